"""Evo-DeiT agrees with the published implementation in float64 (data/README.md says how the numbers were made), and is
a model like any other of timm's."""
import argparse
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, draw, fill, images, load_arrays, load_json, relative_error
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler

import evo_vit.evo_deit
import evo_vit.tokens
from evo_vit import EvoDeiT, compat
from evo_vit.ops import drop_path
from evo_vit.weights import from_deit, resize_position_embedding

TINY = "evo_deit_tiny_patch16_224"
NAMES = [TINY, "evo_deit_small_patch16_384"]
PARAMETERS = {TINY: (5910800, 5717416), "evo_deit_small_patch16_224": (22436432, 22050664),
              "evo_deit_base_patch16_224": (87338192, 86567656), "evo_deit_small_patch16_384": (22582352, 22196584),
              "evo_deit_base_patch16_384": (87630032, 86859496)}
NARROW = "evo_deit_narrow"
CASES = {"eval_stage": (True, True), "eval_layer": (False, True), "eval_none": (True, False)}
TOLERANCE = 1e-9


@pytest.fixture(scope="module", autouse=True)
def narrow():
    evo_vit.evo_deit._register(NARROW, dict(embed_dim=64, num_heads=2, drop_path_rate=0.0), 64)


def published(name, **options):
    """The named model with the weights of its reference numbers, and these."""
    facts = load_json(name)
    return build(name, facts["gain"], facts["qk_gain"], **options), facts, load_arrays(name)


def set_mode(model, stage_wise, select=True):
    model.set_stage_wise(stage_wise)
    model.set_token_selection(select)


def small(distilled_training=True, **options):
    """A narrow model, with the weights of the rule."""
    model = timm.create_model(NARROW, **dict(dict(num_classes=7), **options)).double()
    model.set_distilled_training(distilled_training)
    fill(model, 1.25, 1.75)
    return model.eval()


# --------------------------------------------------------------------------------------------- the published numbers

@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_their_order_are_the_reference_ones(name):
    facts, model = load_json(name), timm.create_model(name)
    assert [[k, list(p.shape)] for k, p in model.named_parameters()] == facts["parameters"]
    assert [[k, list(b.shape)] for k, b in model.named_buffers()] == facts["buffers"] == []
    assert list(model.state_dict()) == facts["state_dict_keys"]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_every_size_has_the_published_number_of_parameters(name, monkeypatch):
    monkeypatch.setattr(evo_vit.evo_deit, "trunc_normal_", lambda tensor, std: tensor)  # its drawing takes seconds
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    size = int(name[-3:])
    model = timm.create_model(name)
    assert (count(model), count(timm.create_model(name, distillation=False))) == PARAMETERS[name]
    assert model.img_size == size and model.default_cfg["input_size"] == (3, size, size)
    drops = [0.0 if "tiny" in name else 0.1 * i / 11 for i in range(12)]
    assert [block.drop for block in model.blocks] == pytest.approx(drops)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_eval_logits_features_scores_and_kept_tokens_match_reference(name, case, monkeypatch):
    kept = []

    def recorded(score, count, rank=evo_vit.tokens.top):
        values, places = rank(score, count)
        kept.append(places)
        return values, places

    monkeypatch.setattr(evo_vit.tokens, "top", recorded)
    model, facts, arrays = published(name)
    set_mode(model.eval(), *CASES[case])
    tokens, state = model.forward_tokens(images(facts["input_size"]))
    assert relative_error(model.forward_head(tokens), arrays[case + "__logits"]) < TOLERANCE
    assert relative_error(model.forward_head(tokens, pre_logits=True), arrays[case + "__features"]) < TOLERANCE
    # the reference keeps the tokens in the order of the last selection and names each by its place in the grid
    order = torch.from_numpy(arrays[case + "__token_index"])
    assert relative_error(state.score.gather(1, order), arrays[case + "__global_attn"]) < TOLERANCE
    if case == "eval_none":
        assert state.slow is None and not kept and torch.equal(order, torch.arange(order.shape[1]).expand_as(order))
        return
    assert torch.equal(state.slow, order[:, :state.slow.shape[1]])
    assert np.array_equal(torch.stack(kept).numpy(), arrays[case + "__kept"])


