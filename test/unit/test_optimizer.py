"""The optimiser's state moves between runs that compute alike in different ways."""
import argparse

import pytest
import torch

from runtime.learning.optimizer import build_optimizer, load_optimizer_state
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
        load_optimizer_state(optimizer, state)
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
