"""The models agree with the published implementation in float64 (data/README.md says how the numbers were made)."""
import pytest
import timm
import torch
import torch.nn.functional as F
from reference import build, images, load_arrays, load_json, relative_error

NAMES = ["EvoLeViT_128S", "EvoLeViT_256", "EvoLeViT_256_384"]
EVAL_CASES = {"eval_stage": (True, True), "eval_stage_fixed": (True, False),
              "eval_layer": (False, False), "eval_layer_learned": (False, True)}
TRAIN_CASES = {"train_stage": (True, True), "train_layer": (False, False)}
TOLERANCE = 1e-7


def last_grid(size):
    """Places in the stem's grid of the tokens that the last stage has."""
    grid = torch.arange((size // 16) ** 2).view(size // 16, size // 16)
    return grid[::2, ::2][::2, ::2].flatten()


def set_mode(model, mode):
    model.set_stage_wise(mode[0])
    model.set_learn_tradeoff(mode[1])


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_reference_ones(name):
    facts = load_json(name)
    model = timm.create_model(name, distillation=True)
    assert [[k, list(p.shape)] for k, p in model.named_parameters()] == facts["parameters"]
    assert [[k, list(b.shape)] for k, b in model.named_buffers()] == facts["buffers"]
    assert list(model.state_dict()) == facts["state_dict_keys"]
    count = sum(p.numel() for p in model.parameters())
    class_heads = sum(p.numel() for k, p in model.named_parameters() if k.startswith("head_cls"))
    assert (count, count - class_heads) == (facts["parameter_count"], facts["parameter_count_without_class_heads"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_eval_logits_scores_and_token_order_match_reference(name):
    arrays, size = load_arrays(name), load_json(name)["input_size"]
    model = build(name).eval()
    for case, mode in EVAL_CASES.items():
        set_mode(model, mode)
        tokens, state = model.forward_tokens(images(size))
        assert relative_error(model.forward_head(tokens), arrays[case + "__logits"]) < TOLERANCE, case
        # the reference names each token by its place in the stem's grid, in the order of its last selection
        place = {number: place for place, number in enumerate(last_grid(size).tolist())}
        order = torch.tensor([[place[number] for number in row] for row in arrays[case + "__token_index"].tolist()])
        assert relative_error(state.score.gather(1, order), arrays[case + "__global_attn"]) < TOLERANCE, case
        assert torch.equal(state.slow, order[:, :state.slow.shape[1]]), case


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_fused_model_equals_the_plain_one_and_the_reference(name):
    arrays, size = load_arrays(name), load_json(name)["input_size"]
    model = build(name).eval()
    plain = model(images(size))
    fused = model.fuse()(images(size))
    assert not any("bn" in key for key in model.state_dict())
    assert relative_error(fused, plain) < 1e-9
    assert relative_error(fused, arrays["eval_stage__logits"]) < 1e-9
    # the published folding rounds its weights to float32, which can also turn a close selection over
    assert relative_error(fused, arrays["eval_fused__logits"]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", sorted(TRAIN_CASES))
def test_training_outputs_loss_gradients_and_statistics_match_reference(name, case):
    facts, arrays = load_json(name), load_arrays(name)
    model = build(name).train()
    set_mode(model, TRAIN_CASES[case])
    outputs = model(images(facts["input_size"]))
    labels = torch.arange(2) * 7 % 1000
    loss = sum(F.cross_entropy(output, labels) for output in outputs)
    loss.backward()
    expected = facts[case]

    assert len(outputs) == 4
    for i, output in enumerate(outputs):
        output = output.detach()
        assert relative_error(output[:, :16], arrays["{}__out{}".format(case, i)]) < TOLERANCE
        scale = output.abs().max().item()
        assert abs(output.mean().item() - expected["out_mean"][i]) < TOLERANCE * scale
        assert abs(output.std().item() - expected["out_std"][i]) < TOLERANCE * scale
    assert abs(loss.item() / expected["loss"] - 1) < TOLERANCE

    gradients = {k: None if p.grad is None else p.grad.norm().item() for k, p in model.named_parameters()}
    assert set(gradients) == set(expected["grad_norm"])
    for key, norm in expected["grad_norm"].items():
        if norm is None:
            assert gradients[key] is None, key
        else:
            allowed = TOLERANCE * norm if norm > 1e-9 else 1e-6
            assert abs(gradients[key] - norm) <= allowed, key

    statistics = {k: b.double().norm().item() for k, b in model.named_buffers() if "running" in k}
    expected_statistics = {k: v for k, v in expected["buffer_norm_after"].items() if "running" in k}
    assert set(statistics) == set(expected_statistics)
    for key, norm in expected_statistics.items():
        assert abs(statistics[key] - norm) <= TOLERANCE * norm, key
