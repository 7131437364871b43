"""What differs between the triton versions that the kernels run on (3.6 and later), and nothing else."""

import triton
from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Renamed in 3.8; the old names are gone in 3.9.
tma_load = tma.async_load if VERSION >= (3, 8) else tma.async_copy_global_to_shared
tma_store = tma.async_store if VERSION >= (3, 8) else tma.async_copy_shared_to_global
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if VERSION >= (3, 8):
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Adds a tile in shared memory to the one at `coord` of a tensor, in float32."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(smem, dtype, shape, layout, _semantic=None):
    """Shared memory as another tensor's. (A method of it, named `_reinterpret` before 3.8.)"""
    dtype, shape, layout = (_unwrap_if_constexpr(x) for x in (dtype, shape, layout))
    return _semantic.memdesc_reinterpret(smem, dtype, [_unwrap_if_constexpr(size) for size in shape], layout)
