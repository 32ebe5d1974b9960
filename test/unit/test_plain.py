"""The fast model, step and teacher compute what their plain transcriptions (plain.py) and timm's own parts do."""
import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, fill, images, load_arrays, load_json, relative_error
from timm.loss import SoftTargetCrossEntropy

from bench.plain import PlainEvoLeViT, PlainTraining
from engine import Learner
from evo_vit import ops
from evo_vit.compat import TORCH
from evo_vit.evo_levit import EvoLeViT
from losses import DistillationLoss
from runtime.learning.average import ModelEma
from runtime.learning.clipping import clip_gradients
from runtime.learning.teacher import CPU_CHUNK, Teacher, View, fold_batch_norms
from runtime.machine.compiling import can_compile, compile_module, frozen_weights
from runtime.machine.machine import Machine
from runtime.machine.versions import fused_adamw, has_autocast

MODES = [(True, True), (True, False), (False, False), (False, True)]


def set_mode(model, mode):
    model.set_stage_wise(mode[0])
    model.set_learn_tradeoff(mode[1])


@settings(max_examples=10)
@given(size=st.integers(4, 12).map(lambda n: 16 * n), mode=st.sampled_from(MODES), batch=st.integers(1, 3))
@torch.no_grad()
def test_the_plain_transcription_gives_the_same_logits_at_any_size(size, mode, batch):
    model = build("EvoLeViT_128S", num_classes=10, img_size=size).eval()
    set_mode(model, mode)
    x = images(size, batch)
    assert relative_error(model(x), PlainEvoLeViT(model)(x)) < 1e-9


@pytest.mark.parametrize("mode", MODES[::2])
@torch.no_grad()
def test_the_plain_transcription_without_selection_gives_the_same_logits(mode):
    x = images(64)
    for change in (lambda model: model.set_token_selection(False), lambda model: model.set_keep_ratio(1)):
        model = build("EvoLeViT_128S", num_classes=10, img_size=64).eval()
        set_mode(model, mode)
        selecting = model(x)
        change(model)
        assert relative_error(PlainEvoLeViT(model)(x), model(x)) < 1e-9 < relative_error(selecting, model(x))


@torch.no_grad()
def test_the_plain_transcription_matches_the_reference():
    arrays, size = load_arrays("EvoLeViT_256"), load_json("EvoLeViT_256")["input_size"]
    model = build("EvoLeViT_256").eval()
    for case, mode in (("eval_stage", (True, True)), ("eval_layer", (False, False))):
        set_mode(model, mode)
        assert relative_error(PlainEvoLeViT(model)(images(size)), arrays[case + "__logits"]) < 1e-7, case


@pytest.mark.parametrize("name", ["EvoLeViT_128S", "EvoLeViT_256"])
@torch.no_grad()
def test_float32_logits_equal_the_float64_ones_to_1e_4(name):
    model = build(name, gain=1.0).eval()
    x = images(224)
    exact = model(x)
    single = model.float()(x.float())
    assert relative_error(single, exact) < 1e-4
    assert relative_error(model.fuse().to(memory_format=torch.channels_last)(x.float()), exact) < 1e-4


def test_attention_in_chunks_is_attention(monkeypatch):
    q, k, v = (torch.randn(3, 4, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((9, 8), (12, 8), (12, 16)))
    results = []
    for chunk in (2 ** 21, 200):  # 200: one head of one image at a time, the last chunk as full as the others
        monkeypatch.setattr(ops, "ATTENTION_CHUNK", chunk)
        x, class_attn = ops.attention(q, k, v, 0.3, 11)
        (x.pow(2).sum() + class_attn.pow(3).sum()).backward()
        results.append([x.detach(), class_attn.detach()] + [t.grad for t in (q, k, v)])
        for t in (q, k, v):
            t.grad = None
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES[::2])
def test_steps_give_the_weights_and_the_average_of_the_plain_step(mode):
    start = build("EvoLeViT_128S", gain=1.0, num_classes=10, img_size=64).train()
    set_mode(start, mode)
    teacher = lambda x: x[:, 0, 0, :10]  # noqa: E731
    criterion = DistillationLoss(SoftTargetCrossEntropy(), teacher, "cls", 0.5, 1.0)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    groups = lambda m: [dict(params=list(m.parameters()), lr=1e-3, weight_decay=0.025)]  # noqa: E731
    optimizer = torch.optim.AdamW(groups(model), **fused_adamw("cpu"))
    ema = ModelEma(model, 0.9)
    learner = Learner(model, criterion, optimizer, Machine(torch.device("cpu")), 0.01, "agc", ema)
    training = PlainTraining(plain, criterion, groups(plain), decay=0.9)
    for step in range(3):
        x = images(64, batch=8, seed=step)
        labels = torch.nn.functional.one_hot((torch.arange(8) + step) % 10, 10).double()
        loss = learner.update([(x, labels, None)])
        assert abs(loss / training.step(x, labels) - 1) < 1e-9
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert (p - q).abs().max() < 1e-8, name
    for p, q in zip(ema.module.state_dict().values(), training.average.state_dict().values()):
        assert not p.is_floating_point() or (p - q).abs().max() < 1e-8


