"""Trains, distils and evaluates Evo-LeViT: the whole recipe, top to bottom. `python main.py --help` lists the flags."""
import argparse
import os
import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import losses
from announce import describe, describe_epoch, describe_training, measure_rate, name_slow
from datasets import crop_pct, need_read
from engine import Learner, evaluate, label_epoch, need_finite, train_one_epoch
from fix_timm.mixup import Mixup
from flags import (
    check_evaluation,
    check_machine,
    check_recipe,
    family_defaults,
    global_batch,
    mixes,
    parse_args,
    scaled_lr,
)
from loaders import build_train_loader, build_val_loader, open_index
from runtime.errors import NonFiniteLoss, Stopped, TooManyDamagedImages, UserError
from runtime.keeping.checkpoint import BEST, export_weights, file_hash, load_checkpoint, load_newest, local_file
from runtime.keeping.control import Control, Signals
from runtime.keeping.exported import Program, how_to_run
from runtime.keeping.output import explained, opened, summarize, write_summary
from runtime.keeping.restore import need_classes, open_trained, restore
from runtime.keeping.settings import (
    combine,
    labels_sum,
    micro_batches,
    need_same_classes,
    need_same_everywhere,
    other_folder,
    places_in,
)
from runtime.keeping.sharing import same_for_all
from runtime.keeping.state import TrainingState
from runtime.keeping.teacher_labels import FORMAT, WEIGHTS, LabelWriter, TeacherLabels, label_settings
from runtime.learning.average import ModelEma
from runtime.learning.finetuning import start_from
from runtime.learning.models import (
    EVO_DEIT,
    NO_SELECTION,
    apply_token_schedule,
    build_model,
    check_model_name,
    default_input_size,
    is_evo_name,
    keep_ratios,
    needs_batches,
    parameters_without_gradient,
    scheduled_mode,
    set_mode,
)
from runtime.learning.normalization import Renormalize, timm_statistics
from runtime.learning.optimizer import build_optimizer, build_schedule
from runtime.learning.teacher import build_teacher
from runtime.learning.teacher_precision import Shelf, need_precision, set_precision
from runtime.machine import devices, memory, processes, versions
from runtime.machine.agreement import Agreement
from runtime.machine.compiling import compile_module, frozen_weights
from runtime.machine.machine import Machine
from runtime.machine.precision import build_precision
from runtime.machine.profiling import profiled
from runtime.machine.randomness import seed_everything
from runtime.machine.threads import share_cores
from samplers import Feed

# ----------------------------------------------------------------------------------------------------- builders


def build_student(args, classes, say, fresh):
    """The model to train, from --finetune's weights where they are given and the run is a `fresh` one.

    Raises UserError where it cannot be trained on batches of that size."""
    more_heads = args.distillation_type != "none" or args.model.startswith(EVO_DEIT)
    model = build_model(args.model, len(classes), args.input_size, more_heads, args.drop_path, args.keep_ratio)
    if args.finetune and fresh:
        checkpoint = load_checkpoint(args.finetune, "--finetune")
        checkpoint.name_ignored(say)
        same = checkpoint.classes() in (None, classes)
        start = start_from(checkpoint.weights(), model, args.model, same, checkpoint.refuse)
        model.load_state_dict(start.state, strict=False)
        say("Finetuning from {}; of its tensors left out: {}".format(args.finetune, ", ".join(start.left_out)
            or "none"))
        if start.new:
            say("Not in it, so drawn at random: {}".format(", ".join(start.new)))
        if not same:
            say("Its classes differ from the data set's (first '{}', here '{}'), so the classifier starts anew".format(
                *next((pair for pair in zip(checkpoint.classes(), classes) if pair[0] != pair[1]),
                      (checkpoint.classes()[-1], classes[-1]))))
    if args.batch_size == 1 and needs_batches(model):
        raise UserError("--batch-size 1: {} normalises by the statistics of a batch, which one image does not have; "
                        "use at least 2".format(args.model))
    return model


def build_criterion(args, num_classes, teacher):
    """(the distillation loss over the base criterion that suits the labels, Mixup or None)."""
    mixup = None
    if mixes(args):
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
        base = SoftTargetCrossEntropy()
    elif args.smoothing:
        base = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base = torch.nn.CrossEntropyLoss()
    return losses.DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha,
                                   args.distillation_tau, args.model.startswith(EVO_DEIT)), mixup


