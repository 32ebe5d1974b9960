"""What is trained, as a noun: a Learner and its update; an epoch of updates, of teacher labels, and evaluation."""
import math
import statistics
from contextlib import contextmanager
from typing import Callable, Dict, List, Optional, Sequence, Set

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from losses import DistillationLoss
from runtime.errors import NonFiniteLoss, RunFailed
from runtime.keeping.control import Control, name_replaced
from runtime.keeping.progress import Progress
from runtime.keeping.state import Done
from runtime.learning.average import ModelEma
from runtime.learning.clipping import clip_gradients
from runtime.machine import versions
from runtime.machine.devices import Stopwatch, start_reading
from runtime.machine.machine import Machine
from runtime.machine.memory import use_huge_pages
from runtime.machine.processes import broadcast_buffers, complain, parallelize
from runtime.machine.profiling import Profile
from runtime.pictures.batches import loaded
from samplers import Feed

WARMUP_UPDATES = 5  # an epoch's first updates, whose operators may still be compiled, do not count as its speed


def only_finite(loss: float) -> bool:
    """Allows an update whose loss is finite; raises NonFiniteLoss for another."""
    if not math.isfinite(loss):
        raise NonFiniteLoss("the loss is {}".format(loss))
    return True


class Learner:
    """What is trained: a model on a machine, by a criterion and an optimiser.

    clip_grad: None or 0 for no clipping, else the limit, which `clip_mode` (norm, value or agc) gives its meaning.
    average: a ModelEma that follows the model, or None. may_skip: training goes on after an update that was
    not allowed, so what its forward pass has left in the model's statistics is taken back.
    """

    def __init__(self, model: torch.nn.Module, criterion: DistillationLoss, optimizer: torch.optim.Optimizer,
            machine: Machine, clip_grad: Optional[float] = None, clip_mode: str = "agc",
            average: Optional[ModelEma] = None, may_skip: bool = False):
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.machine = machine
        self.clip_grad = clip_grad
        self.clip_mode = clip_mode
        self.average = average
        self.may_skip = may_skip
        self.parallel = model  # what training's forward passes go through
        self.forward_seconds = []  # of each update, of this process alone: it does not wait for others here

    def share(self, unused: Sequence[str] = ()):
        """From now on gradients are averaged over all processes, but for the parameters named in `unused`, which get
        none; to be called again where these change."""
        self.parallel = parallelize(self.model, self.machine.device, unused)

    def share_statistics(self):
        """Gives every process the first one's batch-norm statistics, of the model and of its average: DDP leaves them
        alone, training does not use them, and what is evaluated is what is saved."""
        broadcast_buffers(self.model)
        if self.averaged is not None:
            broadcast_buffers(self.averaged)

    @property
    def averaged(self) -> Optional[torch.nn.Module]:
        """The average's model where it lies on the device; None for none, or one that is kept on the CPU."""
        module = None if self.average is None else self.average.module
        here = module is not None and next(module.parameters()).device.type == self.machine.device.type
        return module if here else None

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, micro_batches: Sequence, allowed: Callable = only_finite,
            place: Callable = lambda batch: batch) -> float:
        """One update of the weights; the gradients of the micro-batches are averaged, as those of as many processes
        would be.

        `place(micro_batch)` is called for each of them just before its forward pass and gives (images (B, 3, H, W),
        labels, taught) on the device; `taught` is what criterion.teach would give for the images, where that is known
        already, else None. allowed: allowed(loss) says, before the weights are touched, whether they are to be. Where
        the precision scales the loss, an update whose gradients overflow is left out. Returns the loss.
        """
        precision = self.machine.precision
        self.optimizer.zero_grad()
        total, watch = 0.0, Stopwatch(self.machine.device)
        statistics_before = [buffer.clone() for buffer in self.model.buffers()] if self.may_skip else []
        for i, micro_batch in enumerate(micro_batches, 1):
            last = i == len(micro_batches)
            watch.start()
            images, labels, taught = place(micro_batch)
            with self._exchanging_gradients(last):
                with precision.autocast():
                    if taught is None:
                        taught = self.criterion.teach(images)  # before the student's forward pass and its activations
                    loss = self.criterion(images, self.parallel(images), labels, taught) / len(micro_batches)
                total = total + loss.detach()
                watch.stop()
                if last:
                    read_loss = start_reading(total)  # before the backward pass, which the host then need not wait for
                precision.backward(loss, self.optimizer, last)
        loss_value = read_loss()
        self.forward_seconds.append(watch.seconds())
        if not allowed(loss_value):
            precision.skip(self.optimizer)
            if self.may_skip:
                versions.copy_(list(self.model.buffers()), statistics_before)
            return loss_value
        precision.step(self.model, self.optimizer, self._clip if self.clip_grad else None)
        if self.average is not None:
            self.average.update(self.model)
        return loss_value

    def _clip(self, parameters):
        clip_gradients(parameters, self.clip_grad, self.clip_mode)

    @contextmanager
    def _exchanging_gradients(self, wanted):
        """Keeps DDP from averaging gradients after this backward, for all but the last micro-batch of an update."""
        if not wanted and hasattr(self.parallel, "no_sync"):
            with self.parallel.no_sync():
                yield
        else:
            yield


