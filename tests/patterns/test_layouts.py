"""Every layout rule against the operation itself, element by element."""

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fa3_inductor.patterns import layouts
from fa3_inductor.patterns.indices import Space, shape_exprs, size_expr

from .test_indices import everywhere, symbols

aten = torch.ops.aten


def output_node(function, *inputs):
    """The node whose value a traced function returns."""
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs).graph
    return graph.output_node().args[0]


# What is done to arange(24).view(2, 3, 4), for every operator.
CASES = {
    aten.clone: [lambda x: x.clone()],
    aten.contiguous: [lambda x: x.mT.contiguous()],
    aten.alias: [lambda x: aten.alias(x)],
    aten.lift_fresh_copy: [lambda x: aten.lift_fresh_copy(x)],
    aten.view: [lambda x: x.view(6, 4), lambda x: x.view(2, -1, 2), lambda x: x.permute(1, 0, 2)[:2].view(2, 2, 1, 4)],
    aten.reshape: [lambda x: x.permute(2, 0, 1).reshape(8, 3), lambda x: x.reshape(3, 8)],
    aten._unsafe_view: [lambda x: aten._unsafe_view(x, [4, 6])],
    aten.flatten: [lambda x: x.flatten(), lambda x: x.flatten(-2, -1)],
    aten.unflatten: [lambda x: x.unflatten(-1, (2, 2))],
    aten.view_as: [lambda x: x.view_as(torch.zeros(4, 6))],
    aten.reshape_as: [lambda x: x.mT.reshape_as(torch.zeros(4, 6))],
    aten.expand: [lambda x: x[:1].expand(5, 2, 3, 4), lambda x: x[:, :1].expand(-1, 6, -1)],
    aten.expand_as: [lambda x: x[:, :1].expand_as(torch.zeros(2, 5, 4))],
    aten.broadcast_to: [lambda x: torch.broadcast_to(x, (5, 2, 3, 4))],
    aten.unsqueeze: [lambda x: x.unsqueeze(1), lambda x: x.unsqueeze(-1), lambda x: x.unsqueeze(-4)],
    aten.squeeze: [
        lambda x: x[:, :1].squeeze(),
        lambda x: x[:, :1].squeeze(-2),
        lambda x: x.squeeze(1),
        lambda x: x[:1, :1].squeeze((0, -2)),
    ],
    aten.transpose: [lambda x: x.transpose(0, -1), lambda x: x.transpose(1, 2)],
    aten.swapaxes: [lambda x: x.swapaxes(0, -1)],
    aten.swapdims: [lambda x: x.swapdims(0, 1)],
    aten.t: [lambda x: x[1].t(), lambda x: x[0, 1].t()],
    aten.mT: [lambda x: x.mT],
    aten.numpy_T: [lambda x: x[1].T],
    aten.adjoint: [lambda x: x.adjoint()],
    aten.permute: [lambda x: x.permute(2, 0, 1), lambda x: x.permute(-2, -1, 0)],
    aten.movedim: [lambda x: x.movedim(0, -1), lambda x: x.movedim((0, 2), (1, 0)), lambda x: x.movedim(-1, 0)],
    aten.moveaxis: [lambda x: x.moveaxis(0, 2)],
    aten.select: [lambda x: x.select(1, 2), lambda x: x.select(-1, -3)],
    aten.slice: [
        lambda x: x[:, 1:],
        lambda x: x[..., 1:4:2],
        lambda x: x[:, -2:],
        lambda x: x[..., -3:-1],
        lambda x: aten.slice(x, 1, 1, 9),
    ],
    aten.narrow: [lambda x: x.narrow(-1, 1, 2), lambda x: x.narrow(0, 1, 1)],
    aten.repeat_interleave: [lambda x: x.repeat_interleave(3, 1), lambda x: x.repeat_interleave(2, dim=-1)],
    aten.repeat: [lambda x: x.repeat(2, 1, 3), lambda x: x[:, :1].repeat(2, 1, 4, 1)],
    aten.tile: [lambda x: x.tile((2, 3)), lambda x: x.tile((2, 1, 1, 2))],
    aten.split: [lambda x: x.split(3, -1)[1], lambda x: x.split(1, 0)[1]],
    aten.split_with_sizes: [lambda x: x.split([1, 2, 1], 2)[2]],
    aten.chunk: [lambda x: x.chunk(2, 1)[1], lambda x: x.chunk(2)[-1]],
    aten.tensor_split: [lambda x: x.tensor_split(3, 2)[1], lambda x: x.tensor_split((1, 3), -1)[2]],
    aten.unbind: [lambda x: x.unbind(-1)[2], lambda x: x.unbind()[1]],
}
PIECES = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind}
TRACED_AS_ANOTHER = {aten.lift_fresh}  # becomes lift_fresh_copy


def test_every_rule_has_a_case():
    assert set(layouts._RULES) == set(CASES) - PIECES | TRACED_AS_ANOTHER


def check(function, kind=None):
    x = torch.arange(24).view(2, 3, 4)
    expected = function(x)
    node = output_node(function, x)
    space = Space()
    source_index = index = symbols(space, expected.shape)
    seen = set()
    while node.op != "placeholder":
        seen.add(layouts.packet(node.args[0] if node.target is operator.getitem else node))
        step = layouts.layout_step(space, node, source_index)
        assert step is not None, node.format_node()
        node, source_index = step
    assert kind is None or kind in seen
    for concrete, where in everywhere(index, expected.shape):
        assert x[tuple(int(e.xreplace(where)) for e in source_index)] == expected[concrete]


@pytest.mark.parametrize(
    "kind, number", [pytest.param(k, n, id=f"{k.__name__}-{n}") for k, fs in CASES.items() for n in range(len(fs))]
)
def test_rule(kind, number):
    check(CASES[kind][number], kind)


def test_a_chain_of_layouts():
    check(lambda x: x.permute(2, 0, 1)[1:].flatten(0, 1).unsqueeze(1).expand(-1, 2, -1).chunk(2, -1)[0].mT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.view(torch.int32),
        lambda x: x.repeat_interleave(2),
        lambda x: x.repeat_interleave(torch.tensor([2, 2]), 0, output_size=4),
        lambda x: x.topk(2)[1],
    ],
    ids=["add", "view.dtype", "flat repeat", "counted repeat", "topk"],
)
def test_no_layout(function):
    node = output_node(function, torch.arange(24).view(2, 3, 4))
    space = Space()
    assert layouts.layout_step(space, node, symbols(space, node.meta["val"].shape)) is None


@pytest.mark.parametrize("n", [3, -3])
@pytest.mark.parametrize("take", [lambda x, n: x.select(0, n), lambda x, n: x[n:]], ids=["select", "slice"])
def test_a_symbolic_position_may_count_from_the_end(take, n):
    graph = make_fx(take, tracing_mode="symbolic")(torch.zeros(8, 5), n).graph
    whole, position = graph.find_nodes(op="placeholder")
    node = graph.output_node().args[0]
    while layouts.packet(node) not in (aten.select, aten.slice) or node.args[1] != 0:
        node = node.args[0]
    space = Space()
    index = symbols(space, shape_exprs(node.meta["val"]))
    source, (row, *_) = layouts.layout_step(space, node, index)
    within = index[0] if len(index) == 2 else 0
    expected = size_expr(position) + (size_expr(whole.meta["val"].shape[0]) if n < 0 else 0)
    assert source is whole and row - within == expected
