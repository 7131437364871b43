"""Launches a compiled Gluon kernel again and again, with other tensors, for a few microseconds of Python a time.

Triton's own launch inspects every argument and encodes every TMA descriptor anew, most of the 73 us that a call of the
forward kernel took the host of an H100 (`python -m fa3_inductor.bench launch`: 35 us now). Here that happens once, in
`prepare`; a call of the `Launch` that it returns replaces addresses and calls the CUDA driver, through ctypes.
"""

import ctypes
import functools
import struct
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST  # private; 3.6 to 3.9
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_P, _I, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_PROTOTYPES = {
    "cuGetErrorName": (_I, _P),
    "cuCtxGetCurrent": (_P,),
    "cuCtxSetCurrent": (_P,),
    "cuDevicePrimaryCtxRetain": (_P, _I),
    "cuModuleLoadData": (_P, ctypes.c_char_p),
    "cuModuleGetFunction": (_P, _P, ctypes.c_char_p),
    "cuFuncSetCacheConfig": (_P, _I),
    "cuFuncSetAttribute": (_P, _I, _I),
    "cuFuncGetParamInfo": (_P, ctypes.c_size_t, _P, _P),
    "cuTensorMapEncodeTiled": (_P, _I, _U, _P, _P, _P, _P, _P, _I, _I, _I, _I),
    "cuTensorMapReplaceAddress": (_P, _P),
    "cuLaunchKernel": (_P, _U, _U, _U, _U, _U, _U, _U, _P, _P, _P),
    "cuThreadExchangeStreamCaptureMode": (_P,),
    "cuMemAlloc_v2": (_P, ctypes.c_size_t),
    "cuStreamCreate": (_P, _U),
    "cuMemcpyHtoDAsync_v2": (_P, _P, ctypes.c_size_t, _P),
    "cuStreamSynchronize": (_P,),
    "cuStreamDestroy_v2": (_P,),
}
_OPTIONAL = {"cuFuncGetParamInfo"}  # since CUDA 12.4

_INVALID_VALUE = 1  # CUresult
_OUT_OF_MEMORY = 2  # CUresult
_INVALID_CONTEXT = 201  # CUresult
_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode
_STREAM_NON_BLOCKING = 1  # CUstream_flags
_PREFER_SHARED = 1  # CUfunc_cache
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_REQUIRED_CLUSTER_WIDTH, _HEIGHT, _DEPTH = 11, 12, 13  # CUfunction_attribute
_INTERLEAVE_NONE = 0  # CUtensorMapInterleave
_L2_PROMOTION_128B = 2  # CUtensorMapL2promotion
_TFLOAT32 = 11  # CUtensorMapDataType
_MAP_SIZE, _MAP_ALIGNMENT = 128, 64  # CUtensorMap, in bytes
_DEFAULT_SHARED = 48 << 10  # bytes of shared memory that a block may have without asking

# What `struct` calls triton's scalar types.
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp64": "d",
}  # fmt: skip


class Driver:
    """The functions of libcuda that a launch needs, as attributes that return a CUresult.

    Calling the object with a function's name and arguments raises RuntimeError unless that returns 0.
    `cuFuncGetParamInfo` is None where libcuda has none.
    """

    def __init__(self, library):
        for name, types in _PROTOTYPES.items():
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes, function.restype = types, _I
            elif name not in _OPTIONAL:
                raise RuntimeError(f"libcuda has no {name}: the driver is older than CUDA 12.0")
            setattr(self, name, function)

    def __call__(self, name: str, *args) -> None:
        if code := getattr(self, name)(*args):
            self.fail(name, code)

    def fail(self, name: str, code: int):
        """Raises RuntimeError for what function `name` returned."""
        error = ctypes.c_char_p()
        self.cuGetErrorName(code, ctypes.byref(error))
        raise RuntimeError(f"{name}: {error.value.decode() if error.value else f'CUDA error {code}'}")

    def ensure_context(self, device: int) -> bool:
        """Gives this thread the primary context of `device` if it has none; returns whether it had none."""
        context = _P()
        self("cuCtxGetCurrent", ctypes.byref(context))
        if context.value:
            return False
        # A CUdevice is the device's number. Torch holds the primary context for good, so this reference costs nothing.
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        return True


@functools.cache
def _driver() -> Driver:
    try:
        # CDLL gives up the GIL, as a launch has to: it blocks while the launch queue is full, and what the stream waits
        # for may be a callback in Python.
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise RuntimeError(f"no CUDA driver: {error}") from error


@dataclass(frozen=True)
class DeviceInts:
    """int32 on a GPU, to be an argument of a kernel as a tensor is; `upload` makes them."""

    address: int
    dtype: torch.dtype = torch.int32

    def data_ptr(self) -> int:
        return self.address


