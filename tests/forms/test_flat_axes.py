"""Products over several axes, and operands with several axes of their own: what they are when these are one."""

import pytest
import torch

from .harness import assert_fused, fuse

B, H, S, R, D = 2, 3, 11, 2, 8


def values_of_two_axes(q, k, v):
    """vit-pytorch's SepViT: the tokens of a window are values of their window's token."""
    weights = torch.einsum("bhid,bhjd->bhij", q[:, 0], k[:, 0]).mul(0.3).softmax(-1)
    return torch.einsum("b h i j, b h j w d -> b h i w d", weights, v.transpose(1, 2).transpose(2, 3))


def rows_that_share_weights(q, k, v):
    """The tied rows of an MSA Transformer."""
    scores = torch.einsum("brhid,brhjd->bhij", q * 0.2, k)
    return torch.einsum("bhij,brhjd->brhid", scores.softmax(-1), v)


def rows_that_share_scores(q, k, v):
    scores = torch.einsum("...rhid,...rhjd->...hij", q, k) * 0.2
    return scores.softmax(-1) @ v[:, 0]


def two_products_of_the_weights(q, k, v):
    """Invariant point attention: values, and points of three numbers."""
    weights = (q[:, 0] @ k[:, 0].mT * 0.3).softmax(-1)
    points = v[:, 1, :, :, :6].unflatten(-1, (2, 3))
    return torch.cat([torch.einsum("bhij,bhjpc->bhipc", weights, points).flatten(-2), weights @ v[:, 0]], -1)


FORMS = [values_of_two_axes, rows_that_share_weights, rows_that_share_scores, two_products_of_the_weights]


def inputs():
    return [torch.randn(B, R, H, S, D) for _ in range(3)]


@pytest.mark.parametrize(
    "target, grads, dynamic", [("sdpa", False, None), ("sdpa", True, True), ("reference", True, None)]
)
@pytest.mark.parametrize("fn", FORMS)
def test_is_fused(fn, target, grads, dynamic):
    assert_fused(fn, inputs(), target=target, grads=grads, dynamic=dynamic)


@pytest.mark.parametrize("fn", FORMS)
def test_in_16_bits(fn):
    assert_fused(fn, inputs(), torch.bfloat16)


def test_one_that_is_broadcast_along_an_axis_it_sums_over():
    fn = lambda q, k, v: torch.einsum("brhid,brhjd->bhij", q, k[:, :1]).mul(0.2).softmax(-1) @ v[:, 0]  # noqa: E731
    args = inputs()
    compiled, _ = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
