"""One training step, one epoch of them, and evaluation."""
import math
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad

from runtime.control import NonFiniteLoss
from runtime.device import synchronize
from runtime.distributed import sum_over_processes
from runtime.precision import Precision
from runtime.progress import Progress
from runtime.randomness import derive_seed, seed_everything

WARMUP_UPDATES = 5  # an epoch's first updates, whose operators may still be compiled, do not count as its speed


@contextmanager
def _no_gradient_exchange(model, skip):
    """Keeps DDP from averaging gradients after this backward, for all but the last micro-batch of an update."""
    if skip and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield


def _only_finite(loss):
    if not math.isfinite(loss):
        raise NonFiniteLoss("the loss is {}".format(loss))
    return True


def train_step(model, criterion, micro_batches, optimizer, clip_grad=None, clip_mode="agc", model_ema=None,
               precision=Precision(), check=_only_finite):
    """One update of the weights from a list of micro-batches [(images (B, 3, H, W), labels)], already on the device.

    The gradients of the micro-batches are averaged, as those of as many processes would be.
    criterion: criterion(images, outputs, labels), a losses.DistillationLoss.
    clip_grad: None or 0 for no clipping, else the limit, which `clip_mode` (norm, value or agc) gives its meaning.
    precision: number format; where it scales the loss, an update whose gradients overflow is left out.
    check: check(loss) says, before the weights are touched, whether they are to be; unless given it raises
        NonFiniteLoss for a loss that is not finite.
    Returns the loss, a float.
    """
    optimizer.zero_grad()
    total = 0.0
    for i, (samples, targets) in enumerate(micro_batches, 1):
        last = i == len(micro_batches)
        with _no_gradient_exchange(model, skip=not last):
            with precision.autocast():
                loss = criterion(samples, model(samples), targets) / len(micro_batches)
            precision.backward(loss, optimizer, last)
        total = total + loss.detach()
    loss_value = total.item()
    if not check(loss_value):
        precision.skip(optimizer)
        return loss_value
    clip = (lambda parameters: dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)) if clip_grad else None
    precision.step(model, optimizer, clip)
    if model_ema is not None:
        model_ema.update(getattr(model, "module", model))
    return loss_value


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, control, accum_steps=1, clip_grad=None,
                    clip_mode="agc", model_ema=None, mixup_fn=None, world_size=1, rank=0, show=True,
                    precision=Precision(), max_updates=None, seed=0, done=(0, 0.0), on_boundary=None):
    """Trains for one epoch, or `max_updates` of it; `accum_steps` successive batches of `data_loader` make one update.

    data_loader: batches as runtime.pictures.collate makes them.
    control: a runtime.control.Control; where it says `save` after an update, on_boundary(updates, loss_sum) is called.
    done: updates of this epoch that an earlier process has made, and the sum of their losses; `data_loader` starts
        after them.
    Returns train_loss and train_lr, the number of updates, images/s over all processes (after the first
    WARMUP_UPDATES where there are more), and the loss scale where there is one. Raises NonFiniteLoss, with a `report`
    of the update and its files, and TooManyDamagedImages.
    """
    model.train()
    planned = len(data_loader) // accum_steps
    if max_updates is not None:
        planned = min(planned, max_updates)
    updates, (before, loss_sum), finite = 0, done, done[0]
    micro_batches, indices, damaged = [], [], []
    progress = Progress(data_loader, len(data_loader), "Epoch: [{}]".format(epoch), show)
    for samples, targets, batch_indices, batch_damaged in progress:
        images = samples.shape[0] * world_size
        samples, targets = samples.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        seed_everything(derive_seed(seed, epoch, before + updates, rank * accum_steps + len(micro_batches)))
        if mixup_fn is not None:
            samples, targets = mixup_fn(samples, targets)
        micro_batches.append((samples, targets))
        indices += batch_indices.tolist()
        damaged += batch_damaged
        if len(micro_batches) == accum_steps:
            lr = optimizer.param_groups[0]["lr"]
            try:
                loss = train_step(model, criterion, micro_batches, optimizer, clip_grad, clip_mode, model_ema, precision,
                                  lambda loss: control.before_update(loss, damaged))
            except NonFiniteLoss as error:
                error.report = {"epoch": epoch, "update": before + updates, "lr": lr, "loss_scale": precision.loss_scale,
                                "files": [data_loader.dataset.name(index) for index in indices]}
                raise
            updates += 1
            if control.nonfinite_in_a_row:
                print("Left out update {} of epoch {} at learning rate {:.3g}: the loss is not finite".format(
                    before + updates - 1, epoch, lr), file=sys.stderr, flush=True)
            else:
                loss_sum += loss
                finite += 1
            micro_batches, indices, damaged = [], [], []
            if control.save and on_boundary is not None:
                on_boundary(before + updates, loss_sum)
        progress.note(images, loss=loss_sum / max(finite, 1), lr=optimizer.param_groups[0]["lr"])
        if updates == WARMUP_UPDATES < planned and not micro_batches:
            synchronize(device)
            progress.restart_clock()
        if updates == planned:
            break
    synchronize(device)
    loss_sum, counted = sum_over_processes([loss_sum, finite], device)
    stats = {"train_loss": loss_sum / max(counted, 1), "train_lr": optimizer.param_groups[0]["lr"],
             "updates": before + updates, "train_images_per_s": progress.images_per_second}
    if precision.loss_scale is not None:
        stats["loss_scale"] = precision.loss_scale
    return stats


@torch.no_grad()
def evaluate(data_loader, model, device, sharded=False, show=True, precision=Precision()):
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, images/s, the number of images, and that of damaged ones.

    data_loader: batches as runtime.pictures.collate makes them. A damaged image, which has the label -1, counts as
    wrong and is named; the mean cross-entropy is that of the others.
    sharded: each process's `data_loader` has its own share of the images; the counts are summed over all.
    """
    model.eval()
    loss = correct1 = correct5 = images = damaged = 0
    progress = Progress(data_loader, len(data_loader), "Test:", show)
    for samples, targets, _, batch_damaged in progress:
        for _, path, label, reason in batch_damaged:
            if show or sharded:
                print("Damaged image, counted as wrong: {} (class {}; {})".format(path, label, reason), file=sys.stderr,
                      flush=True)
        samples, targets = samples.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with precision.autocast():
            logits = model(samples)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1)[1]  # (B, 5) classes, best first
        hits = ranked == targets.unsqueeze(1)
        # one read of the device for all three
        sums = torch.stack([F.cross_entropy(logits, targets, reduction="sum", ignore_index=-1),
                            hits[:, 0].sum().float(), hits.sum().float()]).tolist()
        loss, correct1, correct5 = loss + sums[0], correct1 + sums[1], correct5 + sums[2]
        images += samples.shape[0]
        damaged += len(batch_damaged)
        progress.note(samples.shape[0], top1=100.0 * correct1 / images)
    seconds = progress.seconds
    if sharded:
        loss, correct1, correct5, images, damaged = sum_over_processes([loss, correct1, correct5, images, damaged], device)
    return {"loss": loss / max(images - damaged, 1), "acc1": 100.0 * correct1 / images, "acc5": 100.0 * correct5 / images,
            "images_per_s": images / max(seconds, 1e-9), "images": int(images), "damaged": int(damaged)}
