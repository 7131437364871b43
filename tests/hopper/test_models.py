"""Real models through the whole of ``torch.compile`` on the GPU, inference and a training step, against float64."""

import copy

import pytest
import torch

import fa3_inductor
from tests.forms.harness import error

transformers = pytest.importorskip("transformers")
hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not hopper, reason="needs an sm_90 GPU")

SEQLEN = 300


def llama(implementation: str) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config)


def bert(implementation: str) -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        attn_implementation=implementation,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def gpt2(implementation: str) -> torch.nn.Module:
    config = transformers.GPT2Config(
        n_embd=256,
        n_layer=2,
        n_head=4,
        vocab_size=128,
        attn_implementation=implementation,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def loss_and_grads(model: torch.nn.Module, run, ids: torch.Tensor, mask: torch.Tensor | None):
    model.zero_grad(set_to_none=True)
    out = run(
        input_ids=ids,
        labels=ids,
        attention_mask=mask,
        **({} if "Bert" in type(model).__name__ else {"use_cache": False}),
    )
    out.loss.backward()
    grads = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return out.logits.detach(), grads


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_training_step(build, implementation, padded):
    torch.manual_seed(torch.seed())
    exact = build(implementation).cuda().double().train()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 128, (2, SEQLEN), device="cuda")
    mask = torch.ones_like(ids) if padded else None
    if padded:
        mask[0, -40:] = 0
    truth = loss_and_grads(exact, exact, ids, mask)
    eager = loss_and_grads(model, model, ids, mask)
    fa3_inductor.clear_reports()
    ours = loss_and_grads(model, torch.compile(model, backend="fa3_inductor"), ids, mask)
    for name, mine, theirs, wanted in zip(("logits", "gradients"), ours, eager, truth, strict=True):
        assert error(mine, wanted) <= 1.5 * error(theirs, wanted) + 1e-3, name
    sites = fa3_inductor.reports().sites
    assert len(sites) == 2 and all(s.status == "fused" for s in sites), fa3_inductor.reports()
    expected = "full" if build is bert else "causal"
    expected = expected if not padded else "key padding[b, k]" if build is bert else "causal & key padding[b, k]"
    assert {s.mask for s in sites} == {expected}
    assert {s.target for s in sites} == {"hopper"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_padded_inference(build, implementation):
    """Padding is a mask that the kernel reads; where it is causal too, the hidden tiles are skipped."""
    torch.manual_seed(torch.seed())
    exact = build(implementation).cuda().double().eval()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 128, (2, SEQLEN), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -40:] = 0
    real = mask.bool()
    compiled = torch.compile(model, backend="fa3_inductor")
    with torch.no_grad():
        truth, eager, ours = (f(input_ids=ids, attention_mask=mask).logits[real] for f in (exact, model, compiled))
    assert error(ours, truth) <= 1.5 * error(eager, truth) + 1e-3
    assert all((s.status, s.target) == ("fused", "hopper") for s in fa3_inductor.reports().sites)
    assert len(fa3_inductor.reports().sites) == 2


def test_cuda_graphs():
    model = llama("eager").cuda().bfloat16().eval()
    ids = torch.randint(0, 128, (1, SEQLEN), device="cuda")
    compiled = torch.compile(model, backend="fa3_inductor", mode="reduce-overhead")
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(input_ids=ids, use_cache=False).logits.clone()
    assert error(got, wanted) < 2e-2
    assert all(s.target == "hopper" for s in fa3_inductor.reports().sites)


def test_other_lengths_without_recompiling_each():
    model = llama("eager").cuda().bfloat16().eval()
    compiled = torch.compile(model, backend="fa3_inductor", dynamic=True)
    for seqlen in (64, 65, 200, 257):
        ids = torch.randint(0, 128, (1, seqlen), device="cuda")
        with torch.no_grad():
            assert (
                error(compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
                < 2e-2
            )
    assert len(fa3_inductor.reports().graphs) <= 2
    assert all((s.mask, s.target) == ("causal", "hopper") for s in fa3_inductor.reports().sites)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding(implementation, kind):
    """A prompt, and then token by token, on a cache of a fixed size and on one that grows."""
    torch.manual_seed(torch.seed())
    exact = llama(implementation).cuda().double().eval()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 128, (2, SEQLEN + 6), device="cuda")

    def decoded(run):
        caches = transformers.StaticCache, transformers.DynamicCache
        cache = caches[0](config=model.config, max_cache_len=1024) if kind == "static" else caches[1]()
        steps = [ids[:, :SEQLEN], *ids[:, SEQLEN:].split(1, dim=1)]
        return torch.cat([run(input_ids=step, past_key_values=cache).logits[:, -1] for step in steps])

    fa3_inductor.clear_reports()
    with torch.no_grad():
        truth = exact(input_ids=ids, use_cache=False).logits[:, SEQLEN - 1 :].transpose(0, 1).flatten(0, 1)
        eager, ours = decoded(model), decoded(torch.compile(model, backend="fa3_inductor"))
    assert error(ours, truth) <= 1.5 * error(eager, truth) + 1e-3
    sites = fa3_inductor.reports().sites
    assert all((s.status, s.target) == ("fused", "hopper") for s in sites), fa3_inductor.reports()
    assert {s.q_shape[2] == 1 for s in sites} == {False, True}
