"""FlashAttention-3 as a ``torch.compile`` pass: ``torch.compile(model, backend="fa3_inductor")``.

Importing this package is cheap on purpose: torch imports it in every process (through the ``torch.backends`` entry
point), so nothing heavy, torch included, is imported before one of the names below is used.
"""

from __future__ import annotations

import importlib
import os

from fa3_inductor._version import __version__

TYPE_CHECKING = False  # type checkers take it for true; typing itself is slow to import
if TYPE_CHECKING:
    from typing import Any

    from fa3_inductor import config
    from fa3_inductor._explain import explain
    from fa3_inductor.backend import disable, enable, enabled
    from fa3_inductor.patterns.reasons import Reason
    from fa3_inductor.report import GraphReport, Report, Site, clear_reports, reports

__all__ = [
    "GraphReport",
    "Reason",
    "Report",
    "Site",
    "__version__",
    "clear_reports",
    "config",
    "disable",
    "enable",
    "enabled",
    "explain",
    "reports",
]

# In a checkout, kernels/ and patterns/ lie beside this folder; in an installed package they lie inside it.
_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "patterns")):
    __path__.append(os.path.dirname(_here))

_HOME = {
    "GraphReport": "fa3_inductor.report",
    "Reason": "fa3_inductor.patterns.reasons",
    "Report": "fa3_inductor.report",
    "Site": "fa3_inductor.report",
    "clear_reports": "fa3_inductor.report",
    "disable": "fa3_inductor.backend",
    "enable": "fa3_inductor.backend",
    "enabled": "fa3_inductor.backend",
    "explain": "fa3_inductor._explain",
    "reports": "fa3_inductor.report",
}


def __getattr__(name: str) -> Any:
    if name == "config":
        return importlib.import_module("fa3_inductor.config")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
