"""``python -m tests.zoo``: every model through the pass, a line for each, and a summary.

Exit status 1 if a result is wrong or a graph could not be captured; an attention that is merely not fused is listed.
"""

import argparse
import json
import sys
import time
from collections import Counter

from .registry import MODES, models
from .run import Result, totals
from .workers import quiet, run_all

COLUMNS = ("expected", "found", "fused", "stock")


def line(result: Result) -> str:
    text = f"{result.mode:9s}  {result.name:50s} "
    if result.failure:
        return f"{text} FAILED  {result.failure}"
    expected = "?" if result.expected is None else result.expected
    text += f" {result.fused} of {expected} fused, {result.found} found"
    text += f"; out {error(result.out_error, result.eager_out_error)}"
    if result.mode == "training":
        text += f", grad {error(result.grad_error, result.eager_grad_error)}"
    if result.stock is not None:
        text += f"; stock fuses {result.stock}"
    text += f"; {result.seconds:.1f} s" + f", drawn {result.draws} times" * (result.draws > 1)
    text += f"  MISSED {result.missed}" * bool(result.missed) + "  WRONG" * result.wrong
    return text


def error(ours: float, eager: float | None) -> str:
    return f"{ours:.1e}" if eager is None else f"{ours:.1e} (eager {eager:.1e})"


def details(result: Result) -> list[str]:
    lines = [f"crash: {result.crash}"] if result.crash else []
    lines += [f"capture: {error.strip().splitlines()[-1]}" for error in result.captures]
    return lines + [f"{times} x {why}" for why, times in result.rejected.items()]


def table(results: list[Result]) -> list[str]:
    """Sums by library and mode."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if not result.failure:
            groups.setdefault((result.name.partition("/")[0], result.mode), []).append(result)
    lines = [f"{'library':16s}{'mode':12s}" + "".join(f"{title:>12s}" for title in ("runs", *COLUMNS))]
    for (library, mode), group in sorted(groups.items()):
        sums = totals(group)
        lines.append(f"{library:16s}{mode:12s}{len(group):12d}" + "".join(f"{sums[title]:12d}" for title in COLUMNS))
    return lines


def summary(results: list[Result], missing: dict[str, str], stock: bool) -> list[str]:
    ran = [r for r in results if not r.failure]
    sums = totals(results)
    lines = [f"{len({r.name for r in ran})} models, {len(ran)} runs: {sums['expected']} attentions expected, "]
    lines[0] += f"{sums['found']} found, {sums['fused']} fused, {sums['missed']} of those to be fused missed"
    if stock:
        counted = sum(r.stock is not None for r in ran)
        lines.append(f"stock Inductor fuses {sums['stock']} (counted in {counted} of the runs)")
    for title, field in (("masks proved", "masks"), ("fused onto", "kernels")):
        counted = sum((getattr(r, field) for r in ran), Counter())
        lines.append(f"{title}: " + ", ".join(f"{n} {name}" for name, n in counted.most_common()))
    reasons = sum((r.reasons for r in ran), Counter())
    lines.append("left as written: " + (", ".join(f"{n} {name}" for name, n in reasons.most_common()) or "none"))
    lists = {
        "missed": [f"{r.mode} {r.name}: {r.missed}" for r in ran if r.missed],
        "wrong": [f"{r.mode} {r.name}" for r in ran if r.wrong],
        "not captured": [f"{r.mode} {r.name}" for r in ran if r.captures],
        "did not run": [f"{r.mode} {r.name}: {r.failure}" for r in results if r.failure],
        "not installed": [f"{family}: {why}" for family, why in missing.items()],
    }
    for title, entries in lists.items():
        lines.append(f"{title}: {len(entries) or 'none'}")
        lines += [f"    {entry}" for entry in entries]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="only models with this in their name")
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--target", choices=["reference", "sdpa", "hopper"], default="reference")
    parser.add_argument("--stock", action="store_true", help="also count what Inductor's own patterns fuse")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="this many processes")
    parser.add_argument("--seconds", type=int, default=60, help="how long a model may take")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    quiet()
    start = time.perf_counter()
    zoo, missing = models()
    chosen = [(m.name, mode) for m in zoo for mode in m.modes if options.k in m.name and options.mode in (mode, "both")]
    settings = {"target": options.target, "stock": options.stock, "seconds": options.seconds}
    results = []
    for result in run_all(chosen, settings, options.jobs):
        results.append(result)
        print(line(result), *details(result), sep="\n           ", flush=True)
    print("", *table(results), "", *summary(results, missing, options.stock), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([result.to_dict() for result in results], file, indent=1)
    return int(any(result.bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
