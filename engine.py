"""One training step, one epoch of them, and evaluation."""
import math
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from runtime.clip import clip_gradients
from runtime.control import NonFiniteLoss, name_replaced
from runtime.device import start_reading, synchronize
from runtime.distributed import sum_over_processes
from runtime.pictures import normalize
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
    """One update of the weights from a list of micro-batches [(images (B, 3, H, W), labels, taught)], already on the
    device; `taught` is what criterion.teach would give for the images, where that is known already, else None.

    The gradients of the micro-batches are averaged, as those of as many processes would be.
    criterion: a losses.DistillationLoss.
    clip_grad: None or 0 for no clipping, else the limit, which `clip_mode` (norm, value or agc) gives its meaning.
    precision: number format; where it scales the loss, an update whose gradients overflow is left out.
    check: check(loss) says, before the weights are touched, whether they are to be; unless given it raises
        NonFiniteLoss for a loss that is not finite.
    Returns the loss, a float.
    """
    optimizer.zero_grad()
    total = 0.0
    for i, (samples, targets, taught) in enumerate(micro_batches, 1):
        last = i == len(micro_batches)
        with _no_gradient_exchange(model, skip=not last):
            with precision.autocast():
                if taught is None:
                    taught = criterion.teach(samples)  # before the student's forward pass: its activations are not there yet
                loss = criterion(samples, model(samples), targets, taught) / len(micro_batches)
            total = total + loss.detach()
            if last:
                read_loss = start_reading(total)  # before the backward pass, which the host then need not wait for
            precision.backward(loss, optimizer, last)
    loss_value = read_loss()
    if not check(loss_value):
        precision.skip(optimizer)
        return loss_value
    clip = (lambda parameters: clip_gradients(parameters, clip_grad, clip_mode)) if clip_grad else None
    precision.step(model, optimizer, clip)
    if model_ema is not None:
        model_ema.update(getattr(model, "module", model))
    return loss_value


def _to_device(batch, device, channels_last, mixup_fn, seed):
    """(images, targets) of a batch of collate's on the device, mixed from `seed`, from which the model draws, too."""
    pictures, targets = batch[:2]
    samples, targets = normalize(pictures, device, channels_last), targets.to(device, non_blocking=True)
    seed_everything(seed)
    return (samples, targets) if mixup_fn is None else mixup_fn(samples, targets)


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, control, accum_steps=1, clip_grad=None,
                    clip_mode="agc", model_ema=None, mixup_fn=None, world_size=1, rank=0, show=True,
                    precision=Precision(), max_updates=None, seed=0, done=(0, 0.0), on_boundary=None,
                    channels_last=False, teacher_labels=None):
    """Trains for one epoch, or `max_updates` of it; `accum_steps` successive batches of `data_loader` make one update.

    data_loader: batches as runtime.pictures.collate makes them.
    control: a runtime.control.Control; where it says `save` after an update, on_boundary(updates, loss_sum) is called.
    done: updates of this epoch that an earlier process has made, and the sum of their losses; `data_loader` starts
        after them.
    channels_last: memory format of the images.
    teacher_labels: a runtime.teacher_labels.TeacherLabels, whose crops `data_loader` has; None for a live teacher.
    Returns train_loss and train_lr, the number of updates, images/s over all processes and the share of the time that
    was spent waiting for data (both after the first WARMUP_UPDATES where there are more), and the loss scale where there
    is one. Raises NonFiniteLoss, with a `report`
    of the update and its files, and TooManyDamagedImages.
    """
    model.train()
    planned = len(data_loader) // accum_steps
    if max_updates is not None:
        planned = min(planned, max_updates)
    updates, (before, loss_sum), finite = 0, done, done[0]
    crop_epoch = epoch if teacher_labels is None else teacher_labels.crop_epoch(epoch)
    micro_batches, indices, damaged = [], [], []
    progress = Progress(data_loader, len(data_loader), "Epoch: [{}]".format(epoch), show)
    for batch in progress:
        images = len(batch[1]) * world_size
        replica, update = rank * accum_steps + len(micro_batches), before + updates
        samples, targets = _to_device(batch, device, channels_last, mixup_fn,
                                      derive_seed(seed, crop_epoch, update, replica))
        taught = None
        if teacher_labels is not None:
            taught = teacher_labels.batch(epoch, replica, update).to(device, non_blocking=True)
        micro_batches.append((samples, targets, taught))
        indices += batch[2].tolist()
        damaged += batch[3]
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
             "updates": before + updates, "train_images_per_s": progress.images_per_second,
             "waiting_for_data": progress.waiting_share}
    if precision.loss_scale is not None:
        stats["loss_scale"] = precision.loss_scale
    return stats


@torch.no_grad()
def label_epoch(data_loader, criterion, device, epoch, accum_steps=1, mixup_fn=None, world_size=1, rank=0, show=True,
                precision=Precision(), seed=0, channels_last=False):
    """What criterion.teach says of an epoch's batches, as train_one_epoch would see them: for each of the `accum_steps`
    replicas that this process stands for a list with a CPU tensor for each update."""
    labels = [[] for _ in range(accum_steps)]
    progress = Progress(data_loader, len(data_loader), "Labels: [{}]".format(epoch), show)
    for number, batch in enumerate(progress):
        update, step = divmod(number, accum_steps)
        samples, _ = _to_device(batch, device, channels_last, mixup_fn,
                                derive_seed(seed, epoch, update, rank * accum_steps + step))
        with precision.autocast():
            labels[step].append(criterion.teach(samples).cpu())
        name_replaced(entry[1:] for entry in batch[3])
        progress.note(len(samples) * world_size)
    return labels


@torch.no_grad()
def evaluate(data_loader, model, device, sharded=False, show=True, precision=Precision(), channels_last=False):
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, images/s, the number of images, and that of damaged ones.

    data_loader: batches as runtime.pictures.collate makes them. A damaged image, which has the label -1, counts as
    wrong and is named; the mean cross-entropy is that of the others.
    sharded: each process's `data_loader` has its own share of the images; the counts are summed over all.
    """
    model.eval()
    loss = correct1 = correct5 = images = damaged = 0
    progress = Progress(data_loader, len(data_loader), "Test:", show)
    for pictures, targets, _, batch_damaged in progress:
        for _, path, label, reason in batch_damaged:
            if show or sharded:
                print("Damaged image, counted as wrong: {} (class {}; {})".format(path, label, reason), file=sys.stderr,
                      flush=True)
        samples, targets = normalize(pictures, device, channels_last), targets.to(device, non_blocking=True)
        with precision.autocast():
            logits = model(samples)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1)[1]  # (B, 5) classes, best first
        hits = ranked == targets.unsqueeze(1)
        # one read of the device for all three
        sums = torch.stack([F.cross_entropy(logits, targets, reduction="sum", ignore_index=-1),
                            hits[:, 0].sum().float(), hits.sum().float()]).tolist()
        loss, correct1, correct5 = loss + sums[0], correct1 + sums[1], correct5 + sums[2]
        images += len(targets)
        damaged += len(batch_damaged)
        progress.note(len(targets), top1=100.0 * correct1 / images)
    seconds = progress.seconds
    if sharded:
        loss, correct1, correct5, images, damaged = sum_over_processes([loss, correct1, correct5, images, damaged], device)
    return {"loss": loss / max(images - damaged, 1), "acc1": 100.0 * correct1 / images, "acc5": 100.0 * correct5 / images,
            "images_per_s": images / max(seconds, 1e-9), "images": int(images), "damaged": int(damaged)}
