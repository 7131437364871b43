"""Random programs compute the same with the pass as without; the same ones in every run."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings

from .check import SETTINGS, NotAProgram, check
from .programs import programs

FUSED = []  # whether each well-formed program was


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are tiny here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(program=programs(), setting=SETTINGS)
def test_random_programs(one_thread, program, setting):
    note(f"{setting}, {program.oddities}\n{program.source}")
    with contextlib.suppress(NotAProgram):
        report = check(program, setting)
        if not program.oddities:
            FUSED.append(bool(report.fused))


def test_that_there_was_something_to_compare():
    """Two thirds and more of them are fused; were it far fewer, the test above would compare eager with itself."""
    if not FUSED:
        pytest.skip("runs behind the test of programs")
    assert sum(FUSED) > len(FUSED) / 2
