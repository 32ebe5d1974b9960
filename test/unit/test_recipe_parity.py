"""The recipe's pieces agree with the published ones: sampler, losses, optimiser groups, schedule, and whole steps."""
import argparse
import hashlib

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, load_json, relative_error
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler

import samplers
from engine import Learner
from flags import get_args_parser
from losses import DistillationLoss
from runtime.learning.models import apply_token_schedule
from runtime.machine.machine import Machine
from samplers import OnceSampler, RASampler, ShardSampler, TrainingBatchSampler


def published_args(**changes):
    return argparse.Namespace(**dict(vars(get_args_parser().parse_args([])), **changes))


def test_repeated_augmentation_hands_out_the_published_indices():
    cases = load_json("sampler")
    assert cases
    for case in cases:
        sampler = RASampler(range(case["length"]), case["num_replicas"], case["rank"])
        sampler.set_epoch(case["epoch"])
        indices = list(sampler)
        assert (len(sampler), len(indices)) == (case["len"], case["count"])
        assert indices[:40] == case["first"]
        assert hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest() == case["sha256"]


@given(length=st.integers(1, 255), replicas=st.integers(1, 8))
def test_repeated_augmentation_also_serves_small_data_sets(length, replicas):
    for rank in range(replicas):
        sampler = RASampler(range(length), replicas, rank)
        indices = list(sampler)
        assert len(indices) == len(sampler) == length // replicas
        assert all(0 <= index < length for index in indices)


@given(length=st.integers(0, 300), world=st.integers(1, 8))
def test_sharded_evaluation_sees_every_image_once(length, world):
    seen = [i for rank in range(world) for i in ShardSampler(range(length), rank, world)]
    assert sorted(seen) == list(range(length))


def test_accumulation_hands_out_the_images_of_as_many_processes():
    data = range(700)
    one = TrainingBatchSampler([RASampler(data, 4, r) for r in range(4)], 8, 0, 4, 0)
    many = [TrainingBatchSampler([RASampler(data, 4, r)], 8, 0, 4, r) for r in range(4)]
    for sampler in [one] + many:
        sampler.set_epoch(2)
    batches, parts = list(one), [list(sampler) for sampler in many]
    assert len(batches) == len(one) == 4 * len(many[0]) > 0
    assert batches == [batch for together in zip(*parts) for batch in together]


def test_distillation_losses_match_reference():
    facts = load_json("distillation_loss")
    random = np.random.RandomState(7)
    outputs = [torch.from_numpy(random.standard_normal((4, 10)) * 2) for _ in range(4)]
    teacher_logits = torch.from_numpy(random.standard_normal((4, 10)) * 2)
    labels = torch.from_numpy(random.standard_normal((4, 10))).softmax(1)
    assert facts["cases"]
    for case in facts["cases"]:
        criterion = DistillationLoss(SoftTargetCrossEntropy(), lambda images: teacher_logits, case["type"],
                                     case["alpha"], case["tau"])
        taken = outputs[0] if case["type"] == "none" else tuple(outputs)
        assert abs(criterion(None, taken, labels).item() / case["loss"] - 1) < 1e-7, case


def test_distillation_says_which_outputs_are_missing():
    criterion = DistillationLoss(SoftTargetCrossEntropy(), lambda images: None, "cls", 0.5, 1.0)
    with pytest.raises(ValueError, match="needs 4 outputs"):
        criterion(None, torch.zeros(2, 3), torch.zeros(2, 3))


def test_weight_decay_leaves_alone_what_the_published_recipe_does():
    for name, facts in load_json("optimizer_groups").items():
        model = timm.create_model(name, distillation=True)
        names = {id(p): n for n, p in model.named_parameters()}
        optimizer = create_optimizer(published_args(), model)
        free = [names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]]
        decayed = [p for g in optimizer.param_groups if g["weight_decay"] == 0.025 for p in g["params"]]
        assert sorted(free) == sorted(facts["no_decay"])
        assert len(free) + len(decayed) == len(names)


def test_learning_rate_of_every_epoch_matches_reference():
    for case in load_json("lr_schedule"):
        args = published_args(epochs=case["epochs"], lr=case["scaled_lr"])
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
        scheduler, _ = create_scheduler(args, optimizer)
        rates = []
        for epoch in range(case["epochs"]):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(epoch)
        assert np.allclose(rates, case["lr_in_epoch"], rtol=1e-9, atol=0)


def test_twelve_training_steps_follow_the_published_trajectory():
    facts = load_json("trajectory_EvoLeViT_128S")
    model = build(facts["model"], gain=facts["gain"], num_classes=10).train()
    args = published_args(epochs=facts["epochs"], lr=facts["lr"], warmup_epochs=1)
    optimizer = create_optimizer(args, model)
    scheduler, _ = create_scheduler(args, optimizer)
    logits = {}
    criterion = DistillationLoss(SoftTargetCrossEntropy(), lambda images: logits["teacher"], "cls", 0.5, 1.0)
    learner = Learner(model, criterion, optimizer, Machine(torch.device("cpu")), args.clip_grad, args.clip_mode)
    rates, seen = [], []
    for epoch in range(facts["epochs"]):
        apply_token_schedule(model, epoch, 0, stage_wise_epoch=2)
        rates.append(optimizer.param_groups[0]["lr"])
        for step in range(facts["steps_per_epoch"]):
            random = np.random.RandomState(1000 + 10 * epoch + step)
            images = torch.from_numpy(random.standard_normal((8, 3, 224, 224)))
            labels = torch.from_numpy(random.randint(0, 10, 8)).long()
            logits["teacher"] = torch.from_numpy(random.standard_normal((8, 10)))
            soft = 0.9 * torch.nn.functional.one_hot(labels, 10).double() + 0.01
            seen.append(learner.update([(images, soft, None)]))
        scheduler.step(epoch)
    assert np.allclose(rates, facts["lr_in_epoch"], rtol=1e-9)
    assert relative_error(seen, facts["losses"]) < 1e-6
    tensors = dict(model.named_parameters())
    tensors.update((k, b) for k, b in model.named_buffers() if "running" in k)
    for name, norm in facts["final_norms"].items():
        assert abs(tensors[name].detach().norm().item() - norm) < 1e-6 * max(norm, 1), name
    with torch.no_grad():
        final = model.eval()(torch.from_numpy(np.random.RandomState(77).standard_normal((2, 3, 224, 224))))
    assert relative_error(final, facts["final_logits"]) < 1e-6


@settings(max_examples=60)
@given(length=st.integers(8, 900), replicas=st.integers(1, 8), epoch=st.integers(0, 5), shuffle=st.booleans())
def test_the_sampler_without_repetition_is_pytorchs_index_for_index(length, replicas, epoch, shuffle):
    for rank in range(replicas):
        ours, theirs = (kind(range(length), replicas, rank, shuffle)
                        for kind in (OnceSampler, torch.utils.data.DistributedSampler))
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs) and len(ours) == len(theirs)


def test_samplers_deal_out_pieces_as_they_would_the_whole(monkeypatch):
    for kind in (OnceSampler, RASampler):
        whole = list(kind(range(3000), 2, 1))
        monkeypatch.setattr(samplers, "_PIECE", 7)
        assert list(kind(range(3000), 2, 1)) == whole
        monkeypatch.undo()
