"""Everything that a run carries from update to update, as one thing that can be saved and restored exactly."""
import json
import os

from .checkpoint import BEST, load_weights, model_state, save_checkpoint, save_newest, saved_settings, write_whole
from .errors import UserError
from .optimizer import load_optimizer_state


class TrainingState:
    """Model, average, optimiser, schedule, precision, and where the run stands.

    classes: names of the data set's classes, which go along for who uses the checkpoint.
    Where it stands: `epoch` and, inside it, `progress` (None at an epoch's start, else the images that all processes have
    seen and each one's sum of losses); `max_accuracy` so far; `log`, one dict per finished epoch.
    """

    def __init__(self, model, model_ema, optimizer, lr_scheduler, precision, classes, args):
        self.model = model
        self.model_ema = model_ema
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.precision = precision
        self.classes = classes
        self.args = args
        self.epoch = args.start_epoch
        self.progress = None
        self.max_accuracy = -1.0  # so that the first epoch is the best so far, whatever it reaches
        self.log = []

    def checkpoint(self):
        """Tensors and plain values. `epoch` is the last finished one, as in DeiT's checkpoints."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "model_ema": self.model_ema.module.state_dict() if self.model_ema is not None else None,
                "lr_scheduler": self.lr_scheduler.state_dict(), "amp_backend": self.precision.backend,
                "scaler": self.precision.state_dict(), "epoch": self.epoch - 1, "progress": self.progress,
                "max_accuracy": self.max_accuracy, "log": self.log, "classes": self.classes,
                "args": vars(self.args)}

    def size_on_disk(self):
        """About how many bytes a checkpoint takes: the weights, their average, and AdamW's two moments."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return weights * (4 if self.model_ema is not None else 3)

    def save(self, best=False):
        """Writes checkpoint.pth, for an epoch that is the `best` so far best_checkpoint.pth before it, and log.txt after
        it. Raises SaveFailed."""
        folder, checkpoint = self.args.output_dir, self.checkpoint()
        if best:
            save_checkpoint(checkpoint, os.path.join(folder, BEST))
        save_newest(checkpoint, folder)
        self.write_log()

    def write_log(self):
        """log.txt: one JSON object per finished epoch. It is written anew, so that a resumed run leaves nothing of what
        an interrupted one wrote after its checkpoint. Raises SaveFailed."""
        text = "".join(json.dumps(entry) + "\n" for entry in self.log)
        write_whole(os.path.join(self.args.output_dir, "log.txt"), lambda f: f.write(text.encode()))

    def restore(self, checkpoint, path, given_start_epoch, global_batch, say):
        """Goes on where `checkpoint` (read from `path`) ends, or at the epoch that the command line asks for.

        Raises UserError where it does not fit.
        """
        what, args = "--resume", self.args
        load_weights(self.model, model_state(checkpoint, path, what), args.model, path, what)
        if self.model_ema is not None:
            key = "model_ema" if checkpoint.get("model_ema") else "model"
            load_weights(self.model_ema.module, model_state(checkpoint, path, what, key), args.model, path, what)
        if "optimizer" in checkpoint:
            try:
                load_optimizer_state(self.optimizer, checkpoint["optimizer"])
                self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
                if checkpoint.get("amp_backend") == self.precision.backend and checkpoint["scaler"]:
                    self.precision.load_state_dict(checkpoint["scaler"])
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError("{}: the optimiser state of {} does not fit --opt {} ({})".format(
                    what, path, args.opt, " ".join(str(error).split())[:160]))
        try:
            self.max_accuracy = float(checkpoint.get("max_accuracy", self.max_accuracy))
            self.log = [dict(entry) for entry in checkpoint.get("log", [])]
            if given_start_epoch or "epoch" not in checkpoint:
                self.log = [entry for entry in self.log if entry["epoch"] < self.epoch]
                return
            self.epoch = int(checkpoint["epoch"]) + 1
            progress = checkpoint.get("progress")
            if progress is not None:
                self.progress = {"images": int(progress["images"]),
                                 "loss_sums": [float(value) for value in progress["loss_sums"]]}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("{}: {} does not say where its run stood ({})".format(what, path, error))
        if self.epoch >= args.epochs and args.resume == "auto":  # killed between its last save and its end
            say("{} has finished all {} epochs".format(path, args.epochs))
            return
        if self.epoch >= args.epochs:
            raise UserError("{}: {} has finished epoch {} of {} already; raise --epochs to go on, or use --eval"
                            .format(what, path, self.epoch, args.epochs))
        saved = saved_settings(checkpoint, path, what)
        if saved.get("global_batch", global_batch) != global_batch:
            say("Note: the checkpoint's global batch was {}, this run's is {}: the order of the images is kept, but the "
                "numbers will differ".format(saved["global_batch"], global_batch))
        elif saved.get("processes", self.args.processes) != self.args.processes:
            say("Note: the checkpoint was written by {} processes, this run has {}: it sees the same images in the same "
                "updates, but rounding will differ".format(saved["processes"], self.args.processes))
        say("Resuming {} at epoch {}, image {}".format(path, self.epoch, self.progress["images"] if self.progress else 0))

    def done(self, global_batch, rank):
        """(updates of this epoch that are made, the sum of their losses) for process `rank`."""
        if self.progress is None:
            return 0, 0.0
        sums = self.progress["loss_sums"]
        own = sums[rank] if len(sums) == self.args.processes else sum(sums) / len(sums)
        return self.progress["images"] // global_batch, own
