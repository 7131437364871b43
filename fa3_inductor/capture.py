"""A functional, pre-autograd ATen view of a Dynamo graph, for reading only, and the way back.

The view has a small vocabulary: methods, operators, in-place writes, nn modules and vmapped functions have all become
functional ATen calls, while ``scaled_dot_product_attention`` is still whole. For every value of the Dynamo graph the
capture records which ATen node it is, and again after every in-place write, so that a value can be taken from the
Dynamo graph exactly where it still holds.
"""

import dataclasses
import functools
import itertools
import logging
import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import tracing
from .opaque import EXPANSIONS
from .patterns.layouts import NO_GRAD
from .patterns.magnitude import LEARNED, REQUIRES_GRAD

log = logging.getLogger(__name__)

# What is not looked into: a tensor that was computed from others in a way that is not said.
UNSEEN = "unseen"
_library = torch.library.Library("fa3", "FRAGMENT")
_library.define(f"{UNSEEN}(Tensor[] inputs, SymInt[] size, *, ScalarType dtype, Device device) -> Tensor")


@torch.library.register_fake(f"fa3::{UNSEEN}", lib=_library)
def _unseen(inputs: list[torch.Tensor], size: list[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=device)


class CaptureError(RuntimeError):
    """The graph could not be captured; the message says at which of the user's operations."""


@dataclasses.dataclass
class Capture:
    """The ATen view of ``source`` and the correspondence between the two graphs."""

    source: GraphModule
    view: GraphModule
    seconds: float
    inputs: dict[Node, Node]  # placeholder of the view -> placeholder of the source
    wrapped: dict[Node, tuple[Node, tuple[str, ...]]]  # ... -> placeholder of the source, and the attribute that it is
    _history: dict[
        Node, list[tuple[int, Any]]
    ]  # source node -> [(since which source node, ATen node or tuple of them)]
    _order: dict[Node, int]
    grad_modes: dict[Node, bool]
    unseen: dict[Node, str]  # source nodes that were not looked into, and why
    _sources: dict[Node, list[Node]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, entries in self._history.items():
            for _, value in entries:
                if isinstance(value, Node) and node not in self._sources.setdefault(value, []):
                    self._sources[value].append(node)

    def value_of(self, node: Node, before: Node) -> Any:
        """The ATen node (or tuple of nodes) that ``node`` holds when ``before`` starts to run; None if not a tensor."""
        now = self._order[before]
        held = None
        for since, value in self._history.get(node, ()):
            if since < now:
                held = value
        return held

    def find(self, value: Node, before: Node) -> Node | None:
        """A node of the source graph that holds exactly ``value`` when ``before`` starts to run."""
        for node in self._sources.get(value, ()):
            if self._order[node] < self._order[before] and self.value_of(node, before) is value:
                return node
        return None

    @functools.cached_property
    def _writes(self) -> list[tuple[int, set[int | None]]]:
        """Which nodes may write to memory, and to which."""
        return [(at, _all_storages(n.all_input_nodes)) for n, at in self._order.items() if may_write(n)]

    def is_written(self, wrapper: Node, before: Node) -> bool:
        """Whether anything may write, before ``before`` runs, to what a graph input that wraps tensors consists of."""
        inner = {None} | _storages(wrapper)
        return any(at < self._order[before] and inner & written for at, written in self._writes)

    def is_written_after(self, node: Node, place: Node) -> bool:
        """Whether anything may write to the memory of ``node`` when ``place`` has run."""
        storages = _storages(node)
        return any(at > self._order[place] and storages & written for at, written in self._writes)

    def origin(self, value: Node) -> Node | None:
        """The node of the source graph during which ``value`` was computed."""
        return value.meta.get("fa3_origin")

    def outputs(self, node: Node) -> Any:
        """What ``node`` of the source graph returned: an ATen node or a tuple of them."""
        entries = self._history.get(node)
        return entries[0][1] if entries else None

    def held_by(self, value: Node) -> list[Node]:
        """Every node of the source graph that held ``value`` at some time."""
        return list(self._sources.get(value, ()))


_HALVES = (torch.bfloat16, torch.float16)


class _Visible(TorchFunctionMode):
    """Makes visible what a functional trace from before autograd leaves out.

    The casts of autocast: the trace is from before autocast too, and enters none. Only those to 16 bits matter here, of
    the products; what autocast keeps in fp32 the matcher reads as it stands.

    That dropout returns its own input where it drops nothing, else a tensor that may be written to: torch freezes what
    it returns in such a trace, and a write to it later would raise.

    That type_as returns its own input where that has the dtype already: the trace takes it for a new tensor.
    """

    _PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "mm", "addmm", "einsum", "linear"}
    _PRODUCTS |= {"scaled_dot_product_attention"}

    def __init__(self) -> None:
        super().__init__()
        self._entered: list[tuple[str, torch.dtype | None, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_enter_autocast":
            device_type, dtype, enabled = args[:3]
            self._entered.append((device_type, dtype, enabled))
        elif name == "_exit_autocast":
            self._entered.pop()
        elif name == "dropout":
            return self._dropout(func, args, kwargs)
        elif name == "type_as":
            like = args[1] if len(args) > 1 else kwargs["other"]
            if (args[0].dtype, args[0].device) == (like.dtype, like.device):
                return args[0]
        elif name in self._PRODUCTS:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._cast, (args, kwargs))
        return func(*args, **kwargs)

    def _dropout(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """torch.dropout(input, p, train) or torch.nn.functional.dropout(input, p, training, inplace)."""
        given = dict(zip(("input", "p", "training", "inplace"), args)) | kwargs
        if given.get("inplace"):
            return func(*args, **kwargs)
        if not given.get("train", given.get("training", True)) or given.get("p") == 0:
            return given["input"]
        return func(*args, **kwargs).clone()

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if kind == "meta" or x.dtype not in (torch.float32, *_HALVES):
            return x
        for device_type, dtype, enabled in reversed(self._entered):
            if device_type == kind:
                return x.to(dtype or torch.get_autocast_dtype(kind)) if enabled else x
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Recorder(torch.fx.Interpreter):
    """Runs the Dynamo graph under capture and notes which traced node every value is."""

    def __init__(self, module: GraphModule, attributes: list[str], vmapped: dict[Node, str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._attributes = dict.fromkeys(attributes)
        self.history: dict[Node, list[tuple[int, Any]]] = {}
        self.origins: dict[Node, Node] = {}
        self.current: Node | None = None
        self._by_storage: dict[int | None, list[Node]] = {}
        self._graph_length = 0
        self._step = -1
        self._sizes: dict[Any, Any] = {}  # the symbolic ones of graph inputs, by their expressions
        self._mapped: dict[Node, int] = {}  # what has other axes than in the user's code, and how many of its own
        self._open = 0  # how many vmaps are
        self._vmapped = vmapped  # nodes of vmaps that could not be captured
        self.unseen = dict(vmapped)  # all that is not looked into, and why
        self._shared: set[int | None] = set()  # storages that these may have in common with what is
        self._stale: set[Node] = set()  # what was written to without the trace's knowing

    def run_with_attributes(self, *args: Any) -> Any:
        """Run with the values of the module's own tensors after those of the graph inputs."""
        count = len(args) - len(self._attributes)
        self._attributes = dict(zip(self._attributes, args[count:], strict=True))
        for x in args:
            if isinstance(x, torch.Tensor) and not tracing.is_wrapper(x):
                self._sizes |= {size.node.expr: size for size in x.shape if isinstance(size, torch.SymInt)}
        with _Visible():
            return pytree.tree_map(_plain_output, self.run(*args[:count]))

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        return self._attributes[target] if target in self._attributes else super().get_attr(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        self._step += 1
        self.current = n
        result = self._value_of(n)
        tracer = tracing.current_tracer()
        if n.op != "output":
            value = _traced(result, tracer)
            # (What is made inside of a vmap must not be read outside of it: at run time it is of its kind.)
            if value is not None and n not in self._mapped and not self._open:
                self.history[n] = [(self._step, value)]
                for storage in _storages(n):
                    self._by_storage.setdefault(storage, []).append(n)
            if may_write(n):
                self._follow_write(n, tracer)
        self._note_origins(n, tracer.graph)
        return result

    def _value_of(self, n: Node) -> Any:
        if n in self._vmapped:
            return None if self._vmapped.keys() >= n.users.keys() else self._pass_by(n)
        in_vmap = self._in_vmap(n)
        if in_vmap is not None:
            return in_vmap()
        values = [self.env[x] for x in n.all_input_nodes]
        if n.op == "output" or not any(isinstance(x, _Unseen) for x in values):
            try:
                return super().run_node(n)
            except Exception as error:
                if _writes(n) or not any(map(tracing.is_wrapper, [*values, n.meta.get("example_value")])):
                    raise
                log.info("'%s' is not looked into: %s", n.name, error)
        elif _writes(n):
            raise CaptureError("it may write to a tensor that is not looked into")
        kinds = {type(x.meta.get("example_value")) for x in (*n.all_input_nodes, n)}
        names = sorted(kind.__name__ for kind in kinds if hasattr(kind, "__tensor_flatten__"))
        self.unseen[n] = f"it works on {', '.join(names)}" if names else "what it works on is not"
        return self._pass_by(n)

    def _pass_by(self, n: Node) -> Any:
        """What a node that is not looked into, or is in such a vmap, returns: it comes from all that enters."""
        nodes = self._vmapped if n in self._vmapped else (n,)
        sources = dict.fromkeys(x for m in nodes for x in m.all_input_nodes)
        sources = [x for x in sources if x in self.env and x not in self._vmapped]
        self._shared |= _storages(n) & ({None} | _all_storages(sources))
        inputs = pytree.tree_leaves([_plain_output(self.env[x]) for x in sources])
        inputs = [x for x in inputs if isinstance(x, torch.Tensor)]

        def unseen(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and not tracing.is_wrapper(value):
                size = [self._size(x) for x in value.shape]
                return getattr(torch.ops.fa3, UNSEEN)(inputs, size, dtype=value.dtype, device=value.device)
            if n in self._vmapped:
                raise CaptureError(f"'{n.name}' leaves a vmapped function and is no tensor")
            return _Unseen(getattr(torch.ops.fa3, UNSEEN)(inputs, [0], dtype=torch.uint8, device=torch.device("cpu")))

        return pytree.tree_map(unseen, n.meta.get("example_value"))

    def _size(self, size: Any) -> Any:
        """As it is known in this trace."""
        known = size if isinstance(size, int) else self._sizes.get(size.node.expr)
        if known is None:
            raise CaptureError(f"a size of what is not looked into is {size}")
        return known

    # A vmapped function (as transformers makes masks of) would be traced on tensors of its own kind, which are no
    # functional ones. It runs on broadcast ones instead: [a level's batch, one for each level around it, its own axes].

    def _in_vmap(self, n: Node) -> Callable[[], Any] | None:
        """What to run in place of a node that opens or closes a vmap or computes in one; None if it does neither."""
        name = getattr(n.target, "__name__", "") if n.op == "call_function" else str(n.target)
        if name in _TRANSFORMS:
            raise CaptureError("derivatives are taken inside the compiled code (torch.func); compile what they are of")
        self._open += {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)
        if name in ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"):
            return lambda: None
        if name in ("_add_batch_dim", "_remove_batch_dim"):
            return functools.partial(getattr(self, name), n, *self.fetch_args_kwargs_from_env(n)[0])
        is_fresh = name in ("new_ones", "new_zeros", "new_full")
        if n.op == "output" or is_fresh or self._mapped.keys().isdisjoint(n.all_input_nodes):
            return None
        return functools.partial(self._elementwise, n, name)

    def _add_batch_dim(self, n: Node, x: torch.Tensor, dim: int, level: int) -> torch.Tensor:
        own = self._mapped.get(n.args[0], x.ndim) - 1
        if own:
            raise CaptureError("a vmapped function of more than numbers")
        self._mapped[n] = own
        return x.movedim(dim % x.ndim, 0).reshape(-1, *[1] * (level - 1))

    def _remove_batch_dim(self, n: Node, x: torch.Tensor, level: int, size: int, dim: int) -> torch.Tensor:
        own = self._mapped.get(n.args[0], x.ndim)
        x = x.reshape(*[1] * (level + own - x.ndim), *x.shape)
        x = x.expand(size, *x.shape[1:]).movedim(0, level - 1 + dim % (own + 1))
        if level > 1:
            self._mapped[n] = own + 1
        return x

    def _elementwise(self, n: Node, name: str) -> torch.Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if any(self._mapped.get(x) for x in n.all_input_nodes):
            raise CaptureError(f"'{n.name}' in a vmapped function has axes of its own")
        if name in _INDEXING:
            source, index = args[0], args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            if n.args[0] in self._mapped or len(index) != source.ndim:
                raise CaptureError(f"'{n.name}' in a vmapped function is more than one number")
            inputs = [x for x in index if isinstance(x, torch.Tensor)]
        else:
            inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            # (Of two with and without axes, torch takes the dtype of the first; of two without, it may take another.)
            dtypes = {x.dtype for x in inputs if name != "where" or x.dtype != torch.bool}
            if len(dtypes) > 1 and len(inputs) > sum(x in self._mapped for x in n.all_input_nodes):
                raise CaptureError(f"'{n.name}' in a vmapped function is of several dtypes")
        sources = n.args[:1] if name in _INDEXING else ()
        unmapped = [self.env[x] for x in n.all_input_nodes if x not in self._mapped and x not in sources]
        if name not in _ELEMENTWISE | _INDEXING or any(isinstance(x, torch.Tensor) and x.ndim for x in unmapped):
            raise CaptureError(f"'{n.name}' ({name}) in a vmapped function")
        self._mapped[n] = 0
        result = getattr(self, n.op)(n.target, args, kwargs)
        if result.shape != torch.broadcast_shapes(*(x.shape for x in inputs)):
            raise CaptureError(f"'{n.name}' ({name}) in a vmapped function does not work element by element")
        return result

    def call_method(self, target: str, args: tuple, kwargs: dict) -> Any:
        known = self.current.meta.get("example_value")
        if target == "item" and isinstance(known, torch.SymFloat):
            # A float of the model that Dynamo made an input (a scale, a dropout probability): its value is guarded.
            return float(known)
        if target in _HOOKS:
            return args[0].detach()
        return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if getattr(target, "__name__", "") in _HOOKS:
            return args[0].detach()
        if isinstance(target, torch._ops.HigherOrderOperator):
            result = super().call_function(target, args, kwargs)
            return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        expansion = EXPANSIONS.get(target)
        return expansion(*args, **kwargs) if expansion is not None else super().call_function(target, args, kwargs)

    def _follow_write(self, writer: Node, tracer: Any) -> None:
        """After an in-place write, note the new value of everything that may alias what was written."""
        storages = _all_storages(writer.all_input_nodes)
        if self._shared and storages & (self._shared | {None}) and _writes(writer):
            raise CaptureError("it may write to a tensor that is not looked into")
        if None in storages or isinstance(writer.target, torch._ops.HigherOrderOperator):
            storages = set(self._by_storage)
        for storage in storages | {None}:
            nodes = [x for x in self._by_storage.get(storage, ()) if x is not writer and x not in self._stale]
            values = {x: _traced(self.env[x], tracer) for x in nodes}
            written = set(itertools.islice(reversed(tracer.graph.nodes), len(tracer.graph.nodes) - self._graph_length))
            knows = {x for x, value in values.items() if not written.isdisjoint(pytree.tree_leaves(value))}
            if knows and storage is not None:
                self._forget([x for x in nodes if x not in knows], writer)
            for node in nodes:
                if node not in self._stale and values[node] not in (None, self.history[node][-1][1]):
                    self.history[node].append((self._step, values[node]))

    def _forget(self, nodes: list[Node], writer: Node) -> None:
        """What shares memory with something that was written to, and has no new value for that in the trace.

        Some operators may return their input, and the trace takes it for a new tensor: ``einsum``, ``sum_to_size`` and
        ``broadcast_tensors`` among them. (Views of other parts of the memory do have a new value.)

        Raises:
            CaptureError: one of the nodes is read later.
        """
        for node in nodes:
            if any(user is not writer and user not in self.env for user in node.users):
                raise CaptureError(f"it writes to '{node.name}' too, which torch takes for another tensor")
            self.history[node].append((self._step, None))
            self._stale.add(node)

    def _note_origins(self, n: Node, graph: torch.fx.Graph) -> None:
        appended = len(graph.nodes) - self._graph_length
        for node, _ in zip(reversed(graph.nodes), range(appended), strict=False):
            if node.op != "placeholder":
                self.origins[node] = n
        self._graph_length = len(graph.nodes)


_TRANSFORMS = ("_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad")

# What is the same on numbers and, entry by entry, on tensors of them; functions, operators and methods.
_ELEMENTWISE = {"le", "lt", "ge", "gt", "eq", "ne", "and_", "or_", "xor", "not_", "invert", "inv", "neg", "abs", "pos"}
_ELEMENTWISE |= {"logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"}
_ELEMENTWISE |= {"add", "sub", "mul", "truediv", "floordiv", "mod", "remainder", "floor_divide", "div", "where"}
_ELEMENTWISE |= {"minimum", "maximum", "clamp", "exp", "log", "sqrt", "tanh", "to", "bool", "float", "long", "int"}
_INDEXING = {"getitem", "index"}
_ELEMENTWISE |= {f"__{name}__" for name in ("le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor", "invert")}


def _storages(node: Node) -> set[int | None]:
    """What tells the storages of a Dynamo node's tensor; -1 for another kind of value, None where nothing is known."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        return {None if value is None else -1}
    try:
        return {part.value.untyped_storage()._cdata for part in tracing.plain_parts([value])[0]}
    except NotImplementedError:  # in a vmapped function
        return {None}


def _all_storages(nodes: list[Node]) -> set[int | None]:
    return set().union(*map(_storages, nodes))


def _traced(result: Any, tracer: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple(_traced(r, tracer) for r in result)
    return tracing.traced_node(result, tracer)


@dataclasses.dataclass
class _Unseen:
    """What is no plain tensor and is not looked into; ``trace`` is a tensor that comes from what it comes from."""

    trace: torch.Tensor


def _plain_output(value: Any) -> Any:
    """What stands for a value among the results of a trace, which are plain tensors."""
    if isinstance(value, _Unseen):
        return value.trace
    return [part.value for part in tracing.plain_parts([value])[0]] if tracing.is_wrapper(value) else value


def _requires_grad(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("example_value"))
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# What watches a tensor of autograd's rather than computes one. A detach stands for it, across which nothing is fused.
_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook", "requires_grad_")


def _is_hidden(node: Node) -> bool:
    """Whether a detach stands for what a node of the source graph returns, which may have a gradient of its own.

    The gradient of a higher-order operator may be its own (an autograd.Function).
    """
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return isinstance(target, torch._ops.HigherOrderOperator) or (name in _HOOKS and node.op.startswith("call"))


_INPLACE_OPERATORS = {getattr(operator, name.strip("_")) for name in dir(operator) if name.startswith("__i")} - {
    operator.inv,
    operator.invert,
    operator.index,
}


def may_write(node: Node) -> bool:
    """Whether a Dynamo node may write to a tensor in place. Errs on the side of yes."""
    target = node.target
    if node.op == "call_method":
        return target == "__setitem__" or (target.endswith("_") and not target.endswith("__"))
    if node.op != "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator) or target is operator.setitem or target in _INPLACE_OPERATORS:
        return True
    name = getattr(target, "__name__", "")
    is_named_so = name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_")
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None or is_named_so:
        return True
    # An ``inplace`` argument given by position cannot be told from another flag, so any True counts.
    parameters = getattr(getattr(target, "__code__", None), "co_varnames", ())
    return "inplace" in parameters and any(arg is True for arg in node.args)


def _writes(node: Node) -> bool:
    """`may_write`, where a higher-order operator (a checkpoint) does so only if something in its bodies does."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return may_write(node)
    owner = node.graph.owning_module
    bodies = [getattr(owner, x.target, None) for x in node.all_input_nodes if x.op == "get_attr"]
    bodies = [x for x in bodies if isinstance(x, GraphModule)]
    return not bodies or any(_writes(n) for body in bodies for n in body.graph.nodes)


def capture(gm: GraphModule) -> Capture:
    """Capture ``gm``, whose placeholders carry fake tensors in ``meta["example_value"]`` as Dynamo leaves them.

    Raises:
        CaptureError: the graph holds something that cannot be traced functionally; the graph itself is untouched.
    """
    start = time.perf_counter()
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = _fake_inputs(placeholders)
    attributes = _tensor_attributes(gm)
    inputs += [tracing.as_fake(_attribute(gm, name), inputs) for name in attributes]
    leaves, rebuild = tracing.plain_parts(inputs)
    in_vmaps: dict[Node, str] = {}
    while True:
        recorder = _Recorder(gm, attributes, in_vmaps)
        try:
            view = tracing.trace_before_autograd(recorder.run_with_attributes, leaves, rebuild)
            break
        except Exception as error:
            at = recorder.current
            message = _first_line(error)
            around = _vmap_around(at)
            if not in_vmaps.keys() >= around:
                log.info("a vmapped function is not looked into: '%s': %s", at.name, message)
                in_vmaps |= dict.fromkeys(around, f"a vmapped function, {message}")
                continue
            where = f" at '{at.name}' ({getattr(at.target, '__name__', at.target)})" if at is not None else ""
            what = "refused" if isinstance(error, CaptureError) else type(error).__name__
            raise CaptureError(f"{what}{where}: {message}") from error
    modes = grad_modes(gm)
    for node in view.graph.nodes:
        if node in recorder.origins:
            node.meta["fa3_origin"] = origin = recorder.origins[node]
            node.meta[REQUIRES_GRAD] = _is_hidden(origin) or (origin in recorder.unseen and _requires_grad(origin))
            node.meta[NO_GRAD] = not modes[recorder.origins[node]] and any(modes.values())
    _drop_aliases(view, recorder.history)
    held = [n.meta.get("example_value") for n in placeholders] + [_attribute(gm, name) for name in attributes]
    captured_inputs, wrapped = {}, {}
    for node, leaf in zip(view.graph.find_nodes(op="placeholder"), leaves, strict=True):
        value = held[leaf.of]
        node.meta[REQUIRES_GRAD] = isinstance(value, torch.Tensor) and value.requires_grad
        node.meta[LEARNED] = isinstance(value, torch.nn.Parameter) and value.requires_grad and not leaf.path
        if leaf.of < len(placeholders):
            known = wrapped if leaf.path else captured_inputs
            known[node] = (placeholders[leaf.of], leaf.path) if leaf.path else placeholders[leaf.of]
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    return Capture(
        gm, view, time.perf_counter() - start, captured_inputs, wrapped, recorder.history, order, modes, recorder.unseen
    )


def _drop_aliases(view: GraphModule, history: dict[Node, list[tuple[int, Any]]]) -> None:
    """Lets the whole of a tensor (``x[:, ...]``) be the tensor, so that what holds one holds the other."""
    same: dict[Node, Node] = {}
    for node in view.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        if not (node.meta.get(NO_GRAD) or node.meta.get(REQUIRES_GRAD)):
            same[node] = node.args[0]
            node.replace_all_uses_with(node.args[0])
            view.graph.erase_node(node)

    def without(value: Any) -> Any:
        while isinstance(value, Node) and value in same:
            value = same[value]
        return tuple(map(without, value)) if isinstance(value, tuple) else value

    for entries in history.values():
        entries[:] = [(since, without(value)) for since, value in entries]


def _vmap_around(node: Node | None) -> frozenset[Node]:
    """The nodes of the outermost vmap around a node of a Dynamo graph; none if it is in none, or in one that may write
    to what it has not made."""
    around: list[Node] = []
    opened, is_around = 0, False
    for other in node.graph.nodes if node is not None else ():
        name = getattr(other.target, "__name__", "")
        opened += name == "_vmap_increment_nesting"
        if opened:
            around.append(other)
            is_around |= other is node
        opened -= name == "_vmap_decrement_nesting"
        if not opened:
            if is_around:
                break
            around.clear()
    made = {n for n in around if getattr(n.target, "__name__", n.target) in _FRESH}
    writes = (n for n in around if may_write(n) and n.all_input_nodes[0] not in made)
    return frozenset() if not is_around or any(writes) else frozenset(around)


_FRESH = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty", "clone")


def grad_modes(gm: GraphModule) -> dict[Node, bool]:
    """Whether each node of a Dynamo graph runs with gradients enabled."""
    mode, modes = torch.is_grad_enabled(), {}
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            mode = bool(node.args[0])
        modes[node] = mode
    return modes


def _fake_inputs(placeholders: list[Node]) -> list[Any]:
    values = []
    for node in placeholders:
        value = node.meta.get("example_value", node.meta.get("val"))
        if value is None:
            raise CaptureError(f"graph input '{node.name}' has no example value")
        values.append(value)
    return values


def _tensor_attributes(gm: GraphModule) -> list[str]:
    """The tensors that belong to the graph module itself (parameters of an exported program, say)."""
    names = dict.fromkeys(n.target for n in gm.graph.find_nodes(op="get_attr"))
    return [name for name in names if isinstance(_attribute(gm, name), torch.Tensor)]


def _attribute(gm: GraphModule, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), gm)
