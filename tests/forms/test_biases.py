"""Biases beside masks: ordinary numbers change nothing about who sees whom, what may be a mask does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .test_regressions import D, H, S, same_as_eager

LOW = torch.finfo(torch.float32).min
CAUSAL = torch.ones(S, S).tril().bool()
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def qkv(grads=True):
    return [torch.randn(2, H, S, D) for _ in range(3)]


def scores(q, k):
    return q @ k.mT * D**-0.5


def padding(device, samples=2):
    """The second sample is nothing but padding."""
    lengths = torch.tensor([15, 0], device=device)[:samples]
    return (torch.arange(S, device=device) < lengths[:, None])[:, None, None]


def alibi(device):
    slopes = torch.pow(0.5, torch.arange(1, H + 1, device=device))
    return slopes[:, None, None] * (torch.arange(S, device=device) - S + 1)


def added(visible):
    return torch.where(visible, 0.0, LOW)


class Relative(nn.Module):
    """T5's bias: a learned number for every distance."""

    def __init__(self, combine, trained=True, first=0.0):
        super().__init__()
        self.table = nn.Embedding(2 * S, H)
        nn.init.normal_(self.table.weight)
        self.table.weight.data[0] = first
        self.table.requires_grad_(trained)
        self.combine = combine

    def forward(self, q, k, v):
        positions = torch.arange(S, device=q.device)
        buckets = (positions[:, None] - positions).clamp(-S, S - 1) + S
        bias = self.table(buckets).permute(2, 0, 1)
        return self.combine(scores(q, k), bias).softmax(-1) @ v


def with_causal(s, bias):
    return s + (bias + added(CAUSAL.to(s.device)))


def with_padding(s, bias):
    return s + (bias + added(padding(s.device)))


def overwritten(s, bias):
    return (s + bias).masked_fill(~padding(s.device), LOW)


def overwritten_by_infinity(s, bias):
    return (s + bias).masked_fill(~padding(s.device), -torch.inf)


def overwritten_before(s, bias):
    return s.masked_fill(~padding(s.device), LOW) + bias


@TARGETS
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("combine", [with_causal, overwritten, overwritten_by_infinity])
def test_learned_beside_a_mask(combine, grads, target):
    model = Relative(combine)
    report = same_as_eager(model, qkv(), grads, target)
    (site,) = report.sites
    assert site.status == "fused", site.verdict
    if combine is with_causal:
        assert site.mask == "causal & bias"
        if grads:
            model.table.weight.grad = None
            model(*qkv()).sum().backward()
            assert model.table.weight.grad.any()


@TARGETS
def test_the_gradient_of_what_is_learned(target):
    from .harness import fuse

    for combine in (with_causal, overwritten):
        model = Relative(combine)
        args = qkv()
        gradients = []
        for function in (model, fuse(model, target=target)[0]):
            model.zero_grad()
            (function(*args) * torch.linspace(-1, 1, D)).sum().backward()
            gradients.append(model.table.weight.grad)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combine", [with_padding, overwritten_before])
def test_learned_beside_a_finite_mask_that_may_hide_whole_rows(combine):
    """Such a row's weights, or their gradient, depend on the bias."""
    for grads in (True, False):
        report = same_as_eager(Relative(combine), qkv(), grads=grads)
        assert [s.status for s in report.sites] == ["fused"]


@TARGETS
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("combine", [with_causal, with_padding, overwritten, overwritten_by_infinity])
def test_alibi_beside_a_mask(combine, grads, target):
    def attention(q, k, v):
        return combine(scores(q, k), alibi(q.device)).softmax(-1) @ v

    report = same_as_eager(attention, qkv(), grads, target)
    assert [s.status for s in report.sites] == ["fused"], report


