"""Trains, distils and evaluates Evo-LeViT: the whole recipe, top to bottom. `python main.py --help` lists the flags."""
import argparse
import os
import sys
import time
from datetime import timedelta

LAUNCHER = os.getppid()  # before the imports, which take seconds, and in which a launcher can end

from runtime.tool import Parser, need, need_compiler, positive  # first: it makes torchvision importable on a CPU-only PyTorch
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler

import losses
from datasets import DATA_SETS, INAT_CATEGORIES, ShardSampler, build_dataset, build_train_sampler, build_transform
from engine import evaluate, label_epoch, train_one_epoch
from evo_vit import compat
from fix_timm.mixup import Mixup
from runtime import device as devices
from runtime import distributed
from runtime.checkpoint import (SaveFailed, adapt_for_finetuning, export_weights, load_checkpoint, load_newest,
                                load_weights, model_state, saved_settings)
from runtime.control import Agreement, Control, NonFiniteLoss, Signals, TooManyDamagedImages
from runtime.ema import ModelEma
from runtime.errors import UserError
from runtime.macs import count_macs
from runtime.matmul_rate import measure_matmul_rate
from runtime.models import (apply_token_schedule, build_model, check_model_name, default_input_size, fold_like,
                            keep_ratios)
from runtime.optimizer import build_optimizer
from runtime.output import prepare_output_dir, summarize, write_args, write_report, write_summary
from runtime.pictures import DamagedImage, EvaluationView, TrainingView, collate
from runtime.precision import build_precision, parse_loss_scale
from runtime.randomness import seed_everything
from runtime.scalars import Scalars
from runtime.state import TrainingState
from runtime.teacher import build_teacher
from runtime.teacher_labels import LabelWriter, TeacherLabels, label_settings


class Stopped(Exception):
    """A signal asked for it, and the state is saved."""


PUBLISHED_EPOCHS = 300
PUBLISHED_GLOBAL_BATCH = {224: 2048, 384: 1024}  # by image size: 8 cards with 256 and 128 images


