"""The share of tokens that go the slow way may be set at any time, in both families."""
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import fill, images, relative_error

from bench import tradeoff
from evo_vit import EvoDeiT, EvoLeViT
from runtime.errors import UserError
from runtime.learning.normalization import Renormalize
from runtime.machine.machine import Machine

FAMILIES = {"deit": lambda **options: EvoDeiT(64, 2, num_classes=5, img_size=112, **options),
            "levit": lambda **options: EvoLeViT((16, 32, 48), 16, (1, 2, 3), (3, 2, 2), num_classes=5, img_size=112,
                                                **options)}
PATCHES = {"deit": (49, 49, 49), "levit": (49, 16, 4)}


def model_of(family, **options):
    model = FAMILIES[family](**options).double()
    fill(model, qk_gain=1.75)
    return model.eval()


@pytest.mark.parametrize("stage_wise", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_keeping_all_is_selecting_nothing_and_half_is_as_built(family, stage_wise):
    model, x = model_of(family), images(112)
    model.set_stage_wise(stage_wise)
    half = model(x)
    model.set_token_selection(False)
    none, ratios = model(x), model.keep_ratios()
    model.set_token_selection(True)
    model.set_keep_ratio(1)
    assert torch.equal(model(x), none) and model.keep_ratios() == ratios == [1, 1, 1]
    assert all(state.slow is None for _, state in model.forward_stages(x))
    model.set_keep_ratio(0.5)
    assert torch.equal(model(x), half) and not torch.equal(half, none)


@settings(max_examples=15)
@given(family=st.sampled_from(sorted(FAMILIES)), ratio=st.floats(0.001, 0.999), stage_wise=st.booleans())
@torch.no_grad()
def test_any_ratio_keeps_its_share_and_at_least_one(family, ratio, stage_wise):
    model, built = model_of(family), model_of(family, keep_ratio=ratio)
    for m in (model, built):
        m.set_stage_wise(stage_wise)
    model.set_keep_ratio(ratio)
    stages = model.forward_stages(images(112))
    for (tokens, state), patches in list(zip(stages, PATCHES[family]))[1:]:
        assert state.slow.shape == (2, max(int(patches * ratio), 1))
        assert all(len(set(row)) == len(row) and set(row) <= set(range(patches)) for row in state.slow.tolist())
    assert model.keep_ratios()[1:] == pytest.approx([ratio] * 2)
    assert model.keep_ratios() == built.keep_ratios() and torch.equal(model(images(112)), built(images(112)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_ratios_are_refused(family):
    model = FAMILIES[family]()
    for ratio in (0, -0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not above 0 and at most 1"):
            model.set_keep_ratio(ratio)
        with pytest.raises(ValueError, match="not above 0 and at most 1"):
            FAMILIES[family](keep_ratio=ratio)
    assert model.keep_ratios()[1:] == [0.5, 0.5]
    with pytest.raises(ValueError, match="full_blocks 0"):
        FAMILIES[family](full_blocks=0)


@torch.no_grad()
def test_the_first_blocks_may_keep_all_as_far_as_wished():
    x = images(112)
    for full, ratios in ((2, [0.75, 0.5, 0.5]), (6, [1, 0.75, 0.5]), (12, [1, 1, 1])):
        model = model_of("deit", full_blocks=full)
        logits = []
        for stage_wise in (True, False):
            model.set_stage_wise(stage_wise)
            logits.append(model(x))
        assert model.keep_ratios() == ratios
        assert (relative_error(*logits) < 1e-12) == (full == 12)
    model = timm.create_model("evo_deit_tiny_patch16_224", img_size=64, keep_ratio=0.25, full_blocks=8)
    assert model.keep_ratios() == [1, 1, 0.25]


TINY = "evo_deit_tiny_patch16_224"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function: bench/tradeoff.py's figures, here logits of one image, of a tiny model's checkpoint with 3 classes or
    others, on a data set of 3."""
    for number in range(3):
        folder = tmp_path / "val" / "class{}".format(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (80 * number,) * 3).save(str(folder / "one.png"))
    x = images(32).float()

    def evaluate(model, loader, machine):
        assert len(next(iter(loader))[1]) == 3
        return {"acc1": model.eval()(x), "nonfinite": 0}
    monkeypatch.setattr(tradeoff, "evaluate", evaluate)

    @torch.no_grad()
    def figures(ratios, classes=3, **content):
        model = timm.create_model(TINY, img_size=32, num_classes=classes)
        fill(model, qk_gain=1.75)
        path = str(tmp_path / "weights.pth")
        torch.save(dict(model=model.state_dict(), **content), path)
        return tradeoff.accuracies(path, TINY, 32, str(tmp_path), ratios, Machine(torch.device("cpu"))), model.eval()
    return figures


def test_accuracy_is_refused_for_another_number_of_classes(measured):
    with pytest.raises(UserError, match="was trained on 10 classes but 3 are needed here"):
        measured([0.5], classes=10)


def test_accuracy_over_the_ratios_is_that_with_selection(measured):
    half, all_tokens = measured([0.5, 1], mode="stage-wise, no token selection")[0]
    assert not torch.equal(half, all_tokens)
    assert torch.equal(half, measured([0.5], mode="stage-wise")[0][0])


@torch.no_grad()
def test_accuracy_is_that_of_images_as_the_checkpoint_wants_them(measured):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    (found,), model = measured([0.5], mean=mean, std=std)
    assert torch.allclose(found, model(Renormalize(mean, std)(images(32).float())), atol=1e-5)
