"""Queries that a mask by a number hides every key of: equal weights in eager, and gradients that run through them.

The number swallows the score that it is added to, but not that score's gradient; written over the score, it ends it.
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

from .harness import error, fuse, run

B, H, S, D = 2, 4, 23, 16
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def scores(q, k):
    return q @ k.mT * 0.25


def least(q):
    return torch.finfo(q.dtype).min


def later(q):
    return torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)


def left_padded():
    """The second sample begins with keys, and queries, that are none."""
    return torch.arange(S) >= torch.tensor([[0], [7]])


def hidden(q, keep):
    return (1.0 - keep[:, None, None].to(q.dtype)) * least(q)


def computed_twice(q, k, v, keep):
    """As an encoder's mask was once made: nothing that is proved."""
    inverted = 1.0 - (keep & keep[:, :1])[:, None, None].to(q.dtype)
    return (scores(q, k) + inverted.masked_fill(inverted.bool(), least(q))).softmax(-1) @ v


def of_pairs(q, k, v, keep):
    """Every padded query sees nothing."""
    pairs = torch.bmm(keep[:, :, None].to(q.dtype), keep[:, None].to(q.dtype))
    return (scores(q, k) + (1.0 - pairs[:, None]) * least(q)).softmax(-1) @ v


def sum_of_masks(q, k, v, keep):
    sum_of_both = torch.clamp(hidden(q, keep) + later(q) * least(q), min=least(q))
    return (scores(q, k) + sum_of_both).softmax(-1) @ v


def added_twice(q, k, v, keep):
    """Keys that both hide are lower than the others of an empty row."""
    return (scores(q, k) + later(q) * -1e9 + (~keep)[:, None, None] * -1e9).softmax(-1) @ v


def beside_infinity(q, k, v, keep):
    return (scores(q, k).masked_fill(later(q), -math.inf) + hidden(q, keep)).softmax(-1) @ v


def written_then_added(q, k, v, keep):
    """GPT-Neo's."""
    return (torch.where(~later(q), scores(q, k), least(q)) + hidden(q, keep)).softmax(-1) @ v


def behind_alibi(q, k, v, keep):
    """Bloom's."""
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=q.device)[:, None, None]
    biased = scores(q, k) + (slopes * torch.arange(S, device=q.device)).to(q.dtype)
    return (biased.masked_fill(later(q), least(q)) + hidden(q, keep)).softmax(-1) @ v


def written_twice(q, k, v, keep):
    return scores(q, k).masked_fill(later(q), -3e4).masked_fill(~keep[:, None, None], -6e4).softmax(-1) @ v


def behind_a_soft_cap(q, k, v, keep):
    """Gemma 2's."""
    return (5 * torch.tanh(scores(q, k) / 5) + later(q) * least(q) + hidden(q, keep)).softmax(-1) @ v


def behind_a_function(q, k, v, keep):
    return (scores(q, k).clamp(-1, 1).masked_fill(later(q), least(q)) + hidden(q, keep)).softmax(-1) @ v


def raised_by_a_number(q, k, v, keep):
    """The other way round: the kept keys of a row swallow their scores."""
    return (scores(q, k) + keep.long()[:, None, None] * 1e9).softmax(-1) @ v


KERNELS_ONLY = (written_then_added, behind_alibi, behind_a_soft_cap, behind_a_function)
FORMS = [computed_twice, of_pairs, sum_of_masks, added_twice, beside_infinity, written_twice, raised_by_a_number]
FORMS += KERNELS_ONLY


def assert_as_eager(ours, theirs):
    assert error(ours.out, theirs.out) < 1e-5
    for mine, grad in zip(ours.grads, theirs.grads, strict=True):
        assert error(mine, grad) < 1e-5


@TARGETS
@pytest.mark.parametrize("fn", FORMS)
@pytest.mark.parametrize("grads", [False, True])
def test_rows(fn, grads, target):
    args = [torch.randn(3, B, H, S, D)[i] for i in range(3)] + [left_padded()]
    compiled, report = fuse(fn, target=target)
    assert_as_eager(run(compiled, args, torch.float32, grads), run(fn, args, torch.float32, grads))
    (site,) = report.sites
    stays = target == "sdpa" and (fn in KERNELS_ONLY[2:] or (grads and fn in KERNELS_ONLY[:2]))
    assert site.status == ("rejected" if stays else "fused"), site.verdict


