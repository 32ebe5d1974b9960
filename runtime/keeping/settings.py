"""Where the command line, a checkpoint and the data set meet: which of them says how a run goes on, and whether they
agree.

The rule: what the command line names is used; what it leaves open is as in the checkpoint; what neither says is the
default.
"""
import argparse
import json
import os
import zlib
from typing import Callable, List, Optional, Set

import numpy as np

from ..errors import UserError
from ..machine.agreement import Agreement
from .checkpoint import Checkpoint

# what --eval takes: the model and the data; the mode comes along (Checkpoint.mode)
EVALUATION = ("model", "input_size", "data_set", "data_path", "inat_category", "prune_warmup_epoch", "stage_wise_epoch",
              "keep_ratio")
# what belongs to a run of the command and not to the recipe: --resume leaves it to the command line
RUN = {
    "amp_backend", "amp_dtype", "channels_last", "compile", "device", "device_id", "dist_eval", "dist_timeout",
    "dist_url", "eval", "eval_ema", "export_weights", "finetune", "index_cache", "local_rank", "loss_scale",
    "max_steps", "num_workers", "opt_level", "output_dir", "pin_mem", "profile", "resume", "save_every_minutes",
    "save_every_steps", "start_epoch", "tensorboard", "world_size", "write_teacher_labels"}
# what is meant by files that are older than these flags
IMPLIED = {"image_backend": "pillow", "teacher_precision": "same"}
FIXED = ("model", "opt")  # what a checkpoint's weights and moments belong to


def combine(args: argparse.Namespace, given: Set[str], checkpoint: Optional[Checkpoint], family: dict,
            say: Callable) -> argparse.Namespace:
    """The settings of a run, a new Namespace: `args`, of which the command line names `given`, and by the rule above
    what `checkpoint` says, for evaluation or training. `family`: defaults of the model's family. What is another than
    the flags' defaults is told in a sentence. Raises UserError for what cannot change."""
    saved = {} if checkpoint is None else checkpoint.settings() if args.eval else checkpoint.recipe()
    if saved and not args.eval:
        saved = dict(IMPLIED, **saved)
    own = {name: value for name, value in family.items() if name not in given and name not in saved}
    if own and not args.eval:
        say("Published recipe of {}: {}".format(args.model, ", ".join("{} {}".format(flag_name(n), v) for n,
            v in own.items())))
    args = argparse.Namespace(**dict(vars(args), **own))
    names = EVALUATION if args.eval else [name for name in vars(args) if name not in RUN]
    taken = {name: saved[name] for name in names if name in saved and name not in given}
    if not args.eval:
        changed = [name for name in names if name in given and name in saved and saved[name] != getattr(args, name)]
        for name in FIXED:
            if name in changed:
                checkpoint.refuse("was trained with --{0} {1}, and its weights and moments do not go on with --{0} "
                    "{2}; leave the flag out, or start anew{3}".format(name, saved[name], getattr(args, name),
                     anew(checkpoint)))
        if changed:
            say("Going on with other settings than the checkpoint's: {}".format(", ".join("{} {} (was {})".format(
                flag_name(name), getattr(args, name), saved[name]) for name in changed)))
        others = [name for name, value in taken.items() if value != getattr(args, name)]
        if others:
            say("From the checkpoint: {}".format(
                ", ".join("{} {}".format(flag_name(name), taken[name]) for name in others)))
    return argparse.Namespace(**dict(vars(args), **taken))


def other_folder(checkpoint: Checkpoint, folder: str) -> bool:
    """Whether `checkpoint` comes from elsewhere than `folder`, whose files are then another run's."""
    return os.path.realpath(os.path.dirname(checkpoint.path)) != os.path.realpath(folder)


def anew(checkpoint: Checkpoint) -> str:
    """How a run starts in place of going on with `checkpoint`, behind "start anew"."""
    return " in another --output_dir" if checkpoint.flag == "--resume auto" else " with --finetune"


def micro_batches(args: argparse.Namespace, given: Set[str], checkpoint: Optional[Checkpoint], processes: int,
                  say: Callable) -> int:
    """Batches of an update for each of the run's `processes`: --accum-steps, or, where other processes go on with a
    run than it had before, as many as keep its global batch and so the order of its images, if they divide it.

    An --accum-steps that the command line changes counts as it stands.
    """
    saved = {} if checkpoint is None or args.eval else checkpoint.recipe()
    before, whole = saved.get("processes"), saved.get("global_batch")
    if not before or not whole or args.batch_size != saved.get("batch_size") \
            or "accum_steps" in given and args.accum_steps != saved.get("accum_steps"):
        return args.accum_steps
    if before == processes:  # it may have made up for others already
        return saved.get("micro_batches", args.accum_steps)
    count, rest = divmod(whole, processes * args.batch_size)
    if rest or not count:
        return args.accum_steps
    say("Going on with {} process{} in place of {}: --accum-steps {} keeps the global batch of {}".format(
        processes, "" if processes == 1 else "es", before, count, whole))
    return count


def flag_name(name: str) -> str:
    """How the setting `name` is spelt on the command line."""
    return "--" + (name if name in ("num_workers", "output_dir", "data_path") else name.replace("_", "-"))


def need_same_classes(checkpoint: Checkpoint, classes: List[str]):
    """Raises UserError where the checkpoint's classes, if it names them, are not the data set's `classes`."""
    own = checkpoint.classes()
    if own is None or own == classes:
        return
    checkpoint.places_of(classes)  # refuses names that it does not know
    missing = [name for name in own if name not in classes]
    checkpoint.refuse("was trained on the classes of other data: {}; go on with that data, or start anew{}".format(
        "'{}' is missing here".format(missing[0]) if missing else "here they stand in another order",
        anew(checkpoint)))


def places_in(checkpoint: Checkpoint, classes: List[str]) -> Optional[List[int]]:
    """For evaluation: the place of each of the data set's `classes` among the checkpoint's, None where they are the
    same or it does not name them. Raises UserError, naming it, for a class that the checkpoint does not know."""
    own = checkpoint.classes()
    return None if own is None or own == classes else checkpoint.places_of(classes)


def labels_sum(data) -> int:
    """What tells the labels of a data set's images, in their order, from others."""
    return zlib.crc32(np.asarray(data.labels, dtype=np.int64))


def pictures_sum(data) -> str:
    """What tells a data set's pictures from others that lie in the same way: by their names "in folders 123" or "in
    archives 456", where they have names."""
    found = 0
    for name in getattr(data, "names", ()):
        found = zlib.crc32(os.fsencode(name), found)
    return "in {} {}".format("folders" if getattr(data, "places", None) is None else "archives", found)


# what may differ from process to process
_OWN = {
    "data_path", "device_id", "dist_url", "export_weights", "finetune", "index_cache", "local_rank", "num_workers",
    "output_dir", "resume", "teacher_labels", "teacher_path", "world_size"}


def need_same_everywhere(settings: dict, data, agreement: Agreement):
    """Raises UserError, naming the first difference, where the processes of a run have other `settings` or another data
    set."""
    own = {flag_name(name): value for name, value in settings.items() if name not in _OWN}
    own.update({"the number of training images": len(data), "the names of the classes": list(data.classes),
                "the labels of the images": labels_sum(data)})
    texts = agreement.texts(json.dumps(own, default=str))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            first, other = json.loads(texts[0]), json.loads(text)
            name = next(name for name in first if first[name] != other.get(name))
            raise UserError("the processes do not agree: {} is {} for process 0 and {} for process {}; start all of "
                "them with the same flags and data".format(name, *(str(one.get(name))[:80] for one in (first, other)),
                 rank))
