"""Everything that a run carries from update to update, as one thing that can be saved and restored exactly."""
import json
import os
from typing import Callable, Dict, List, NamedTuple, Optional

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..learning.models import load_weights
from ..learning.optimizer import load_optimizer_state
from .checkpoint import BEST, Checkpoint, save_checkpoint, save_newest
from .control import Control
from .files import write_text


class Done(NamedTuple):
    """Where an epoch stands for one process."""
    updates: int = 0  # that are made or left out
    loss_sum: float = 0.0  # of those that are made
    counted: int = 0  # those that are made


class TrainingState:
    """Model, average, optimiser, schedule, precision and counters, and where the run stands.

    learner: an engine.Learner. classes: names of the data set's classes. settings: the run's flags and what was derived
    from them (args.json), with `output_dir`, `global_batch` and `processes` among them.
    Where it stands: `epoch` and, inside it, `progress` (None at an epoch's start); `max_accuracy`, the best so far of
    the figure that `best_by` names; `log`, one dict per finished epoch; `mode`, that of the epoch.
    """

    def __init__(self, learner, lr_scheduler, control: Control, classes: List[str], settings: dict):
        self.learner = learner
        self.lr_scheduler = lr_scheduler
        self.control = control
        self.classes = classes
        self.settings = settings
        self.epoch = settings["start_epoch"]
        self.progress = None
        self.mode = None
        self.max_accuracy = -1.0  # so that the first epoch is the best so far, whatever it reaches
        self.log = []
        self.writes = True  # whether this process writes the run's files; output.opened says so where it has others

    # ------------------------------------------------------------------------------------------------- saving

    def checkpoint(self) -> dict:
        """Tensors and plain values. `epoch` is the last finished one, as in DeiT's checkpoints."""
        learner, precision = self.learner, self.learner.machine.precision
        average = learner.average
        return {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict(),
                "model_ema": average.module.state_dict() if average is not None else None,
                "ema_updates": average.updates if average is not None else 0,
                "lr_scheduler": self.lr_scheduler.state_dict(), "amp_backend": precision.backend,
                "scaler": precision.state_dict(), "epoch": self.epoch - 1, "progress": self.progress, "mode": self.mode,
                "max_accuracy": self.max_accuracy, "log": self.log, "control": self.control.state_dict(),
                "classes": self.classes, "mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD),
                "args": self.settings}

    def size_on_disk(self) -> int:
        """About how many bytes a checkpoint takes: the weights, their average, and AdamW's two moments."""
        weights = sum(p.numel() * p.element_size() for p in self.learner.model.parameters())
        return weights * (4 if self.learner.average is not None else 3)

    def save(self, best: bool = False):
        """Writes checkpoint.pth, before it best_checkpoint.pth for an epoch that is the `best` so far, and log.txt
        after it. Raises SaveFailed."""
        folder, content = self.settings["output_dir"], self.checkpoint()
        if best or self.progress is None and not os.path.exists(os.path.join(folder, BEST)):  # a new machine's disk
            save_checkpoint(content, os.path.join(folder, BEST))
        save_newest(content, folder)
        self.write_log()

    def save_inside_epoch(self, done: Done, loss_sums: List[float]):
        """Saves where `done` of the present epoch is done; loss_sums: each process's, in the order of their ranks."""
        self.progress = {"images": done.updates * self.settings["global_batch"], "loss_sums": loss_sums,
                         "counted": done.counted}
        self.learner.share_statistics()
        if self.writes:
            self.save()

    def write_log(self):
        """log.txt: one JSON object per finished epoch. It is written anew, so that a resumed run leaves nothing of what
        an interrupted one wrote after its checkpoint. Raises SaveFailed."""
        write_text(os.path.join(self.settings["output_dir"], "log.txt"),
                   "".join(json.dumps(entry) + "\n" for entry in self.log))

    def finish_epoch(self, entry: Dict) -> bool:
        """Takes an epoch's line of the log and steps the schedule; returns whether the epoch is the best so far."""
        self.lr_scheduler.step(entry["epoch"], entry["test_acc1"])
        reached = entry[self.settings["best_by"]]
        best = reached > self.max_accuracy
        self.max_accuracy = max(self.max_accuracy, reached)
        self.log.append(entry)
        self.epoch, self.progress = entry["epoch"] + 1, None
        return best

    # ------------------------------------------------------------------------------------------------- going on

    def restore(self, checkpoint: Optional[Checkpoint], given_start_epoch: bool, new_folder: bool, say: Callable):
        """Goes on where `checkpoint` ends, or at the epoch that the command line asks for; without one at the start.
        new_folder: what is the best so far begins anew, since the output folder has none of the checkpoint's run.

        The learning rate is what a run with these flags would have there. Raises UserError where it does not fit.
        """
        if checkpoint is not None:
            self._take_weights(checkpoint)
            self.mode = checkpoint.mode()  # what an export says of a run that is at its end already
            try:
                self._take_place(checkpoint.content, given_start_epoch)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                checkpoint.refuse("does not say where its run stood ({})".format(error))
            self._say_where(checkpoint, given_start_epoch, say)
        for entry in self.log:
            self.lr_scheduler.step(entry["epoch"], entry["test_acc1"])
        if self.epoch and (not self.log or self.log[-1]["epoch"] != self.epoch - 1):
            last = self.epoch - 1
            # beyond its warm-up this one would want to know what was reached
            self.lr_scheduler.step(
                last if self.settings["sched"] != "plateau" else min(last, self.settings["warmup_epochs"]))
        if new_folder:
            self.max_accuracy = -1.0

    def _take_weights(self, checkpoint):
        content, learner, name = checkpoint.content, self.learner, self.settings["model"]
        load_weights(learner.model, checkpoint.weights(), name, checkpoint.refuse)
        if learner.average is not None:
            averaged = checkpoint.weights("model_ema" if content.get("model_ema") else "model")
            load_weights(learner.average.module, averaged, name, checkpoint.refuse)
            learner.average.updates = int(content.get("ema_updates") or 0)
        if "optimizer" not in content:
            return
        precision = learner.machine.precision
        try:
            load_optimizer_state(learner.optimizer, content["optimizer"], learner.model)
            if content.get("amp_backend") == precision.backend and content["scaler"]:
                precision.load_state_dict(content["scaler"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            checkpoint.refuse("has an optimiser state that does not fit --opt {} ({})".format(
                self.settings["opt"], " ".join(str(error).split())[:160]))

    def _take_place(self, content, given_start_epoch):
        self.log = [dict(entry, epoch=int(entry["epoch"]), test_acc1=float(entry["test_acc1"]))
                    for entry in content.get("log", [])]
        if given_start_epoch:
            self.log = [entry for entry in self.log if entry["epoch"] < self.epoch]
        reached = [entry[self.settings["best_by"]] for entry in self.log if self.settings["best_by"] in entry]
        self.max_accuracy = max(reached) if self.log and reached else -1.0 if self.log else float(
            content.get("max_accuracy", self.max_accuracy))
        if content.get("control") is not None:
            self.control.load_state_dict(content["control"])
        if given_start_epoch or "epoch" not in content:
            return
        self.epoch = int(content["epoch"]) + 1
        progress = content.get("progress")
        if progress is not None:
            self.progress = {"images": int(progress["images"]), "loss_sums": [float(v) for v in progress["loss_sums"]]}
            if "counted" in progress:  # not in checkpoints of before version 2
                self.progress["counted"] = int(progress["counted"])

    def _say_where(self, checkpoint, given_start_epoch, say):
        epochs, saved = self.settings["epochs"], checkpoint.settings()
        if self.epoch >= epochs and not given_start_epoch:
            if checkpoint.flag == "--resume auto":  # killed between its last save and its end
                say("{} has finished all {} epochs".format(checkpoint.path, epochs))
                return
            checkpoint.refuse("has finished epoch {} of {} already; raise --epochs to go on, or use --eval".format(
                self.epoch, epochs))
        before = checkpoint.recipe()
        if "images" in before and any(before.get(name) != self.settings[name] for name in ("images", "labels_sum")):
            say("Note: the checkpoint's run had {:,} training images and this one has {}: what is left of its epoch "
                "has some of them twice and others not at all".format(before["images"], "others of that number"
                if before["images"] == self.settings["images"] else "{:,}".format(self.settings["images"])))
        stored, now = before.get("stored_epochs"), self.settings.get("stored_epochs")
        if self.progress and stored and now and self.epoch % stored != self.epoch % now:
            say("Note: the checkpoint's run had {} stored epochs of teacher labels and this one has {}: what is left "
                "of its epoch has some images twice and others not at all".format(stored, now))
        global_batch, processes = self.settings["global_batch"], self.settings["processes"]
        if saved.get("global_batch", global_batch) != global_batch:
            say("Note: the checkpoint's global batch was {}, this run's is {}: the order of the images is kept, but "
                "the numbers will differ".format(saved["global_batch"], global_batch))
        elif saved.get("processes", processes) != processes:
            say("Note: the checkpoint was written by {} processes, this run has {}: it sees the same images in the "
                "same updates, but rounding will differ".format(saved["processes"], processes))
        say("Resuming {} at epoch {}, image {}".format(
            checkpoint.path, self.epoch, self.progress["images"] if self.progress else 0))

    def done(self) -> Done:
        """Where the present epoch stands for this process."""
        if self.progress is None:
            return Done()
        sums, world = self.progress["loss_sums"], self.learner.machine.world
        own = sums[world.rank] if len(sums) == world.size else sum(sums) / len(sums)
        updates = self.progress["images"] // self.settings["global_batch"]
        return Done(updates, own, self.progress.get("counted", updates))
