"""Speed against accuracy of one set of weights, over the share of tokens that it keeps."""
from typing import List, Optional

import torch

from datasets import build_dataset, build_transform, need_read
from engine import evaluate, need_finite
from runtime.keeping.checkpoint import load_checkpoint
from runtime.keeping.restore import need_classes, restore
from runtime.keeping.settings import places_in
from runtime.learning.models import is_evo
from runtime.learning.normalization import Renormalize, timm_statistics
from runtime.machine.machine import Machine
from runtime.pictures import page
from runtime.pictures.batches import EvaluationView, collate


def accuracies(path: str, name: str, size: int, data_path: Optional[str], ratios: List[float], machine: Machine,
        batch: int = 32) -> List[float]:
    """Top-1 accuracy in percent of the checkpoint `path` with each keep ratio, stage-wise and with token selection as
    the contenders run, on the validation pictures of its data set.

    name, size: the contender's model and the side of its images, which the checkpoint's have to be. data_path: where
    the data set lies, None for where training found it. Raises UserError for another checkpoint, for one of another
    number of classes, and as restore and build_dataset do, RunFailed for outputs that are not finite.
    """
    checkpoint = load_checkpoint(path, "--resume")
    saved, found = checkpoint.settings(), []
    own = saved.get("model", name), saved.get("input_size", size)
    if own != (name, size):
        checkpoint.refuse("is of {} at {} pixels and the contender is {} at {}; name it by --compare and "
                          "--input-size".format(*own + (name, size)))
    for ratio in ratios:
        restored = restore(checkpoint, name, size, keep_ratio=ratio)
        if not is_evo(restored.model):
            checkpoint.refuse("holds {}, which keeps all its tokens".format(restored.name))
        loader = torch.utils.data.DataLoader(_view(checkpoint, restored, data_path), batch_size=batch,
                                             collate_fn=collate)
        stats = evaluate(_as_raced(checkpoint, restored.model, machine), loader, machine)
        need_finite(stats)
        found.append(stats["acc1"])
    return found


def _view(checkpoint, restored, data_path):
    """The validation pictures, whose classes have to be the model's."""
    if data_path:
        need_read(restored.data_set, data_path)
    dataset = build_dataset(False, restored.data_set, data_path or restored.data_path,
                            build_transform(False, restored.data_set, restored.input_size), restored.inat_category)
    places = places_in(checkpoint, dataset.classes)
    need_classes(checkpoint, restored, dataset.classes)
    return EvaluationView(dataset, restored.input_size, places)


def _as_raced(checkpoint, model, machine):
    """The model in the mode in which contenders run, for images normalised by ImageNet's statistics."""
    model.set_stage_wise(True)
    model.set_token_selection(True)  # its last epoch may have had none, and then no share would change anything
    renormalize = Renormalize(*checkpoint.statistics() or timm_statistics(model))
    model = machine.place(model)
    return torch.nn.Sequential(machine.place(renormalize), model) if renormalize.needed else model


def draw(rows: List[dict], title: str) -> str:
    """A page with the table of `rows` (benchmark.py's, with keep_ratio and, where it is known, acc1) and the curve:
    accuracy, or where that is not known FLOPs, over images/s."""
    from matplotlib.figure import Figure
    known = all(row["acc1"] is not None for row in rows)
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for name in sorted({row["model"] for row in rows}):
        points = sorted((row["images_per_s"], row["acc1"] if known else row["gflops"], row["keep_ratio"])
            for row in rows if row["model"] == name)
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
        for speed, value, ratio in points:
            axis.annotate("{:g}".format(ratio), (speed, value), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axis.set_xlabel("images/s")
    axis.set_ylabel("top-1, %" if known else "GFLOP of a batch (2 a multiply-add)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    head = ["model", "keep ratio", "images/s", "speed to the first (min-max)", "GFLOP of a batch (2 a multiply-add)",
            "top-1, %"]
    table = page.table(head, [[row["model"], "{:g}".format(row["keep_ratio"]), "{:.1f}".format(row["images_per_s"]),
         "{ratio:.2f} ({ratio_min:.2f}-{ratio_max:.2f})".format(**row), "{:.1f}".format(row["gflops"]), "-"
        if row["acc1"] is None else "{:.2f}".format(row["acc1"])] for row in rows])
    curve = page.image(page.draw(figure, "svg"), "svg+xml", "{} over images/s".format("Accuracy" if known else "FLOPs"))
    return page.page(title, curve + table)
