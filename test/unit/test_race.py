"""How linear maps run on a CPU is measured once for each number of threads, and makes no difference but rounding."""
import json
import os
import sys

import commands
import pytest
import torch
from reference import build, images

from evo_vit import race

measures = pytest.mark.skipif(not race.HAS_BOTH, reason="this PyTorch has one way alone")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing measured yet; what it will hold."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(race.VARIABLE, raising=False)
    monkeypatch.setattr(race, "_found", {})
    return tmp_path / "evo_vit"


@measures
@pytest.mark.parametrize("name, options", [("EvoLeViT_128S", {}), ("evo_deit_tiny_patch16_224", {"qk_gain": 1.0})])
def test_either_way_gives_the_same_logits_and_gradients(name, options, monkeypatch):
    logits, gradients = [], []
    for way in race.WAYS:
        monkeypatch.setenv(race.VARIABLE, way)
        assert race.choose_linear().way == way
        model = build(name, gain=1.0, num_classes=10, img_size=64, **options).float()
        layers = [layer for layer in model.modules() if hasattr(layer, "by_convolution")]
        assert len(layers) > 10 and all(layer.by_convolution == (way == "convolution") for layer in layers)
        with torch.no_grad():
            logits.append(model.eval()(images(64, batch=4).float()))
        model(images(64, batch=4).float()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    largest = max(g.abs().max() for g in gradients[0])
    assert len(gradients[0]) > 50 and all((a - b).abs().max() <= 1e-4 * largest for a, b in zip(*gradients))


@measures
def test_the_faster_way_is_taken_and_kept(cache, monkeypatch):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    choice = race.choose_linear()
    assert torch.equal(torch.get_rng_state(), state)
    assert set(choice.rates) == set(race.WAYS) and min(choice.rates.values()) > 0.1
    fast = choice.rates["convolution"] > 1.3 * choice.rates["matmul"]
    assert choice.way == ("convolution" if fast else "matmul")
    monkeypatch.setattr(race, "_found", {})
    monkeypatch.setattr(race, "_race", lambda threads: pytest.fail("measured again"))
    assert race.choose_linear() == choice
    kept, = cache.iterdir()
    for rates, way in (((10, 13.5), "convolution"), ((10, 12.5), "matmul"), ((10, 5), "matmul")):
        kept.write_text(json.dumps(dict(zip(race.WAYS, rates))))
        monkeypatch.setattr(race, "_found", {})
        assert race.choose_linear().way == way


@measures
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"matmul": 1}', '{"matmul": "fast", "convolution": 2}'])
def test_a_damaged_measurement_is_made_again(text, cache, monkeypatch):
    race.choose_linear()
    kept, = cache.iterdir()
    kept.write_text(text)
    monkeypatch.setattr(race, "_found", {})
    choice = race.choose_linear()
    assert min(choice.rates.values()) > 0.1
    assert {way: json.loads(kept.read_text())[way] for way in race.WAYS} == choice.rates
    assert [path.name for path in cache.iterdir()] == [kept.name]


@measures
def test_of_two_processes_that_measure_at_a_time_the_first_is_believed(cache):
    first = race._keep(1, {"matmul": 1.0, "convolution": 2.0})
    assert race._keep(1, {"matmul": 3.0, "convolution": 2.0}) == first == {"matmul": 1.0, "convolution": 2.0}
    assert race._keep(2, {"matmul": 3.0, "convolution": 2.0})["matmul"] == 3.0


@measures
def test_where_nothing_can_be_kept_it_is_measured_all_the_same(cache, monkeypatch):
    cache.write_text("a file in the folder's place")
    assert min(race.choose_linear().rates.values()) > 0.1


def test_a_wrong_way_ends_every_command_in_one_sentence():
    for script in ("main.py", "predict.py", "export.py"):
        code, out, err = commands.run([sys.executable, os.path.join(commands.ROOT, script), "--help"],
                                      env={race.VARIABLE: "fast"})
        assert (code, err) == (2, "error: EVO_VIT_LINEAR=fast: set it to matmul or convolution\n")