@pytest.mark.parametrize("case", ["eval_stage", "eval_layer"])
@torch.no_grad()
def test_float32_keeps_the_same_tokens(case):
    model, facts, arrays = published(TINY)
    set_mode(model.float().eval(), *CASES[case])
    tokens, state = model.forward_tokens(images(224).float())
    expected = torch.from_numpy(arrays[case + "__kept"][-1].astype(np.int64))
    assert torch.equal(state.slow.sort(dim=1)[0], expected.sort(dim=1)[0])
    assert relative_error(model.forward_head(tokens), arrays[case + "__logits"]) < 1e-4


@pytest.mark.parametrize("case", ["train_stage", "train_layer"])
@pytest.mark.parametrize("name", NAMES)
def test_training_outputs_loss_and_gradients_match_reference(name, case):
    model, facts, arrays = published(name)
    set_mode(model.train(), case == "train_stage")
    tokens = model.forward_features(images(facts["input_size"]))
    outputs = model.forward_head(tokens)
    labels = torch.arange(2) * 7 % 1000
    losses = [F.cross_entropy(output, labels) for output in outputs]
    loss = 0.5 * losses[0] + 0.5 * losses[1]
    loss.backward()
    expected = facts[case]

    features = {"features": model.norm(tokens[:, 1:].mean(dim=1)), "class_features": model.norm_cls(tokens[:, 0])}
    for key, value in features.items():
        assert relative_error(value.detach(), arrays["{}__{}".format(case, key)]) < TOLERANCE
    assert len(outputs) == 2
    for i, output in enumerate(outputs):
        output = output.detach()
        assert relative_error(output[:, :16], arrays["{}__out{}".format(case, i)]) < TOLERANCE
        scale = output.abs().max().item()
        assert abs(output.mean().item() - expected["out_mean"][i]) < TOLERANCE * scale
        assert abs(output.std().item() - expected["out_std"][i]) < TOLERANCE * scale
        assert abs(losses[i].item() / expected["head_loss"][i] - 1) < TOLERANCE
    assert abs(loss.item() / expected["loss"] - 1) < TOLERANCE

    gradients = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    assert set(gradients) == set(expected["grad_norm"])
    for key, norm in expected["grad_norm"].items():
        assert abs(gradients[key] - norm) <= (TOLERANCE * norm if norm > 1e-9 else 1e-6), key


# --------------------------------------------------------------------------------------------- the published recipe

def recipe(**options):
    """timm's arguments as DeiT's recipe sets them."""
    return argparse.Namespace(**dict(dict(
        opt="adamw", opt_eps=1e-8, opt_betas=None, momentum=0.9, weight_decay=0.05, lr=5e-4, sched="cosine", epochs=300,
        lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, warmup_lr=1e-6, min_lr=1e-5, warmup_epochs=5,
        cooldown_epochs=10, patience_epochs=10, decay_epochs=30, decay_rate=0.1), **options))


def test_weight_decay_leaves_alone_what_the_published_recipe_does():
    facts, model = load_json("optimizer_groups_evo_deit"), timm.create_model(TINY)
    expected = facts["all models"]
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
              for group in create_optimizer(recipe(), model).param_groups}
    assert groups == {0.0: sorted(expected["no_decay"]), facts["weight_decay"]: sorted(expected["decay"])}


def test_learning_rate_of_every_epoch_matches_reference():
    for case in load_json("lr_schedule_evo_deit"):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=case["scaled_lr"])
        scheduler, _ = create_scheduler(recipe(epochs=case["epochs"], lr=case["scaled_lr"]), optimizer)
        rates = []
        for epoch in range(case["epochs"]):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(epoch)
        assert np.allclose(rates, case["lr_in_epoch"], rtol=1e-9, atol=0)


