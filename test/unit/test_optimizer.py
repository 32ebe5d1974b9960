"""The optimiser's state moves between runs that compute alike in different ways."""
import argparse
import copy

import pytest
import torch

from engine import Learner
from losses import DistillationLoss
from runtime.learning.optimizer import build_optimizer, load_optimizer_state
from runtime.machine.machine import Machine
from runtime.machine.versions import fused_adamw

ARGS = argparse.Namespace(opt="adamw", lr=0.1, weight_decay=0.0, opt_eps=1e-8, opt_betas=None, momentum=0.9)


def trained(steps, channels_last, state=None):
    """(model, its optimiser) after updates by fixed gradients."""
    model = torch.nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, model.weight.numel()).view_as(model.weight))
        model.bias.zero_()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(ARGS, model, torch.device("cpu"))
    if state is not None:
        load_optimizer_state(optimizer, state, model)
    for _ in range(steps):
        model.weight.grad = torch.empty_like(model.weight).copy_(model.weight.detach() ** 3)
        model.bias.grad = torch.ones(6)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("first,then", [(False, True), (True, False), (True, True)])
def test_moments_follow_the_memory_format_of_their_parameter(first, then):
    state = trained(2, first)[1].state_dict()
    ours, optimizer = trained(1, then, state)
    expected = trained(1, False, trained(2, False)[1].state_dict())[0]
    assert torch.allclose(ours.weight, expected.weight, rtol=1e-6)
    for parameter, moments in optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()


def test_a_state_of_an_optimiser_that_is_not_fused_leaves_the_update_fused():
    model, optimizer = trained(2, True)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("fused", None)
    for moments in state["state"].values():
        moments["step"] = 2  # as PyTorch 1.5 writes it
    resumed, optimizer = trained(1, True, state)
    assert all(group.get("fused") is fused_adamw("cpu").get("fused") for group in optimizer.param_groups)
    assert torch.allclose(resumed.weight, trained(1, True, trained(2, True)[1].state_dict())[0].weight, rtol=1e-6)


def test_decay_starts_and_ends_in_a_resumed_run_and_a_state_of_one_group_is_read():
    def built(decay):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        return model, build_optimizer(argparse.Namespace(**dict(vars(ARGS), weight_decay=decay)), model,
                                      torch.device("cpu"))

    def moments(model, optimizer):
        return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in model.named_parameters()}

    def step(model, optimizer):
        model(torch.arange(12.0).view(4, 3).cos()).square().sum().backward()
        optimizer.step()
        return moments(model, optimizer)

    model, optimizer = built(0.0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0} and len(optimizer.param_groups) == 2
    expected = step(model, optimizer)
    one = torch.optim.AdamW(model.parameters(), lr=0.1)  # as versions up to 2.0 made it
    model.zero_grad()
    one_expected = step(model, one)
    for state, names in ((optimizer.state_dict(), expected), (one.state_dict(), one_expected)):
        for decay in (0.0, 0.3):
            other, resumed = built(decay)
            load_optimizer_state(resumed, state, other)
            assert {group["weight_decay"] for group in resumed.param_groups} == {0.0, decay}
            found = moments(other, resumed)
            assert set(found) == set(names) and all(torch.equal(found[name], names[name]) for name in names)


def test_a_counter_in_the_groups_goes_on_and_what_flags_say_does_not():
    model, optimizer = trained(1, False)
    optimizer.param_groups[0].update(lookahead_step=4, lr=0.5)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0].update(lookahead_step=0, lr=0.1)
    load_optimizer_state(optimizer, state, model)
    assert (optimizer.param_groups[0]["lookahead_step"], optimizer.param_groups[0]["lr"]) == (4, 0.1)


def test_an_update_that_is_left_out_leaves_no_trace_in_the_statistics():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
                                torch.nn.Linear(4 * 6 * 6, 2))
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, "none", 0.0, 1.0)
    learner = Learner(model, criterion, build_optimizer(ARGS, model, torch.device("cpu")),
                      Machine(torch.device("cpu")), may_skip=True)
    labels = torch.tensor([0, 1])

    def update(images, allowed):
        learner.update([(images, labels, None)], lambda loss: allowed)
        return {name: value.clone() for name, value in model.state_dict().items()}

    first = update(torch.randn(2, 3, 8, 8), True)
    after = update(torch.full((2, 3, 8, 8), float("inf")), False)
    assert all(torch.equal(first[name], after[name]) for name in first) and torch.isfinite(after["1.running_var"]).all()
    assert not torch.equal(first["1.running_mean"], update(torch.randn(2, 3, 8, 8), True)["1.running_mean"])
