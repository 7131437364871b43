"""transformers' Llama, GPT-2 and BERT, unmodified: every attention fused, every mask proved."""

import copy

import pytest
import torch

from fa3_inductor import Reason

from .harness import fuse

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS, LENGTH = 64, 2, 11
PADDINGS = {
    "no mask": None,
    "left": torch.arange(LENGTH)[None] >= torch.tensor([[0], [4]]),
    "right": torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [7]]),
}
IDS = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY


def model(name, implementation, **options):
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "attn_implementation": implementation}
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **common,
            **options,
        )
        return transformers.LlamaForCausalLM(config)
    if name == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options}
        config = transformers.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, **off, **common)
        return transformers.GPT2LMHeadModel(config)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, **off, **common
    )
    return transformers.BertForMaskedLM(config)


def arguments(padding, **more):
    mask = PADDINGS[padding]
    return {"input_ids": IDS, **({} if mask is None else {"attention_mask": mask.long()}), **more}


def close(ours, eager, exact):
    """No further from the float64 model than 1.5 times eager is; NaN where eager has it."""
    assert torch.equal(ours.isnan(), eager.isnan())
    known = ~exact.isnan() & ~eager.isnan()
    if not known.any():  # transformers' float64 model gives NaN for a padded row where its float32 model does not
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4, equal_nan=True)
        return
    mine, theirs = ((x.double() - exact)[known].square().mean().sqrt() for x in (ours, eager))
    floor = 1e-7 * exact[known].abs().max() + 1e-9  # the gradient of a key's bias is zero
    assert mine <= 1.5 * theirs + floor, f"{mine:.3g} against eager's {theirs:.3g}"


def expected(name, padding):
    causal = [] if name == "bert" else ["causal"]
    return " & ".join(causal + ([] if padding == "no mask" else ["key padding[b, k]"])) or "full"


NAMES = pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
PADDED = pytest.mark.parametrize("padding", PADDINGS)


def assert_fused(report, name, padding, dtypes=1):
    assert len(report.sites) == LAYERS * dtypes
    for site in report.sites:
        assert site.status == "fused", site.verdict
        assert site.mask.removesuffix(" & bias") == expected(name, padding)


@NAMES
@IMPLEMENTATIONS
@PADDED
@pytest.mark.parametrize("use_cache", [True, False])
def test_inference(name, implementation, padding, use_cache):
    if name == "bert" and use_cache:
        pytest.skip("BERT has no cache here")
    m = model(name, implementation).eval()
    options = {} if name == "bert" else {"use_cache": use_cache}
    given = arguments(padding, **options)
    with torch.no_grad():
        compiled, report = fuse(lambda **x: m(**x))
        close(compiled(**given).logits, m(**given).logits, copy.deepcopy(m).double()(**given).logits)
    assert_fused(report, name, padding)


@NAMES
@IMPLEMENTATIONS
@PADDED
def test_training_step(name, implementation, padding):
    m = model(name, implementation).train()
    given = arguments(padding, labels=IDS)
    wide = copy.deepcopy(m).double()
    compiled, report = fuse(lambda **x: m(**x))
    ours, eager, exact = (f(**given).loss for f in (compiled, m, wide))
    close(ours, eager, exact)
    gradients = (torch.autograd.grad(x, list(y.parameters())) for x, y in ((ours, m), (eager, m), (exact, wide)))
    for parameter in zip(*gradients, strict=True):
        close(*parameter)
    assert_fused(report, name, padding)


@NAMES
def test_weights_asked_for(name):
    m = model(name, "eager").eval()
    with torch.no_grad():
        compiled, report = fuse(lambda **x: m(**x, output_attentions=True))
        ours, eager = compiled(input_ids=IDS), m(input_ids=IDS, output_attentions=True)
    torch.testing.assert_close(ours.attentions, eager.attentions)
    assert [s.reason for s in report.sites] == [Reason.WEIGHTS_USED] * LAYERS


def test_dropout_of_the_weights():
    m = model("gpt2", "eager", attn_pdrop=0.2).train()
    compiled, report = fuse(lambda **x: m(**x))
    with torch.no_grad():
        ours, eager = (torch.stack([f(input_ids=IDS).logits for _ in range(200)]) for f in (compiled, m))
    assert {s.status for s in report.sites} == {"fused"} and all("dropout" in s.form for s in report.sites)
    assert ours.std(0).mean() > 0
    difference = (ours.mean(0) - eager.mean(0)).abs()
    assert (difference <= 6 * (eager.var(0) / 100).sqrt() + 1e-6).all()
