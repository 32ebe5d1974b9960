"""The first lines of a run: what is computed, where, and on what two runs of the same flags may differ."""
import platform
import statistics

from evo_vit import compat
from evo_vit.race import choose_linear

# isort: split
import torch

from flags import PUBLISHED_EPOCHS, global_batch, published_global_batch, scaled_lr
from runtime.learning.models import default_input_size, is_evo_name
from runtime.machine.cost import count_macs, measure_matmul_rate

SLOW = 1.5


def describe(model, args, machine):
    """The first lines of a run: what is computed, and where. Returns the multiply-adds of an image."""
    macs = count_macs(model, args.input_size)
    machine.say("Model: {}, {:,} parameters, {:,.1f} M FLOPs (multiply-adds) for an image of {} pixels".format(
        args.model, sum(p.numel() for p in model.parameters()), macs / 1e6, args.input_size))
    machine.say("Device: {} x {}, precision {}, torch {torch}, torchvision {torchvision}, timm {timm}{}".format(
        machine.device.type, machine.world.size, machine.precision.name, _on_cpu(args, machine), **compat.versions()))
    if machine.world.launcher:
        machine.say("Processes: as {} says".format(machine.world.launcher))
    notice = compat.untested_notice()
    if notice:
        machine.say("Warning: " + notice)
    return macs


def _on_cpu(args, machine):
    """What else the speed of a CPU depends on."""
    if machine.device.type != "cpu":
        return ""
    threads = torch.get_num_threads()
    text = "; {} thread{} a process".format(threads, "" if threads == 1 else "s")
    if is_evo_name(args.model) and machine.precision.name == "float32":
        text += ", linear maps {}".format(choose_linear())
    return text


def measure_rate(machine):
    """FLOP/s of matrix products in the run's number format on one device (see measure_matmul_rate). Says so where they
    are slower than in float32, as on a CPU that has no instructions for them."""
    rate = measure_matmul_rate(machine.device, machine.precision.dtype)
    if machine.device.type == "cpu" and machine.precision.dtype is not None:
        in_float32 = measure_matmul_rate(machine.device)
        if rate < in_float32:
            machine.say("Note: this processor has no fast {}: its matrix products reach {:.0f} GFLOP/s, those in "
                        "float32 {:.0f}; --opt-level O0 trains in float32".format(
                            machine.precision.name.split()[0], rate / 1e9, in_float32 / 1e9))
    return rate


def describe_training(args, machine, images, updates):
    """The lines on which two runs of the same flags may differ, with a warning where they are not the published
    ones."""
    batch, say = global_batch(args, machine), machine.say
    say("Data: {}, {:,} training images".format(args.data_set, images))
    say("Global batch: {} = {} images x {} processes x {} accumulation steps".format(
        batch, args.batch_size, machine.world.size, args.micro_batches))
    say("Learning rate: {:.4g} after scaling ({:.4g} x {} / 512)".format(scaled_lr(args, machine), args.lr, batch))
    say("Updates: {} per epoch, {} epochs".format(updates, args.epochs))
    published = published_global_batch(args.model, default_input_size(args.model))
    if is_evo_name(args.model) and (batch, args.epochs) != (published, PUBLISHED_EPOCHS):
        say("Warning: the published accuracy of {} was reached with a global batch of {} and {} epochs, this run has "
            "{} and {}; --accum-steps makes up for missing devices".format(args.model, published, PUBLISHED_EPOCHS,
             batch, args.epochs))
    if is_evo_name(args.model) and args.stage_wise_epoch >= args.epochs:
        say("Note: --stage-wise-epoch {} is not before the end, so tokens are selected in every block (layer-wise) in "
            "all {} epochs".format(args.stage_wise_epoch, args.epochs))
    if args.warmup_epochs >= args.epochs and args.sched != "plateau":
        say("Note: --warmup-epochs {} is not shorter than --epochs {}, so all of the run is warm-up: its rate starts "
            "at {:.4g} and never reaches the one above; --warmup-epochs 0 trains without".format(args.warmup_epochs,
             args.epochs, args.warmup_lr))


def name_slow(own_seconds, agreement, say):
    """Names the process that takes the longest for its part of an update, where that is SLOW times what the others'
    median takes: they wait for it in every update. own_seconds: this process's, as train_one_epoch gives it."""
    seconds = agreement.gather(own_seconds)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:slowest] + seconds[slowest + 1:] or seconds)
    if seconds[slowest] > SLOW * others:
        machines = agreement.texts(platform.node())
        say("Note: process {} on {} is slow: {:.3g} s an update for its data and forward passes; the others, {:.3g} s, "
            "wait for it".format(slowest, machines[slowest], seconds[slowest], others))


def describe_epoch(log, best_by, best, say):
    """An epoch's line: its figures of log.txt, and the best so far of the one that `best_by` names."""
    say("Epoch {epoch} ({mode}): train loss {train_loss:.4f}, {train_images_per_s:.1f} images/s ({mfu:.0%} of the "
        "matmul rate, {waiting_for_data:.0%} waiting for data); test Acc@1 {test_acc1:.3f}, Acc@5 {test_acc5:.3f}, "
        "loss {test_loss:.4f}; best {best_by} {best:.3f}".format(best_by="Acc@1" if best_by == "test_acc1"
        else "Acc@1 of the average", best=best, **log))
