"""Every kernel configuration compiles for sm_90a to the code it was designed as. No GPU needed."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

from fa3_inductor.kernels import offline, sass  # noqa: E402

GOOD = offline.Report(
    name="good",
    registers=168,
    spill_bytes=0,
    loop_spills=0,
    early_writes=[],
    shared_bytes=200_000,
    counts={"HGMMA": 64, "UTMALDG": 6, "UTMASTG": 2, "USETMAXREG": 4},
    max_regs=[120, 240, 24, 256],
    warnings=[],
)


@pytest.fixture(scope="module")
def check(request):
    """`offline.check`, of all configurations to be tested at once: each is a process that takes seconds."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # there are several of us already
        yield offline.check
        return
    wanted = [item for item in request.session.items if getattr(item, "originalname", "") == "test_configuration"]
    names = [item.callspec.params["name"] for item in wanted]
    pool = ThreadPoolExecutor(os.cpu_count())
    results = {name: pool.submit(offline.check, name) for name in names}
    yield lambda name: results[name].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", offline.cases())
def test_configuration(name, check):
    assert check(name)["violations"] == []


def test_a_good_report_breaks_no_rule():
    assert offline.violations(GOOD, {240, 24}) == []


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(spill_bytes=164), "164 bytes spilled"),
        (
            dict(early_writes=["MOV R1, R2"]),
            "'MOV R1, R2' writes to an operand of a matrix product in flight (triton-lang/triton#11781)",
        ),
        (dict(loop_spills=12), "12 accesses to spilled registers in a loop of matrix products"),
        (dict(shared_bytes=240_000), "240000 bytes of shared memory"),
        (dict(counts={"QGMMA": 9, "UTMALDG": 6, "UTMASTG": 2, "USETMAXREG": 4}), "no HGMMA"),
        (dict(warnings=["C7510: wgmma serialized"]), "C7510: wgmma serialized"),
        (dict(max_regs=[120, 240, 40, 224, 256]), "setmaxnreg [40, 120, 224, 240, 256] for a budget of [24, 240]"),
        (dict(max_regs=[120, 240, 24, 224, 256]), "setmaxnreg [24, 120, 224, 240, 256] for a budget of [24, 240]"),
        (dict(max_regs=[]), "setmaxnreg [] for a budget of [24, 240]"),
    ],
)
def test_each_rule(change, sentence):
    assert offline.violations(dataclasses.replace(GOOD, **change), {240, 24}) == [sentence]


def test_limits_of_a_case():
    report = dataclasses.replace(GOOD, spill_bytes=448, loop_spills=20)
    assert len(offline.violations(report, {240, 24})) == 2
    assert offline.violations(report, {240, 24}, (448, 20)) == []
    assert len(offline.violations(report, {240, 24}, (447, 19))) == 2


def test_a_kernel_in_8_bits_has_other_products():
    assert offline.violations(GOOD, {240, 24}, product="QGMMA") == ["no QGMMA"]


def code(*lines):
    """What nvdisasm prints; labels end in a colon."""
    return sass.parse("\n".join(x if x.endswith(":") else f"        /*0010*/                   {x} ;" for x in lines))


PRODUCT = "HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88, gsb0"


def test_spills_are_counted_in_loops_of_matrix_products():
    store, load, jump = "STL [R1], R0", "LDL R0, [R1]", "@P0 BRA `(.L_x_1)"
    products = [PRODUCT] * 8
    assert sass.loop_spills(code(store, ".L_x_1:", *products, load, jump)) == 1
    assert sass.loop_spills(code(store, ".L_x_1:", *products, jump, load)) == 0
    assert sass.loop_spills(code(".L_x_1:", store, jump, *products)) == 0
    tile = [".L_x_2:", load, ".L_x_1:", *products, load, jump, load, "@P1 BRA `(.L_x_2)"]
    assert sass.loop_spills(code(*tile)) == 1
    assert sass.loop_spills(code(*tile, ".L_x_3:", PRODUCT, load, "EXIT", "@!P2 BRA `(.L_x_3)")) == 1


WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
SCORES = "HGMMA.64x64x16.F32.BF16 R120, gdesc[UR8], RZ, !UPT, gsb0"


WRITES = [
    "FADD R27, R1, R2",
    "@!P1 MOV R24, R3",
    "LDG.E.64 R23, desc[UR4][R2.64]",
    "IMAD.WIDE R26, R1, R2, R4",
    "SHFL.BFLY PT, R25, R1, 0x1, 0x1f",
    "CS2R R24, SRZ",
    "HGMMA.64x16x16.F32.BF16 R20, gdesc[UR8], RZ, !UPT",
    "QGMMA.64x16x32.F32.E4M3.E4M3 R20, gdesc[UR8], RZ, !UPT",
]
READS = [
    "FADD R28, R24, R25",
    "STG.E desc[UR4][R2.64], R24",
    "ISETP.GE.AND P0, PT, R24, R3, PT",
    "BAR.SYNC R24, R25",
    "R2UR UR4, R24",
    "FADD R23, R1, R2",
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_an_operand_in_flight_is_found(write):
    bare = write.removeprefix("@!P1 ")
    assert sass.early_writes(code(PRODUCT, write)) == [bare]
    assert sass.early_writes(code(PRODUCT, SCORES, "WARPGROUP.DEPBAR.LE gsb0, 0x2", write)) == [bare]
    assert sass.early_writes(code(SCORES, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", write)) == [bare]
    assert sass.early_writes(code(PRODUCT, SCORES, "WARPGROUP.DEPBAR.LE gsb0, 0x1", write)) == []
    assert sass.early_writes(code(PRODUCT, WAIT, write)) == []
    assert sass.early_writes(code(write, PRODUCT, WAIT)) == []


@pytest.mark.parametrize("other", READS)
def test_reading_an_operand_in_flight_is_fine(other):
    assert sass.early_writes(code(PRODUCT, other)) == []


def test_parameters_taken_for_descriptors():
    ptx = """
        .param .align 64 .b8 some_kernel_param_0[128],
        .param .u32 some_kernel_param_1,
        .param .align 64 .b8 some_kernel_param_9[128],
        mov.b64 map, some_kernel_param_{};
    """
    assert offline.not_descriptors(ptx.format(9)) == []
    for other in (1, 10):
        assert offline.not_descriptors(ptx.format(other)) == [f"some_kernel_param_{other} is no descriptor"]


def test_a_compiler_that_dies_is_reported():
    assert "does not compile" in offline.check("no-such-case")["violations"][0]