def build_teaching(args, loader, machine, agreement):
    """(the teacher, stored labels of one): at most one of them, where the loss needs what it says of the training
    pictures of `loader`."""
    data = loader.dataset.dataset
    classes = data.classes
    if args.teacher_labels:
        replicas = machine.world.size * args.micro_batches
        labels = TeacherLabels(args.teacher_labels, label_settings(args, replicas, data))
        labels.need_everywhere(agreement)
        machine.say("Teacher labels: {} epochs in {}".format(labels.epochs, args.teacher_labels))
        return None, labels
    if args.distillation_type == "none" or args.distillation_alpha == 0 and not args.write_teacher_labels:
        return None, None
    check_model_name(args.teacher_model, "--teacher-model")
    checkpoint = load_checkpoint(args.teacher_path, "--teacher-path")
    checkpoint.name_ignored(machine.say)
    own_format = args.teacher_precision != "same"
    if own_format:
        need_precision(args.teacher_precision, machine)
    teacher = build_teacher(args.teacher_model, checkpoint, classes, machine, args.input_size, args.teacher_input_size,
                            own_format)
    if own_format:
        set_precision(teacher, args.teacher_precision, loader.dataset, machine, args.teacher_agreement,
                      Shelf(checkpoint.path, agreement))
    return teacher, None


def build_learner(args, model, criterion, machine):
    """(the Learner of `model`, which is put on the machine; its schedule of learning rates)."""
    machine.place(model)
    processes.broadcast_weights(model)  # before the average, which is a copy, is made
    scaled = argparse.Namespace(**dict(vars(args), lr=scaled_lr(args, machine)))
    optimizer = build_optimizer(scaled, model, machine.device, machine.precision.backend)
    lr_scheduler = build_schedule(scaled, optimizer)
    average = None
    if args.model_ema:
        average = ModelEma(model, args.model_ema_decay, args.model_ema_warmup)
        if args.model_ema_force_cpu:
            average.module.cpu()
    teacher = criterion.teacher_model
    model, optimizer = machine.precision.prepare(model, optimizer, teacher)
    if args.compile:
        compile_module(model, machine.device.type, is_evo_name(args.model))
        if teacher is not None:
            teacher.compile_network(machine.device.type)
    learner = Learner(model, criterion, optimizer, machine, args.clip_grad, args.clip_mode, average,
                      may_skip=args.skip_nonfinite > 0)
    return learner, lr_scheduler


def find_unused(model, criterion, args, machine):
    """{mode: names of the parameters that have no gradient in it} for every mode of the schedule."""
    modes = {scheduled_mode(e, args.prune_warmup_epoch, args.stage_wise_epoch) for e in range(args.epochs)}
    if machine.world.size == 1:
        return dict.fromkeys(modes, ())
    images = torch.zeros(2, 3, args.input_size, args.input_size, device=machine.device)
    labels = torch.full((2, model.num_classes), 1 / model.num_classes, device=machine.device) if mixes(args) else \
        torch.zeros(2, dtype=torch.int64, device=machine.device)
    return {set_mode(model, mode): parameters_without_gradient(model, criterion, images, labels) for mode in modes}


# ----------------------------------------------------------------------------------------------------- tasks

