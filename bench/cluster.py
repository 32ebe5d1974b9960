"""What a run on 8 to 512 cards asks of disks, hosts and links, worked out from figures of one card. Nothing is run.

python -m bench.cluster [--model NAME] [--batch-size N] [--images-per-s F] [--link GB] [--round-trip-ms MS]
"""
from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
from runtime.learning.models import build_model, default_input_size

CARDS = (8, 16, 32, 64, 128, 256, 512)
PICTURE_MB = 0.11  # a JPEG of ImageNet's training set, on average
SERVER = 8  # cards of a machine
STEPS = 2  # messages that a ring sends for each of its members: one round to sum up, one to hand out


def row(cards, parameters, batch_size, images_per_s, link_gb, round_trip_ms):
    """(MB/s that a machine reads, MB that a card sends for an update, seconds of the all-reduce, seconds of the host's
    sum of counts, images/s a card) where nothing overlaps."""
    sent = STEPS * (cards - 1) / cards * 4 * parameters  # bytes, float32 gradients
    gradients = sent / (link_gb * 1e9)
    counts = STEPS * (cards - 1) * round_trip_ms / 2 / 1000
    speed = batch_size / (batch_size / images_per_s + gradients + counts)
    return speed * min(cards, SERVER) * PICTURE_MB, sent / 1e6, gradients, counts, speed


def main(args):
    model = build_model(args.model, 1000, default_input_size(args.model), distillation=True)
    parameters = sum(p.numel() for p in model.parameters())
    print("{}, {:,} parameters, {} images a card, {:g} images/s on one card; {:g} GB/s a card between machines, {:g} "
          "ms for a message there and back; one wait of the host for the loss and one sum of three counts an update, "
          "at any number of cards".format(args.model, parameters, args.batch_size, args.images_per_s, args.link,
                                   args.round_trip_ms))
    print("cards  read MB/s a machine  sent MB a card  all-reduce s  counts s  images/s a card  of one card")
    for cards in CARDS:
        read, sent, gradients, counts, speed = row(cards, parameters, args.batch_size, args.images_per_s, args.link,
                                                   args.round_trip_ms)
        print("{:5}  {:19.0f}  {:14.1f}  {:12.4f}  {:8.4f}  {:15.1f}  {:10.1%}".format(
            cards, read, sent, gradients, counts, speed, speed / args.images_per_s))


if __name__ == "__main__":
    parser = command.Parser(prog="python -m bench.cluster", description=__doc__, **command.RAW_DESCRIPTION)
    parser.add_argument("--model", default="EvoLeViT_256_384", metavar="NAME", help="model")
    parser.add_argument("--batch-size", type=command.positive, default=128, metavar="N", help="images of a batch")
    parser.add_argument("--images-per-s", type=command.above_0, default=66.93, metavar="F",
                        help="training speed of one card; the default is the published one of an NPU 910")
    parser.add_argument("--link", type=command.above_0, default=12.5, metavar="GB",
                        help="gigabytes a second that a card can send to another machine; 12.5 is 100 Gbit/s")
    parser.add_argument("--round-trip-ms", type=command.above_0, default=0.1, metavar="MS",
                        help="milliseconds of a small message between two hosts, there and back")
    command.run(main, parser.parse_args())