def train_one_epoch(learner: Learner, feed: Feed, epoch: int, control: Control, done: Done = Done(),
                    max_updates: Optional[int] = None, saved: Optional[Callable] = None,
                    profile: Optional[Profile] = None) -> Dict:
    """Trains for one epoch, or `max_updates` of it, from where it is `done`.

    saved: called with the present Done after an update where `control` says that it is time to save. profile: an
    entered Profile, or None.
    Returns train_loss and train_lr, the number of updates, images/s over all processes and the share of the time that
    was spent waiting for data (both after the first WARMUP_UPDATES where there are more), own_seconds, what an update
    takes this process without waiting for the others (data and forward passes, by the median), the loss scale where
    there is one, and done, where the epoch stands for this process. Raises NonFiniteLoss, with a `report` of the update
    and its files, and TooManyDamagedImages.
    """
    machine = learner.machine
    learner.parallel.train()
    learner.forward_seconds.clear()
    planned = feed.updates_in_epoch - done.updates
    planned = planned if max_updates is None else min(planned, max_updates)
    progress = Progress(feed.updates(epoch, done), planned, "Epoch: [{}]".format(epoch), machine.world.is_main)
    updates = 0
    for number, batches in progress if planned > 0 else ():
        damaged = [one for batch in batches for one in batch.damaged]
        lr = learner.lr
        try:
            loss = learner.update(batches, lambda loss: control.before_update(loss, damaged),
                                  lambda batch: feed.on(machine, batch))
        except NonFiniteLoss as error:
            error.report = {"epoch": epoch, "update": number, "lr": lr, "loss_scale": machine.precision.loss_scale,
                            "files": feed.names(batches)}
            raise
        updates += 1
        if profile is not None:
            profile.step()
        if control.nonfinite_in_a_row:
            complain("Left out update {} of epoch {} at learning rate {:.3g}: the loss is not finite".format(
                number, epoch, lr))
            done = done._replace(updates=number + 1)
        else:
            done = Done(number + 1, done.loss_sum + loss, done.counted + 1)
        if control.save and saved is not None:
            saved(done)
        progress.note(sum(len(batch.labels) for batch in batches) * machine.world.size,
                      loss=done.loss_sum / max(done.counted, 1), lr=learner.lr)
        if updates == WARMUP_UPDATES < planned:
            if machine.device.type == "cpu":
                use_huge_pages()
            machine.synchronize()
            progress.restart_clock()
        if updates == planned:
            break
    machine.synchronize()
    timed = updates - WARMUP_UPDATES if updates > WARMUP_UPDATES else updates
    own = statistics.median(learner.forward_seconds or [0.0]) + progress.waited / max(timed, 1)
    loss_sum, counted = machine.sum(done.loss_sum, done.counted)
    stats = {"train_loss": loss_sum / max(counted, 1), "train_lr": learner.lr, "updates": done.updates,
             "train_images_per_s": progress.images_per_second, "waiting_for_data": progress.waiting_share,
             "own_seconds": own, "done": done}
    if machine.precision.loss_scale is not None:
        stats["loss_scale"] = machine.precision.loss_scale
    return stats


