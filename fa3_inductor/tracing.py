"""The private parts of torch that capture and its guards stand on, one function each, with the versions it was read in."""

import contextlib
import functools
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.traceback
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import Guard, GuardSource, TracingContext, tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot


def export_before_autograd(module: torch.nn.Module, fake_inputs: list[Any]) -> GraphModule:
    """The functional ATen graph of ``module`` as it is before autograd (torch 2.11 to 2.15: ``aot_export_module``).

    Traced in a tracing context of its own, so that nothing it learns reaches the compilation that is under way.
    """
    mode = detect_fake_mode(fake_inputs)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(tracing(TracingContext(mode)))
            # A float attribute of the model that Dynamo made symbolic is read with .item().
            stack.enter_context(patch.object(mode, "allow_scalar_outputs", True))
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        view, _ = aot_export_module(module, fake_inputs, trace_joint=False, pre_dispatch=True)
    return view


def current_tracer() -> Any:
    """The tracer of the proxy mode that is recording, or None (torch 2.11 to 2.15)."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def traced_node(value: Any, tracer: Any) -> Node | None:
    """The graph node that a functional tensor holds at this moment of a trace; None for anything else."""
    if not isinstance(value, FunctionalTensor):
        return None
    torch._sync(value)
    slot = get_proxy_slot(torch._from_functional_tensor(value.elem), tracer, None)
    return None if slot is None else slot.proxy.node


def fake_mode_of(gm: GraphModule) -> Any:
    """The fake tensor mode of a Dynamo graph's example values; a context that does nothing where there is none."""
    values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    return detect_fake_mode(values) or contextlib.nullcontext()


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

    Only what the model owns (parameters and buffers, which Dynamo reaches through a module) and globals are considered: a
    plain argument changes from call to call, and a graph that is exported has nobody to check a guard.
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

    Dynamo builds its guards from the tracing context after the backend returns (torch 2.11 to 2.15).
    """
    argument = _argument(placeholder)
    tensor = argument.example
    guard = Guard(argument.source, functools.partial(_install_unchanged, identity=id(tensor), version=tensor._version))
    TracingContext.get().guards_context.dynamo_guards.add(guard)


def _install_unchanged(builder: Any, guard: Guard, identity: int, version: int) -> None:
    def unchanged(tensor: Any) -> bool:
        return id(tensor) == identity and tensor._version == version

    text = f"the buffer {guard.name} is unchanged since its mask was proved (version {version})"
    builder.get_guard_manager(guard).add_lambda_guard(unchanged, [text], guard.user_stack)