def test_twelve_training_steps_follow_the_published_trajectory():
    facts = load_json("trajectory_evo_deit_tiny_patch16_224")
    model = build(facts["model"], facts["gain"], facts["qk_gain"], num_classes=10).train()
    args = recipe(epochs=facts["epochs"], lr=facts["lr"], warmup_epochs=facts["warmup_epochs"])
    optimizer = create_optimizer(args, model)
    scheduler, _ = create_scheduler(args, optimizer)
    rates, losses = [], []
    for epoch in range(facts["epochs"]):
        model.set_stage_wise(epoch >= facts["stage_wise_from_epoch"])
        rates.append(optimizer.param_groups[0]["lr"])
        for step in range(facts["steps_per_epoch"]):
            random = np.random.RandomState(1000 + 10 * epoch + step)
            x = torch.from_numpy(random.standard_normal((8, 3, 224, 224)))
            labels = 0.9 * F.one_hot(torch.from_numpy(random.randint(0, 10, 8)).long(), 10).double() + 0.01
            pair = [-(labels * output.log_softmax(dim=1)).sum(dim=1).mean() for output in model(x)]
            loss = 0.5 * pair[0] + 0.5 * pair[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            assert relative_error([part.item() for part in pair], facts["head_losses"][len(losses) - 1]) < 1e-6
        scheduler.step(epoch)
    assert np.allclose(rates, facts["lr_in_epoch"], rtol=1e-9)
    assert relative_error(losses, facts["losses"]) < 1e-6
    for name, p in model.named_parameters():
        norm = facts["final_norms"][name]
        assert abs(p.detach().norm().item() - norm) < 1e-6 * max(norm, 1), name
    with torch.no_grad():
        final = model.eval()(torch.from_numpy(np.random.RandomState(77).standard_normal((2, 3, 224, 224))))
    assert relative_error(final, facts["final_logits"]) < 1e-6


def test_a_position_embedding_is_resized_as_in_the_published_fine_tuning():
    facts = load_json("pos_embed_resize_evo_deit")
    embedding = torch.from_numpy(draw("pos_embed", (1, 197, 192)))
    resized = resize_position_embedding(embedding, 577)
    assert list(resized.shape) == facts["shape"] and torch.equal(resized[:, 0], embedding[:, 0])
    assert abs(resized.norm().item() / facts["norm"] - 1) < TOLERANCE
    assert relative_error(resized[0].norm(dim=1), facts["row_norms"]) < TOLERANCE
    columns = len(facts["first_columns"][0])
    assert relative_error(resized[0, :, :columns], facts["first_columns"]) < TOLERANCE
    with pytest.raises(ValueError, match="of 197 rows cannot become one of 578"):
        resize_position_embedding(embedding, 578)


# --------------------------------------------------------------------------------------------- DeiT's weights

@torch.no_grad()
def test_a_deits_weights_make_its_blocks():
    deit = timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=64).double()
    fill(deit)
    model = timm.create_model(TINY, num_classes=7, img_size=64, distillation=False, keep_ratio=1).double().eval()
    model.load_state_dict(from_deit(deit.state_dict()))
    x = images(64)
    tokens = deit.patch_embed(x)
    tokens = torch.cat((deit.cls_token.expand(2, -1, -1), tokens), dim=1) + deit.pos_embed
    for block in deit.eval().blocks:
        tokens = block(tokens)
    assert relative_error(model.forward_features(x), tokens) < TOLERANCE
    assert relative_error(model(x), deit.head(deit.norm(tokens[:, 1:].mean(dim=1)))) < TOLERANCE


def test_a_distilled_deits_own_parts_are_left_out_and_missing_ones_are_named():
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=64)
    state, model = from_deit(deit.state_dict()), timm.create_model(TINY, num_classes=7, img_size=64)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert sorted(missing) == ["head_cls.bias", "head_cls.weight", "norm_cls.bias", "norm_cls.weight"]
    assert torch.equal(state["pos_embed"][:, 1:], deit.pos_embed[:, 2:])
    for name in ("blocks.0.ls1.gamma", "stem.weight"):
        with pytest.raises(ValueError, match=name + " is not a weight of a DeiT"):
            from_deit({name: torch.zeros(1)})


# --------------------------------------------------------------------------------------------- as a model of timm's

@torch.no_grad()
def test_timms_interface():
    model, x = small(), images(64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 16, 64) and model.num_features == 64
    assert torch.equal(model.forward_head(tokens), model(x)) and model(x).shape == (2, 7)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 64)
    assert model.get_classifier().out_features == 7 and model.fuse() is model
    assert model.default_cfg["input_size"] == (3, 64, 64) and model.default_cfg["crop_pct"] == 0.9
    names = list(model.state_dict())
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3 and list(model.state_dict()) == names
    assert [output.shape for output in model.train()(x)] == [(2, 3)] * 2
    model.eval().reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pytest.raises(ValueError, match="drop_rate of evo_deit_narrow is 0.0 and cannot be changed"):
        small(drop_rate=0.1)


