"""What Gluon has no words for: where shared memory is, clusters of CTAs, and tiles that TMA brings to all of them.

Triton knows nothing of the clusters; `launch.prepare` asks CUDA for them.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fa3_inductor.kernels.compat import reinterpret, thread_barrier

GROUP = gl.constexpr(1024)  # bytes of 8 rows of 128, of which swizzled tiles are made
COLUMNS = gl.constexpr(64)  # of 16 bits, in 128 bytes
CLUSTER = gl.constexpr(2)  # CTAs


@gluon.constexpr_function
def _kilobytes(smems) -> int:
    """How many kilobytes pieces of shared memory have, all together."""
    return sum(math.prod(smem.type.shape) * smem.type.element_ty.primitive_bitwidth for smem in smems) // 8192


@gluon.jit
def _write_addresses(KILOBYTES: gl.constexpr):
    """Writes to the start of every kilobyte of shared memory what its address is."""
    number = gl.arange(0, 256, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 a;
        setp.lt.u32 p, $1, $2;
        mov.u32 a, global_smem;
        mad.lo.u32 a, $1, 1024, a;
        @p st.shared.b32 [a], a;
        mov.u32 $0, 0;
        }""",
        "=r,r,n", [number, KILOBYTES], gl.int32, False, 1,
    )  # fmt: skip
    thread_barrier()


@gluon.jit
def _address(smem):
    """The address of shared memory, which Gluon does not tell: `_write_addresses` wrote it there."""
    word = reinterpret(smem.index(0), gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.max(word.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _meet():
    """Waits for all warps of all CTAs of the cluster."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r", [],
        gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _release(bar):
    """Counts this warp in at the mbarrier of that address in each CTA of the cluster, and goes on."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 lane, remote;
        mov.u32 lane, %laneid;
        setp.lt.u32 p, lane, $2;
        @p mapa.shared::cluster.u32 remote, $1, lane;
        @p mbarrier.arrive.shared::cluster.b64 _, [remote];
        mov.u32 $0, 0;
        }""",
        "=r,r,n", [bar, CLUSTER], gl.int32, False, 1,
    )  # fmt: skip


@gluon.constexpr_function
def _bring_asm(kernel: str, descriptor: int, share: int) -> str:
    # A descriptor of four dimensions is nine parameters: the map, and shape and strides, which nobody reads.
    multicast, mask = (".multicast::cluster", f", {2**share - 1}") if share > 1 else ("", "")
    return f"""{{
    .reg .pred p;
    .reg .b64 map;
    elect.sync _|p, 0xffffffff;
    mov.b64 map, {kernel}_param_{descriptor * 9};
    cvta.param.u64 map, map;
    @p cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes{multicast}
        [$1], [map, {{$3, $4, $5, $6}}], [$2]{mask};
    mov.u32 $0, 0;
    }}"""


@gluon.jit
def _bring_box(
    KERNEL: gl.constexpr, DESCRIPTOR: gl.constexpr, SHARE: gl.constexpr, at, bar, column, row, head, batch
):  # fmt: skip
    """Brings what a descriptor of a kernel has in a box to that address, and so to SHARE CTAs, whose barriers it tells.

    The kernel's first parameters are the descriptors, of four dimensions, and DESCRIPTOR is the number of one.
    """
    gl.inline_asm_elementwise(
        _bring_asm(KERNEL, DESCRIPTOR, SHARE), "=r,r,r,r,r,r,r", [at, bar, column, row, head, batch], gl.int32, False, 1
    )
