"""What the pass found and did: one :class:`Site` per attention, one :class:`GraphReport` per compiled graph, a
:class:`Report` over many.

The pass fills :class:`GraphReport` objects and hands them to :func:`record`; everything here is for reading: tables,
JSON, and the files of ``config.dump_dir``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from fa3_inductor.patterns.reasons import Reason

log = logging.getLogger(__name__)

Shape = tuple[int | str, ...]


@dataclasses.dataclass
class Site:
    """One attention of the user's model, fused or left as it was.

    ``reason`` is None for a fused site; for a rejected one it says why in general, and ``detail`` says what was seen
    here. ``source`` is ``file:line`` of the user's code and ``code`` the text of that line. ``mask`` is what was
    proved about the mask ("causal", "none", ...). Sizes that are symbolic when compiling are strings in the shapes.
    ``flops`` (forward) and ``score_bytes`` (scores and probabilities that no longer exist in memory) are estimates,
    None where a size is symbolic.
    """

    status: Literal["fused", "rejected"]
    reason: Reason | None = None
    detail: str = ""
    mask: str | None = None
    target: str | None = None
    kernel: str | None = None
    source: str = ""
    code: str = ""
    form: str = ""
    q_shape: Shape | None = None
    k_shape: Shape | None = None
    v_shape: Shape | None = None
    dtype: str | None = None
    scale: str | None = None
    node: str = ""
    flops: int | None = None
    score_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; ``reason`` becomes the enum member's name."""
        out = dataclasses.asdict(self)
        out["reason"] = None if self.reason is None else self.reason.name
        for key in ("q_shape", "k_shape", "v_shape"):
            out[key] = None if out[key] is None else list(out[key])
        return out

    @property
    def verdict(self) -> str:
        """What a fused site runs on, or why a rejected one was left alone: one line of text."""
        if self.status == "fused":
            return "/".join(part for part in (self.target, self.kernel) if part) or "fused"
        why = "rejected" if self.reason is None else f"{self.reason.name}: {self.reason.sentence}"
        return f"{why} ({self.detail})" if self.detail else why


@dataclasses.dataclass
class GraphReport:
    """What happened in one graph. ``seconds`` holds the time of each phase; ``error`` the message when the pass gave
    up."""

    name: str
    sites: list[Site] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "name": self.name,
            "sites": [site.to_dict() for site in self.sites],
            "seconds": dict(self.seconds),
            "error": self.error,
        }

    def __str__(self) -> str:
        return str(Report([self]))


@dataclasses.dataclass
class Report:
    """The reports of some graphs, in the order in which they were compiled. ``print(report)`` shows a table.

    ``graph_breaks`` lists why Dynamo split the model, one text per break; only :func:`fa3_inductor.explain` fills it.
    """

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    graph_breaks: list[str] = dataclasses.field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Every attention found, over all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def fused(self) -> list[Site]:
        """The sites that now run on a fused kernel."""
        return [site for site in self.sites if site.status == "fused"]

    @property
    def rejected(self) -> list[Site]:
        """The sites that were left as the user wrote them."""
        return [site for site in self.sites if site.status == "rejected"]

    @property
    def summary(self) -> str:
        """One line: how many graphs, how many attentions, how many fused."""
        saved = sum(site.score_bytes or 0 for site in self.fused)
        text = (
            f"{_count(len(self.graphs), 'graph')}, {_count(len(self.sites), 'attention')}: "
            f"{len(self.fused)} fused, {len(self.rejected)} left as written"
        )
        return f"{text}; {_si(saved, 'B')} of scores no longer materialised" if saved else text

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: ``{"graphs": [...], "graph_breaks": [...], "fused": n, "rejected": n}``."""
        return {
            "graphs": [graph.to_dict() for graph in self.graphs],
            "graph_breaks": list(self.graph_breaks),
            "fused": len(self.fused),
            "rejected": len(self.rejected),
        }

    def __str__(self) -> str:
        lines = [self.summary]
        if self.sites:
            header = ("#", "source", "form", "q, k, v", "dtype", "mask", "runs on / why not", "FLOPs", "scores")
            rows = [header, *(_row(number, site) for number, site in enumerate(self.sites, 1))]
            widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
            indent = " " * (widths[0] + 2)
            lines.append("  ".join(map(str.ljust, header, widths)).rstrip())
            lines.append("  ".join("-" * width for width in widths))
            for row, site in zip(rows[1:], self.sites, strict=True):
                lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
                lines += [indent + note for note in _notes(site)]
        for graph in self.graphs:
            if graph.error is not None:
                lines.append(f"graph {graph.name} was left unchanged: {graph.error}")
        for number, reason in enumerate(self.graph_breaks, 1):
            lines.append(f"graph break {number}: {reason}")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _si(value: float, unit: str) -> str:
    """A number with a decimal prefix: 1.5 M, 32.8 kB."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.{0 if prefixes[0] == '' else 1}f} {prefixes[0]}{unit}".rstrip()