def test_training_gives_logits_for_timms_losses_unless_the_recipe_asks_for_both_heads():
    model, x = small().train(), images(64).float()
    model.float()
    assert [logits.shape for logits in model(x)] == [(2, 7)] * 2
    model.set_distilled_training(False)
    LabelSmoothingCrossEntropy()(model(x), torch.tensor([0, 1])).backward()
    assert model.head.weight.grad is not None and model.head_cls.weight.grad is None
    plain = small(distillation=False).float().train()
    assert plain(x).shape == (2, 7) and not any("_cls" in name for name, _ in plain.named_modules())


@torch.no_grad()
def test_features_of_the_stages():
    model, x = small(), images(64)
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and [tuple(f.shape) for f in features] == [(2, 64, 4, 4)] * 3
    stages = model.forward_stages(x)
    for feature, (tokens, state) in zip(features, stages):
        assert torch.equal(feature.flatten(2).transpose(1, 2), tokens[:, 1:]) and state.score.shape == (2, 16)
    assert [state.slow is None for _, state in stages] == [True, False, False]
    waiting = torch.ones(2, 16, dtype=torch.bool).scatter(1, stages[1][1].slow, False)
    assert torch.equal(features[1].flatten(2).transpose(1, 2)[waiting], features[0].flatten(2).transpose(1, 2)[waiting])
    if hasattr(timm, "layers"):
        extractor = small_extractor(model)
        assert all(torch.equal(a, b) for a, b in zip(extractor(x), [features[0], features[2]]))
        assert extractor.feature_info.channels() == [64, 64] and extractor.feature_info.reduction() == [16, 16]


def small_extractor(model):
    extractor = timm.create_model(NARROW, num_classes=7, features_only=True, out_indices=(0, 2)).double()
    extractor.model.load_state_dict(model.state_dict())
    return extractor.eval()