def train(args, given, checkpoint, machine, agreement, index):
    """The recipe itself, going on from `checkpoint` if there is one; returns the trained model."""
    say = machine.say
    loader = build_train_loader(args, machine, index)
    data, sampler = loader.dataset.dataset, loader.batch_sampler
    if len(data.classes) == 1:
        raise UserError("--data-path: there is one class only, '{}', so there is nothing to tell apart; the layout is "
                        "train/CLASS/PICTURE and val/CLASS/PICTURE".format(data.classes[0]))
    if checkpoint is not None:
        need_same_classes(checkpoint, data.classes)
    settings = dict(vars(args), processes=machine.world.size, global_batch=global_batch(args, machine))
    need_same_everywhere(settings, data, agreement)
    settings.update(images=len(data), labels_sum=labels_sum(data))
    val_loader, shared = build_val_loader(args, machine, index)
    model = build_student(args, data.classes, say, checkpoint is None)
    teacher, labels = build_teaching(args, loader, machine, agreement)
    settings.update(stored_epochs=labels and labels.epochs)
    macs = 3 * describe(model, args, machine)  # of a training image, forwards and backwards
    macs += teacher.image_macs(args.input_size) if teacher is not None else 0
    matmul_rate = measure_rate(machine) * machine.world.size
    criterion, mixup = build_criterion(args, len(data.classes), teacher)
    unused = find_unused(model.to(machine.device), criterion, args, machine)
    learner, lr_scheduler = build_learner(args, model, criterion, machine)
    feed = Feed(loader, sampler, mixup, labels)
    describe_training(args, machine, len(data), sampler.updates)

    with Signals() as signals, ExitStack() as held:
        control = Control(agreement, signals, args.save_every_steps, args.save_every_minutes, args.max_bad_images,
                          args.skip_nonfinite)
        state = TrainingState(learner, lr_scheduler, control, data.classes, settings)
        fresh = checkpoint is None or other_folder(checkpoint, args.output_dir)
        state.restore(checkpoint, "start_epoch" in given, fresh, say)
        scalars = held.enter_context(opened(state, fresh, agreement, say))
        profile = held.enter_context(profiled(args.profile, machine, args.output_dir))
        index.keep()
        start, updates, shared_mode = time.time(), 0, None

        def saved(done):
            state.save_inside_epoch(done, agreement.gather(done.loss_sum))
            processes.barrier()  # no process leaves while the first one still writes
            if control.stop:
                raise Stopped

        for epoch in range(state.epoch, args.epochs):
            epoch_start, done = time.time(), state.done()
            for one in (learner.model,) + ((learner.average.module,) if learner.average is not None else ()):
                state.mode = apply_token_schedule(one, epoch, args.prune_warmup_epoch, args.stage_wise_epoch)
            if state.mode != shared_mode:  # layer-wise and stage-wise training use different parameters
                learner.share(unused.get(state.mode, ()))
                shared_mode = state.mode
            log = train_one_epoch(learner, feed, epoch, control, done, args.max_steps and args.max_steps - updates,
                                  saved, profile)
            updates += log["updates"] - done.updates
            name_slow(log.pop("own_seconds"), agreement, say)
            log.update(train_seconds=time.time() - epoch_start, mfu=2 * macs * log["train_images_per_s"] / matmul_rate,
                       epoch=epoch, mode=state.mode, keep_ratios=keep_ratios(learner.model))
            done = log.pop("done")
            try:
                log.update(validate(learner, val_loader, shared, control))
            except Stopped:
                saved(done)
                raise
            log.update(seconds=time.time() - epoch_start, peak_memory_mb=memory.peak_memory_mb(machine.device),
                       n_parameters=sum(p.numel() for p in model.parameters()), damaged_images=control.damaged)
            best = state.finish_epoch(log)
            if state.writes:
                state.save(best)
                if scalars is not None:
                    scalars.write(log)
            describe_epoch(log, args.best_by, state.max_accuracy, say)
            processes.barrier()
            if updates == args.max_steps:
                break
            if agreement.total(int(signals.stop))[0] and state.epoch < args.epochs:
                raise Stopped
    finish(args, state, updates, time.time() - start, machine)
    return learner.model


def validate(learner, loader, shared, control):
    """Figures of an evaluation, for the log: test_* of the weights, and of their average test_ema_acc1 and
    test_ema_loss. Raises Stopped, on every process, where a signal asks for it."""
    learner.share_statistics()
    watched = partial(evaluate, loader=loader, machine=learner.machine, shared=shared,
                      before_batch=control.watch_evaluation(len(loader)))
    log = {"test_" + name: value for name, value in watched(learner.model).items()}
    if learner.averaged is not None:
        figures = watched(learner.averaged, named=False)
        log.update(test_ema_acc1=figures["acc1"], test_ema_loss=figures["loss"])
    if log["test_nonfinite"]:
        learner.machine.say("Warning: the output is not finite for {test_nonfinite} of {test_images} validation "
                            "images, which count as wrong".format(**log))
    return log


def finish(args, state, updates, seconds, machine):
    """What a finished run leaves beside its checkpoints."""
    if updates == args.max_steps:
        machine.say("Ended after {:,} updates, as --max-steps says; epoch {} counts as finished".format(
            updates, state.epoch - 1))
    if state.writes:
        write_summary(args.output_dir, dict(
            summarize(state.log, state.settings["global_batch"]), model=args.model, device=machine.device.type,
            processes=machine.world.size, batch_size=args.batch_size, precision=machine.precision.name,
            updates=sum(entry["updates"] for entry in state.log),
            best_acc1=max(entry["test_acc1"] for entry in state.log),
            seconds=max(seconds, sum(entry["seconds"] for entry in state.log))))
        if args.export_weights and machine.world.is_main:
            save_export(state.learner.model, args, state.classes, state.mode, machine.say)
    machine.say("Training time {}; {} holds the weights of the last epoch and of the best".format(
        timedelta(seconds=int(seconds)), args.output_dir))