def upload(values: list[int], device: int) -> DeviceInts | None:
    """`values` in memory of `device` that is never freed; None if it has no memory left.

    The memory is not torch's: what its allocator gives while torch records a CUDA graph, or in the run before, belongs
    to that graph. And it is never freed since a graph that somebody recorded may read it.

    Raises:
        RuntimeError: with the CUDA driver's name for what is wrong.
    """
    driver = _driver()
    driver.ensure_context(device)
    data = (ctypes.c_int32 * len(values))(*values)
    memory, stream, mode = _P(), _P(), _I(_CAPTURE_MODE_RELAXED)
    # A CUDA graph that this thread records forbids what follows, though it is none of the graph's business.
    driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        if (code := driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.sizeof(data))) == _OUT_OF_MEMORY:
            return None
        if code:
            driver.fail("cuMemAlloc_v2", code)
        driver("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        driver("cuMemcpyHtoDAsync_v2", memory, data, ctypes.sizeof(data), stream)
        driver("cuStreamSynchronize", stream)
        driver("cuStreamDestroy_v2", stream)
    finally:
        driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return DeviceInts(memory.value)


class Parameter(NamedTuple):
    """One parameter of a kernel.

    offset: bytes from the start of the buffer, a multiple of the parameter's alignment.
    size: bytes.
    kind and value: "bytes", those; "address", an index into the tensors; or "map", a `Map`.
    """

    offset: int
    size: int
    kind: str
    value: object


class Map(NamedTuple):
    """What cuTensorMapEncodeTiled is told, dimensions innermost first.

    tensor: index into the tensors.
    strides: bytes, those of all dimensions but the innermost.
    """

    tensor: int
    data_type: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    fill: int


def layout(
    signature: dict, args: tuple, descriptors: list[dict] | None, tensors: tuple[torch.Tensor, ...]
) -> list[Parameter]:
    """The parameters of a kernel, at their natural offsets. Pure.

    Args:
        signature: the types of `args` as triton has them, in the same order: "i32", "*fp16", "constexpr" (which is no
            parameter), "tensordesc<...>", or a tuple of these.
        descriptors: the compiler's `tensordesc_meta`: for each descriptor in order, how it lies in shared memory.
        tensors: those that "address" and `Map.tensor` count.

    Raises:
        ValueError: for arguments that this module does not know how to pass.
    """
    if len(args) != len(signature):
        raise ValueError(f"{len(args)} arguments for the {len(signature)} of the kernel: pass all, by position")
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    if len(index) != len(tensors):
        raise ValueError("a tensor is listed twice, so a later call could not tell its two roles apart")
    metas = iter(descriptors or ())
    parameters: list[Parameter] = []

    def add(kind: str, value, size: int, alignment: int | None = None) -> None:
        end = parameters[-1].offset + parameters[-1].size if parameters else 0
        parameters.append(Parameter(end + -end % (alignment or size), size, kind, value))

    def visit(kind, arg) -> None:
        if isinstance(kind, tuple):
            for inner_kind, inner_arg in zip(kind, arg, strict=True):
                visit(inner_kind, inner_arg)
        elif kind.startswith("tensordesc"):
            if (meta := next(metas, None)) is None:
                raise ValueError("the kernel takes a descriptor apart instead of using it for TMA")
            add("map", _map(arg, meta, index), _MAP_SIZE, _MAP_ALIGNMENT)
            # 3.6 to 3.9: where the kernel reads a descriptor's .shape and .strides from.
            for size in arg.shape:
                add("bytes", _pack("i32", size), 4)
            for stride in arg.strides:
                add("bytes", _pack("i64", stride), 8)
        elif kind.startswith("*"):
            if id(arg) not in index:
                raise ValueError(f"a pointer that is not among the tensors: {type(arg).__name__}")
            add("address", index[id(arg)], 8)
        elif kind != "constexpr":
            value = _pack(kind, arg)
            add("bytes", value, len(value))

    for kind, arg in zip(signature.values(), args):
        visit(kind, arg)
    # 3.6 to 3.9: global and profiling scratch memory, of which `prepare` makes sure that the kernel has none.
    add("bytes", bytes(8), 8)
    add("bytes", bytes(8), 8)
    return parameters


def _map(descriptor: TensorDescriptor, meta: dict, index: dict[int, int]) -> Map:
    # "is_im2col" and `round_f32_to_tf32` are younger than 3.6.
    if meta["fp4_padded"] or meta.get("is_im2col"):
        raise ValueError("fp4_padded and im2col descriptors are not supported")
    if id(descriptor.base) not in index:
        raise ValueError("the base of a descriptor is not among the tensors")
    rounded = getattr(descriptor, "round_f32_to_tf32", False)
    return Map(
        tensor=index[id(descriptor.base)],
        data_type=_TFLOAT32 if rounded else TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        shape=tuple(reversed(descriptor.shape)),
        strides=tuple(meta["elem_size"] * stride for stride in reversed(descriptor.strides[:-1])),
        box=tuple(reversed(meta["block_size"])),
        swizzle=meta["swizzle"],
        fill=int(descriptor.padding == "nan"),
    )


def _pack(kind: str, value) -> bytes:
    """A scalar of triton type `kind`, little-endian. Raises ValueError if it does not fit or there is no such type."""
    if kind in ("fp32", "f32", "bf16"):
        packed = bytes(ctypes.c_float(value))  # as in C, too large is infinite
        return packed[2:] if kind == "bf16" else packed
    if kind not in _FORMATS:
        raise ValueError(f"arguments of type {kind} are not supported")
    try:
        return struct.pack("<" + _FORMATS[kind], value)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{value!r} is no {kind}: {error}") from error


class Launch:
    """One compiled kernel with all of its arguments but the addresses of its tensors. Holds no tensor."""

    def __init__(self, driver, device: int, function: int, grid, threads: int, shared: int, parameters, addresses):
        """
        Args:
            device: number of the device that `function` (a CUfunction) is loaded on.
            threads: per block.
            shared: bytes of dynamic shared memory per block.
            parameters: of `layout`.
            addresses: of the tensors, which say how the addresses of later ones are aligned.
        """
        size = parameters[-1].offset + parameters[-1].size
        memory = ctypes.create_string_buffer(size + _MAP_SIZE)
        start = -ctypes.addressof(memory) % _MAP_SIZE
        base = ctypes.addressof(memory) + start
        maps: list[list] = [[] for _ in addresses]
        words: list[list] = [[] for _ in addresses]
        for offset, size, kind, value in parameters:
            if kind == "bytes":
                memory[start + offset : start + offset + size] = value
            elif kind == "address":
                words[value].append(ctypes.c_uint64.from_buffer(memory, start + offset))
                words[value][-1].value = addresses[value]
            else:
                maps[value.tensor].append(_P(base + offset))
                _encode(driver, base + offset, value, addresses[value.tensor])
        # An array of pointers and not one buffer for all (CU_LAUNCH_PARAM_BUFFER_POINTER): ptxas aligns a parameter's
        # place in the constant bank, which on sm_90 starts at 0x210, so a map may be at an offset that is no multiple
        # of 64; but on the host a map has to be aligned.
        pointers = (_P * len(parameters))(*(base + parameter.offset for parameter in parameters))
        self._memory = memory, pointers
        self._driver, self._device = driver, device
        self._lock = threading.Lock()
        self._launch, self._replace = driver.cuLaunchKernel, driver.cuTensorMapReplaceAddress
        # ctypes passes its own objects on faster than it converts ints.
        self._head = (_P(function), *map(_U, grid), _U(threads), _U(1), _U(1), _U(shared))
        self._pointers = _P(ctypes.addressof(pointers))
        # Triton compiled loads for the alignment that it saw: 16 bytes or none.
        masks = (0 if address & 15 else 15 for address in addresses)
        self._slots = tuple(zip(masks, map(tuple, maps), map(tuple, words)))
        self._unknown = (None,) * len(addresses)
        self._addresses = tuple(addresses)

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launches on the CUstream `stream` of the device of `prepare`, which must be the current one.

        Args:
            addresses: of the tensors of `prepare`, in that order, in tensors of the same shapes, strides and dtypes.

        Raises:
            RuntimeError: with the CUDA driver's name for what is wrong.
            TypeError: if there are more or fewer addresses than tensors.
            ValueError: if an address is no multiple of 16, but the tensor's in `prepare` was.
        """
        with self._lock:  # the driver has copied the parameters when cuLaunchKernel returns
            name, code = self._submit(stream, addresses)
            # A thread that torch started (autograd's) or that the user did has no context until something of torch in
            # it needed one. As with triton's launch, that is not the caller's business.
            if code == _INVALID_CONTEXT and self._driver.ensure_context(self._device):
                name, code = self._submit(stream, addresses)
            if code:
                self._driver.fail(name, code)

    def _submit(self, stream: int, addresses: tuple[int, ...]) -> tuple[str, int]:
        """The CUresult of the last function called, and its name."""
        if addresses != self._addresses:
            if len(addresses) != len(self._slots):
                raise TypeError(f"{len(addresses)} addresses for {len(self._slots)} tensors")
            # If this ends halfway, the next call starts afresh.
            before, self._addresses = self._addresses, self._unknown
            for new, old, (mask, maps, words) in zip(addresses, before, self._slots):
                if new != old:
                    if new & mask:
                        raise ValueError(f"address {new:#x} is no multiple of 16, and the kernel was compiled for one")
                    for pointer in maps:
                        if code := self._replace(pointer, new):
                            return "cuTensorMapReplaceAddress", code
                    for word in words:
                        word.value = new
            self._addresses = addresses
        return "cuLaunchKernel", self._launch(*self._head, stream, self._pointers, None)


def _encode(driver: Driver, where: int, tensor_map: Map, address: int) -> None:
    rank = len(tensor_map.shape)
    driver(
        "cuTensorMapEncodeTiled",
        where,
        tensor_map.data_type,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*tensor_map.shape),
        (ctypes.c_uint64 * rank)(*tensor_map.strides),
        (ctypes.c_uint32 * rank)(*tensor_map.box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        _INTERLEAVE_NONE,
        tensor_map.swizzle,
        _L2_PROMOTION_128B,
        tensor_map.fill,
    )


def prepare(
    kernel, grid: tuple[int, int, int], args: tuple, tensors: tuple[torch.Tensor, ...], options: dict, cluster: int = 1
) -> Launch:
    """Compiles `kernel`, a @gluon.jit function, for the current device, as `kernel[grid](*args, **options)` would.

    Args:
        args: all of the kernel's arguments. A `Launch` passes these, but for the addresses.
        tensors: each of the tensors among the arguments and the bases of descriptors once.
        cluster: how many neighbours of the grid's first axis are a cluster, of which triton knows nothing. It is the
            same for every launch of one kernel.

    Raises:
        RuntimeError: if there is no CUDA driver, or with its name for what is wrong, or if this version of triton
            passes arguments in an unknown way.
        ValueError: for a kernel or an argument that is not supported here.
    """
    compiled = kernel.warmup(*args, grid=grid, **options)
    metadata = compiled.metadata
    for name, plain in (
        ("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0),
        ("launch_cooperative_grid", False), ("launch_pdl", False),
    ):  # fmt: skip
        if (value := getattr(metadata, name, plain)) != plain:
            raise ValueError(f"kernels with {name}={value} are not supported")
    descriptors = getattr(metadata, "tensordesc_meta", None)
    parameters = layout(compiled.src.signature, args, descriptors, tensors)
    driver, device = _driver(), torch.cuda.current_device()
    driver.ensure_context(device)
    function = _load(driver, compiled, device, [parameter.size for parameter in parameters], cluster)
    addresses = [tensor.data_ptr() for tensor in tensors]
    # num_warps is what the compiler made of the option: with the warps of warp-specialised partitions.
    return Launch(driver, device, function, grid, 32 * metadata.num_warps, metadata.shared, parameters, addresses)


_functions: dict[tuple[str, int], int] = {}  # by the hash of the compiled kernel and device; never unloaded
_functions_lock = threading.Lock()


def _load(driver: Driver, compiled, device: int, sizes: list[int], cluster: int) -> int:
    """The CUfunction of a compiled kernel on the current device, whose parameters have `sizes` bytes."""
    with _functions_lock:
        if (key := (compiled.hash, device)) not in _functions:
            module, function = _P(), _P()
            shared = compiled.metadata.shared
            driver("cuModuleLoadData", ctypes.byref(module), compiled.asm["cubin"])
            driver("cuModuleGetFunction", ctypes.byref(function), module, compiled.metadata.name.encode())
            _verify(driver, function, sizes)
            if shared > _DEFAULT_SHARED:
                driver("cuFuncSetCacheConfig", function, _PREFER_SHARED)
                driver("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            if cluster > 1:
                for attribute, value in ((_REQUIRED_CLUSTER_WIDTH, cluster), (_HEIGHT, 1), (_DEPTH, 1)):
                    driver("cuFuncSetAttribute", function, attribute, value)
            _functions[key] = function.value
        return _functions[key]


def _verify(driver: Driver, function, sizes: list[int]) -> None:
    """Raises RuntimeError if the parameters of a function do not have `sizes` bytes, as far as libcuda can tell."""
    if driver.cuFuncGetParamInfo is None:
        return
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while len(found) <= len(sizes):
        code = driver.cuFuncGetParamInfo(function, len(found), ctypes.byref(offset), ctypes.byref(size))
        if code == _INVALID_VALUE:  # no such parameter
            break
        if code:
            driver.fail("cuFuncGetParamInfo", code)
        found.append(size.value)
    if found != sizes:
        raise RuntimeError(
            f"this version of triton lays out arguments differently: sizes {found} in place of {sizes} (the first "
            f"{len(sizes) + 1} at most)"
        )
