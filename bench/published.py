"""The published code itself as a contender: the models and the loss of a checkout of its repository
(https://github.com/YifanXu74/Evo-ViT), and its step by timm's clipping, optimiser and average as its engines call them.

The engines themselves cannot run everywhere: they want CUDA and a launcher. Whatever runs here is as they leave it: one
process, float32 in training of Evo-LeViT, fp16 autocast on CUDA else, batch norms folded in evaluation.
"""
import importlib
import os
import sys
import warnings
from argparse import Namespace

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer
from timm.utils import ModelEma, NativeScaler

from evo_vit.compat import TORCH, create_model
from runtime.errors import UserError
from runtime.learning.models import EVO_DEIT, apply_token_schedule, check_model_name, default_input_size
from runtime.machine.cost import count_macs
from runtime.machine.devices import synchronize

from . import contenders
from .plain import parallel

_MODULES = {"EvoLeViT": ("levit.evo_levit", "levit.evo_levit_384"), EVO_DEIT: ("deit.evo_deit",)}
_LOSSES = {"EvoLeViT": "levit.losses_levit", EVO_DEIT: "deit.losses_deit"}


def _import(folder, name):
    """The module `name` of the checkout `folder`. Raises UserError where there is none."""
    sys.path.insert(0, os.path.abspath(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that timm has moved
            return importlib.import_module(name)
    except Exception as error:  # whatever other people's modules raise
        raise UserError("--published {}: {} cannot be imported from there ({}); name a checkout of "
                        "https://github.com/YifanXu74/Evo-ViT".format(folder, name, error))
    finally:
        sys.path.pop(0)


def _model(folder, name, family, **options):
    """The model `name` as the checkout builds it."""
    for module in _MODULES[family]:
        make = getattr(_import(folder, module), name, None)
        if make is not None:
            return make(num_classes=contenders.CLASSES, **options)
    raise UserError("--published {}: it has no {}".format(folder, name))


def build(text, place, device) -> contenders.Contender:
    """The contender of `text`, "NAME,published" with teacher=... where it trains, at a turns.Place.

    Raises UserError where the checkout lacks it, or has it for another size only.
    """
    name, options = contenders.parse(place.task, text)
    family = EVO_DEIT if name.startswith(EVO_DEIT) else "EvoLeViT"
    if place.size != default_input_size(name):
        raise UserError("contender {}: the published {} takes images of {} pixels alone".format(
            text, name, default_input_size(name)))
    if TORCH < (1, 6):
        raise UserError("contender {}: the published code needs PyTorch 1.6 or newer".format(text))
    own = contenders.own_model(name, place.size, device, True)
    if place.task == "train":
        contenders.need_batch(text, own, place.batch)
        apply_token_schedule(own, 0, 0, 200)  # before epoch 200
    macs = place.batch * count_macs(own, place.size)
    images = torch.randn(place.batch, 3, place.size, place.size).to(device)
    if place.task == "inference":
        return contenders.Contender(_inference(place, name, family, images), place.batch, macs)
    teacher, teacher_name = None, options.get("teacher", "regnety_160" if family == "EvoLeViT" else "none")
    if teacher_name != "none":
        if family != "EvoLeViT":
            raise UserError("contender {}: the published code has no teacher for Evo-DeiT".format(text))
        check_model_name(teacher_name, "teacher")
        teacher = create_model(teacher_name, num_classes=contenders.CLASSES, global_pool="avg").to(device).eval()
    macs *= 3
    if teacher is not None:
        macs += place.batch * contenders.macs_of(text, teacher, teacher_name, place.size, "name another teacher")
    return contenders.Contender(_training(place, name, family, images, teacher), place.batch, macs)


def _inference(place, name, family, images):
    options = dict(distillation=True, fuse=True) if family == "EvoLeViT" else {}
    model = _model(place.published, name, family, **options).to(images.device).eval()

    def run():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a CPU
            with torch.cuda.amp.autocast():
                return model(images)
    return run


def _training(place, name, family, images, teacher):
    """A function that makes one update, as train_one_epoch does before epoch 200."""
    levit = family == "EvoLeViT"
    options = dict(distillation=teacher is not None) if levit else dict(
        drop_path_rate=0.0 if "tiny" in name else 0.1)  # main_deit.py's --drop-path
    model = _model(place.published, name, family, **options).to(images.device).train()
    model.stage_wise_prune = False
    if levit:
        model.set_learn_tradeoff(False)
    criterion = _import(place.published, _LOSSES[family]).DistillationLoss(
        SoftTargetCrossEntropy(), teacher, "none" if teacher is None else "cls", 0.5, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without CUDA the scaler does nothing
        scaler = NativeScaler()
    average = ModelEma(model, decay=0.99996, device="", resume="")
    shared = parallel(model)
    optimizer = create_optimizer(Namespace(opt="adamw", lr=1e-4, momentum=0.9, opt_eps=1e-8, opt_betas=None,
                                           weight_decay=0.025 if levit else 0.05), model)
    targets = torch.rand(place.batch, contenders.CLASSES).softmax(1).to(images.device)

    def loss_of():
        outputs = shared(images)
        if levit:
            return criterion(images, outputs, targets)
        return 0.5 * criterion(images, outputs[0], targets) + 0.5 * criterion(images, outputs[1], targets)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.cuda.amp.autocast(enabled=not levit):
                loss = loss_of()
        value = loss.item()
        optimizer.zero_grad()
        clip = dict(clip_grad=0.01, clip_mode="agc") if levit else dict(clip_grad=None)
        scaler(loss, optimizer, parameters=model.parameters(), create_graph=False, **clip)
        synchronize(images.device)
        average.update(model)
        return value
    return run