@torch.no_grad()
def label_epoch(criterion: DistillationLoss, feed: Feed, epoch: int, machine: Machine,
                damaged: Set[int]) -> List[List[torch.Tensor]]:
    """What criterion.teach says of an epoch's batches, as train_one_epoch would see them: for each of the replicas that
    this process stands for (a micro-batch of an update each) a list with a CPU tensor for each update. The numbers of
    damaged pictures, which are named, join those in `damaged`."""
    labels = [[] for _ in range(feed.accum_steps)]
    progress = Progress(feed.updates(epoch), feed.updates_in_epoch, "Labels: [{}]".format(epoch), machine.world.is_main)
    for _, batches in progress:
        for replica, batch in zip(labels, batches):
            images, _, _ = feed.on(machine, batch)
            with machine.precision.autocast():
                replica.append(criterion.teach(images).cpu())
            name_replaced(entry[1:] for entry in batch.damaged if entry[0] not in damaged)
            damaged.update(entry[0] for entry in batch.damaged)
            progress.note(len(batch.labels) * machine.world.size)
    return labels


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, machine: Machine, shared: bool = False,
             named: bool = True, before_batch: Callable = lambda number: None) -> Dict:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, images/s, the number of images, and those of damaged
    ones.

    loader: batches of pictures.batches.collate. A damaged image, which has the label -1, counts as wrong and is named;
    the mean cross-entropy is that of the others. shared: each process's `loader` has its own share of the images; the
    counts are summed over all. named: name damaged images; not where the same loader has just been evaluated.
    before_batch: called with the number of every batch, from 0 on.
    Raises RunFailed where all images are damaged.
    """
    model.eval()
    show, sums, images, damaged = machine.world.is_main, [0.0] * 4, 0, 0
    progress = Progress(loaded(loader), len(loader), "Test:", show)
    for number, (pixels, labels, _, batch_damaged) in enumerate(progress):
        before_batch(number)
        for _, path, label, reason in batch_damaged:
            if named and (show or shared):
                complain("Damaged image, counted as wrong: {} (class {}; {})".format(path, label, reason))
        samples, targets = machine.images(pixels), labels.to(machine.device, non_blocking=True)
        with machine.precision.autocast():
            logits = model(samples)
        logits = logits.float()
        finite = torch.isfinite(logits).all(dim=1, keepdim=True)  # (B, 1); the order of others means nothing
        hits = (logits.topk(min(5, logits.shape[1]), dim=1)[1] == targets.unsqueeze(1)) & finite  # (B, 5), best first
        # one read of the device for all three
        batch_sums = torch.stack([F.cross_entropy(logits, targets, reduction="sum", ignore_index=-1),
                                  hits[:, 0].sum().float(), hits.sum().float(), (~finite).sum().float()]).tolist()
        sums = [a + b for a, b in zip(sums, batch_sums)]
        images += len(labels)
        damaged += len(batch_damaged)
        progress.note(len(labels), top1=100.0 * sums[1] / images)
    seconds = progress.seconds
    loss, correct1, correct5, nonfinite = sums
    if shared:
        loss, correct1, correct5, nonfinite, images, damaged = machine.sum(loss, correct1, correct5, nonfinite, images,
                                                                          damaged)
    if damaged == images:
        raise RunFailed("none of the {} validation pictures could be decoded; they are named above".format(int(images)))
    return {"loss": loss / (images - damaged), "acc1": 100.0 * correct1 / images,
            "acc5": 100.0 * correct5 / images, "images_per_s": images / max(seconds, 1e-9), "images": int(images),
            "damaged": int(damaged), "nonfinite": int(nonfinite)}


def need_finite(stats: dict) -> None:
    """Raises RunFailed where some of a model's outputs were not finite; stats: what `evaluate` returned."""
    if stats["nonfinite"]:
        raise RunFailed("the model's output is not finite for {} of {} images, which count as wrong; its weights or "
                        "their normalisation are damaged".format(stats["nonfinite"], stats["images"]))