@TARGETS
@pytest.mark.parametrize("first", [-torch.inf, LOW, -1e20])
@pytest.mark.parametrize("kind", ["frozen", "buffer", "input"])
def test_what_may_be_a_mask(kind, first, target):
    """The first query sees itself alone, and a bias that hides that leaves it the keys that the mask hides."""
    bias = torch.randn(H, S, S)
    bias[:, 0, 0] = first

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "frozen":
                self.bias = nn.Parameter(bias, requires_grad=False)
            elif kind == "buffer":
                self.register_buffer("bias", bias)

        def forward(self, q, k, v, bias=None):
            bias = self.bias if bias is None else bias
            return with_causal(scores(q, k), bias).softmax(-1) @ v

    args = [*qkv(), bias] if kind == "input" else qkv()
    for grads in (False, True):
        same_as_eager(Model(), args, grads, target)


def with_one_factor(s, bias):
    return s + (bias + added(padding(s.device, s.size(0)))) * 0.5


def through_a_minimum(s, bias):
    return s + torch.minimum(bias, added(padding(s.device, s.size(0))))


@TARGETS
@pytest.mark.parametrize("combine", [with_one_factor, through_a_minimum])
def test_a_mask_that_is_part_of_a_bias(combine, target):
    """Its numbers are finite, but no ordinary ones."""

    def attention(q, k, v):
        return combine(scores(q, k), alibi(q.device)).softmax(-1) @ v

    same_as_eager(attention, qkv(), False, target)
    (site,) = same_as_eager(attention, [x[:1] for x in qkv()], True, target).sites  # no row of these is empty
    assert site.status == "fused"


@TARGETS
def test_a_learned_bias_alone(target):
    report = same_as_eager(Relative(lambda s, bias: s + bias), qkv(), True, target)
    assert [s.status for s in report.sites] == ["fused"], report


def raised(q, k, v, visible):
    masked = scores(q, k) + added(visible)
    return torch.max(masked, torch.tensor(LOW, device=q.device)).softmax(-1) @ v


@TARGETS
def test_scores_raised_to_the_lowest_number(target):
    def causal(q, k, v):
        return raised(q, k, v, CAUSAL.to(q.device))

    for grads in (False, True):
        report = same_as_eager(causal, qkv(), grads, target)
        assert [(s.status, s.mask) for s in report.sites] == [("fused", "causal")]

    def padded(q, k, v):
        return raised(q, k, v, padding(q.device))

    def clamped(q, k, v):
        return torch.clamp(scores(q, k) + added(padding(q.device)), min=LOW).softmax(-1) @ v

    for function in (padded, clamped):  # half of an empty row's gradient ends in the maximum's other operand
        for grads in (False, True):
            report = same_as_eager(function, qkv(), grads, target)
            assert [s.status for s in report.sites] == ["fused"], report


@pytest.mark.parametrize("least", [-1.0, 0.0, -1e9])
def test_scores_raised_to_a_number_that_they_reach(least):
    def attention(q, k, v):
        return scores(q, k).clamp(min=least).softmax(-1) @ v

    report = same_as_eager(attention, qkv(), True)
    assert [s.reason.name for s in report.sites] == ["SCORE_OP"]


def test_a_bias_that_is_dropped_out_is_no_ordinary_one():
    class Model(nn.Module):
        def forward(self, q, k, v):
            bias = F.dropout(alibi(q.device), 0.5, self.training)
            return with_causal(scores(q, k), bias).softmax(-1) @ v

    report = same_as_eager(Model().eval(), qkv(), True)
    assert [s.status for s in report.sites] == ["fused"]


@TARGETS
def test_a_sum_over_rows_and_columns_of_an_image(target):
    """The summands have axes for rows and columns, which only their sum has in one."""

    def attention(q, k, v, rows, columns):
        rows = rows[:, :, None, :, None].expand(-1, -1, 6, -1, 6)
        columns = columns[:, :, None, :, None].expand(-1, -1, 4, -1, 4).permute(0, 2, 1, 4, 3)
        return (scores(q, k) + (rows + columns).reshape(H, 24, 24)).softmax(-1) @ v

    args = [*(torch.randn(2, H, 24, D) for _ in range(3)), torch.randn(H, 4, 4), torch.randn(H, 6, 6)]
    report = same_as_eager(attention, args, False, target)
    assert [(site.status, site.mask) for site in report.sites] == [("fused", "bias")], report.sites[0].verdict
