"""What differs between the triton versions that the kernels run on (3.6 and later), and nothing else."""

import triton
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Renamed in 3.8; the old names are gone in 3.9.
tma_load = tma.async_load if VERSION >= (3, 8) else tma.async_copy_global_to_shared
tma_store = tma.async_store if VERSION >= (3, 8) else tma.async_copy_shared_to_global
