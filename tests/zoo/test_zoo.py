"""A part of the zoo that is fast enough for every change: all handwritten forms, and a sample of the rest."""

import math

import pytest
import torch

from . import run as runner
from .handwritten import FORMS
from .registry import FAMILIES, MODES, Model, call, find, load
from .run import distance, run

BOTH_MODES = pytest.mark.parametrize("mode", MODES)

# The name of an argument that transformers 5.0 knows.
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")

SAMPLE = {
    "of_torch": [
        "torch/attention-padding-causal-weights",
        "torch/attention-bias-kv-zero",
        "torch/encoder-causal",
        "torch/transformer-is-causal",
    ],
    "of_transformers": [
        "transformers/llama/eager:lm_padded",
        "transformers/gpt2/sdpa:lm",
        "transformers/mistral-sliding/eager:lm_padded",
        "transformers/gemma2-soft-cap/eager:lm",
        "transformers/gpt-oss-sinks/eager:lm_padded",
        "transformers/deepseek-v3-latent/eager",
        "transformers/llama4-chunked/sdpa",
        "transformers/llama-cached/eager:decode_padded",
        "transformers/gemma3-cached/sdpa:decode",
        "transformers/bert/eager:text_padded",
        "transformers/modernbert/eager:text_padded",
        "transformers/bart/eager:translation_padded",
    ],
    "of_transformers_media": [
        "transformers/vit/eager",
        "transformers/swin/eager",
        "transformers/whisper/sdpa",
    ],
    "of_x_transformers": [
        "x-transformers/decoder",
        "x-transformers/decoder-memory",
        "x-transformers/encoder-mask",
    ],
    "of_timm": [
        "timm/eva-rope/unfused",
        "timm/levit/fused",
    ],
}


@BOTH_MODES
@pytest.mark.parametrize("name", FORMS)
def test_handwritten(name, mode):
    model = find(name)
    if mode not in model.modes:
        pytest.skip("inference only")
    result = run(model, mode, seconds=0)
    assert not result.failure and not result.bad, result
    assert result.fused == model.to_fuse, [str(why) for why in result.rejected]
    left = model.attentions - result.fused
    assert result.reasons == ({model.reason.name: left} if model.reason else {})


@BOTH_MODES
@pytest.mark.parametrize("family,name", [(family, name) for family, names in SAMPLE.items() for name in names])
def test_sample(family, name, mode):
    pytest.importorskip(FAMILIES[family])
    load(family)
    model = find(name)
    if mode not in model.modes:
        pytest.skip("inference only")
    result = run(model, mode, seconds=0)
    assert not result.failure and not result.bad, result
    assert result.fused >= model.to_fuse, [str(why) for why in result.rejected]


# ------------------------------------------------------------------------------------------- the run itself


@BOTH_MODES
def test_wrong_results_are_noticed(monkeypatch, mode):
    def backend(gm, _inputs):
        return lambda *args: [x * 1.01 for x in gm(*args)]

    monkeypatch.setattr(runner, "fusing", lambda report, target: backend)
    result = run(Model("linear", lambda: call(torch.nn.Linear(4, 4), torch.randn(2, 4)), 1), mode)
    assert result.wrong and result.missed == 1
    assert result.out_error == pytest.approx(0.01, rel=1e-3)


@BOTH_MODES
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_bfloat16_beside_eager(monkeypatch, mode, factor):
    """What "hopper" does, on a CPU; a result that is off by a tenth is wrong in every draw."""
    prepare, fusing = runner.prepare, runner.fusing

    def off(report, target):
        assert target == "hopper"
        backend = fusing(report, "reference")

        def compiled(gm, inputs):
            forward = backend(gm, inputs)
            return lambda *args: [x * factor for x in forward(*args)]

        return compiled

    monkeypatch.setattr(runner, "prepare", lambda model, mode, device, seed: prepare(model, mode, "cpu", seed))
    monkeypatch.setattr(runner, "fusing", off)
    result = run(find("handwritten/nanogpt"), mode, target="hopper", seconds=0)
    assert not result.failure and result.fused == 1
    assert 0 < result.eager_out_error < 0.02 and (result.eager_grad_error > 0) == (mode == "training")
    assert (result.wrong, result.draws) == ((False, 1) if factor == 1 else (True, runner.DRAWS))


def test_crashes_and_failures_are_told_apart(monkeypatch):
    def broken(gm, _inputs):
        raise ValueError("of the pass")

    monkeypatch.setattr(runner, "fusing", lambda report, target: broken)
    result = run(Model("linear", lambda: call(torch.nn.Linear(4, 4), torch.randn(2, 4)), 0), "inference")
    assert result.wrong and "of the pass" in result.crash
    result = run(Model("linear", lambda: call(torch.nn.Linear(4, 4), torch.randn(2, 5)), 0), "inference")
    assert result.failure.startswith("run: RuntimeError") and not result.wrong


def test_distance():
    nan, inf = math.nan, math.inf

    def between(ours, exact):
        return distance(torch.tensor(ours), torch.tensor(exact))

    assert between([1.0, nan, inf], [1.0, nan, inf]) == 0
    assert between([3.0, 4.4], [3.0, 4.0]) == pytest.approx(0.08)
    for ours, exact in (
        ([nan, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, nan]),
        ([inf, 1.0], [-inf, 1.0]),
        ([1.0], [1.0, 1.0]),
    ):
        assert math.isnan(between(ours, exact))
    assert distance(None, torch.zeros(2)) == 0 and distance(torch.ones(1), None) == 1
