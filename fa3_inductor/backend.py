"""The ways into the pass: ``backend="fa3_inductor"``, and :func:`enable` for the stock ``inductor`` backend."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from fa3_inductor import __version__, compat, config
from fa3_inductor.rewrite import rewrite_graph

log = logging.getLogger(__name__)

# Set in a GraphModule's meta once it has been through the pass: compile_fx calls itself, with the same module.
_REWRITTEN = "fa3_inductor_rewritten"

_PREFIX = "fa3_inductor."


compat.prepare_dynamo()  # before Dynamo sees a model that this backend is to compile


def fa3_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: fuses the attentions of a Dynamo graph, then compiles it with Inductor.

    ``mode`` and ``options`` mean what they mean for Inductor, except for options that name one of our own settings
    (``{"target": "sdpa"}`` or ``{"fa3_inductor.target": "sdpa"}``): those hold for this compile.

    Raises RuntimeError for a mode or option that neither knows, or whose value has the wrong type; ValueError for a
    value that one of our settings cannot have.
    """
    ours, inductors = _split(options or {})
    patches = compat.inductor_patches(mode, inductors)
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ours):
        return _compile(compile_fx, gm, example_inputs, config_patches=patches)


def _reset() -> None:
    """Called by ``torch._dynamo.reset()``, as Inductor's own backend object is: drops recorded CUDA graphs."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


fa3_inductor.reset = _reset


def enable() -> None:
    """Turns the pass on for the stock ``inductor`` backend, in every thread of this process, for what is compiled
    from now on.

    Code that was compiled before keeps running as it is; ``torch.compiler.reset()`` makes it compile anew.
    """
    compat.hook_compile_fx()
    compat.set_process_wide(config, "enabled", True)


def disable() -> None:
    """Turns the pass off again for the stock ``inductor`` backend; ``backend="fa3_inductor"`` is not affected."""
    compat.set_process_wide(config, "enabled", False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Turns the pass on for what the stock ``inductor`` backend compiles inside the ``with`` block, in this thread.

    Compiling happens at the first call of a compiled function, so that call has to be inside the block.
    """
    compat.hook_compile_fx()
    with config.patch(enabled=True):
        yield


def compile_if_enabled(compile_fx: Callable[..., Any], **call: Any) -> Any:
    """What stands in front of Inductor's ``compile_fx`` once it is hooked: ``call`` holds that function's arguments
    by name."""
    if config.enabled and isinstance(call["model_"], torch.fx.GraphModule):
        return _compile(compile_fx, call.pop("model_"), call.pop("example_inputs_"), **call)
    return compile_fx(**call)


def _compile(
    compile_fx: Callable[..., Any],
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    config_patches: dict[str, Any] | None = None,
    **rest: Any,
) -> Callable[..., Any]:
    if not gm.meta.get(_REWRITTEN):
        gm.meta[_REWRITTEN] = True
        rewrite_graph(gm)
    return compile_fx(gm, example_inputs, config_patches=_shielded(config_patches or {}), **rest)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts ``options`` into our settings and Inductor's."""
    known = set(config.get_config_copy()) - {"enabled"}
    ours, inductors = {}, {}
    for key, value in options.items():
        name = key.removeprefix(_PREFIX).replace("-", "_")
        if name in known:
            ours[name] = value
        elif key.startswith(_PREFIX):
            raise RuntimeError(f"Unexpected optimization option {key}, known options are {sorted(known)}")
        else:
            inductors[key] = value
    return ours, inductors


class StockFusionShield(CustomGraphPass):
    """Keeps Inductor's own attention patterns away from a graph, and runs the user's joint pre-passes as before.

    Those patterns match more than they prove (a softmax over another dim, a permuted key, rows that are masked
    completely), so what our matcher has refused must not fall to them. Being the value of ``joint_custom_pre_pass``
    while a graph is compiled is what disables them, and this pass's ``uuid`` makes that part of the key of Inductor's
    and AOTAutograd's caches, together with everything else that a compiled artefact depends on and the graph does not
    show: our sources, our settings, and which SDPA backends are switched on (chosen among while tracing).
    """

    def __init__(self, users: tuple[Callable[..., Any], ...]) -> None:
        self.users = users
        self.key = (__version__, _source_hash(), compat.settings_key(config), _sdpa_backends())

    def __call__(self, graph: torch.fx.Graph) -> None:
        compat.silence_stock_attention(_shield_is_up)
        for user in self.users:
            user(graph)

    def uuid(self) -> Any | None:
        ids = [user.uuid() if isinstance(user, CustomGraphPass) else None for user in self.users]
        # A user's pass without an identity forbids caching, with us as without us.
        return (self.key, *ids) if all(ids) else None


def _shield_is_up() -> bool:
    return isinstance(torch._inductor.config.joint_custom_pre_pass, StockFusionShield)


def _shielded(patches: dict[str, Any]) -> dict[str, Any]:
    """``patches`` with the shield in front of whatever ``joint_custom_pre_pass`` would have been."""
    name = "joint_custom_pre_pass"
    current = patches[name] if name in patches else getattr(torch._inductor.config, name)
    if isinstance(current, StockFusionShield):
        return patches
    users = current if isinstance(current, (list, tuple)) else [] if current is None else [current]
    return {**patches, name: StockFusionShield(tuple(users))}


def _sdpa_backends() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
    )


def _sources() -> list[Path]:
    """The package's Python files."""
    roots = [Path(__file__).parent]
    for package in ("fa3_inductor.kernels", "fa3_inductor.patterns"):
        roots += map(Path, importlib.util.find_spec(package).submodule_search_locations)
    return sorted({path for root in roots for path in root.rglob("*.py")})


@functools.cache
def _source_hash() -> str:
    """A hash over our sources: the autograd formula and the fakes of our ops are traced into what is cached."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()