@settings(max_examples=20)
@given(seed=st.integers(0, 10 ** 6),
       limit=st.sampled_from([0.01, 0.3, 10.0]), scale=st.sampled_from([1e-4, 1.0, 100.0]))
def test_adaptive_clipping_is_timms_bit_for_bit(seed, limit, scale):
    from timm.utils.agc import adaptive_clip_grad
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1,), (7,), (5, 3), (4, 3, 3, 3), (1, 5, 6), (2,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters[:-1]:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    other = copy.deepcopy(parameters)
    for p, q in zip(parameters, other):
        q.grad = None if p.grad is None else p.grad.clone()
    clip_gradients(parameters, limit)
    adaptive_clip_grad(other, limit)
    for p, q in zip(parameters[:-1], other):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=0), p.shape
    assert parameters[-1].grad is None


@torch.no_grad()
def test_a_folded_teacher_in_chunks_gives_the_logits_of_timms_model():
    model = timm.create_model("regnety_002", num_classes=10)
    fill(model, gain=1.0)
    model.eval()
    x = images(64, batch=CPU_CHUNK + 3).float()
    expected = model(x)
    for channels_last in (False, True):
        folded = copy.deepcopy(model)
        fold_batch_norms(folded, x[:1])
        teacher = Teacher(folded, channels_last=channels_last).train()
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules()) and not teacher.training
        assert relative_error(teacher(x), expected) < 1e-5
    small = torch.nn.functional.interpolate(x, size=(48, 48), mode="bilinear", align_corners=False)
    assert relative_error(Teacher(copy.deepcopy(model), View(48))(x), model(small)) < 1e-5
    if hasattr(torch, "bfloat16") and has_autocast("cpu"):
        logits = Teacher(copy.deepcopy(model), dtype=torch.bfloat16)(x)
        assert logits.dtype == torch.float32 and relative_error(logits, expected) < 0.1


def test_what_has_no_weight_is_not_computed():
    def never(*_):
        raise AssertionError("computed")

    outputs, labels, taught = [torch.randn(4, 10) for _ in range(4)], torch.rand(4, 10), torch.arange(4)
    assert DistillationLoss(never, lambda x: outputs[0], "cls", 1.0, 1.0)(None, outputs, labels).item() > 0
    criterion = DistillationLoss(SoftTargetCrossEntropy(), never, "cls", 0.0, 1.0)
    assert criterion.teach(None) is None and criterion(None, outputs, labels).item() > 0
    assert DistillationLoss(SoftTargetCrossEntropy(), never, "cls", 0.5, 1.0)(None, outputs, labels, taught).item() > 0


@pytest.mark.skipif(TORCH < (2, 1), reason="this PyTorch does not compile modules")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", MODES[::2])
def test_the_model_compiles_without_a_graph_break(training, mode):
    import torch._dynamo
    torch._dynamo.reset()
    model = build("EvoLeViT_128S", gain=1.0, num_classes=10, img_size=64).float().train(training)
    set_mode(model, mode)
    x = images(64).float()
    explanation = torch._dynamo.explain(model)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="this PyTorch does not compile modules")
def test_a_compiled_model_computes_the_same_in_both_modes():
    model = build("EvoLeViT_128S", gain=1.0, num_classes=10, img_size=64).float()
    compiled = copy.deepcopy(model)
    compile_module(compiled, "cpu")
    x = images(64, batch=4).float()
    for training, mode in ((False, MODES[0]), (True, MODES[2])):
        for m in (model, compiled):
            m.train(training)
            set_mode(m, mode)
        expected, got = model(x), compiled(x)
        for a, b in zip(expected, got):
            assert relative_error(b.detach(), a.detach()) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="this PyTorch does not compile modules")
def test_frozen_weights_are_built_into_each_compiled_model():
    models = [EvoLeViT((32, 48, 64), 8, (2, 3, 4), (2, 1, 1), num_classes=10, img_size=64) for _ in range(2)]
    for model in models:
        fill(model, gain=1.0)
        model.fuse().eval()
    models[1].head.weight.data.mul_(3.0)
    compiled = [compile_module(copy.deepcopy(model), "cpu", frozen=True) for model in models]
    for batch in (4, 1, 3):
        x = images(64, batch=batch).float()
        with torch.no_grad(), frozen_weights("cpu"):
            for model, frozen in zip(models, compiled):
                assert relative_error(frozen(x), model(x)) < 1e-4
    with torch.no_grad():
        compiled[0].head.weight.zero_()
        with frozen_weights("cpu"):  # what makes it fast: it looks no more at the weights
            assert relative_error(compiled[0](x), models[0](x)) < 1e-4