def _shape(shape: Shape | None) -> str:
    return "?" if shape is None else "x".join(str(size) for size in shape)


def _shapes(site: Site) -> str:
    distinct = list(dict.fromkeys(_shape(shape) for shape in (site.q_shape, site.k_shape, site.v_shape)))
    return distinct[0] if len(distinct) == 1 else ", ".join(map(_shape, (site.q_shape, site.k_shape, site.v_shape)))


def _row(number: int, site: Site) -> tuple[str, ...]:
    head, separator, line = site.source.rpartition(":")
    return (
        str(number),
        os.path.basename(head) + separator + line if separator else site.source,
        site.form,
        _shapes(site),
        site.dtype or "?",
        site.mask or "?",
        site.verdict if site.status == "fused" else "rejected",
        "?" if site.flops is None else _si(site.flops, ""),
        "?" if site.score_bytes is None else _si(site.score_bytes, "B"),
    )


def _notes(site: Site) -> list[str]:
    """What a table cell is too narrow for, a line each."""
    if site.status == "fused":
        return [site.detail] if site.detail else []
    return [site.verdict, f"> {site.code}"] if site.code else [site.verdict]


_lock = threading.Lock()
_recorded: list[GraphReport] = []
_apart: ContextVar[bool] = ContextVar("fa3_inductor_reports_apart", default=False)


def record(graph_report: GraphReport) -> None:
    """Adds the report of one compiled graph to what :func:`reports` returns."""
    if _apart.get():
        return
    with _lock:
        _recorded.append(graph_report)


@contextlib.contextmanager
def recording_nothing() -> Iterator[None]:
    """Keeps what the pass does inside the block out of :func:`reports` and of ``config.dump_dir``."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def reports() -> Report:
    """The reports of every graph that was compiled through the pass in this process, oldest first."""
    with _lock:
        return Report(list(_recorded))


def clear_reports() -> None:
    """Forgets the reports collected so far; compiled code is not affected."""
    with _lock:
        _recorded.clear()


_dump_numbers = itertools.count()


def dump(graph_report: GraphReport, before: str, after: str) -> None:
    """Writes one graph's files under ``config.dump_dir``; does nothing when that is unset.

    The folder is ``<dump_dir>/<process id>/<number>_<graph name>`` and holds ``before.py`` and ``after.py`` (readable
    FX, as passed in), ``report.json`` and ``report.txt``. A failure to write is logged as a warning and never raised,
    since this runs inside a compile.
    """
    from fa3_inductor import config

    if not config.dump_dir or _apart.get():
        return
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", graph_report.name)
    folder = os.path.join(config.dump_dir, str(os.getpid()), f"{next(_dump_numbers):03d}_{name}")
    try:
        os.makedirs(folder, exist_ok=True)
        _write(folder, "before.py", before)
        _write(folder, "after.py", after)
        _write(folder, "report.json", json.dumps(graph_report.to_dict(), indent=2))
        _write(folder, "report.txt", str(graph_report))
    except OSError as error:
        log.warning("could not write the dump of graph %s to %s: %s", graph_report.name, folder, error)


def _write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text if text.endswith("\n") else text + "\n")
