"""Models do not disturb one another, and any supported image size runs."""
import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, images


@torch.no_grad()
def test_interleaved_models_and_a_copy_give_the_logits_they_give_alone():
    first, second = (build("EvoLeViT_128S", num_classes=10, img_size=size).eval() for size in (96, 128))
    second.set_stage_wise(False)
    ema = copy.deepcopy(first)
    alone = [first(images(96)), second(images(128)), ema(images(96))]
    steps = []  # the blocks of all three run in turn: each forward starts inside another one
    second.blocks[3].register_forward_hook(lambda *_: steps.append((first(images(96)), ema(images(96)))))
    together = second(images(128))
    assert torch.equal(together, alone[1])
    assert torch.equal(steps[0][0], alone[0]) and torch.equal(steps[0][1], alone[2])


@settings(max_examples=12)
@given(size=st.integers(4, 14).map(lambda n: 16 * n), classes=st.integers(2, 40), distillation=st.booleans(),
       stage_wise=st.booleans())
@torch.no_grad()
def test_any_multiple_of_16_and_class_count_runs(size, classes, distillation, stage_wise):
    model = timm.create_model("EvoLeViT_128S", num_classes=classes, distillation=distillation, img_size=size).eval()
    model.set_stage_wise(stage_wise)
    tokens, state = model.forward_tokens(torch.randn(2, 3, size, size))
    assert model.forward_head(tokens).shape == (2, classes)
    places = state.score.shape[1]
    assert tokens.shape[1] == 1 + places and state.slow.shape == (2, places // 2)
    for row in state.slow:
        assert len(set(row.tolist())) == len(row) and all(0 <= place < places for place in row.tolist())


@pytest.mark.parametrize("size", [48, 100, 0, (112, 128)])
def test_other_image_sizes_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 16"):
        from evo_vit import EvoLeViT
        EvoLeViT((128, 256, 384), 16, (4, 6, 8), (2, 3, 4), img_size=size)
