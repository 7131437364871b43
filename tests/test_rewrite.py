"""The pass as a whole: what it costs where there is nothing to do, and that it never breaks a compile."""

import statistics
import time

import pytest
import torch

from fa3_inductor import Reason, rewrite
from fa3_inductor.capture import CaptureError
from tests.forms.harness import fuse


def attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


@pytest.fixture
def qkv():
    return [torch.randn(2, 3, 11, 16) for _ in range(3)]


def graph_of(fn, *args) -> torch.fx.GraphModule:
    graphs = []

    def keep(gm, _inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(fn, backend=keep)(*args)
    return graphs[0]


def test_a_graph_without_attention_costs_next_to_nothing(monkeypatch):
    def fn(x):
        for i in range(300):
            x = torch.relu(x * 1.01 + i)
        return x

    gm = graph_of(fn, torch.randn(4))
    monkeypatch.setattr(rewrite, "capture", lambda gm: pytest.fail("captured"))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        assert not rewrite.rewrite_graph(gm).sites
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 5e-3


def test_a_graph_that_cannot_be_captured_is_left_alone(monkeypatch, qkv):
    def refuse(gm):
        raise CaptureError("because")

    monkeypatch.setattr(rewrite, "capture", refuse)
    compiled, report = fuse(attend)
    torch.testing.assert_close(compiled(*qkv), attend(*qkv))
    assert report.graphs[0].error == f"{Reason.CAPTURE.sentence}: because"


@pytest.mark.parametrize("step", ["_attention", "_restore"])
def test_a_splice_that_fails_leaves_the_graph_as_it_was(monkeypatch, qkv, step):
    def fail(*args):
        args[0].call("clone", args[0].operand(args[1].q) if step == "_attention" else args[1])
        raise RuntimeError("broken")

    gm = graph_of(attend, *qkv)
    before = gm.code
    monkeypatch.setattr(f"fa3_inductor.splice.{step}", fail)
    (site,) = rewrite.rewrite_graph(gm).sites
    assert (site.status, site.reason, site.detail) == ("rejected", Reason.INTERNAL, "RuntimeError: broken")
    gm.recompile()
    assert gm.code == before
    gm.graph.lint()


def test_a_matcher_that_fails_loses_one_site_only(monkeypatch, qkv):
    from fa3_inductor.patterns import find

    read, calls = find.read_terms, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise ZeroDivisionError("broken")
        return read(*args)

    monkeypatch.setattr(find, "read_terms", fail_once)
    compiled, report = fuse(lambda q, k, v: attend(attend(q, k, v), k, v))
    torch.testing.assert_close(compiled(*qkv), attend(attend(*qkv), *qkv[1:]))
    assert [(s.status, s.reason) for s in report.sites] == [("rejected", Reason.INTERNAL), ("fused", None)]
