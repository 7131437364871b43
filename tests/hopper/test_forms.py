"""Every spelling on the GPU: fused onto the Hopper kernel where it can run it, as exact as eager wherever it runs."""

import pytest
import torch

from tests.forms import forms
from tests.forms.harness import assert_as_good_as_eager, fuse, run

FUSED = [
    pytest.param(form, dtype, id=f"{form.name}-{str(dtype)[6:]}")
    for form in forms.FORMS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if form.reason is None and (form.float16 or dtype != torch.float16)
]
hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not hopper, reason="needs an sm_90 GPU")


@pytest.fixture(autouse=True)
def kernel_sizes(monkeypatch):
    """Head dim and lengths that the kernel has, odd ones among them."""
    monkeypatch.setattr(forms, "D", 64)
    monkeypatch.setattr(forms, "S", 131)
    torch.manual_seed(torch.seed())


def on_gpu(args: list) -> list:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


@pytest.mark.parametrize("form, dtype", FUSED)
def test_fused(form, dtype):
    compiled, report = fuse(form.fn)
    args = on_gpu(form.args())
    ours = run(compiled, args, dtype, form.grads)
    assert_as_good_as_eager(
        ours, run(form.fn, args, dtype, form.grads), run(form.fn, args, torch.float64, form.grads), dtype
    )
    (site,) = report.sites
    target = "sdpa" if dtype == torch.float32 else "hopper"
    assert (site.status, site.mask, site.target) == ("fused", form.mask, target), site.verdict


@pytest.mark.parametrize("form, dtype", [case for case in FUSED if case.values[1] != torch.float32])
def test_fused_for_inference(form, dtype):
    """Without gradients every mask and bias runs on the kernel, whatever its shape and dtype."""
    compiled, report = fuse(form.fn)
    args = on_gpu(form.args())
    ours, eager, exact = (
        run(f, args, d, False) for f, d in ((compiled, dtype), (form.fn, dtype), (form.fn, torch.float64))
    )
    assert_as_good_as_eager(ours, eager, exact, dtype)
    (site,) = report.sites
    assert (site.status, site.mask, site.target) == ("fused", form.mask, "hopper"), site.verdict


@pytest.mark.parametrize("form", [f for f in forms.FORMS if f.reason is not None], ids=lambda f: f.name)
def test_left_alone(form):
    compiled, report = fuse(form.fn)
    args = on_gpu(form.args())
    ours, eager = run(compiled, args, torch.float32, form.grads), run(form.fn, args, torch.float32, form.grads)
    for mine, theirs in zip([ours.out, *ours.grads], [eager.out, *eager.grads], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert [s.reason for s in report.sites] == [form.reason]
