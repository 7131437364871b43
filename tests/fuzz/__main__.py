"""``python -m tests.fuzz --programs N --seed S``: many random programs through the pass, and a summary.

Exit status 1 if one went wrong; every such program is shrunk and printed. One that is merely not fused is counted.
"""

import argparse
import logging
import sys
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .check import SETTINGS, NotAProgram, Setting, Wrong, check
from .programs import Program, programs


class Tally:
    """What became of the programs, and the simplest failure of each batch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.failure: tuple[str, Setting, Program] | None = None  # the last one: hypothesis ends with the simplest
        self.failures: list[str] = []

    def run(self, program: Program, setting: Setting) -> None:
        counts = Counter() if self.failure else self.counts  # of shrinking, nothing is counted
        counts["programs"] += 1
        try:
            report = check(program, setting)
        except NotAProgram as refused:
            counts["not run by PyTorch"] += 1
            self._note(f"PyTorch: {str(refused)[:100]}", program, setting)
            return
        except Wrong as wrong:
            self.failure = str(wrong), setting, program
            raise
        kind = "odd" if program.oddities else "well-formed"
        counts[kind] += 1
        counts[f"{kind}, fused"] += bool(report.fused)
        if kind == "well-formed" and not report.fused:
            sites = report.rejected or [None]
            self._note(sites[0].verdict if sites[0] else "no attention found", program, setting)

    def _note(self, reason: str, program: Program, setting: Setting) -> None:
        if self.failure:
            return
        self.reasons[reason] += 1
        if len(program.source) < len(self.examples.get(reason, program.source + " ")):
            self.examples[reason] = f"{_settings(setting)}\n{program.source}"

    def finish_batch(self) -> None:
        if self.failure:
            what, setting, program = self.failure
            odd = f"# odd: {', '.join(program.oddities)}\n" if program.oddities else ""
            self.failures.append(f"# WRONG: {what}\n{odd}{_settings(setting)}\n{program.source}")
            print(self.failures[-1], flush=True)
            self.failure = None


def _settings(setting: Setting) -> str:
    mode = "training" if setting.trains else "inference"
    return f"# target={setting.target!r}, {setting.dtype}, {mode}, dynamic={setting.dynamic}"


def run_batch(tally: Tally, size: int, number: int, phases: tuple[Phase, ...]) -> None:
    """``size`` programs; ends at the first that goes wrong, shrunk."""

    @seed(number)
    @settings(max_examples=size, database=None, deadline=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(programs(), SETTINGS)
    def fuzz(program: Program, setting: Setting) -> None:
        tally.run(program, setting)

    try:
        fuzz()
    except Exception:
        if tally.failure is None:
            raise
    tally.finish_batch()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=int, default=100, help="programs between two restarts; one failure is shown of each"
    )
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they were found")
    parser.add_argument("--examples", action="store_true", help="print the shortest program for each reason")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tally, start = Tally(), time.time()
    phases = (Phase.generate,) if options.no_shrink else (Phase.generate, Phase.shrink)
    for number in range(0, options.programs, options.batch):
        run_batch(tally, min(options.batch, options.programs - number), options.seed * 1_000_003 + number, phases)
    print(f"{time.time() - start:.0f} s")
    print(", ".join(f"{count} {what}" for what, count in tally.counts.items()) + f", {len(tally.failures)} WRONG")
    for reason, count in tally.reasons.most_common():
        print(f"{count:5d}  {reason}")
        if options.examples:
            print(tally.examples[reason])
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
