"""The models as other projects use them: timm's interface, the kept tokens, and pip install."""
import os
import re
import sys

import commands
import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy

from evo_vit import compat  # noqa: F401


def small(**options):
    return timm.create_model("EvoLeViT_128S", **dict(dict(num_classes=7, img_size=112), **options)).eval()


@torch.no_grad()
def test_timms_interface():
    model, images = small(), torch.randn(2, 3, 112, 112)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 4, 384) and model.num_features == 384
    assert torch.equal(model.forward_head(tokens), model(images)) and model(images).shape == (2, 7)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 384)
    assert [head.l.out_features for head in model.get_classifier()] == [7, 7]
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 112, 112) and config["interpolation"] == "bicubic"
    from runtime.pictures.gallery import photographs
    assert create_transform(**config)(next(photographs(1)).image).shape == (3, 112, 112)


def test_what_timms_scripts_pass_along_is_accepted_or_refused_by_name():
    small(in_chans=3, drop_rate=0.0, global_pool=None, drop_path_rate=0.1)
    model = small(img_size=(112, 112))  # what they make of --img-size 112 and --input-size 3 112 112
    assert model.img_size == 112 and model.default_cfg["input_size"] == (3, 112, 112)
    with pytest.raises(ValueError, match="in_chans of EvoLeViT_128S is 3 and cannot be changed"):
        small(in_chans=1)


@torch.no_grad()
@pytest.mark.parametrize("stage_wise", [True, False])
@pytest.mark.parametrize("name", ["EvoLeViT_128S", "evo_deit_tiny_patch16_224"])
def test_of_no_image_there_are_no_logits(name, stage_wise):
    model = timm.create_model(name, num_classes=7, img_size=64).eval()
    model.set_stage_wise(stage_wise)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 7)


def test_training_gives_logits_for_timms_losses_unless_the_recipe_asks_for_all_heads():
    model, images = small().train(), torch.randn(2, 3, 112, 112)
    LabelSmoothingCrossEntropy()(model(images), torch.tensor([0, 1])).backward()
    assert model.head.l.weight.grad is not None and model.head_cls.l.weight.grad is None
    model.set_distilled_training(True)
    assert [logits.shape for logits in model(images)] == [(2, 7)] * 4
    assert model.eval()(images).shape == (2, 7)


@torch.no_grad()
def test_features_of_the_stages():
    model, images = small(), torch.randn(2, 3, 112, 112)
    last, features = model.forward_intermediates(images)
    assert torch.equal(last, model.forward_features(images))
    assert [tuple(f.shape) for f in features] == [(2, 128, 7, 7), (2, 256, 4, 4), (2, 384, 2, 2)]
    stages = model.forward_stages(images)
    for feature, (tokens, state) in zip(features, stages):
        assert torch.equal(feature.flatten(2).transpose(
            1, 2), tokens[:, 1:]) and state.score.shape[1] == tokens.shape[1] - 1
    assert [state.slow is None for _, state in stages] == [True, False, False]
    rows = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
    assert [tuple(f.shape) for f in rows] == [(2, 4, 384)]
    with pytest.raises(ValueError, match="the stages are 0 to 2"):
        model.forward_intermediates(images, indices=[3])
    for number in (4, -1):
        with pytest.raises(ValueError, match="the last {} stages: there are 3".format(number)):
            model.forward_intermediates(images, indices=number)
    with pytest.raises(ValueError, match="neither NCHW nor NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")
    if not hasattr(timm, "layers"):
        with pytest.raises(RuntimeError, match="features_only needs timm 1.0"):
            small(features_only=True)
        return
    torch.manual_seed(0)
    extractor = small(features_only=True, out_indices=(0, 2))
    torch.manual_seed(0)
    expected = small().forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(extractor(images), expected))
    assert extractor.feature_info.channels() == [128, 384] and extractor.feature_info.reduction() == [16, 64]


def readme_example(name):
    """The README's Python example, which README.zh.md has word for word but for comments."""
    with open(os.path.join(commands.ROOT, name), encoding="utf-8") as f:
        (example,) = re.findall("```python\n(.*?)```", f.read(), re.S)
    return example


@pytest.mark.slow
@pytest.mark.share
def test_the_readmes_ten_lines_run_on_an_installed_package(student, tmp_path):
    """Built and installed by pip into a folder of its own, far from the repository."""
    source, site, work = commands.copy_package(tmp_path / "source"), tmp_path / "site", tmp_path / "work"
    code, out, err = commands.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, source])
    assert code == 0, err
    (work / "save").mkdir(parents=True)
    os.symlink(os.path.join(student[0], "best_checkpoint.pth"), str(work / "save" / "best_checkpoint.pth"))
    example = readme_example("README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    strip = lambda text: re.sub("#.*", "", text)  # noqa: E731
    assert strip(readme_example("README.zh.md")) == strip(example)
    assert "112" in example
    code = "import evo_vit, torch; assert evo_vit.__file__.startswith({!r}); torch.manual_seed(0)\n{}".format(
        str(site), example.replace("112", "64"))  # the size of the fixture's student
    code, out, err = commands.run([sys.executable, "-c", code], cwd=work, env={"PYTHONPATH": str(site)})
    assert code == 0, err
    accuracy = float(re.search(r"([\d.]+) *%", out).group(1))
    print(out)
    assert accuracy > 20  # of a student that has seen 16 batches; the quickstart's reaches 98


def test_timms_layer_decay_knows_how_deep_a_parameter_lies():
    for name, blocks in (("EvoLeViT_128S", 9), ("evo_deit_tiny_patch16_224", 12)):
        model = timm.create_model(name, num_classes=7, img_size=112)
        matcher = model.group_matcher()
        named = [parameter for parameter, _ in model.named_parameters()]
        stem = {p for p in named if re.search(matcher["stem"], p)}
        places = {}
        for parameter in set(named) - stem:
            found = next((re.search(pattern, parameter) for pattern, _ in matcher["blocks"]
                          if re.search(pattern, parameter)), None)
            places.setdefault(int(found.group(1)) if found and found.groups() else None, []).append(parameter)
        assert all(parameter.startswith(("head", "norm")) for parameter in places.pop(None))
        assert "cls_token" in stem and sorted(places) == list(range(len(places))) and len(places) >= blocks
        if name.startswith("evo_deit"):
            assert {parameter.split(".")[0] for parameter in places[11]} == {"blocks", "qks", "vs", "norms", "projs"}


@torch.no_grad()
def test_new_heads_are_in_the_models_mode_and_full_blocks_are_counted_over_stages():
    model = small().eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 112, 112)).shape == (1, 3)
    full = [block.full for block in small(full_blocks=4).blocks if hasattr(block, "full")]
    assert full == [True] * 4 + [False] * 5
    modules = dict(model.named_modules())
    seen = []
    for info in model.feature_info:
        modules[info["module"]].register_forward_hook(lambda module, inputs, output: seen.append(
            (output if isinstance(output, torch.Tensor) else output[0]).shape))
    model(torch.randn(1, 3, 112, 112))
    assert [tuple(shape) for shape in seen] == [(1, 50, 128), (1, 17, 256), (1, 5, 384)]
