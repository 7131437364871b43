"""Every spelling: found, proved as expected or left alone for the expected reason, and as exact as eager either way."""

import pytest
import torch

from .forms import FORMS, Form
from .harness import assert_as_good_as_eager, fuse, run

FUSED = [f for f in FORMS if f.reason is None]
REJECTED = [f for f in FORMS if f.reason is not None]


def name(form: Form) -> str:
    return form.name


@pytest.fixture(autouse=True)
def fresh_data():
    torch.manual_seed(torch.seed())


@pytest.mark.parametrize("target", ["sdpa", "reference"])
@pytest.mark.parametrize("form", FUSED, ids=name)
def test_fused(form, target):
    compiled, report = fuse(form.fn, target=target)
    args = form.args()
    for dtype in (torch.float32, torch.bfloat16):
        ours = run(compiled, args, dtype, form.grads)
        assert_as_good_as_eager(
            ours, run(form.fn, args, dtype, form.grads), run(form.fn, args, torch.float64, form.grads), dtype
        )
    assert len(report.sites) == 2  # one a dtype
    for site in report.sites:
        assert (site.status, site.mask, site.target) == ("fused", form.mask, target), site.verdict


@pytest.mark.parametrize("form", REJECTED, ids=name)
def test_left_alone(form):
    compiled, report = fuse(form.fn)
    args = form.args()
    ours, eager = run(compiled, args, torch.float32, form.grads), run(form.fn, args, torch.float32, form.grads)
    for mine, theirs in zip([ours.out, *ours.grads], [eager.out, *eager.grads], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    (site,) = report.sites
    assert (site.status, site.reason) == ("rejected", form.reason), site.verdict
    assert site.source.partition(":")[0].endswith("forms.py")


@pytest.mark.parametrize("form", FUSED, ids=name)
def test_float64_is_never_narrowed(form):
    compiled, report = fuse(form.fn)
    args = form.args()
    ours, eager = run(compiled, args, torch.float64, form.grads), run(form.fn, args, torch.float64, form.grads)
    for mine, theirs in zip([ours.out, *ours.grads], [eager.out, *eager.grads], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert [s.status for s in report.sites] == ["rejected"]