def write_labels(args, machine, agreement, index):
    """`--write-teacher-labels`: stores what the teacher says of --epochs epochs' crops; epochs that are stored stay."""
    loader = build_train_loader(args, machine, index)
    data, sampler = loader.dataset.dataset, loader.batch_sampler
    teacher, _ = build_teaching(args, loader, machine, agreement)
    machine.precision.prepare(teacher)
    if args.compile:
        teacher.compile_network(machine.device.type)
    criterion, mixup = build_criterion(args, len(data.classes), teacher)
    index.keep()
    feed = Feed(loader, sampler, mixup)
    settings = label_settings(args, sampler.replicas, data)
    settings[WEIGHTS] = file_hash(local_file(args.teacher_path, "--teacher-path"))
    settings[FORMAT] = machine.precision.name if args.teacher_precision == "same" else args.teacher_precision
    writer = LabelWriter(args.write_teacher_labels, settings, machine.world.is_main)
    criterion.alpha = criterion.alpha or 1.0  # labels are written also where this loss would not use them
    damaged = set()
    own = [sampler.first_replica + step for step in range(feed.accum_steps)]
    machine.say("Teacher: {}, labels of {:,} images x {} epochs".format(
        args.teacher_model, sampler.updates * global_batch(args, machine), args.epochs))
    for epoch in range(args.epochs):
        if not all(writer.has(epoch, replica) for replica in own):
            for replica, batches in zip(own, label_epoch(criterion, feed, epoch, machine, damaged)):
                writer.write(epoch, replica, batches)
        met = len(agreement.union(damaged))  # also keeps fast processes from leaving slow ones behind
        if met > args.max_bad_images:
            raise TooManyDamagedImages("{} picture files cannot be decoded and --max-bad-images allows {}; they are "
                "named above; remove {} before you start again: it has labels of other pictures in their places".format(
                    met, args.max_bad_images, args.write_teacher_labels))
    if met:
        machine.say("Note: {} damaged pictures, named above, have the labels of those that take their places; "
                    "they are right only while the files stay damaged".format(met))
    machine.say("The labels lie in {0}; train with --teacher-labels {0}".format(args.write_teacher_labels))
    return teacher


def evaluate_checkpoint(args, given, checkpoint, machine, index):
    """`--eval`: prints top-1, top-5, loss and images/s of the checkpoint, and returns the model."""
    loader, shared = build_val_loader(args, machine, index, lambda classes: places_in(checkpoint, classes))
    index.keep()
    classes = checkpoint.classes() or loader.dataset.dataset.classes
    restored = restore(checkpoint, args.model, args.input_size, len(classes), "model_ema" if args.eval_ema else "model",
                       args.keep_ratio)
    need_classes(checkpoint, restored, classes)
    model, mode = restored.model, restored.mode
    if not isinstance(model, Program):
        describe(model, args, machine)
    if args.export_weights and isinstance(model, Program):
        checkpoint.refuse("is an exported program, whose weights cannot be taken out; leave --export-weights out")
    if (args.compile or machine.precision.name != "float32") and isinstance(model, Program):
        checkpoint.refuse("is an exported program, which runs as it was written, in float32; leave {} out".format(
            "--compile" if args.compile else "--opt-level and --amp-dtype"))
    if given & {"prune_warmup_epoch", "stage_wise_epoch"} and isinstance(model, Program):
        checkpoint.refuse("is an exported program, whose mode is built in; leave --stage-wise-epoch and "
                          "--prune-warmup-epoch out")
    if given & {"prune_warmup_epoch", "stage_wise_epoch"}:
        epoch = max(checkpoint.settings().get("epoch") or 0, 0)
        mode = apply_token_schedule(model, epoch, args.prune_warmup_epoch, args.stage_wise_epoch)
    if "keep_ratio" in given and mode.endswith(NO_SELECTION):
        raise UserError("--keep-ratio: {} is evaluated in its mode, {}, in which all tokens are kept; leave it out, or "
                        "choose a mode by --prune-warmup-epoch 0".format(checkpoint.path, mode))
    mean, std = checkpoint.statistics() or timm_statistics(model)
    renormalize = Renormalize(mean, std)
    machine.place(model)
    if args.compile:
        compile_module(model, machine.device.type, is_evo_name(args.model), frozen=True)
    model, _ = machine.precision.prepare(model)
    if renormalize.needed:
        machine.say("Note: images are normalised as its training says, by mean {} and deviation {}".format(mean, std))
        model = torch.nn.Sequential(machine.place(renormalize), model)
    with frozen_weights(machine.device.type):
        stats = evaluate(model, loader, machine, shared)
    machine.say("Evaluated {} ({}, {}) on {} images of {}".format(
        checkpoint.path, "averaged weights" if args.eval_ema else "weights", mode, stats["images"], args.data_set))
    machine.say("Acc@1 {acc1:.3f}  Acc@5 {acc5:.3f}  loss {loss:.6f}  images/s {images_per_s:.1f}".format(**stats))
    if stats["damaged"]:
        machine.say("{} damaged images, named above, count as wrong".format(stats["damaged"]))
    need_finite(stats)
    if args.export_weights and machine.world.is_main:
        save_export(restored.model, args, classes, mode, machine.say, (mean, std))
    return restored.model