@pytest.mark.parametrize("stage_wise", [True, False])
def test_backward_through_an_eval_forward_gives_the_gradients_of_training(stage_wise):
    gradients = []
    for training in (False, True):
        model = small(distillation=False).train(training)
        set_mode(model, stage_wise)
        x = images(64).requires_grad_()
        model(x).pow(2).sum().backward()
        gradients.append([x.grad] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.skipif(compat.TORCH < (2, 1), reason="this PyTorch has no bfloat16 autocast that all of this needs")
@pytest.mark.parametrize("stage_wise", [True, False])
def test_half_precision_trains_and_ranks_in_single_precision(stage_wise):
    model, x = small().float(), images(64).float()
    model.set_stage_wise(stage_wise)
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, state = model.forward_tokens(x)
        assert tokens.dtype == state.score.dtype == torch.float32
        outputs = model.train()(x)
    sum(output.float().sum() for output in outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert relative_error(model.eval().bfloat16()(x.bfloat16()).float().detach(), exact) < 0.5


class Wrapped(torch.nn.Module):
    """What users put in a layer's place: it takes tokens and gives tokens."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def plain(layer):
    other = torch.nn.Linear(layer.in_features, layer.out_features).double()
    other.load_state_dict(layer.state_dict())
    return other


@torch.no_grad()
@pytest.mark.parametrize("replace", [Wrapped, plain])
def test_layers_can_be_replaced(replace):
    model, x = small(), images(64)
    whole = model(x)
    for i, block in enumerate(model.blocks):
        model.projs[i], block.mlp.fc1, block.mlp.fc2 = map(replace, (model.projs[i], block.mlp.fc1, block.mlp.fc2))
    assert relative_error(model(x), whole) < 1e-12
    model.blocks[3].mlp = Wrapped(model.blocks[3].mlp)
    assert relative_error(model(x), whole) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_a_layers_own_input_and_output(training):
    model, x, seen = small().train(training), images(64), []
    for layer in (model.projs[5], model.blocks[5].mlp.fc2):
        layer.register_forward_pre_hook(lambda layer, inputs: inputs[0] * 1)
        layer.register_forward_hook(lambda layer, inputs, y: seen.append(
            relative_error(F.linear(inputs[0], layer.weight, layer.bias), y)))
    whole = small().train(training)(x)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(model(x), whole)) and max(seen) < 1e-12 and len(seen) == 2


@torch.no_grad()
def test_interleaved_models_and_a_copy_give_the_logits_they_give_alone():
    first, second = small(img_size=96), small()
    second.set_stage_wise(False)
    ema = copy.deepcopy(first)
    alone = [first(images(96)), second(images(64)), ema(images(96))]
    steps = []  # each forward of the first and its copy starts inside the second's
    second.blocks[5].register_forward_hook(lambda *_: steps.append((first(images(96)), ema(images(96)))))
    assert torch.equal(second(images(64)), alone[1])
    assert torch.equal(steps[0][0], alone[0]) and torch.equal(steps[0][1], alone[2])


@settings(max_examples=8)
@given(size=st.integers(2, 10).map(lambda n: 16 * n), classes=st.integers(2, 40), distillation=st.booleans(),
       stage_wise=st.booleans())
@torch.no_grad()
def test_any_multiple_of_16_and_class_count_runs(size, classes, distillation, stage_wise):
    model = EvoDeiT(64, 2, num_classes=classes, distillation=distillation, img_size=size).eval()
    model.set_stage_wise(stage_wise)
    tokens, state = model.forward_tokens(torch.randn(2, 3, size, size))
    assert model.forward_head(tokens).shape == (2, classes)
    places = (size // 16) ** 2
    assert tokens.shape[1] == 1 + places and state.slow.shape == (2, places // 2)


@pytest.mark.parametrize("size", [16, 100, 0, (112, 128)])
def test_other_image_sizes_are_refused(size):
    with pytest.raises(ValueError, match="Evo-DeiT takes squares of multiples of 16 from 32 up"):
        EvoDeiT(64, 2, img_size=size)
    with pytest.raises(ValueError, match="built for 64 x 64 images and got 80 x 64"):
        EvoDeiT(64, 2, img_size=64)(torch.zeros(1, 3, 80, 64))
    with pytest.raises(ValueError, match="takes a batch of images .* and got \\(3, 64, 64\\)"):
        EvoDeiT(64, 2, img_size=64)(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("options", [
    dict(depth=0), dict(num_heads=3), dict(drop_path_rate=1.0), dict(drop_path_rate=-0.1)])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match=list(options)[0]):
        EvoDeiT(**dict(dict(embed_dim=64, num_heads=2, img_size=64), **options))


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    out = drop_path(torch.ones(20000, 2, 3), 0.3)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs(out.mean().item() - 1) < 0.02
    assert torch.equal(drop_path(out, 0), out)


@pytest.mark.parametrize("stage_wise", [True, False])
def test_both_branches_of_a_block_are_dropped_at_its_rate(stage_wise, monkeypatch):
    rates = []
    monkeypatch.setattr(evo_vit.evo_deit, "drop_path", lambda branch, rate: rates.append(rate) or branch)
    model = EvoDeiT(64, 2, drop_path_rate=0.2, img_size=64)
    model.set_stage_wise(stage_wise)
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert not rates
    model.train()(torch.zeros(1, 3, 64, 64))
    assert rates == pytest.approx(np.linspace(0, 0.2, 12).repeat(2).tolist())


@torch.no_grad()
def test_attention_reports_its_arithmetic():
    model, macs = small(), []
    model.attention.register_forward_hook(lambda module, inputs, output: macs.append(module.macs(*inputs)))
    model(images(64))
    assert macs == [2 * 64 * tokens ** 2 for tokens in [17] * 4 + [9] * 8]


@pytest.mark.skipif(compat.TORCH < (2, 1), reason="this PyTorch does not compile modules")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stage_wise", [True, False])
def test_the_model_compiles_without_a_graph_break(training, stage_wise):
    import torch._dynamo
    torch._dynamo.reset()
    model = small(drop_path_rate=0.1).float().train(training)
    model.set_stage_wise(stage_wise)
    with torch.set_grad_enabled(training):
        explanation = torch._dynamo.explain(model)(images(64).float())
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons
