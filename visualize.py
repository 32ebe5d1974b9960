"""Shows which tokens a model keeps: for each stage the picture with the other tokens dimmed and the global class
attention as a heat map, with the five most probable classes, stage-wise and layer-wise. Writes a PNG for each picture
and mode, and index.html with all of them in it.

Without pictures, it shows validation pictures of the checkpoint's data set."""
import os
import re
from typing import NamedTuple

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import numpy as np
import torch

from datasets import build_transform, need_read, validation_pictures
from runtime.errors import UserError
from runtime.keeping.files import write_text, write_whole
from runtime.keeping.restore import add_checkpoint_flags, restore_evo
from runtime.learning.models import LAYER_WISE, STAGE_WISE, set_mode
from runtime.pictures import page
from runtime.pictures.gallery import batches, find_pictures, read_pictures, to_batch

MODES = (STAGE_WISE, LAYER_WISE)
DIMMED = 0.25  # what is left of the brightness where a token is not kept
BATCH = 16
COUNT = 16  # validation pictures that are shown if nothing is said


class StageMap(NamedTuple):
    """What a stage makes of one picture, on the picture's pixels."""
    kept: np.ndarray  # (H, H) bool: the token that stands for this pixel was selected last
    attention: np.ndarray  # (H, H) global class attention of that token
    tokens: int
    kept_tokens: int


def get_args_parser():
    parser = command.Parser(prog="python visualize.py", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=command.path, metavar="PICTURE_OR_FOLDER",
        help="picture files, and folders of them (default: validation pictures of the checkpoint's data set)")
    add("--data-path", "--data_path", type=command.path, metavar="DIR",
        help="the data set (default: where training found it)")
    add("--count", type=command.positive, metavar="N",
        help="validation pictures to show, spread over all of them (default: {})".format(COUNT))
    add("--output_dir", "--output-dir", type=command.path, default="save/tokens", metavar="DIR",
        help="where the pages go")
    add_checkpoint_flags(parser, command.path, command.positive)
    return parser


def _spread(values, cell, size):
    """(n, n) values of tokens -> (size, size) values of pixels; a token stands for `cell` pixels a side, fewer at the
    end."""
    return values.repeat(cell, axis=0).repeat(cell, axis=1)[:size, :size]


@torch.no_grad()
def stage_maps(model, images):
    """Images (B, 3, H, H) -> ([the stages' StageMaps] for each image, logits (B, classes)), in the model's present
    mode."""
    stages = model.forward_stages(images)
    maps = [[] for _ in images]
    for info, (_, state) in zip(model.feature_info, stages):
        count = state.score.shape[1]
        side = int(count ** 0.5)
        for number, one in enumerate(maps):
            kept = np.ones(count, dtype=bool)
            if state.slow is not None:
                kept[:] = False
                kept[state.slow[number].numpy()] = True
            spread = [_spread(values.reshape(side, side), info["reduction"], images.shape[-1])
                      for values in (kept, state.score[number].numpy())]
            one.append(StageMap(*spread, tokens=count, kept_tokens=int(kept.sum())))
    return maps, model.forward_head(stages[-1][0])


def draw(pixels, maps, guesses, title):
    """A figure of `pixels` (H, H, 3) uint8, its StageMaps and its [(class, probability)]."""
    from matplotlib.figure import Figure
    columns = 1 + len(maps)
    figure = Figure(figsize=(2.6 * columns, 5.8), dpi=100)
    axes = figure.subplots(2, columns)
    for axis in axes[:, 1:].flat:
        axis.set_axis_off()
    axes[0, 0].set_axis_off()
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title(title, fontsize=10)
    for number, stage in enumerate(maps, 1):
        shown = np.where(stage.kept[..., None], pixels, pixels * DIMMED + 255 * (1 - DIMMED) * 0.5).astype(np.uint8)
        axes[0, number].imshow(shown)
        axes[0, number].set_title("stage {}: {} of {} tokens kept".format(
            number, stage.kept_tokens, stage.tokens), fontsize=10)
        axes[1, number].imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        axes[1, number].imshow(stage.attention, cmap="inferno", alpha=0.7)
        axes[1, number].set_title("attention after the stage", fontsize=10)
    bars = axes[1, 0]
    places = range(len(guesses))[::-1]
    bars.barh(list(places), [probability for _, probability in guesses], color="#7aa6d8")
    bars.set_xlim(0, 1)
    bars.set_yticks([])
    for place, (name, probability) in zip(places, guesses):
        bars.text(0.02, place, "{}  {:.1%}".format(page.label(name[:24]), probability), va="center", fontsize=9)
    for side in ("top", "right", "left"):
        bars.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def draw_batch(restored, pictures):
    """For each of the gallery.Pictures [(mode, its guesses [(class, probability)], PNG file's bytes)]."""
    transform = build_transform(False, restored.data_set, restored.input_size)
    images = to_batch(pictures, transform)
    pixels = [transform(picture.image)[0].numpy() for picture in pictures]
    drawn = [[] for _ in pictures]
    for mode in MODES:
        set_mode(restored.model, mode)
        maps, logits = stage_maps(restored.model, images)
        best, places = (values.tolist() for values in logits.softmax(dim=1).topk(min(5, logits.shape[1]), dim=1))
        for number in range(len(pictures)):
            guesses = [(restored.classes[place], value) for place, value in zip(places[number], best[number])]
            figure = draw(pixels[number], maps[number], guesses, mode)
            drawn[number].append((mode, guesses, page.draw(figure, "png")))
    return drawn


def prepare_output_dir(folder):
    """Makes the folder, without the PNG files of an earlier run; raises UserError where it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if re.match(r"\d{4}-.*\.(stage|layer)-wise\.png$", name):
                os.remove(os.path.join(folder, name))
    except OSError as error:
        raise UserError("--output_dir: {} cannot be written ({})".format(folder, error.strerror))


def run(args):
    command.need("visualize.py", "matplotlib")
    if args.paths and (args.data_path or args.count is not None):
        raise UserError("{} is for validation pictures; leave it out where pictures are named".format(
            "--data-path" if args.data_path else "--count"))
    restored = restore_evo(args.resume, args.model, args.input_size, average=args.eval_ema)
    if args.data_path:
        need_read(restored.data_set, args.data_path)
    pictures = read_pictures(find_pictures(args.paths)) if args.paths else \
        validation_pictures(restored.data_set, args.data_path or restored.data_path, restored.inat_category,
                            args.count or COUNT)
    prepare_output_dir(args.output_dir)
    body, shown = [], 0
    for batch in batches(pictures, BATCH):
        for picture, drawn in zip(batch, draw_batch(restored, batch)):
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in os.path.basename(picture.name))[:50]
            body.append("<h2>{}</h2>".format(page.text(picture.name)))
            for mode, guesses, content in drawn:
                file = "{:04d}-{}.{}.png".format(shown, name, mode)
                write_whole(os.path.join(args.output_dir, file), lambda f: f.write(content))
                body.append(page.image(content, "png", "{}, {}: {}".format(
                    picture.name, mode, ", ".join("{} {:.1%}".format(*guess) for guess in guesses))))
            shown += 1
    if not shown:
        raise UserError("there is no picture that can be read")
    about = ("<p>{}, {} pixels, {} pictures. The checkpoint {} was last trained {}.</p><p>Above, what each stage's "
        "tokens stand for, dimmed where they were not selected last; below, the global class attention after the "
        "stage, bright where it is high.</p>").format(restored.name, restored.input_size, shown, page.text(args.resume),
         restored.mode)
    target = os.path.join(args.output_dir, "index.html")
    write_text(target, page.page("Tokens that {} keeps".format(restored.name), about + "\n".join(body)))
    print("{} pictures; {} shows them all, the PNG files lie beside it".format(shown, target))


def main(argv=None):
    command.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
