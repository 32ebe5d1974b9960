"""The flags of main.py, in groups, each with its unit and default, and which of them go together."""
import argparse
import os

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import losses
from datasets import DATA_SETS, INAT_CATEGORIES, TABLE
from runtime.command import above_0, at_least_0, count, path, positive, seed, share, share_below_1
from runtime.errors import UserError
from runtime.learning.models import EVO_DEIT
from runtime.machine.precision import parse_loss_scale
from runtime.machine.versions import RESIZES_BYTES

PUBLISHED_EPOCHS = 300
# the published recipe of Evo-DeiT, where it is another than Evo-LeViT's, and images of a card by model
_EVO_DEIT = {"distillation_type": "none", "clip_grad": 0.0, "clip_mode": "norm", "weight_decay": 0.05}
_EVO_DEIT_BATCH = {"evo_deit_tiny_patch16_224": 256, "evo_deit_base_patch16_384": 64}
PUBLISHED_GLOBAL_BATCH = {224: 2048, 384: 1024}  # of Evo-LeViT, by image size: 8 cards with 256 and 128 images


def get_args_parser():
    """All flags, with the defaults of the published recipe."""
    own = ", ".join("--{} {}".format(name.replace("_", "-"), value) for name, value in _EVO_DEIT.items())
    parser = command.Parser(
        prog="python main.py", description="Evo-LeViT and Evo-DeiT training and evaluation. With --eval and --resume, "
        "what the command line leaves open is as in the checkpoint; what neither says is the default, which for "
        "Evo-DeiT is its own published recipe: {}.".format(own))

    add = parser.add_argument_group("data").add_argument
    add("--data-path", "--data_path", type=path, metavar="DIR",
        help="folder with train/ and val/, or the http address of shards; DIGITS needs none")
    add("--data-set", default="IMNET", choices=DATA_SETS, help="IMNET is any folder in ImageNet's layout")
    add("--inat-category", default="name", choices=INAT_CATEGORIES,
        help="taxonomic level that is the class, of INAT and INAT19")
    add("--index-cache", type=path, default="", metavar="DIR", help="where the list of the pictures is kept from run "
        "to run, so that train/ and val/ are searched once (default: the output folder)")
    add("--input-size", type=positive, metavar="PIXELS", help="side of the images (default: the model's own)")
    add("--num_workers", "--num-workers", type=count, metavar="N", help="data-loading processes of each process; 0 "
        "loads in the process itself (default: 10, or its share of the cores where that is less)")
    add("--pin-mem", action="store_true", default=True, help="page-locked host memory, where the device is no CPU")
    add("--no-pin-mem", action="store_false", dest="pin_mem", help="ordinary host memory")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="EvoLeViT_256", metavar="NAME",
        help="an Evo-LeViT or Evo-DeiT, or with --distillation-type none any timm model")
    add("--keep-ratio", type=float, metavar="SHARE", help="share of the tokens that go the slow way where tokens are "
        "selected, above 0 and at most 1: fewer are faster (default: the model's own, 0.5)")
    add("--drop-path", type=share_below_1, metavar="SHARE", help="share of images for which a residual branch is left "
        "out in training, from 0 to below 1 (default: the model's own)")
    add("--prune-warmup-epoch", type=count, default=0, metavar="EPOCH", help="first epoch with token selection")
    add("--stage-wise-epoch", type=count, default=200, metavar="EPOCH", help="first epoch that runs stage-wise with "
        "the learned trade-off; before it layer-wise with trade-off 0.5")

    add = parser.add_argument_group("moving average of the weights").add_argument
    add("--model-ema", action="store_true", default=True, help="keep one, and evaluate it after each epoch, too")
    add("--no-model-ema", action="store_false", dest="model_ema", help="keep none")
    add("--model-ema-decay", type=share, default=0.99996, metavar="SHARE",
        help="weight of the old average at each update, 0 to 1")
    add("--model-ema-warmup", action="store_true", help="smaller decay at first, (1 + updates) / (10 + updates): for "
        "short runs")
    add("--model-ema-force-cpu", action="store_true", help="keep it in host memory; it is then not evaluated")

    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="adamw", metavar="NAME", help="any first-order one of timm's")
    add("--opt-eps", type=at_least_0, default=1e-8, metavar="X", help="epsilon in the denominator")
    add("--opt-betas", type=share_below_1, nargs="+", metavar="BETA",
        help="decay rates of the moments (default: the optimiser's own)")
    add("--clip-grad", type=at_least_0, default=0.01, metavar="LIMIT", help="limit of gradient clipping; 0 for none")
    add("--clip-mode", default="agc", choices=("agc", "norm", "value"), help="what the limit holds for: the gradient's "
        "norm relative to the weights', row by row (agc), the norm of all, or each value")
    add("--momentum", type=share_below_1, default=0.9, metavar="X", help="momentum of SGD, 0 to 1")
    add("--weight-decay", type=at_least_0, default=0.025, metavar="X", help="per unit of learning rate")

    add = parser.add_argument_group("learning rate, set before each epoch").add_argument
    add("--epochs", type=positive, default=PUBLISHED_EPOCHS, metavar="N", help="length of the training, in epochs")
    add("--sched", default="cosine", choices=("cosine", "tanh", "step", "plateau"), help="how the rate falls")
    add("--lr", type=at_least_0, default=5e-4, metavar="RATE",
        help="rate for a global batch of 512 images, scaled with the batch")
    add("--lr-noise", type=share, nargs="+", metavar="SHARE", help="from which share of the epochs on, or from which "
        "to which, the rate is noisy (default: never)")
    add("--lr-noise-pct", type=at_least_0, default=0.67, metavar="SHARE", help="largest noise, relative to the rate")
    add("--lr-noise-std", type=at_least_0, default=1.0, metavar="X", help="standard deviation of the noise")
    add("--warmup-lr", type=at_least_0, default=1e-6, metavar="RATE", help="first rate of the warm-up, not scaled")
    add("--min-lr", type=at_least_0, default=1e-5, metavar="RATE",
        help="last rate of the cosine and tanh schedules, not scaled")
    add("--decay-epochs", type=above_0, default=30, metavar="N", help="epochs between two steps of the step schedule")
    add("--warmup-epochs", type=count, default=5, metavar="N", help="epochs of the warm-up")
    add("--cooldown-epochs", type=count, default=10, metavar="N",
        help="read by timm's schedule; --epochs alone ends the run")
    add("--patience-epochs", type=count, default=10, metavar="N", help="epochs that the plateau schedule waits")
    add("--decay-rate", "--dr", type=above_0, default=0.1, metavar="X", help="factor of the step and plateau schedules")

    add = parser.add_argument_group("batches").add_argument
    add("--batch-size", type=positive, default=256, metavar="N", help="images in a process's batch")
    add("--accum-steps", type=positive, default=1, metavar="N",
        help="batches in an update: one process trains as N would")
    add("--repeated-aug", action="store_true", default=True, help="each image three times in a global batch")
    add("--no-repeated-aug", action="store_false", dest="repeated_aug", help="each image once in an epoch")
    add("--seed", type=seed, default=0, metavar="N", help="seed of weights, augmentation, mixing and dropout; the "
        "order of the images follows from the epoch alone")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color-jitter", type=at_least_0, default=0.4, metavar="X",
        help="strength of colour jitter, 0 to 1, where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's name of an augmentation policy, or none")
    add("--smoothing", type=share, default=0.1, metavar="SHARE", help="label smoothing, 0 to 1")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"),
        help="of the crops' resizing")
    add("--reprob", type=share, default=0.25, metavar="SHARE", help="probability of random erasing, 0 to 1")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"),
        help="random erasing fills in zeros, one colour, or noise")
    add("--recount", type=positive, default=1, metavar="N", help="areas that random erasing fills")
    add("--mixup", type=at_least_0, default=0.8, metavar="ALPHA", help="alpha of mixup's beta distribution; 0 for none")
    add("--cutmix", type=at_least_0, default=1.0, metavar="ALPHA", help="alpha of CutMix's beta distribution; 0 for "
        "none")
    add("--cutmix-minmax", type=share, nargs=2, metavar=("MIN", "MAX"),
        help="shares of the side, in place of CutMix's alpha")
    add("--mixup-prob", type=share, default=1.0, metavar="SHARE", help="probability of mixing at all, 0 to 1")
    add("--mixup-switch-prob", type=share, default=0.5, metavar="SHARE",
        help="probability of CutMix where both are on, 0 to 1")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="mix per batch, pair or image")
    add("--jpeg-draft", action="store_true", help="decode JPEGs at a half, a quarter or an eighth of their size where "
        "a crop's sides are at least 4, 8 or 16 times the image's")
    add("--image-backend", default="pillow", choices=("pillow", "fast"), help="what decodes and resizes training "
        "pictures: Pillow, as published, or simplejpeg and PyTorch, whose pixels are within 2 of 255 of Pillow's")

    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", default="cls", choices=losses.TYPES,
        help="the teacher's logits (soft) or first choice (hard; cls also for the class token's heads)")
    add("--distillation-alpha", type=share, default=0.5, metavar="SHARE",
        help="weight of the distillation loss, 0 to 1")
    add("--distillation-tau", type=above_0, default=1.0, metavar="T", help="temperature of soft distillation")
    add("--teacher-model", default="regnety_160", metavar="NAME", help="any timm classifier")
    add("--teacher-path", type=path, default="./regnety_160-a5fe301d.pth",
        metavar="FILE", help="its weights; a file or a URL")
    add("--teacher-input-size", type=positive, metavar="PIXELS", help="resize the images for the teacher, which "
        "changes its labels (default: the student's size, or the teacher's own where it takes no other)")
    add("--teacher-precision", default="same", choices=("same", "float32", "bf16", "int8"), help="number format "
        "of the teacher: the student's (same), or its own; bf16 and int8 (a CPU's) are checked against float32 before "
        "training")
    add("--teacher-agreement", type=share, default=0.98, metavar="SHARE", help="stop if a teacher in bf16 or int8 "
        "has the first choice of float32 for less than this share of 256 training crops, before they are mixed")
    add("--write-teacher-labels", type=path, default="", metavar="DIR",
        help="train nothing, but store the teacher's labels of " "--epochs epochs with the crops of this run")
    add("--teacher-labels", type=path, default="", metavar="DIR", help="take stored labels, with their crops, over and "
        "over where there are fewer epochs of them, and no teacher")

    add = parser.add_argument_group("device, precision and speed").add_argument
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="auto takes the first of npu, cuda "
        "and cpu")
    add("--device_id", "--device-id", type=count, default=0, metavar="CARD", help="the first process's card, counted "
        "from 0 among the visible ones (ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES)")
    add("--amp-backend", default="auto", choices=("auto", "apex", "native", "none"),
        help="auto: on an NPU apex if it is installed, " "else native; on CUDA native; on a CPU none")
    add("--opt-level", choices=("O0", "O1", "O2"),
        help="O0 float32, O1 mixed precision (bf16 on a CPU), O2 apex's (default: O1; on a CPU O0)")
    add("--loss-scale", type=parse_loss_scale, metavar="SCALE",
        help="a number or dynamic (default: 128 on an NPU, else dynamic)")
    add("--amp-dtype", choices=("fp16", "bf16"), help="of native mixed precision (default: fp16; on a CPU bf16)")
    add("--compile", action="store_true", help="compile model and teacher by torch.compile; takes minutes at the start")
    add("--channels-last", action="store_true", default=None,
        help="memory format of images and convolutions (default: on for CPUs and CUDA devices with PyTorch 2)")
    add("--no-channels-last", action="store_false", dest="channels_last", help="the other memory format")

    add = parser.add_argument_group("the run").add_argument
    add("--output_dir", "--output-dir", type=path, default="save", metavar="DIR", help="where its files go")
    add("--finetune", type=path, default="", metavar="FILE",
        help="start from the weights of another data set or image size; a file or a URL")
    add("--resume", type=path, default="", metavar="FILE", help="go on from this checkpoint, or evaluate it; a file or "
        "a URL; auto: the newest readable one in --output_dir, if there is one")
    add("--start_epoch", "--start-epoch", type=int, default=0, metavar="EPOCH", help="first epoch, also with --resume")
    add("--max-steps", type=positive, metavar="N", help="end the run after N updates, to measure speed (default: no "
        "limit)")
    add("--best-by", default="test_acc1", choices=("test_acc1", "test_ema_acc1"), help="the figure of log.txt that "
        "says which epoch best_checkpoint.pth holds: top-1 of the weights or of their average")
    add("--save-every-steps", type=positive, metavar="N", help="save inside an epoch, too, every N updates (default: "
        "never)")
    add("--save-every-minutes", type=above_0, metavar="M", help="save inside an epoch, too, every M minutes (default: "
        "never)")
    add("--max-bad-images", type=count, default=50, metavar="N", help="stop when more picture files cannot be decoded")
    add("--skip-nonfinite", type=count, default=0, metavar="N",
        help="leave out up to N updates in a row without finite loss")
    add("--export-weights", type=path, default="", metavar="FILE", help="write the weights at the end as safetensors")
    add("--profile", type=positive, metavar="N", help="record N updates, after the first 5: a trace in DIR/profile for "
        "Perfetto or MindStudio, and a table of the most expensive operators (default: none)")
    add("--tensorboard", action="store_true", help="also write log.txt's figures for TensorBoard, to DIR/tensorboard")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="evaluate --resume FILE, or DIR/best_checkpoint.pth of --output_dir")
    add("--eval-ema", action="store_true", help="evaluate the averaged weights")
    add("--dist-eval", action="store_true", default=True, help="share the validation images out, each counted once")
    add("--no-dist-eval", action="store_false", dest="dist_eval", help="every process evaluates all of them")

    add = parser.add_argument_group("several processes; torchrun, srun and mpirun say the rest").add_argument
    add("--dist-timeout", type=above_0, default=30, metavar="MINUTES",
        help="end the job when a process is not heard of for so long")
    add("--dist_url", "--dist-url", default="env://", metavar="URL", help="where the processes meet")
    add("--world_size", "--world-size", type=positive, metavar="N",
        help="checked against the launcher (default: the launcher's)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def parse_args(argv=None):
    """The flags, and the set of those that the command line names."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return args, set(vars(parser.parse_args(argv)))


def family_defaults(name):
    """{flag: value} of the published recipe of the model `name`, where it is another than Evo-LeViT's."""
    if not name.startswith(EVO_DEIT):
        return {}
    return dict(_EVO_DEIT, batch_size=_EVO_DEIT_BATCH.get(name, 128))


def published_global_batch(name, input_size):
    """Images of an update with which the published accuracy was reached; None where there is none."""
    if name.startswith(EVO_DEIT):
        return family_defaults(name)["batch_size"] * (16 if name == "evo_deit_base_patch16_384" else 8)
    return PUBLISHED_GLOBAL_BATCH.get(input_size)


def global_batch(args, machine):
    """Images of an update, over all processes."""
    return args.batch_size * machine.world.size * args.micro_batches


def scaled_lr(args, machine):
    """The full learning rate for the global batch."""
    return args.lr * global_batch(args, machine) / 512


def check_machine(args):
    """Raises UserError for flags that this machine cannot serve, of training and evaluation alike."""
    if args.compile:
        command.need_compiler("--compile")
    if args.tensorboard:
        command.need("--tensorboard", "tensorboard")
    if args.index_cache and os.path.exists(args.index_cache) and not os.path.isdir(args.index_cache):
        raise UserError("--index-cache: {} is a file; name a folder".format(args.index_cache))
    if args.export_weights:
        command.need("--export-weights", "safetensors")
        folder = os.path.dirname(os.path.abspath(args.export_weights))
        made = folder == os.path.abspath(args.output_dir) and not args.eval  # by the run itself
        if os.path.isdir(args.export_weights) or not (made or os.access(folder, os.W_OK)):
            raise UserError("--export-weights: {} cannot be written; name a file in a folder that is there".format(
                args.export_weights))


def check_evaluation(given):
    """Raises UserError for one of the flags that the command line has `given` and that --eval would pass over."""
    for name in ("finetune", "write_teacher_labels", "profile", "max_steps"):
        if name in given:
            raise UserError("--{} is for training; --eval evaluates --resume FILE, or save/best_checkpoint.pth".format(
                name.replace("_", "-")))


_OF_A_TEACHER = ("teacher_model", "teacher_path", "teacher_input_size", "distillation_alpha", "distillation_tau")


def check_recipe(args, given=frozenset()):
    """Raises UserError for flags that do not go together; `given`: those that the command line has."""
    if mixes(args) and args.batch_size % 2:
        raise UserError("--batch-size {} is odd, and mixup and CutMix mix pairs; use an even one, or --mixup 0 "
            "--cutmix 0".format(args.batch_size))
    if args.cutmix_minmax:
        least, most = (int(args.input_size * share) for share in args.cutmix_minmax)
        if least >= most:
            raise UserError("--cutmix-minmax {} {}: the first share is the smaller one, by a pixel of {} at least"
                            .format(*args.cutmix_minmax + [args.input_size]))
    if args.lr_noise and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)):
        raise UserError("--lr-noise takes one share of the epochs or two, the smaller one first")
    if args.opt_betas and "adam" in args.opt and len(args.opt_betas) != 2:
        raise UserError("--opt-betas: {} takes two decay rates and {} are given".format(args.opt, len(args.opt_betas)))
    if args.eval_ema:
        raise UserError("--eval-ema says which weights --eval takes; add --eval")
    if args.resume not in ("", "auto") and args.finetune:
        raise UserError("--resume goes on with a run and --finetune starts another; use one of them")
    if args.jpeg_draft and not TABLE[args.data_set].files:
        raise UserError("--jpeg-draft is for data sets of large picture files, which --data-set {} is not".format(
            args.data_set))
    if args.image_backend == "fast":
        if not RESIZES_BYTES:
            raise UserError("--image-backend fast needs PyTorch 2.1 or newer; leave it out")
        if not TABLE[args.data_set].files or args.jpeg_draft:
            raise UserError("--image-backend fast is for data sets of large picture files and replaces --jpeg-draft; "
                            "leave {} out".format("--jpeg-draft" if args.jpeg_draft else "it"))
    if (args.teacher_labels or args.write_teacher_labels) and args.distillation_type == "none":
        raise UserError("--distillation-type none has no teacher whose labels could be stored; leave {} out".format(
            "--teacher-labels" if args.teacher_labels else "--write-teacher-labels"))
    if args.teacher_precision != "same" and (args.teacher_labels or args.distillation_type == "none"):
        raise UserError("--teacher-precision {}: {} has no teacher to run; use --teacher-precision same".format(
            args.teacher_precision, "--teacher-labels" if args.teacher_labels else "--distillation-type none"))
    if args.distillation_alpha == 0 and (args.teacher_labels or args.teacher_precision != "same"):
        raise UserError("--distillation-alpha 0 uses no teacher; leave {} out".format(
            "--teacher-labels" if args.teacher_labels else "--teacher-precision"))
    if args.teacher_labels and args.write_teacher_labels:
        raise UserError("--write-teacher-labels writes labels and --teacher-labels reads them; use one at a time")
    if args.start_epoch < 0 or args.start_epoch >= args.epochs:
        raise UserError("--start_epoch {}: the epochs go from 0 to {}".format(args.start_epoch, args.epochs - 1))
    if args.best_by == "test_ema_acc1" and (not args.model_ema or args.model_ema_force_cpu):
        raise UserError("--best-by test_ema_acc1 needs the average on the device; leave --no-model-ema and "
                        "--model-ema-force-cpu out")
    if args.distillation_type == "none":
        for name in _OF_A_TEACHER:
            if name in given:
                raise UserError("--{} is for a teacher, and with --distillation-type none, the default of Evo-DeiT, "
                    "there is none; add --distillation-type hard, or leave it out".format(name.replace("_", "-")))
    if "teacher_agreement" in given and args.teacher_precision in ("same", "float32"):
        raise UserError("--teacher-agreement is for --teacher-precision bf16 or int8; add it, or leave this one out")


def mixes(args):
    """Whether images are mixed, which makes labels soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
