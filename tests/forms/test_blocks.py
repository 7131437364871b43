"""Keys that come in blocks, each with a product of its own, under one softmax."""

import pytest
import torch
import torch.nn.functional as F

from .harness import assert_fused, fuse

B, H, N, K, G, D = 2, 3, 4, 8, 5, 16


def pegasus_x(q, k, v, few_k, few_v):
    """Each block of tokens sees its own keys and some that all see."""
    q = q * 0.3
    few, own = torch.einsum("bhnkd,bhxd->bhnkx", q, few_k), torch.einsum("bhnkd,bhnxd->bhnkx", q, k)
    weights = torch.cat([few, own], -1).softmax(-1)
    out = torch.einsum("bhnkx,bhxd->bhnkd", weights[..., :G], few_v)
    return out + torch.einsum("bhnkx,bhnxd->bhnkd", weights[..., G:], v)


def dalle(q, k, v, few_k, few_v):
    """A row of an image sees its own past and all of the text."""
    q = q * 0.3
    own, text = torch.einsum("bhnid,bhnjd->bhnij", q, k), torch.einsum("bhnid,bhjd->bhnij", q, few_k)
    later = F.pad(torch.ones(K, K).triu(1).bool(), (G, 0))
    weights = torch.cat((text, own), -1).masked_fill(later, -torch.finfo(q.dtype).max).softmax(-1)
    to_text, to_own = weights[..., :G], weights[..., G:]
    return torch.einsum("bhnij,bhnjd->bhnid", to_own, v) + torch.einsum("bhnij,bhjd->bhnid", to_text, few_v)


def memory(q, k, v, few_k, few_v):
    """By matmul and split, of one length."""
    q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
    weights = (torch.cat([q @ few_k.mT, q @ k.mT], -1) * 0.3).softmax(-1)
    of_few, own = weights.split([G, K], -1)
    return of_few @ few_v + own @ v


def three_blocks(q, k, v, few_k, few_v):
    q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
    scores = torch.cat([q @ few_k.mT, q @ k.mT, q @ few_v.mT], -1) * 0.3
    return scores.softmax(-1) @ torch.cat([few_v, v, few_k], -2)


FORMS = [pegasus_x, dalle, memory, three_blocks]


def inputs():
    return [torch.randn(B, H, N, K, D) for _ in range(3)] + [torch.randn(B, H, G, D) for _ in range(2)]


@pytest.mark.parametrize("target, grads", [("sdpa", True), ("reference", True), ("reference", False)])
@pytest.mark.parametrize("fn", FORMS)
def test_is_fused(fn, target, grads):
    assert_fused(fn, inputs(), target=target, grads=grads)


@pytest.mark.parametrize("fn", FORMS)
def test_in_16_bits(fn):
    assert_fused(fn, inputs(), torch.bfloat16)


def crossed(q, k, v, few_k, few_v):
    """The weights of one block meet the values of the other: of as many keys, that is one attention too."""
    q, k, v, x = q[:, :, 0], k[:, :, 0], v[:, :, 0], v[:, :, 1]
    weights = (torch.cat([q @ k.mT, q @ v.mT], -1) * 0.3).softmax(-1)
    return weights[..., :K] @ x + weights[..., K:] @ k


def overlapping(q, k, v, few_k, few_v):
    q, k, v, x = q[:, :, 0], k[:, :, 0], v[:, :, 0], v[:, :, 1]
    weights = (torch.cat([q @ k.mT, q @ v.mT], -1) * 0.3).softmax(-1)
    return weights[..., :K] @ x + weights[..., K - 1 : -1] @ k


def not_all(q, k, v, few_k, few_v):
    q, k, v, x = q[:, :, 0], k[:, :, 0], v[:, :, 0], v[:, :, 1]
    weights = (torch.cat([q @ k.mT, q @ v.mT], -1) * 0.3).softmax(-1)
    return weights[..., : K - 1] @ x[:, :, 1:] + weights[..., K:] @ k


def of_two_queries(q, k, v, few_k, few_v):
    q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
    weights = (torch.cat([q @ k.mT, (q + 1) @ v.mT], -1) * 0.3).softmax(-1)
    return weights[..., :K] @ v + weights[..., K:] @ k


def subtracted(q, k, v, few_k, few_v):
    q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
    weights = (torch.cat([q @ k.mT, q @ v.mT], -1) * 0.3).softmax(-1)
    return torch.add(weights[..., :K] @ v, weights[..., K:] @ k, alpha=-1)


@pytest.mark.parametrize("fn, fused", [(crossed, True)] + [(f, False) for f in (
    overlapping, not_all, of_two_queries, subtracted
)])  # fmt: skip
def test_what_is_near(fn, fused):
    args = inputs()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args), atol=2e-5, rtol=1e-4)
    assert {s.status for s in report.sites} == {"fused" if fused else "rejected"}, [s.verdict for s in report.sites]
