"""Which weights dropout keeps: as many as it should, one as independent of the other as they should be."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels.dropout import LEVELS, keep_scale, kept_weights, threshold  # noqa: E402

SHAPE = (2, 3, 256, 512)


def kept(seed, p, shape=SHAPE):
    return kept_weights(torch.tensor([seed]), p, shape)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**62 + 12345])
def test_share(seed, p):
    x = kept(seed, p).double()
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(x.mean() - (1 - p)) < 5 * deviation
    for axis in range(4):  # in every slice too
        rest = [i for i in range(4) if i != axis]
        assert ((x.mean(rest) - (1 - p)).abs() < 6 * deviation * math.sqrt(x.shape[axis])).all()


def test_neighbours_and_seeds_have_nothing_to_do_with_each_other():
    p = 0.3
    x = kept(5, p).double() - (1 - p)
    limit = 5 * p * (1 - p) / math.sqrt(x.numel() / 6)
    for shift in (1, 2, 8, 16, 32):
        assert (x[:, :, shift:] * x[:, :, :-shift]).mean().abs() < limit
        assert (x[..., shift:] * x[..., :-shift]).mean().abs() < limit
        assert (x[:, :, shift:, shift:] * x[:, :, :-shift, :-shift]).mean().abs() < limit
    assert (x[0] * x[1]).mean().abs() < limit and (x[:, 0] * x[:, 1]).mean().abs() < limit
    for seed in (6, 5 + 2**32, 5 + 2**33, -5):
        assert (x * (kept(seed, p).double() - (1 - p))).mean().abs() < limit


def test_a_place_decides_not_the_shape():
    whole = kept(9, 0.4)
    assert torch.equal(whole[:, :, :100, :77], kept(9, 0.4, (2, 3, 100, 77)))


def test_scale_is_that_of_the_probability_as_it_is_rounded():
    for p in (0.1, 1 / 3, 1e-6, 0.999999):
        assert keep_scale(p) == pytest.approx(1 / (1 - threshold(p) / LEVELS))
    assert kept(1, 0.0).all() and keep_scale(0.0) == 1


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_no_probability(p):
    with pytest.raises(ValueError, match="probability below 1"):
        threshold(p)