def save_export(model, args, classes, mode, say, statistics=(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)):
    """`--export-weights`: the model's weights, with what is needed to run them; statistics: (mean, deviation) of the
    images that it takes."""
    export_weights(model, args.export_weights, how_to_run(args, classes, mode, crop_pct(args.data_set,
        args.input_size), statistics))
    say("The weights now lie in {}".format(args.export_weights))


def open_checkpoint(args, say):
    """What --resume names, and what --eval takes without it; None for a run from the start."""
    if args.eval and not args.resume:
        best = os.path.join(args.output_dir, BEST)
        if not os.path.isfile(best):
            raise UserError("--eval: there is no {}; train first, or name a checkpoint with --resume FILE".format(best))
        return load_checkpoint(best, "--resume")
    if args.eval:
        if args.resume == "auto":
            raise UserError("--resume auto is for training; --eval takes {} where --resume names no file".format(
                os.path.join(args.output_dir, BEST)))
        return open_trained(args.resume, "--resume")
    if args.resume == "auto":
        checkpoint = load_newest(args.output_dir, say)
        if checkpoint is None:
            say("--resume auto: {} holds no checkpoint yet, so training starts".format(args.output_dir))
        return checkpoint
    return load_checkpoint(args.resume, "--resume") if args.resume else None


def run(args, given):
    """One run of the recipe as `args` say, of which the command line names `given`; returns the model. Raises what
    errors.py lists."""
    world = processes.read_world(args.local_rank, args.world_size)
    if args.eval:
        check_evaluation(given)
    check_machine(args)
    say = Machine(torch.device("cpu"), world).say
    device = devices.select_device(args.device, world.local_rank, world.local_size, args.device_id, say)
    if device.type == "cpu":
        memory.keep_freed_memory(world.local_size)
        share_cores(world.local_size)
    precision = build_precision(device, args.amp_backend, args.opt_level, args.loss_scale, args.amp_dtype)
    channels_last = versions.prefers_channels_last(device.type) if args.channels_last is None else args.channels_last
    machine, timeout = Machine(device, world, precision, channels_last), timedelta(minutes=args.dist_timeout)
    processes.init_processes(world, device, args.dist_url, timeout)
    agreement = Agreement(timeout)
    checkpoint = same_for_all(lambda: open_checkpoint(args, say), agreement, say)
    if checkpoint is not None:
        checkpoint.name_ignored(say)
    args = combine(args, given, checkpoint, family_defaults(args.model), say)
    check_model_name(args.model)
    args = argparse.Namespace(**dict(
        vars(args), input_size=args.input_size or default_input_size(args.model),
        micro_batches=micro_batches(args, given, checkpoint, world.size, say)))
    if "data_path" in given:
        need_read(args.data_set, args.data_path)
    seed_everything(args.seed + world.rank)
    index = open_index(args, machine, agreement)
    if args.eval:
        return evaluate_checkpoint(args, given, checkpoint, machine, index)
    check_recipe(args, given)
    if args.write_teacher_labels:
        return write_labels(args, machine, agreement, index)
    try:
        return train(args, given, checkpoint, machine, agreement, index)
    except NonFiniteLoss as error:
        raise explained(error, args.output_dir, world.rank)


def main(argv=None):
    """The command line; returns the trained or evaluated model."""
    args, given = parse_args(argv)
    trains = not args.eval and not args.write_teacher_labels
    return command.run(lambda args: run(args, given), args, failing="training stopped: " if trains else "")


if __name__ == "__main__":
    main()