def get_args_parser():
    """All flags, with the defaults of the published recipe."""
    parser = Parser(prog="python main.py", description="Evo-LeViT training and evaluation", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument

    add("--batch-size", type=positive, default=256, help="images in a process's batch")
    add("--epochs", type=positive, default=PUBLISHED_EPOCHS)
    add("--accum-steps", type=positive, default=1, metavar="N",
        help="batches in an update: one process trains as N of them would")

    # model
    add("--model", default="EvoLeViT_256", help="an Evo-LeViT, or with --distillation-type none any timm model")
    add("--input-size", type=positive, default=None, help="side of the images in pixels; the model's own if not given")
    add("--drop-path", type=float, default=None, metavar="SHARE", help="stochastic depth; the model's own if not given")
    add("--prune-warmup-epoch", type=int, default=0, metavar="EPOCH", help="no token selection before this epoch")
    add("--stage-wise-epoch", type=int, default=200, metavar="EPOCH",
        help="layer-wise with trade-off 0.5 before this epoch, stage-wise with the learned trade-off from it on")
    add("--model-ema", action="store_true", default=True, help="keep a moving average of the weights")
    add("--no-model-ema", action="store_false", dest="model_ema", help="keep none")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-force-cpu", action="store_true", help="keep the average in host memory")

    # optimiser
    add("--opt", default="adamw", metavar="OPTIMIZER", help="any of timm's")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+", default=None, metavar="BETA")
    add("--clip-grad", type=float, default=0.01, metavar="LIMIT", help="gradient clipping; 0 for none")
    add("--clip-mode", default="agc", choices=("agc", "norm", "value"))
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.025)

    # learning-rate schedule, stepped after each epoch
    add("--sched", default="cosine", choices=("cosine", "tanh", "step", "plateau"))
    add("--lr", type=float, default=5e-4, help="learning rate for a global batch of 512, scaled with it")
    add("--lr-noise", type=float, nargs="+", default=None, metavar="SHARE", help="epochs (as shares) with noisy rate")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--warmup-lr", type=float, default=1e-6)
    add("--min-lr", type=float, default=1e-5)
    add("--decay-epochs", type=float, default=30, help="of the step schedule")
    add("--warmup-epochs", type=int, default=5)
    add("--cooldown-epochs", type=int, default=10, help="read by timm's schedule; --epochs alone ends the run")
    add("--patience-epochs", type=int, default=10, help="of the plateau schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, help="of the step and plateau schedules")

    # augmentation
    add("--color-jitter", type=float, default=0.4, help="where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's name of an augmentation policy, or none")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    add("--repeated-aug", action="store_true", default=True, help="each image three times in a global batch")
    add("--no-repeated-aug", action="store_false", dest="repeated_aug", help="each image once in an epoch")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what random erasing fills in")
    add("--recount", type=positive, default=1, help="areas that random erasing fills")
    add("--mixup", type=float, default=0.8, help="alpha of mixup; 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0 for none")
    add("--cutmix-minmax", type=float, nargs=2, default=None, metavar=("MIN", "MAX"), help="shares of the side")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))

    # distillation
    add("--teacher-model", default="regnety_160", metavar="MODEL")
    add("--teacher-path", default="./regnety_160-a5fe301d.pth", metavar="FILE")
    add("--distillation-type", default="cls", choices=losses.TYPES)
    add("--distillation-alpha", type=float, default=0.5, help="weight of the distillation loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")
    add("--teacher-input-size", type=positive, default=None, metavar="PIXELS",
        help="shrink or enlarge the images for the teacher, which changes its labels; the student's size if not given")
    add("--write-teacher-labels", default="", metavar="DIR",
        help="train nothing, but store the teacher's labels of --epochs epochs with the crops of this run")
    add("--teacher-labels", default="", metavar="DIR",
        help="take stored labels, with their crops, over and over where there are fewer epochs of them, and no teacher")

    # data
    add("--data-path", "--data_path", default=None, metavar="DIR", help="folder with train/ and val/")
    add("--data-set", default="IMNET", choices=DATA_SETS, help="IMNET: any folder in ImageNet's layout")
    add("--inat-category", default="name", choices=INAT_CATEGORIES)
    add("--num_workers", "--num-workers", type=int, default=None,
        help="data-loading processes of each process; if not given 10, or its share of the cores where that is less")
    add("--jpeg-draft", action="store_true",
        help="decode JPEGs at a half, a quarter or an eighth of their size where a crop is twice as much larger than the image")
    add("--pin-mem", action="store_true", default=True, help="page-locked host memory, where the device is no CPU")
    add("--no-pin-mem", action="store_false", dest="pin_mem")

    # precision
    add("--amp-backend", default="auto", choices=("auto", "apex", "native", "none"),
        help="auto: on an NPU apex if it is installed, else native; on CUDA native; on a CPU none")
    add("--opt-level", default=None, choices=("O0", "O1", "O2"),
        help="O0 float32, O1 mixed precision (bf16 on a CPU), O2 apex's; if not given O1, on a CPU O0")
    add("--loss-scale", type=parse_loss_scale, default=None, metavar="SCALE",
        help="a number or dynamic; if not given 128 on an NPU, else dynamic")

    add("--amp-dtype", default=None, choices=("fp16", "bf16"),
        help="of native mixed precision; if not given fp16, on a CPU bf16")

    # speed, at the same numbers but for rounding
    add("--compile", action="store_true", help="compile model and teacher by torch.compile; takes minutes at the start")
    add("--channels-last", action="store_true", default=None,
        help="memory format of images and convolutions; if not given on CPUs and CUDA devices with PyTorch 2")
    add("--no-channels-last", action="store_false", dest="channels_last")

    # the run
    add("--output_dir", "--output-dir", default="save", metavar="DIR")
    add("--tensorboard", action="store_true", help="also write log.txt's figures for TensorBoard, to DIR/tensorboard")
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="auto: npu, then cuda, then cpu")
    add("--device_id", "--device-id", type=int, default=0, metavar="CARD", help="the first process's card")
    add("--max-steps", type=positive, default=None, metavar="N", help="end the run after N updates, to measure speed")
    add("--seed", type=int, default=0)
    add("--finetune", default="", metavar="FILE", help="start from the weights of another data set or image size")
    add("--resume", default="", metavar="FILE",
        help="go on from this checkpoint, or evaluate it; auto: the newest good one in --output_dir, if there is one")
    add("--save-every-steps", type=positive, default=None, metavar="N", help="save inside an epoch, too, every N updates")
    add("--save-every-minutes", type=float, default=None, metavar="M", help="save inside an epoch, too, every M minutes")
    add("--max-bad-images", type=int, default=50, metavar="N", help="stop when more picture files cannot be decoded")
    add("--skip-nonfinite", type=int, default=0, metavar="N", help="leave out up to N updates in a row without finite loss")
    add("--dist-timeout", type=float, default=30, metavar="MINUTES", help="end the job when a process is not heard of")
    add("--export-weights", default="", metavar="FILE", help="write the weights at the end as safetensors")
    add("--start_epoch", "--start-epoch", type=int, default=0, metavar="EPOCH")
    add("--eval", action="store_true", help="evaluate --resume FILE, or DIR/best_checkpoint.pth of --output_dir")
    add("--eval-ema", action="store_true", help="evaluate the averaged weights")
    add("--dist-eval", action="store_true", default=True, help="share the validation images out, each counted once")
    add("--no-dist-eval", action="store_false", dest="dist_eval", help="every process evaluates all of them")
    add("--world_size", "--world-size", type=int, default=None, help="checked against the launcher; need not be given")
    add("--dist_url", "--dist-url", default="env://", help="where the processes meet")
    add("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def parse_args(argv=None):
    """The flags, and the set of those that the command line names."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return args, set(vars(parser.parse_args(argv)))


def take_from_checkpoint(args, given, saved):
    """For --eval: what the command line leaves open is as in the run that wrote the checkpoint (saved_settings)."""
    for name in ("model", "input_size", "data_set", "data_path", "inat_category", "prune_warmup_epoch",
                 "stage_wise_epoch"):
        if name not in given and name in saved:
            setattr(args, name, saved[name])


def check_machine(args):
    """Raises UserError for flags that this machine cannot serve, of training and evaluation alike."""
    if args.compile:
        need_compiler("--compile")
    if args.export_weights:
        need("--export-weights", "safetensors")
        folder = os.path.dirname(os.path.abspath(args.export_weights))
        if os.path.isdir(args.export_weights) or not os.access(folder, os.W_OK):
            raise UserError("--export-weights: {} cannot be written; name a file in a folder that is there".format(
                args.export_weights))


def check_recipe(args):
    """Raises UserError for flags that do not go together."""
    mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixup and args.batch_size % 2:
        raise UserError("--batch-size {} is odd, and mixup and CutMix mix pairs; use an even one, or --mixup 0 --cutmix 0"
                        .format(args.batch_size))
    if args.jpeg_draft and (args.data_set in ("CIFAR", "DIGITS") or (args.input_size or 64) <= 32):
        raise UserError("--jpeg-draft is for data sets of large picture files, which --data-set {} with images of {} pixels "
                        "is not".format(args.data_set, args.input_size))
    if (args.teacher_labels or args.write_teacher_labels) and args.distillation_type == "none":
        raise UserError("--distillation-type none has no teacher whose labels could be stored; leave {} out".format(
            "--teacher-labels" if args.teacher_labels else "--write-teacher-labels"))
    if args.teacher_labels and args.write_teacher_labels:
        raise UserError("--write-teacher-labels writes labels and --teacher-labels reads them; use one at a time")
    if args.tensorboard:
        need("--tensorboard", "tensorboard")
    if args.start_epoch < 0 or args.start_epoch >= args.epochs:
        raise UserError("--start_epoch {}: the epochs go from 0 to {}".format(args.start_epoch, args.epochs - 1))
    return mixup


def build_loader(dataset, args, device, world, **kwargs):
    """A DataLoader with the recipe's workers."""
    workers = args.num_workers
    if workers is None:
        workers = min(10, (os.cpu_count() or 1) // world.local_size)
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, pin_memory=args.pin_mem and device.type != "cpu", collate_fn=collate,
        **dict(kwargs, **compat.persistent_workers(workers)))


def build_train_loader(args, device, world):
    """(the training images' loader, its sampler, number of images, names of the classes)."""
    transform = build_transform(True, args.data_set, args.input_size, args.color_jitter, args.aa, args.train_interpolation,
                                args.reprob, args.remode, args.recount, args.jpeg_draft)
    dataset = build_dataset(True, args.data_set, args.data_path, transform, args.inat_category, args.jpeg_draft)
    sampler = build_train_sampler(dataset, args.batch_size, world.rank, world.size, args.accum_steps, args.repeated_aug,
                                  args.seed)
    return build_loader(TrainingView(dataset), args, device, world, batch_sampler=sampler), sampler, len(dataset), dataset.classes


def build_val_loader(args, device, world):
    """The validation images, each process's share of them with --dist-eval, and the names of the classes."""
    transform = build_transform(False, args.data_set, args.input_size)
    dataset = build_dataset(False, args.data_set, args.data_path, transform, args.inat_category)
    sharded = args.dist_eval and world.size > 1
    sampler = ShardSampler(dataset, world.rank, world.size) if sharded else None
    view = EvaluationView(dataset, args.input_size)
    return build_loader(view, args, device, world, batch_size=args.batch_size, sampler=sampler), dataset.classes, sharded


def describe(model, args, device, precision, world, say):
    """The first lines of a run: what is computed, and where."""
    parameters = sum(p.numel() for p in model.parameters())
    say("Model: {}, {:,} parameters, {:,.1f} M FLOPs (multiply-adds) for an image of {} pixels".format(
        args.model, parameters, count_macs(model, args.input_size) / 1e6, args.input_size))
    say("Device: {} x {}, precision {}, torch {torch}, torchvision {torchvision}, timm {timm}".format(
        device.type, world.size, precision.name, **compat.versions()))
    notice = compat.untested_notice()
    if notice:
        say("Warning: " + notice)
    return parameters


def describe_training(args, global_batch, world, images, updates, lr, say):
    """The lines on which two runs of the same flags may differ, with a warning where they are not the published ones."""
    say("Data: {}, {:,} training images".format(args.data_set, images))
    say("Global batch: {} = {} images x {} processes x {} accumulation steps".format(
        global_batch, args.batch_size, world.size, args.accum_steps))
    say("Learning rate: {:.4g} after scaling ({:.4g} x {} / 512)".format(lr, args.lr, global_batch))
    say("Updates: {} per epoch, {} epochs".format(updates, args.epochs))
    published = PUBLISHED_GLOBAL_BATCH.get(default_input_size(args.model))
    if args.model.startswith("EvoLeViT") and (global_batch, args.epochs) != (published, PUBLISHED_EPOCHS):
        say("Warning: the published accuracy of {} was reached with a global batch of {} and {} epochs, this run has {} "
            "and {}; --accum-steps makes up for missing devices".format(
                args.model, published, PUBLISHED_EPOCHS, global_batch, args.epochs))


def evaluate_checkpoint(args, checkpoint, epoch, device, precision, world, say):
    """`--eval`: prints top-1, top-5, loss and images/s of the checkpoint, and returns the model."""
    key = "model_ema" if args.eval_ema else "model"
    state = model_state(checkpoint, args.resume, "--resume", key)
    check_model_name(args.model)
    args.input_size = args.input_size or default_input_size(args.model)
    loader, classes, sharded = build_val_loader(args, device, world)
    model = build_model(args.model, len(classes), args.input_size,
                        distillation=any(key.startswith("head_dist.") for key in state))
    load_weights(fold_like(state, model), state, args.model, args.resume, "--resume")
    describe(model, args, device, precision, world, say)
    mode = "as built"
    if epoch is not None:
        mode = apply_token_schedule(model, max(epoch, 0), args.prune_warmup_epoch, args.stage_wise_epoch)
    channels_last = uses_channels_last(args, device)
    model, _ = precision.prepare(arrange(model.to(device), args, device, channels_last, frozen=True))
    with compat.frozen_weights(device.type):
        stats = evaluate(loader, model, device, sharded, world.is_main, precision, channels_last)
    say("Evaluated {} ({}, {}) on {} images of {}".format(
        args.resume, "averaged weights" if args.eval_ema else "weights", mode, stats["images"], args.data_set))
    say("Acc@1 {acc1:.3f}  Acc@5 {acc5:.3f}  loss {loss:.4f}  images/s {images_per_s:.1f}".format(**stats))
    if stats["damaged"]:
        say("{} damaged images, named above, count as wrong".format(stats["damaged"]))
    if args.export_weights and world.is_main:
        save_export(model, args, classes, say)
    return model


def save_export(model, args, classes, say):
    """`--export-weights`: the model's weights, with what --eval needs to build it again."""
    export_weights(model, args.export_weights, {"classes": classes, "args": {
        name: getattr(args, name) for name in ("model", "input_size", "data_set", "inat_category")}})
    say("The weights now lie in {}".format(args.export_weights))


def uses_channels_last(args, device):
    """The memory format that the flags ask for, or that suits the device."""
    return compat.prefers_channels_last(device.type) if args.channels_last is None else args.channels_last


def arrange(model, args, device, channels_last, frozen=False):
    """`model` in its memory format, and with --compile compiled when it is first called (frozen: see compile_module)."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        compat.compile_module(model, device.type, args.model.startswith("EvoLeViT"), frozen)
    return model


def build_criterion(args, mixup_active, num_classes, teacher):
    """(the distillation loss over the base criterion that suits the labels, Mixup or None)."""
    mixup_fn = None
    if mixup_active:
        mixup_fn = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                         args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
        base = SoftTargetCrossEntropy()
    elif args.smoothing:
        base = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base = torch.nn.CrossEntropyLoss()
    return losses.DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha,
                                   args.distillation_tau), mixup_fn


def find_unused(model, args, criterion, mixup_active, num_classes, device, world):
    """{mode: names of the parameters that have no gradient in it} for every mode of the schedule."""
    unused = {}
    images = torch.zeros(2, 3, args.input_size, args.input_size, device=device)
    labels = torch.full((2, num_classes), 1 / num_classes, device=device) if mixup_active else \
        torch.zeros(2, dtype=torch.int64, device=device)
    for epoch in range(args.epochs):
        mode = apply_token_schedule(model, epoch, args.prune_warmup_epoch, args.stage_wise_epoch)
        if mode not in unused:
            unused[mode] = distributed.parameters_without_gradient(model, criterion, images, labels) if world.size > 1 else []
    return unused


def train(args, given, checkpoint, path, device, precision, world, say):
    """The recipe itself, going on from `checkpoint`, read from `path`, if there is one; returns the trained model."""
    mixup_active = check_recipe(args)
    check_model_name(args.model)
    args.input_size = args.input_size or default_input_size(args.model)
    distil = args.distillation_type != "none"

    train_loader, sampler, images, classes = build_train_loader(args, device, world)
    num_classes = len(classes)
    val_loader, _, sharded = build_val_loader(args, device, world)

    model = build_model(args.model, num_classes, args.input_size, distil, args.drop_path)
    if args.finetune:
        state = model_state(load_checkpoint(args.finetune, "--finetune"), args.finetune, "--finetune")
        state, left_out = adapt_for_finetuning(state, model)
        if not state:
            raise UserError("--finetune: no tensor of {} fits {}".format(args.finetune, args.model))
        model.load_state_dict(state, strict=False)
        say("Finetuning from {}; of its tensors left out: {}".format(args.finetune, ", ".join(left_out) or "none"))
    channels_last = uses_channels_last(args, device)
    labels = teacher = None
    if args.teacher_labels:
        labels = TeacherLabels(args.teacher_labels,
                               label_settings(args, world.size * args.accum_steps, images, num_classes))
        say("Teacher labels: {} epochs in {}".format(labels.epochs, args.teacher_labels))
    elif distil and args.distillation_alpha != 0:
        teacher = build_teacher(args, num_classes, device, precision.dtype, channels_last)

    n_parameters = describe(model, args, device, precision, world, say)
    flops = 2 * (3 * count_macs(model, args.input_size) + (
        count_macs(teacher.model, args.teacher_input_size or args.input_size) if teacher is not None else 0))  # of a training image
    matmul_rate = measure_matmul_rate(device, precision.dtype) * world.size
    model.to(device)
    base_lr = args.lr
    args.lr = base_lr * args.batch_size * world.size * args.accum_steps / 512
    optimizer = build_optimizer(args, model, device, precision.backend)
    lr_scheduler, _ = create_scheduler(args, optimizer)
    scaled_lr, args.lr = args.lr, base_lr
    model_ema = None
    if args.model_ema:
        model_ema = ModelEma(model, args.model_ema_decay)
        if args.model_ema_force_cpu:
            model_ema.module.cpu()
    criterion, mixup_fn = build_criterion(args, mixup_active, num_classes, teacher)
    unused = find_unused(model, args, criterion, mixup_active, num_classes, device, world)
    model, optimizer = precision.prepare(arrange(model, args, device, channels_last), optimizer, teacher)
    if args.compile and teacher is not None:
        compat.compile_module(teacher.model, device.type, fullgraph=False, frozen=True)

    global_batch = args.batch_size * world.size * args.accum_steps
    describe_training(args, global_batch, world, images, sampler.updates, scaled_lr, say)

    args.processes, args.global_batch = world.size, global_batch
    state = TrainingState(model, model_ema, optimizer, lr_scheduler, precision, classes, args)
    if checkpoint is not None:
        state.restore(checkpoint, path, "start_epoch" in given, global_batch, say)
    elif args.start_epoch and args.sched != "plateau":
        lr_scheduler.step(args.start_epoch - 1)

    if world.is_main:
        prepare_output_dir(args.output_dir, checkpoint is None, state.size_on_disk(), say)
        write_args(args.output_dir, args)
        state.write_log()
    scalars = Scalars(args.output_dir, state.log) if args.tensorboard and world.is_main else None
    distributed.barrier()
    agreement = Agreement(timedelta(minutes=args.dist_timeout))
    start, updates = time.time(), 0
    parallel = parallel_mode = None
    with Signals() as signals:
        control = Control(agreement, signals, args.save_every_steps, args.save_every_minutes, args.max_bad_images,
                          args.skip_nonfinite)

        def save_inside_epoch(epoch_updates, loss_sum):
            state.progress = {"images": epoch_updates * global_batch, "loss_sums": agreement.gather(loss_sum)}
            if world.is_main:
                state.save()
            distributed.barrier()  # no process leaves while rank 0 still writes
            if control.stop:
                raise Stopped

        for epoch in range(state.epoch, args.epochs):
            epoch_start = time.time()
            mode = apply_token_schedule(model, epoch, args.prune_warmup_epoch, args.stage_wise_epoch)
            if model_ema is not None:
                apply_token_schedule(model_ema.module, epoch, args.prune_warmup_epoch, args.stage_wise_epoch)
            if mode != parallel_mode:  # layer-wise and stage-wise training use different parameters
                parallel, parallel_mode = distributed.parallelize(model, device, unused[mode], device.type != "npu"), mode
            done = state.done(global_batch, world.rank)
            sampler.set_epoch(epoch if labels is None else labels.crop_epoch(epoch), done[0])
            train_stats = train_one_epoch(
                parallel, criterion, train_loader, optimizer, device, epoch, control, args.accum_steps, args.clip_grad,
                args.clip_mode, model_ema, mixup_fn, world.size, world.rank, world.is_main, precision,
                args.max_steps and args.max_steps - updates, args.seed, done, save_inside_epoch, channels_last, labels)
            train_stats["train_seconds"] = time.time() - epoch_start
            train_stats["mfu"] = flops * train_stats["train_images_per_s"] / matmul_rate
            distributed.broadcast_buffers(model)
            test_stats = evaluate(val_loader, model, device, sharded, world.is_main, precision, channels_last)
            lr_scheduler.step(epoch, test_stats["acc1"])
            best = test_stats["acc1"] > state.max_accuracy
            state.max_accuracy = max(state.max_accuracy, test_stats["acc1"])
            log = dict(train_stats, epoch=epoch, mode=mode, keep_ratios=keep_ratios(model), seconds=time.time() - epoch_start,
                       peak_memory_mb=devices.peak_memory_mb(device), n_parameters=n_parameters,
                       damaged_images=control.damaged)
            log.update(("test_" + name, value) for name, value in test_stats.items())
            state.log.append(log)
            state.epoch, state.progress = epoch + 1, None
            if world.is_main:
                state.save(best)
            if scalars is not None:
                scalars.write(log)
            say("Epoch {epoch} ({mode}): train loss {train_loss:.4f}, {train_images_per_s:.1f} images/s ({mfu:.0%} of the "
                "matmul rate, {waiting_for_data:.0%} waiting for data); test Acc@1 {test_acc1:.3f}, Acc@5 {test_acc5:.3f}, "
                "loss {test_loss:.4f}; best Acc@1 {best:.3f}".format(best=state.max_accuracy, **log))
            distributed.barrier()
            updates += train_stats["updates"] - done[0]
            if updates == args.max_steps:
                break
            if agreement.total(int(signals.stop))[0] and state.epoch < args.epochs:
                raise Stopped
    if world.is_main:
        write_summary(args.output_dir, dict(summarize(state.log, global_batch), model=args.model, device=device.type,
                                            processes=world.size, batch_size=args.batch_size, updates=updates,
                                            precision=precision.name, best_acc1=state.max_accuracy,
                                            seconds=time.time() - start))
        if args.export_weights:
            save_export(model, args, classes, say)
    say("Training time {}; {} holds the weights of the last epoch and of the best".format(
        timedelta(seconds=int(time.time() - start)), args.output_dir))
    return model


def write_labels(args, device, precision, world, say):
    """`--write-teacher-labels`: stores what the teacher says of --epochs epochs' crops; epochs that are stored stay."""
    mixup_active = check_recipe(args)
    check_model_name(args.model)
    args.input_size = args.input_size or default_input_size(args.model)
    loader, sampler, images, classes = build_train_loader(args, device, world)
    num_classes = len(classes)
    channels_last = uses_channels_last(args, device)
    teacher = build_teacher(args, num_classes, device, precision.dtype, channels_last)
    precision.prepare(teacher)
    if args.compile:
        compat.compile_module(teacher.model, device.type, fullgraph=False, frozen=True)
    criterion, mixup_fn = build_criterion(args, mixup_active, num_classes, teacher)
    replicas = world.size * args.accum_steps
    writer = LabelWriter(args.write_teacher_labels, label_settings(args, replicas, images, num_classes), world.is_main)
    own = [world.rank * args.accum_steps + i for i in range(args.accum_steps)]
    say("Teacher: {}, labels of {:,} images x {} epochs".format(
        args.teacher_model, sampler.updates * args.batch_size * replicas, args.epochs))
    for epoch in range(args.epochs):
        if all(writer.has(epoch, replica) for replica in own):
            continue
        sampler.set_epoch(epoch)
        labels = label_epoch(loader, criterion, device, epoch, args.accum_steps, mixup_fn, world.size, world.rank,
                             world.is_main, precision, args.seed, channels_last)
        for replica, batches in zip(own, labels):
            writer.write(epoch, replica, batches)
    distributed.barrier()
    say("The labels lie in {}; train with --teacher-labels {}".format(args.write_teacher_labels, args.write_teacher_labels))
    return teacher


def run(args, given):
    """One run of the recipe as `args` say; returns the model. Raises UserError for a user's mistake."""
    world = distributed.read_world(args.local_rank, args.world_size)

    def say(text):
        if world.is_main:
            print(text, flush=True)

    check_machine(args)
    checkpoint, path = None, args.resume
    if args.eval and not args.resume:
        args.resume = os.path.join(args.output_dir, "best_checkpoint.pth")
        if not os.path.isfile(args.resume):
            raise UserError("--eval: there is no {}; train first, or name a checkpoint with --resume FILE"
                            .format(args.resume))
    if args.resume == "auto" and not args.eval:
        checkpoint, path = load_newest(args.output_dir, say)
        if checkpoint is None:
            say("--resume auto: {} holds no checkpoint yet, so training starts".format(args.output_dir))
    elif args.resume:
        checkpoint = load_checkpoint(args.resume, "--resume")
    device = devices.select_device(args.device, world.local_rank, world.local_size, args.device_id, say)
    if device.type == "cpu":
        devices.keep_freed_memory()
    precision = build_precision(device, args.amp_backend, args.opt_level, args.loss_scale, args.amp_dtype)
    seed_everything(args.seed + world.rank)
    distributed.init_processes(world, device, args.dist_url, timedelta(minutes=args.dist_timeout))
    if args.eval:
        saved = saved_settings(checkpoint, args.resume, "--resume")
        take_from_checkpoint(args, given, saved)
        return evaluate_checkpoint(args, checkpoint, saved.get("epoch"), device, precision, world, say)
    if args.write_teacher_labels:
        return write_labels(args, device, precision, world, say)
    return train(args, given, checkpoint, path, device, precision, world, say)


def main(argv=None):
    """The command line; returns the trained or evaluated model."""
    args, given = parse_args(argv)
    try:
        return run(args, given)
    except UserError as error:
        tell_error("error: {}".format(error))
        sys.exit(2)
    except Stopped:
        if is_first():
            print("Stopped as asked; to go on: the same command with --resume auto", flush=True)
        sys.exit(0)
    except KeyboardInterrupt:  # training itself stops by way of Signals
        if is_first():
            print("Interrupted", file=sys.stderr)
        sys.exit(130)
    except NonFiniteLoss as error:
        path = write_report(args.output_dir, error)
        print("error: training stopped: {} in epoch {epoch}, update {update}, at learning rate {lr:.3g}, loss scale "
              "{loss_scale}; {} names the files of the batch".format(error, path, **error.report), file=sys.stderr)
        sys.exit(1)
    except (TooManyDamagedImages, DamagedImage, SaveFailed) as error:
        # of what a data loader's worker raised, the last line is the sentence, before it stands its traceback
        tell_error("error: training stopped: {}".format(str(error).strip().split("\n")[-1]))
        sys.exit(1)
    finally:
        distributed.close_processes()  # after the sentence: the others fail as soon as this one leaves


def is_first():
    return os.environ.get("RANK", "0") == "0"


def tell_error(text):
    """Prints `text` on standard error. As a rule all processes of a run meet the same error, and the launcher ends with the
    first of them, most launchers with all others; so another one speaks only if both are still there three seconds later."""
    if not is_first():
        time.sleep(3)
        if os.getppid() != LAUNCHER:
            return
        text = "process {}: {}".format(os.environ["RANK"], text)
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