@TARGETS
@pytest.mark.parametrize("of", ["some", "all"])
def test_a_mask_that_is_given(of, target):
    """Rows of one number, and of several."""
    keep = left_padded() if of == "some" else torch.arange(S) < torch.tensor([[S], [0]])
    mask = later(keep.float()) * -1e9 + (~keep)[:, None, None] * -1e9

    def fn(q, k, v):
        return (scores(q, k) + mask).softmax(-1) @ v

    args = list(torch.randn(3, B, H, S, D).unbind())
    compiled, report = fuse(fn, target=target)
    assert_as_eager(run(compiled, args, torch.float32), run(fn, args, torch.float32))
    assert [s.status for s in report.sites] == ["fused"]


@pytest.mark.parametrize("learned", [False, True])
def test_a_mask_of_sdpa(learned):
    """Falcon's ALiBi, hidden by a number. (PyTorch's own fused kernels are wrong here.)"""

    def fn(q, k, v, bias, keep):
        mask = (bias if learned else bias.detach()).masked_fill(~keep[:, None, None] | later(q), least(q))
        return scaled_dot_product_attention(q, k, v, mask)

    args = [*torch.randn(3, B, H, S, D).unbind(), torch.randn(H, 1, S), left_padded()]
    compiled, report = fuse(fn, target="reference")
    ours = run(compiled, args, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = run(fn, args, torch.float32)
    ours.grads, theirs.grads = ours.grads[: 3 + learned], theirs.grads[: 3 + learned]
    assert_as_eager(ours, theirs)
    assert [s.target for s in report.sites] == ["reference"]


@TARGETS
@pytest.mark.parametrize("where", ["written over a bias", "beside a bias"])
def test_a_learned_bias(where, target):
    def fn(q, k, v, bias, keep):
        if where == "beside a bias":
            return (scores(q, k) + bias + hidden(q, keep)).softmax(-1) @ v
        return (scores(q, k) + bias.masked_fill(~keep[:, None, None], least(q))).softmax(-1) @ v

    args = [*torch.randn(3, B, H, S, D).unbind(), torch.randn(H, S, S), torch.arange(S) < torch.tensor([[S], [0]])]
    compiled, report = fuse(fn, target=target)
    assert_as_eager(run(compiled, args, torch.float32), run(fn, args, torch.float32))
    assert [s.status for s in report.sites] == ["fused"]


@pytest.mark.parametrize("by", ["added", "written"])
def test_dropout_of_equal_weights(by):
    """An encoder in training: with v the unit matrix, the result is the weights, and its zeros what was dropped."""

    def weigh(q, k):
        s = scores(q, k)
        return (s + hidden(q, keep) if by == "added" else s.masked_fill(~keep[:, None, None], least(q))).softmax(-1)

    def fn(q, k, v):
        return dropout(weigh(q, k), 0.5) @ v

    q, k = (x.requires_grad_() for x in torch.randn(2, B, H, S, S).unbind())
    v, keep = torch.eye(S).expand(B, H, S, S), torch.arange(S) < torch.tensor([[S], [0]])
    compiled, report = fuse(fn, target="reference")
    weights = compiled(q, k, v)
    assert [s.status for s in report.sites] == ["fused"]
    kept = (weights != 0).float() * 2
    torch.testing.assert_close(weights[1], kept[1] / S)
    dout = torch.randn_like(weights)
    ours, theirs = (torch.autograd.grad(x, (q, k), dout) for x in (weights, weigh(q, k) * kept))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def weights_hidden_too(q, k, v, bias, keep):
    """CPM-Ant's: an embedding of positions, and a mask that the weights have as well."""
    s = (scores(q, k) + bias).masked_fill(~keep, -math.inf)
    return s.softmax(-1).masked_fill(~keep, 0.0) @ v


def another_mask_too(q, k, v, bias, keep):
    """SpeechBrain's: of two masks by -inf, one."""
    s = scores(q, k).masked_fill(bias < -1e30, -math.inf).masked_fill(~keep, -math.inf)
    return s.softmax(-1).masked_fill(~keep, 0.0) @ v


@TARGETS
@pytest.mark.parametrize("fn", [weights_hidden_too, another_mask_too])
def test_weights_hidden_by_one_of_several_masks(fn, target):
    """Zeros where that mask hides all, and NaN where the others hide all that it shows."""
    bias = torch.randn(H, S, S)
    bias[:, 5, :10] = bias[1, 9] = -math.inf
    keep = torch.rand(B, 1, S, S) > 0.5
    keep[..., 5, 10:] = keep[0, :, 9] = keep[1, :, 11] = False
    args = [*torch.randn(3, B, H, S, D).unbind(), bias, keep]
    compiled, report = fuse(fn, target=target)
    ours, theirs = (run(f, args, torch.float32, False).out for f in (compiled, fn))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert theirs.isnan().any() and (theirs == 0).all(-1).any()
    assert [site.status for site in report.sites] == ["fused"], report
    compiled, report = fuse(fn, target=target)
    for mine, grad in zip(run(compiled, args, torch.float32).grads, run(fn, args, torch.float32).grads, strict=True):
        assert mine is None and grad is None or torch.allclose(mine, grad, atol=1e-5, equal_nan=True)


def exponentials_times_mask(q, k, v, bias):
    e = torch.exp(scores(q, k) + bias) * torch.ones(S, S).tril(-1)
    return (e / e.sum(-1, keepdim=True)) @ v


def infinity_added(q, k, v, bias):
    return (scores(q, k) + bias + torch.full((S, S), -math.inf).triu(0)).softmax(-1) @ v


@TARGETS
@pytest.mark.parametrize("shape", [(S, S), (H, 1, S), (1, S, 1)])
@pytest.mark.parametrize("fn", [exponentials_times_mask, infinity_added])
def test_gradient_of_a_bias_where_a_row_is_nan(fn, shape, target):
    args = [*torch.randn(3, B, H, S, D).unbind(), torch.randn(shape)]
    compiled, report = fuse(fn, target=target)
    ours, theirs = (run(f, args, torch.float32) for f in (compiled, fn))
    for mine, grad in zip([ours.out, *ours.grads], [theirs.out, *theirs.grads], strict=True):
        torch.testing.assert_close(mine, grad, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert theirs.grads[3].isnan().any()
    assert [site.status for site in report.sites] == ["fused"], report


def unknown(keep, dtype):
    """-1e4 in a tensor of which nothing is known."""
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.tensor(-1e4, dtype=dtype))


@TARGETS
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("added", ["bias", "mask"])
def test_what_only_a_wider_sum_keeps(added, is_known, target):
    """Found by fuzzing: bfloat16 loses the scores beside the mask, but float32 does not lose a bias.

    What another mask adds is no matter.
    """
    bias = torch.randn(S, S)

    def fn(q, k, v, mask):
        mask = torch.zeros(S, S, dtype=q.dtype).masked_fill(~mask, -1e4) if is_known else mask
        more = bias if added == "bias" else torch.ones(S, S).triu(1) * -1e9
        return ((scores(q, k) + mask).float() + more).softmax(-1).to(v.dtype) @ v

    keep = torch.rand(S, S) > 0.3
    keep[4] = False
    args = [*torch.randn(3, B, H, S, D).unbind(), keep if is_known else unknown(keep, torch.float32)]
    compiled, report = fuse(fn, target=target)
    ours, theirs = (run(f, args, torch.bfloat16, False).out for f in (compiled, fn))
    assert error(ours, theirs) < 2e-2
    assert [site.status for site in report.sites] == ["rejected" if added == "bias" else "fused"], report
    run(compiled, args, torch.float32, False)
    assert report.sites[-1].status == "fused", report


@TARGETS
def test_scores_beside_the_largest_number_of_float16(target):
    """-65504 less a score of 20 is -inf there: an unknown tensor may hold that, though it had the dtype before."""

    def fn(q, k, v, bias):
        return (scores(q, k).float() + bias).to(q.dtype).softmax(-1) @ v

    bias = torch.zeros(S, S)
    bias[4] = torch.finfo(torch.float16).min
    q, k, v = torch.rand(3, B, H, S, D).unbind()
    args = [9 * q, -9 * k, v, bias]
    compiled, report = fuse(fn, target=target)
    ours, theirs = (run(f, args, torch.float16, False).out for f in (compiled, fn))
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=1e-2, rtol=1e-2)
    assert theirs[:, :, 4].isnan().any()
    assert [site.status for site in report.sites] == ["rejected"], report
