"""The private parts of torch that capture and its guards stand on, one function each, with the versions each serves.

Apart from compat.py because that one runs while torch is being imported and may not import it.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.fx.traceback
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._guards import Guard, GuardSource, TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper


def trace_before_autograd(
    run: Callable[..., Any], parts: "list[Part]", rebuild: Callable[[Sequence[Any]], list[Any]]
) -> GraphModule:
    """The functional ATen graph of ``run`` as it is before autograd, composite operators whole.

    ``parts`` and ``rebuild`` are the `plain_parts` of its fake inputs; the graph has an input for each part.

    This is what ``aot_export_module(pre_dispatch=True)`` traces with, less the analysis of its outputs, which takes a
    third of the time and refuses graphs that write to their inputs. ``run`` is called once, with functional tensors;
    inputs that it writes to are returned after its own results. The trace has a tracing context of its own, so that
    nothing it learns reaches the compilation that is under way. (torch 2.11 to 2.15)
    """

    def functional(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
            inputs = pytree.tree_map(to_fun, args)
            outputs = pytree.tree_map(from_fun, run(*rebuild(inputs)))
            after = [from_fun(x) for x in inputs]
        return outputs, [new for new, old in zip(after, args, strict=True) if new is not old]

    fake_inputs = [part.value for part in parts]
    mode = mode_of(fake_inputs)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(tracing(TracingContext(mode)))
            # A float attribute of the model that Dynamo made symbolic is read with .item().
            stack.enter_context(patch.object(mode, "allow_scalar_outputs", True))
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True))
        stack.callback(
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth,
            torch._C._functorch.get_dynamic_layer_stack_depth(),
        )
        view = make_fx(functional, decomposition_table={}, pre_dispatch=True, _disable_torch_fn_metadata_mode=True)(
            *fake_inputs
        )
    view.graph.eliminate_dead_code()
    return view


class Part(NamedTuple):
    """A tensor that input number ``of`` is, or that is reached through these attributes where it wraps several."""

    of: int
    path: tuple[str, ...]
    value: Any


def plain_parts(inputs: list[Any]) -> tuple[list[Part], Callable[[Sequence[Any]], list[Any]]]:
    """The plain tensors that inputs consist of, and what makes such inputs of others in their place.

    What ``is_wrapper`` says is one (a quantised weight, say, or a DTensor).
    """
    parts: list[Part] = []

    def take(of: int, path: tuple[str, ...], value: Any) -> Callable[[Sequence[Any]], Any]:
        if path and not isinstance(value, torch.Tensor):  # a DTensor's mesh
            return lambda given: value
        if not is_wrapper(value):
            position = len(parts)
            parts.append(Part(of, path, value))
            return lambda given: given[position]
        names, context = value.__tensor_flatten__()
        inner = {name: take(of, (*path, name), getattr(value, name)) for name in names}
        unflatten, size, stride = type(value).__tensor_unflatten__, value.size(), value.stride()
        return lambda given: unflatten({name: make(given) for name, make in inner.items()}, context, size, stride)

    makers = [take(number, (), value) for number, value in enumerate(inputs)]
    return parts, lambda given: [make(given) for make in makers]


def as_fake(tensor: torch.Tensor, inputs: list[Any]) -> torch.Tensor:
    """``tensor`` in the fake mode of ``inputs``; itself where they have none."""
    mode = mode_of(inputs)
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def current_tracer() -> Any:
    """The tracer of the proxy mode that is recording (torch 2.11 to 2.15)."""
    return get_proxy_mode().tracer


def traced_node(value: Any, tracer: Any) -> Node | None:
    """The graph node that a functional tensor holds at this moment of a trace; None for anything else."""
    if not isinstance(value, FunctionalTensor):
        return None
    torch._sync(value)
    slot = get_proxy_slot(torch._from_functional_tensor(value.elem), tracer, None)
    return None if slot is None else slot.proxy.node


def mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The fake mode that these values belong to. (Not the one of the tracing context, which has moved on by then.)"""
    return next((x.fake_mode for x in values if isinstance(x, FakeTensor)), None)


def real_tensors() -> Any:
    """A context in which tensors that are not fake compute for real, inside a compilation too."""
    return unset_fake_temporarily()


_OUTER = "fa3_outer_input"


def link_bodies(gm: GraphModule) -> None:
    """Let the inputs of higher-order operators' bodies be known as the graph inputs that are passed to them."""
    for call in gm.graph.nodes:
        for position, body in enumerate(call.args):
            module = getattr(gm, body.target, None) if isinstance(body, Node) and body.op == "get_attr" else None
            if isinstance(module, GraphModule):
                passed = call.args[position + 1 :]
                for inner, outer in zip(module.graph.find_nodes(op="placeholder"), passed, strict=False):
                    if isinstance(outer, Node) and outer.op == "placeholder":
                        inner.meta[_OUTER] = outer.meta.get(_OUTER, outer)
                link_bodies(module)


def _argument(placeholder: Node) -> Any:
    return placeholder.meta.get(_OUTER, placeholder).meta.get("grapharg")


def guardable_tensor(placeholder: Node) -> torch.Tensor | None:
    """The real tensor behind a Dynamo graph input, if a guard can watch it; else None.

    Only what the model owns (parameters and buffers, which Dynamo reaches through a module) and globals are considered:
    a plain argument changes from call to call, and a graph that is exported has nobody to check a guard.
    """
    argument = _argument(placeholder)
    source = getattr(argument, "source", None)
    if source is None or TracingContext.try_get() is None or torch.compiler.is_exporting():
        return None
    where = source.guard_source() if callable(source.guard_source) else source.guard_source  # a method up to 2.11
    if where is not GuardSource.GLOBAL and not (where.is_unspecialized_nn_module() or where.is_specialized_nn_module()):
        return None
    tensor = argument.example
    if not isinstance(tensor, torch.Tensor) or tensor.is_inference():  # inference tensors count no versions
        return None
    return tensor


def guard_unchanged(placeholder: Node) -> None:
    """Add a Dynamo guard: the graph input is the very tensor it is now, and has not been written to since.

    What autograd does not see either (a write through ``.data`` or ``.numpy()``) the guard does not see.

    Dynamo builds its guards from the tracing context after the backend returns (torch 2.11 to 2.15).
    """
    argument = _argument(placeholder)
    tensor = argument.example
    install = functools.partial(
        _install_unchanged, tensor=weakref.ref(tensor), version=tensor._version, address=tensor.data_ptr()
    )
    guard = Guard(argument.source, install)
    TracingContext.get().guards_context.dynamo_guards.add(guard)


def _install_unchanged(
    builder: Any, guard: Guard, tensor: weakref.ref[torch.Tensor], version: int, address: int
) -> None:
    def is_the_same(found: Any) -> bool:
        return found is tensor()

    def is_unwritten(_: Any) -> bool:
        held = tensor()
        return held is not None and held._version == version and held.data_ptr() == address

    text = f"the buffer {guard.name} is unchanged since what it holds was relied on (version {version})"
    builder.get_guard_manager(guard).add_lambda_guard(is_the_same, [text], guard.user_stack)
    # At the root, which is always asked: Dynamo holds tensors for immutable, and skips what guards a module's while its
    # dicts stay as they are (use_recursive_dict_tags_for_guards, the default in torch 2.11).
    builder.guard_manager.root.add_lambda_guard(is_unwritten, [text], guard.user_stack)
