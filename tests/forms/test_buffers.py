"""Causal masks in buffers: proved from the data, and proved anew when the data changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .harness import fuse

INF = float("-inf")
L, S = 16, 9
KEEP = torch.ones(L, L, dtype=torch.bool).tril()


class Model(nn.Module):
    def __init__(self, buffer, kind, persistent=True):
        super().__init__()
        self.register_buffer("mask", buffer.clone(), persistent=persistent)
        self.kind = kind

    def forward(self, q, k, v):
        mask = self.mask[..., : q.shape[-2], : k.shape[-2]]
        scores = q @ k.mT * 0.25
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask)
        if self.kind == "add":
            scores = scores + mask
        else:
            hidden = {"keep": lambda: ~mask, "hide": lambda: mask, "zero": lambda: mask == 0}[self.kind]()
            scores = scores.masked_fill(hidden, INF)
        return scores.softmax(-1) @ v


SPELLINGS = {
    "float tril": (KEEP.float(), "zero"),
    "four dimensions": (KEEP.float()[None, None], "zero"),
    "uint8": (KEEP.to(torch.uint8), "zero"),
    "bool": (KEEP, "keep"),
    "bool of the hidden": (~KEEP, "hide"),
    "added infinity": (torch.full((L, L), INF).triu(1), "add"),
    "added minimum": (torch.full((L, L), torch.finfo(torch.float32).min).triu(1), "add"),
    "sdpa bool": (KEEP, "sdpa"),
    "sdpa float": (torch.full((L, L), INF).triu(1), "sdpa"),
}
ALL = pytest.mark.parametrize("spelling", SPELLINGS)


def qkv(seqlen=S):
    return [torch.randn(2, 3, seqlen, 16) for _ in range(3)]


def one_more(mask):
    """The same mask with one hidden entry made visible."""
    mask = mask.clone()
    mask[..., 2, 7] = mask[..., 0, 0]
    return mask


def one_entry(model):
    model.mask[..., 2, 7] = model.mask[..., 0, 0].clone()


def copied(model):
    model.mask.copy_(one_more(model.mask))


def loaded(model):
    model.load_state_dict({"mask": one_more(model.mask)})


def replaced(model):
    model.mask = one_more(model.mask)


def in_inference_mode(model):
    with torch.inference_mode():
        model.mask[..., 2, 7] = model.mask[..., 0, 0].clone()


def same(compiled, model, args):
    torch.testing.assert_close(compiled(*args), model(*args), atol=1e-5, rtol=1e-4)


@ALL
@pytest.mark.parametrize("seqlen", [S, L])
def test_proved_causal(spelling, seqlen):
    model = Model(*SPELLINGS[spelling])
    compiled, report = fuse(model)
    same(compiled, model, qkv(seqlen))
    assert [(s.status, s.mask) for s in report.sites] == [("fused", "causal")]


def test_not_persistent():
    model = Model(*SPELLINGS["bool"], persistent=False)
    compiled, report = fuse(model)
    same(compiled, model, qkv())
    assert [s.mask for s in report.sites] == ["causal"]


@ALL
@pytest.mark.parametrize("write", [one_entry, copied, loaded, replaced, in_inference_mode])
def test_written_to(spelling, write):
    model = Model(*SPELLINGS[spelling])
    compiled, report = fuse(model)
    args = qkv()
    same(compiled, model, args)
    before = compiled(*args)
    write(model)
    same(compiled, model, args)
    assert not torch.allclose(compiled(*args), before)
    assert len(report.graphs) == 2 and report.sites[-1].mask != "causal"


@pytest.mark.parametrize("write", [one_entry, replaced])
def test_written_to_where_dynamo_skips_guards_of_modules(write):
    model = Model(*SPELLINGS["bool"])
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):  # the default in torch 2.11
        compiled, report = fuse(model)
        for _ in range(3):
            same(compiled, model, qkv())
        write(model)
        same(compiled, model, qkv())
    assert len(report.graphs) == 2


@ALL
def test_unchanged_is_compiled_once(spelling):
    model = Model(*SPELLINGS[spelling])
    compiled, report = fuse(model)
    for _ in range(4):
        compiled(*qkv())
    assert len(report.graphs) == 1


@ALL
def test_causal_but_for_one_entry_is_no_proof(spelling):
    buffer, kind = SPELLINGS[spelling]
    model = Model(one_more(buffer), kind)
    compiled, report = fuse(model)
    same(compiled, model, qkv())
    assert "causal" not in report.sites[0].mask


@pytest.mark.parametrize("entry", [(0, 1), (2, 7), (8, 0), (8, 8), (15, 15)])
def test_every_entry_counts(entry):
    keep = KEEP.clone()
    keep[entry] = ~keep[entry]
    model = Model(keep, "keep")
    compiled, report = fuse(model)
    torch.testing.assert_close(*(f(*qkv_of(0)) for f in (compiled, model)), equal_nan=True)
    assert report.sites[0].mask != "causal"


def qkv_of(seed):
    torch.manual_seed(seed)
    return qkv(L)


GLOBAL = KEEP.clone()


def test_a_global_tensor():
    def fn(q, k, v):
        return (q @ k.mT * 0.25).masked_fill(~GLOBAL[:S, :S], INF).softmax(-1) @ v

    compiled, report = fuse(fn)
    args = qkv()
    same(compiled, fn, args)
    assert [s.mask for s in report.sites] == ["causal"]
    try:
        GLOBAL[2, 7] = True
        same(compiled, fn, args)
    finally:
        GLOBAL[2, 7] = False
    assert len(report.graphs) == 2


def test_with_inductor():
    model = Model(*SPELLINGS["bool"])
    compiled = torch.compile(model, backend="fa3_inductor")
    args = qkv()
    with torch.no_grad():
        same(compiled, model, args)
        one_entry(model)
        same(compiled, model, args)


SCRIPT = """
import sys

import torch
from fa3_inductor.backend import fa3_inductor as backend
import fa3_inductor

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keep", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, q, k, v):
        return (q @ k.mT * 0.25).masked_fill(~self.keep[:9, :9], float("-inf")).softmax(-1) @ v

model = Model()
if sys.argv[1] == "changed":
    model.keep[2, 7] = True
args = [torch.randn(2, 3, 9, 16) for _ in range(3)]
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend=backend)(*args), model(*args), atol=1e-5, rtol=1e-4)
print(fa3_inductor.reports().sites[0].mask)
"""


def test_warm_caches_do_not_mix_buffers_up(root, tmp_path, python):
    def mask_proved(state):
        code = f"import sys; sys.argv = ['', {state!r}]\n{SCRIPT}"
        return python(code, root, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))

    masks = [mask_proved(state) for state in ("causal", "changed", "causal")]
    assert masks == ["causal", "mask[k, q]", "causal"]
