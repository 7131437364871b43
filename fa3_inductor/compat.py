"""The private parts of torch that the package stands on, one function each, with the versions it was read in.

Nothing of torch is imported before a function is called: :func:`hook_compile_fx` runs while torch itself is being
imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_COMPILE_FX = "torch._inductor.compile_fx"


def hook_compile_fx() -> None:
    """Puts the pass in front of Inductor's entry point, now or as soon as that is imported; idempotent.

    ``torch._inductor.compile_fx.compile_fx`` is looked up there at every call by the stock backend, by AOTInductor
    and by compile_fx itself (torch 2.11 to 2.15), so replacing the module's attribute reaches every way in.
    Inductor's own hooks run too late: behind the cache lookup (from 2.12), and they would have to be shared with
    other users of them.
    """
    _after_import(_COMPILE_FX, _wrap_compile_fx)


def prepare_dynamo() -> None:
    """Has Dynamo see the attention in torch's own transformers, now or as soon as it is imported; idempotent.

    Given a mask, ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` look at its numbers, and Dynamo (of torch 2.11
    to 2.13) leaves all of the model to eager code: it does not look into torch's own modules again after such a break.
    """
    _after_import("torch._dynamo", _prepare_dynamo)


def _prepare_dynamo(dynamo: ModuleType) -> None:
    def detect_is_causal_mask(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True  # a hint: what the mask is gets proved

    try:
        # F.multi_head_attention_forward warns of masks of two types. Dynamo puts that behind the graph.
        dynamo.config.reorderable_logging_functions.add(warnings.warn)
        original = importlib.import_module("torch.nn.modules.transformer")._detect_is_causal_mask
        dynamo.substitute_in_graph(original)(detect_is_causal_mask)
    except (AttributeError, TypeError, ValueError) as failure:  # another torch; or it is known already
        log.info("torch's own transformers stay as Dynamo sees them: %s", failure)


def _after_import(name: str, action: Callable[[ModuleType], object]) -> None:
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module by way of the other finders, and does something with it once it has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_module
        return spec


def _wrap_compile_fx(module: ModuleType) -> None:
    from fa3_inductor import backend

    original = module.compile_fx
    if getattr(original, "fa3_inductor", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        return backend.compile_if_enabled(original, **call)

    compile_fx.fa3_inductor = True
    module.compile_fx = compile_fx


def inductor_patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The Inductor config that ``torch.compile(mode=..., options=...)`` stands for, checked by torch's own code (2.11
    to 2.15).

    Raises RuntimeError for an unknown mode, an unknown option or a value of the wrong type.
    """
    import torch

    return torch._TorchCompileInductorWrapper(mode, options, None).config


def settings_key(config: ModuleType) -> tuple[tuple[str, Any], ...]:
    """The values of all settings that are not marked ``@compile_ignored``, as a part of a cache key.

    ``config.get_hash()`` is meant for this, but in torch 2.12 it is cached across threads whose values differ.
    """
    return tuple(sorted((k, v) for k, v in config.get_config_copy().items() if k not in config._compile_ignored_keys))


def set_process_wide(config: ModuleType, name: str, value: Any) -> None:
    """Sets a config value for every thread.

    Assigning to a config is per thread from torch 2.12 on. The default that an environment variable gives is not, and
    ranks just below assignments; so it takes the value, and this thread's own assignment is made to agree.
    """
    config._config[name].env_value_default = value
    setattr(config, name, value)


def stock_attention_entries() -> Iterator[Any]:
    """Inductor's own attention patterns: the entries of the joint graph's pattern table that ``fuse_attention``
    registered.

    Read in 2.11 to 2.15. The entry's check is a closure over the function that the pattern was traced from, which is
    the only trace that an entry keeps of where it came from.
    """
    from torch._inductor.fx_passes import fuse_attention, joint_graph

    for entries in joint_graph.patterns.patterns.values():
        for entry in entries:
            check = entry.extra_check
            if inspect.isfunction(check) and "search_fn" in check.__code__.co_freevars:
                cell = check.__closure__[check.__code__.co_freevars.index("search_fn")]
                if cell.cell_contents.__module__ == fuse_attention.__name__:
                    yield entry


class Unless:
    """A pattern's check that says no while ``disabled()`` holds."""

    def __init__(self, disabled: Callable[[], bool], check: Callable[[Any], bool]) -> None:
        self.disabled = disabled
        self.check = check

    def __call__(self, match: Any) -> bool:
        return not self.disabled() and self.check(match)


def silence_stock_attention(disabled: Callable[[], bool]) -> None:
    """Makes Inductor's attention patterns match nothing while ``disabled()`` holds.

    To be called when a joint graph is about to be worked on: the patterns are registered then, per device, just before
    the first custom pass runs.
    """
    global _silenced
    for entry in stock_attention_entries():
        entry.extra_check = Unless(disabled, entry.extra_check)
        _silenced += 1
    if not _silenced:
        _warn_not_silenced()


_silenced = 0


@functools.cache
def _warn_not_silenced() -> None:
    import torch

    log.warning(
        "Inductor's own attention patterns were not found in torch %s, so they stay active: an attention that "
        "fa3_inductor leaves as written may still be rewritten by them",
        torch.__version__,
    )
