"""One training step, one epoch of them, and evaluation."""
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad

from runtime.device import synchronize
from runtime.distributed import sum_over_processes
from runtime.precision import Precision
from runtime.progress import Progress

WARMUP_UPDATES = 5  # an epoch's first updates, whose operators may still be compiled, do not count as its speed


class NonFiniteLoss(Exception):
    """Training diverged: the loss of a step is infinite or not a number. The weights are those before the step."""


@contextmanager
def _no_gradient_exchange(model, skip):
    """Keeps DDP from averaging gradients after this backward, for all but the last micro-batch of an update."""
    if skip and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield


def train_step(model, criterion, micro_batches, optimizer, clip_grad=None, clip_mode="agc", model_ema=None,
               precision=Precision()):
    """One update of the weights from a list of micro-batches [(images (B, 3, H, W), labels)], already on the device.

    The gradients of the micro-batches are averaged, as those of as many processes would be.
    criterion: criterion(images, outputs, labels), a losses.DistillationLoss.
    clip_grad: None or 0 for no clipping, else the limit, which `clip_mode` (norm, value or agc) gives its meaning.
    precision: number format; where it scales the loss, an update whose gradients overflow is left out.
    Returns the loss, a float. Raises NonFiniteLoss before it would touch the weights.
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
    if not math.isfinite(loss_value):
        raise NonFiniteLoss("the loss is {}".format(loss_value))
    clip = (lambda parameters: dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)) if clip_grad else None
    precision.step(model, optimizer, clip)
    if model_ema is not None:
        model_ema.update(getattr(model, "module", model))
    return loss_value


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, accum_steps=1, clip_grad=None,
                    clip_mode="agc", model_ema=None, mixup_fn=None, world_size=1, show=True, precision=Precision(),
                    max_updates=None):
    """Trains for one epoch, or `max_updates` of it; `accum_steps` successive batches of `data_loader` make one update.

    Returns train_loss and train_lr, the number of updates, images/s over all processes (after the first
    WARMUP_UPDATES where there are more), and the loss scale where there is one.
    """
    model.train()
    planned = len(data_loader) // accum_steps if max_updates is None else min(max_updates, len(data_loader) // accum_steps)
    loss_sum = updates = 0
    micro_batches = []
    progress = Progress(data_loader, len(data_loader), "Epoch: [{}]".format(epoch), show)
    for samples, targets in progress:
        images = samples.shape[0] * world_size
        samples, targets = samples.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            samples, targets = mixup_fn(samples, targets)
        micro_batches.append((samples, targets))
        if len(micro_batches) == accum_steps:
            try:
                loss_sum += train_step(model, criterion, micro_batches, optimizer, clip_grad, clip_mode, model_ema,
                                       precision)
            except NonFiniteLoss as error:
                raise NonFiniteLoss("{} in epoch {}, update {}, at learning rate {:.3g}".format(
                    error, epoch, updates, optimizer.param_groups[0]["lr"]))
            updates += 1
            micro_batches = []
        progress.note(images, loss=loss_sum / max(updates, 1), lr=optimizer.param_groups[0]["lr"])
        if updates == WARMUP_UPDATES < planned and not micro_batches:
            synchronize(device)
            progress.restart_clock()
        if updates == planned:
            break
    synchronize(device)
    loss_sum, counted = sum_over_processes([loss_sum, updates], device)
    stats = {"train_loss": loss_sum / counted, "train_lr": optimizer.param_groups[0]["lr"], "updates": updates,
             "train_images_per_s": progress.images_per_second}
    if precision.loss_scale is not None:
        stats["loss_scale"] = precision.loss_scale
    return stats


@torch.no_grad()
def evaluate(data_loader, model, device, sharded=False, show=True, precision=Precision()):
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, images/s and the number of images.

    sharded: each process's `data_loader` has its own share of the images; the counts are summed over all.
    """
    model.eval()
    loss = correct1 = correct5 = images = 0
    progress = Progress(data_loader, len(data_loader), "Test:", show)
    for samples, targets in progress:
        samples, targets = samples.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with precision.autocast():
            logits = model(samples)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1)[1]  # (B, 5) classes, best first
        hits = ranked == targets.unsqueeze(1)
        # one read of the device for all three
        sums = torch.stack([F.cross_entropy(logits, targets, reduction="sum"), hits[:, 0].sum().float(),
                            hits.sum().float()]).tolist()
        loss, correct1, correct5 = loss + sums[0], correct1 + sums[1], correct5 + sums[2]
        images += samples.shape[0]
        progress.note(samples.shape[0], top1=100.0 * correct1 / images)
    seconds = progress.seconds
    if sharded:
        loss, correct1, correct5, images = sum_over_processes([loss, correct1, correct5, images], device)
    return {"loss": loss / images, "acc1": 100.0 * correct1 / images, "acc5": 100.0 * correct5 / images,
            "images_per_s": images / max(seconds, 1e-9), "images": int(images)}
