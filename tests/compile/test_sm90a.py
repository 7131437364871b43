"""Every kernel configuration compiles for sm_90a to the code it was designed as. No GPU needed."""

import dataclasses

import pytest

pytest.importorskip("triton")

from fa3_inductor.kernels import offline  # noqa: E402

GOOD = offline.Report(
    name="good",
    registers=168,
    spill_bytes=0,
    loop_spills=0,
    shared_bytes=200_000,
    counts={"HGMMA": 64, "UTMALDG": 6, "UTMASTG": 2, "USETMAXREG": 4},
    max_regs=[120, 240, 24, 256],
    warnings=[],
    sass="",
)


@pytest.mark.parametrize("name", offline.cases())
def test_configuration(name):
    result = offline.check(name)
    assert result["violations"] == []


def test_a_good_report_breaks_no_rule():
    assert offline.violations(GOOD, {240, 24}) == []


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(spill_bytes=132), "132 bytes spilled"),
        (dict(loop_spills=5), "5 accesses to spilled registers in a loop of matrix products"),
        (dict(shared_bytes=240_000), "240000 bytes of shared memory"),
        (dict(counts={"UTMALDG": 6, "UTMASTG": 2, "USETMAXREG": 4}), "no HGMMA"),
        (dict(warnings=["C7510: wgmma serialized"]), "C7510: wgmma serialized"),
        (dict(max_regs=[120, 240, 40, 224, 256]), "setmaxnreg [40, 120, 224, 240, 256] for a budget of [24, 240]"),
        (dict(max_regs=[120, 240, 24, 224, 256]), "setmaxnreg [24, 120, 224, 240, 256] for a budget of [24, 240]"),
        (dict(max_regs=[]), "setmaxnreg [] for a budget of [24, 240]"),
    ],
)
def test_each_rule(change, sentence):
    assert offline.violations(dataclasses.replace(GOOD, **change), {240, 24}) == [sentence]


def test_spills_are_counted_in_loops_of_matrix_products():
    line = "        /*0010*/                   {} ;"
    loop = [line.format(x) for x in ("HGMMA.64x64x16.F32 R4, R2", "LDL R0, [R1]", "@P0 BRA `(.L_x_1)")]
    before = [line.format("STL [R1], R0")]
    assert offline._loop_spills("\n".join([*before, ".L_x_1:", *loop])) == 1
    assert offline._loop_spills("\n".join([*before, ".L_x_1:", loop[0], loop[2], loop[1]])) == 0


def test_a_compiler_that_dies_is_reported():
    assert "does not compile" in offline.check("no-such-case")["violations"][0]
