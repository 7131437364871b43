"""The launch of compiled kernels, on a libcuda made of ctypes callbacks. No GPU needed."""

import ctypes
import gc
import re
import struct
import sys
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fa3_inductor.kernels import launch  # noqa: E402
from fa3_inductor.kernels.compat import tma_store  # noqa: E402
from fa3_inductor.kernels.offline import HOPPER  # noqa: E402

P, INT, U, Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
# As in cuda.h.
PROTOTYPES = {
    "cuGetErrorName": (INT, ctypes.POINTER(P)),
    "cuCtxGetCurrent": (ctypes.POINTER(P),),
    "cuCtxSetCurrent": (P,),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(P), INT),
    "cuModuleLoadData": (ctypes.POINTER(P), P),
    "cuModuleGetFunction": (ctypes.POINTER(P), P, ctypes.c_char_p),
    "cuFuncSetCacheConfig": (P, INT),
    "cuFuncSetAttribute": (P, INT, INT),
    "cuFuncGetParamInfo": (P, Z, ctypes.POINTER(Z), ctypes.POINTER(Z)),
    "cuTensorMapEncodeTiled": (
        P, INT, U, P, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32), INT, INT, INT, INT,
    ),
    "cuTensorMapReplaceAddress": (P, P),
    "cuLaunchKernel": (P, U, U, U, U, U, U, U, P, ctypes.POINTER(P), P),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(INT),),
    "cuMemAlloc_v2": (ctypes.POINTER(P), Z),
    "cuStreamCreate": (ctypes.POINTER(P), U),
    "cuMemcpyHtoDAsync_v2": (P, P, Z, P),
    "cuStreamSynchronize": (P,),
    "cuStreamDestroy_v2": (P,),
}  # fmt: skip
UPLOAD = [name for name in PROTOTYPES if re.search("Exchange|MemAlloc|Stream|Memcpy", name)]
ERRORS = {1: b"CUDA_ERROR_INVALID_VALUE", 201: b"CUDA_ERROR_INVALID_CONTEXT", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}
MAGIC = b"a map".ljust(120)


class Library:
    """What ctypes makes of a libcuda that writes its calls down.

    calls: (name, *arguments), arguments as Python values. A launch's parameters are a list of bytes.
    codes: what the function of a name returns the next times. 0 where there is nothing.
    sizes: in bytes, of the parameters that the kernel has according to cuFuncGetParamInfo and cuLaunchKernel.
    A map is 8 bytes of address and then MAGIC.
    """

    def __init__(self, sizes):
        self.sizes, self.calls, self.codes, self.context, self.mode = sizes, [], {}, 0xC0, 0
        self.names = {code: ctypes.create_string_buffer(name) for code, name in ERRORS.items()}
        for name, argtypes in PROTOTYPES.items():
            prototype = ctypes.PYFUNCTYPE(INT, *argtypes)
            setattr(self, name, prototype(lambda *args, name=name: self.call(name, *args)))

    def call(self, name, *args):
        if name == "cuGetErrorName":
            args[1][0] = ctypes.addressof(self.names[args[0]])
            return 0
        if name == "cuFuncGetParamInfo" and args[1] >= len(self.sizes):
            return 1  # as the driver does
        planned = self.codes.get(name)
        code = planned.pop(0) if planned else 0
        self.calls.append((name, *(getattr(self, name + "_")(*args) if not code else args)))
        return code

    def cuCtxGetCurrent_(self, context):
        context[0] = self.context
        return ()

    def cuCtxSetCurrent_(self, context):
        self.context = context
        return (context,)

    def cuDevicePrimaryCtxRetain_(self, context, device):
        context[0] = 0xC0 + device
        return (device,)

    def cuModuleLoadData_(self, module, data):
        module[0] = 0xD0
        return (ctypes.string_at(data, 4),)

    def cuModuleGetFunction_(self, function, module, name):
        function[0] = 0xF0
        return module, name

    def cuFuncSetCacheConfig_(self, *args):
        return args

    cuFuncSetAttribute_ = cuFuncSetCacheConfig_

    def cuFuncGetParamInfo_(self, function, index, offset, size):
        size[0] = self.sizes[index]
        return (index,)

    def cuTensorMapEncodeTiled_(self, where, data_type, rank, address, shape, strides, box, steps, *rest):
        assert where % 64 == 0
        ctypes.memmove(where, struct.pack("<Q", address) + MAGIC, 128)
        return data_type, address, shape[:rank], strides[: rank - 1], box[:rank], steps[:rank], *rest

    def cuTensorMapReplaceAddress_(self, where, address):
        assert ctypes.string_at(where + 8, 120) == MAGIC
        ctypes.memmove(where, struct.pack("<Q", address), 8)
        return (address,)

    def cuLaunchKernel_(self, function, *args):
        *numbers, stream, parameters, extra = args
        assert extra is None
        return function, *numbers, stream, [ctypes.string_at(parameters[i], n) for i, n in enumerate(self.sizes)]

    def cuThreadExchangeStreamCaptureMode_(self, mode):
        self.mode, mode[0] = mode[0], self.mode
        return (self.mode,)

    def cuMemAlloc_v2_(self, memory, size):
        assert self.mode == 2
        memory[0] = 0xA0
        return (size,)

    def cuStreamCreate_(self, stream, flags):
        stream[0] = 0xB0
        return (flags,)

    def cuMemcpyHtoDAsync_v2_(self, to, data, size, stream):
        return to, ctypes.string_at(data, size), stream

    def cuStreamSynchronize_(self, stream):
        return (stream,)

    cuStreamDestroy_v2_ = cuStreamSynchronize_

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit(do_not_specialize=["count"])
def every_kind(
    flag, q_desc, out, nothing, one, count, big, scale, pair, k_desc, combine: gl.constexpr, sizes: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, 128, layout)
    buffer = gl.allocate_shared_memory(q_desc.dtype, [64, 64], q_desc.layout)
    tma_store(q_desc, [0, one], buffer)
    tma_store(k_desc, [count, 0], buffer)
    value = combine(scale * pair[0], pair[1][0] * flag) + big + sizes[1] + pair[1][2]
    gl.store(out + offsets, gl.zeros([128], gl.float32, layout) + value + q_desc.shape[0])
    gl.store(pair[1][1] + offsets, gl.zeros([128], gl.float32, layout) + k_desc.strides[0])


def compile_for_hopper(kernel, args, options):
    """As `warmup` does on a Hopper GPU."""
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = bind(*args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, parsed)
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=HOPPER, options=parsed.__dict__)


def descriptor(tensor, **options):
    smem = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [64, 64], smem, **options)


def operands():
    """(args, tensors) of every_kind. Both descriptors and no pointer belong to tensors[0]."""
    q, out, pair = torch.empty(256, 128, dtype=torch.float16), torch.empty(128), torch.empty(128)
    args = (
        True, descriptor(q), out, None, 1, 1, 2**40, 0.5, (3, (7.0, pair, 1)), descriptor(q, padding="nan"),
        plus, (1, 2),
    )  # fmt: skip
    return args, (q, out, pair)


@pytest.fixture(scope="module")
def compiled():
    return compile_for_hopper(every_kind, operands()[0], {"num_warps": 4})


class Kernel:
    """A @gluon.jit function whose `warmup` gives what was compiled before, with some metadata changed."""

    def __init__(self, compiled, **metadata):
        fields = ("asm", "src", "hash")
        self.compiled = types.SimpleNamespace(**{name: getattr(compiled, name) for name in fields})
        self.compiled.metadata = compiled.metadata._replace(**metadata)
        self.warmups = []

    def warmup(self, *args, grid, **options):
        self.warmups.append((args, grid, options))
        return self.compiled


# Of every_kind's parameters: flag, q_desc, its shape and strides, out, count, big, scale, pair[0], pair[1][:2], k_desc,
# its shape and strides, scratch.
SIZES = [1, 128, 4, 4, 8, 8, 8, 4, 8, 4, 4, 4, 8, 128, 4, 4, 8, 8, 8, 8]


@pytest.fixture
def library(monkeypatch):
    library = Library(SIZES)
    monkeypatch.setattr(launch, "_driver", lambda: launch.Driver(library))
    monkeypatch.setattr(launch, "_functions", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return library


def prepared(compiled, **metadata):
    args, tensors = operands()
    made = launch.prepare(Kernel(compiled, **metadata), (5, 6, 7), args, tensors, {})
    return made, tuple(tensor.data_ptr() for tensor in tensors)


def test_layout_by_hand():
    x, y = torch.empty(4, 64, 32, dtype=torch.float16), torch.empty(1)
    smem = gl.NVMMASharedLayout.get_default_for([1, 64, 32], gl.float16)
    desc = TensorDescriptor(x, [4, 64, 32], [2048, 32, 1], [1, 64, 32], smem, "nan")
    signature = {
        "a": "i8", "b": "*fp32", "c": "constexpr", "d": ("i1", ("constexpr", "u64", "*kfp16")), "e": "tensordesc<...>",
        "f": "fp16", "g": "fp64",
    }  # fmt: skip
    args = (-2, y, "anything", (True, (None, 2**64 - 1, x)), desc, 1.5, 0.1)
    meta = {"swizzle": 2, "elem_size": 2, "elem_type": 8, "block_size": [1, 16, 32], "fp4_padded": False}
    made = launch.layout(signature, args, [meta], (x, y))
    assert [(p.offset, p.size, p.kind, p.value) for p in made] == [
        (0, 1, "bytes", b"\xfe"),
        (8, 8, "address", 1),
        (16, 1, "bytes", b"\x01"),
        (24, 8, "bytes", b"\xff" * 8),
        (32, 8, "address", 0),
        # Device and host count data types differently: 8 is 10. 64 and 4096 bytes from row to row and plane to plane.
        (64, 128, "map", (0, 10, (32, 64, 4), (64, 4096), (32, 16, 1), 2, 1)),
        *((192 + 4 * i, 4, "bytes", size.to_bytes(4, "little")) for i, size in enumerate((4, 64, 32))),
        *((208 + 8 * i, 8, "bytes", stride.to_bytes(8, "little")) for i, stride in enumerate((2048, 32, 1))),
        (232, 2, "bytes", struct.pack("<e", 1.5)),
        (240, 8, "bytes", struct.pack("<d", 0.1)),
        (248, 8, "bytes", bytes(8)),
        (256, 8, "bytes", bytes(8)),
    ]


def test_layout_is_that_of_the_ptx(compiled):
    """Sizes and natural offsets are those of the .entry's parameters."""
    text = re.search(r"\.entry every_kind\((.*?)\)\n", compiled.asm["ptx"], re.DOTALL).group(1)
    expected, end = [], 0
    for line in text.strip().split("\n"):
        if array := re.match(r"\s*\.param \.align (\d+) \.b8 \w+\[(\d+)\]", line):
            alignment, size = map(int, array.groups())
        else:
            alignment = size = int(re.match(r"\s*\.param \.[usfb](\d+)", line).group(1)) // 8
        expected.append((-(-end // alignment) * alignment, size))
        end = sum(expected[-1])
    args, tensors = operands()
    made = launch.layout(compiled.src.signature, args, compiled.metadata.tensordesc_meta, tensors)
    assert [(p.offset, p.size) for p in made] == expected
    assert [p.size for p in made] == SIZES  # what the other tests say that the kernel has


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("i1", False, b"\0"), ("u1", True, b"\1"), ("i16", -2, b"\xfe\xff"), ("u32", 2**32 - 1, b"\xff" * 4),
        ("fp32", 0.1, struct.pack("<f", 0.1)), ("fp32", 3, struct.pack("<f", 3.0)),
        ("fp32", 1e300, struct.pack("<f", float("inf"))), ("bf16", 1.0, b"\x80\x3f"),
    ],
)  # fmt: skip
def test_scalars(kind, value, expected):
    assert launch._pack(kind, value) == expected


@pytest.mark.parametrize(
    "kind, value", [("i32", 2**31), ("i32", 1.5), ("u8", -1), ("fp16", 1e6), ("i64", None), ("fp8e5", 1.0)]
)
def test_scalars_that_do_not_fit(kind, value):
    with pytest.raises(ValueError, match=kind):
        launch._pack(kind, value)


def test_arguments_that_are_not_supported():
    x = torch.empty(64, 64, dtype=torch.float16)
    desc, signature = descriptor(x), {"a": "tensordesc<...>"}
    meta = {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [64, 64], "fp4_padded": False}
    launch.layout(signature, (desc,), [meta], (x,))
    for args, metas, tensors, message in (
        ((), [meta], (x,), "by position"),
        ((desc,), None, (x,), "apart"),
        ((desc,), [meta | {"fp4_padded": True}], (x,), "fp4"),
        ((desc,), [meta | {"is_im2col": True}], (x,), "im2col"),
        ((desc,), [meta], (x.clone(),), "base"),
    ):
        with pytest.raises(ValueError, match=message):
            launch.layout(signature, args, metas, tensors)
    with pytest.raises(ValueError, match="pointer"):
        launch.layout({"a": "*fp16"}, (x,), None, (x.clone(),))


def test_a_tensor_in_two_roles_is_refused():
    x = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="listed twice"):
        launch.layout({"a": "*fp32", "b": "*fp32"}, (x, x), None, (x, x))


def test_rounding_descriptors_have_a_type_of_their_own():
    """Triton 3.9 can round float32 to TF32 while it loads."""
    x = torch.empty(64, 64, dtype=torch.float16)
    desc = descriptor(x)
    desc.round_f32_to_tf32 = True
    meta = {"swizzle": 2, "elem_size": 4, "elem_type": 7, "block_size": [64, 64], "fp4_padded": False}
    assert launch.layout({"a": "tensordesc<...>"}, (desc,), [meta], (x,))[0].value.data_type == 11


def test_prepare_and_launch(compiled, library):
    args, tensors = operands()
    kernel = Kernel(compiled, shared=50000, num_warps=12)
    made = launch.prepare(kernel, (5, 6, 7), args, tensors, {"num_warps": 4})
    ((warm_args, *rest),) = kernel.warmups
    assert all(a is b for a, b in zip(warm_args, args, strict=True)) and rest == [(5, 6, 7), {"num_warps": 4}]
    q, out, pair = (tensor.data_ptr() for tensor in tensors)
    # float16 is 6, one stride, no interleave, the 128-byte swizzle, 128 bytes of promotion, no NaN or NaN.
    maps = [(6, q, [128, 256], [256], [64, 64], [1, 1], 0, 3, 2, fill) for fill in (0, 1)]
    assert library.calls == [
        ("cuCtxGetCurrent",),
        ("cuModuleLoadData", b"\x7fELF"),
        ("cuModuleGetFunction", 0xD0, b"every_kind"),
        *(("cuFuncGetParamInfo", i) for i in range(len(SIZES))),
        ("cuFuncSetCacheConfig", 0xF0, 1),
        ("cuFuncSetAttribute", 0xF0, 8, 50000),
        *(("cuTensorMapEncodeTiled", *encoded) for encoded in maps),
    ]
    library.calls.clear()
    stream = 0x7F0000000010
    made(stream, q, out, pair)
    ((*numbers, parameters),) = library.named("cuLaunchKernel")
    assert numbers == [0xF0, 5, 6, 7, 384, 1, 1, 50000, stream]
    shape_and_strides = [struct.pack("<i", n) for n in (256, 128)] + [struct.pack("<q", n) for n in (128, 1)]
    desc = [struct.pack("<Q", q) + MAGIC, *shape_and_strides]
    assert parameters == [
        b"\x01", *desc, struct.pack("<Q", out), struct.pack("<i", 1), struct.pack("<q", 2**40),
        struct.pack("<f", 0.5), struct.pack("<i", 3), struct.pack("<f", 7.0), struct.pack("<Q", pair), *desc,
        bytes(8), bytes(8),
    ]  # fmt: skip
    assert len(library.calls) == 1  # the addresses are those of the maps


def test_clusters_are_asked_for_once(compiled, library):
    args, tensors = operands()
    for _ in range(2):
        launch.prepare(Kernel(compiled, shared=49152), (6, 1, 1), args, tensors, {}, 2)
    assert library.named("cuFuncSetAttribute") == [(0xF0, 11, 2), (0xF0, 12, 1), (0xF0, 13, 1)]


def test_little_shared_memory_needs_no_asking(compiled, library):
    made, addresses = prepared(compiled, shared=49152)
    assert not library.named("cuFuncSetAttribute")
    made(0, *addresses)
    assert library.named("cuLaunchKernel")[0][7:9] == (49152, None)  # ctypes' name for a null stream


def test_only_other_addresses_are_replaced(compiled, library):
    made, (q, out, pair) = prepared(compiled)

    def launched(*addresses):
        library.calls.clear()
        made(0, *addresses)
        parameters = library.named("cuLaunchKernel")[0][-1]
        passed = [struct.unpack("<Q", parameters[i][:8])[0] for i in (1, 13, 6, 12)]
        return library.named("cuTensorMapReplaceAddress"), passed

    far = 0x7FFF12345670
    assert launched(q, out, pair) == ([], [q, q, out, pair])
    assert launched(q, far, pair) == ([], [q, q, far, pair])
    assert launched(far, far, pair) == ([(far,), (far,)], [far, far, far, pair])
    assert launched(far, out, far) == ([], [far, far, out, far])
    assert launched(q, out, pair) == ([(q,), (q,)], [q, q, out, pair])


@pytest.mark.parametrize("name", ["cuTensorMapReplaceAddress", "cuLaunchKernel"])
def test_a_failed_launch_names_the_error_and_the_next_is_right(compiled, library, name):
    made, (q, out, pair) = prepared(compiled)
    # Of the two maps, the first gets its new address.
    library.codes[name] = [0, 700] if name == "cuTensorMapReplaceAddress" else [700]
    with pytest.raises(RuntimeError, match=f"{name}: CUDA_ERROR_ILLEGAL_ADDRESS"):
        made(0, 0x1000, 0x2000, pair)
    made(0, q, out, pair)
    parameters = library.named("cuLaunchKernel")[-1][-1]
    assert [struct.unpack("<Q", parameters[i][:8])[0] for i in (1, 13, 6, 12)] == [q, q, out, pair]


NOT_OF_PREPARE = {"cuGetErrorName", "cuTensorMapReplaceAddress", "cuLaunchKernel", *UPLOAD}


@pytest.mark.parametrize(
    "name", [n for n in PROTOTYPES if n not in NOT_OF_PREPARE and not re.search("SetCur|Retain", n)]
)
def test_errors_of_prepare(compiled, library, name):
    library.codes[name] = [700]
    with pytest.raises(RuntimeError, match=f"^{name}: CUDA_ERROR_ILLEGAL_ADDRESS$"):
        prepared(compiled, shared=50000)
    prepared(compiled, shared=50000)  # nothing half-loaded is kept


def test_errors_without_a_name(compiled, library):
    library.cuGetErrorName = ctypes.PYFUNCTYPE(INT, *PROTOTYPES["cuGetErrorName"])(lambda code, name: 1)
    library.codes["cuModuleLoadData"] = [999]
    with pytest.raises(RuntimeError, match="^cuModuleLoadData: CUDA error 999$"):
        prepared(compiled)


@pytest.mark.parametrize("sizes", [SIZES[:-1], [*SIZES, 8], [4, *SIZES[1:]]], ids=["fewer", "more", "other"])
def test_parameters_of_another_layout(compiled, library, sizes):
    library.sizes = sizes
    with pytest.raises(RuntimeError, match="version of triton lays out arguments differently"):
        prepared(compiled)
    library.cuFuncGetParamInfo = None  # before CUDA 12.4, there is no telling
    prepared(compiled)


def test_a_kernel_is_loaded_once_for_each_device(compiled, library, monkeypatch):
    first, second = prepared(compiled)[0], prepared(compiled)[0]
    assert len(library.named("cuModuleLoadData")) == 1
    first(0, 0x10, 0x20, 0x30)
    second(0, 0x40, 0x50, 0x60)
    first(0, 0x10, 0x20, 0x30)  # has a buffer of its own
    outs = [struct.unpack("<Q", call[-1][6])[0] for call in library.named("cuLaunchKernel")]
    assert outs == [0x20, 0x50, 0x20]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    prepared(compiled)
    assert len(library.named("cuModuleLoadData")) == 2


@pytest.mark.parametrize("name", ["cuTensorMapReplaceAddress", "cuLaunchKernel"])
def test_a_thread_without_a_context_gets_one(compiled, library, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    library.context = None
    made, (_, *addresses) = prepared(compiled)
    assert library.context == 0xC3
    library.context, library.codes[name] = None, [201]
    library.calls.clear()
    made(0, 0x1000, *addresses)
    names = [call[0] for call in library.calls if call[0] != "cuTensorMapReplaceAddress"]
    expected = ["cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLaunchKernel"]
    assert names == (["cuLaunchKernel"] if name == "cuLaunchKernel" else []) + expected
    assert library.context == 0xC3
    parameters = library.named("cuLaunchKernel")[-1][-1]
    assert [struct.unpack("<Q", parameters[i][:8])[0] for i in (1, 13)] == [0x1000, 0x1000]


def test_upload(library):
    """What a CUDA graph that is recorded may forbid is done as none of its business, and away from its stream."""
    library.context, library.mode = None, 1
    made = launch.upload([1, -2, 3], 5)
    assert made.data_ptr() == 0xA0 and made.dtype is torch.int32 and library.context == 0xC5
    assert library.named("cuMemAlloc_v2") == [(12,)] and library.named("cuStreamCreate") == [(1,)]
    assert library.named("cuMemcpyHtoDAsync_v2") == [(0xA0, struct.pack("<3i", 1, -2, 3), 0xB0)]
    assert [call[0] for call in library.calls[-3:]] == [
        "cuStreamSynchronize", "cuStreamDestroy_v2", "cuThreadExchangeStreamCaptureMode",
    ]  # fmt: skip
    assert library.mode == 1


def test_what_is_uploaded_passes_for_a_tensor():
    def compile_with(out):
        args, _ = operands()
        return compile_for_hopper(every_kind, (*args[:2], out, *args[3:]), {"num_warps": 4})

    assert compile_with(launch.DeviceInts(0xA00)).hash == compile_with(torch.empty(4, dtype=torch.int32)).hash


@pytest.mark.parametrize("name", UPLOAD)
def test_errors_of_upload(library, name):
    library.codes[name] = [700]
    with pytest.raises(RuntimeError, match=f"^{name}: CUDA_ERROR_ILLEGAL_ADDRESS$"):
        launch.upload([1], 0)
    assert library.mode == 0
    library.codes["cuMemAlloc_v2"] = [2]
    assert launch.upload([1], 0) is None and library.mode == 0


def test_another_context_is_left_alone(compiled, library):
    made, addresses = prepared(compiled)
    library.context, library.codes["cuLaunchKernel"] = 0xEE, [201]
    with pytest.raises(RuntimeError, match="cuLaunchKernel: CUDA_ERROR_INVALID_CONTEXT"):
        made(0, *addresses)
    assert library.context == 0xEE


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_ctas", 2), ("global_scratch_size", 1), ("profile_scratch_size", 1), ("launch_cooperative_grid", True),
        ("launch_pdl", True),
    ],
)  # fmt: skip
def test_kernels_that_are_not_supported(compiled, library, name, value):
    with pytest.raises(ValueError, match=name):
        prepared(compiled, **{name: value})


def test_addresses_that_do_not_fit(compiled, library):
    made, (q, out, pair) = prepared(compiled)
    for wrong in ((), (q, out), (q, out, pair, pair)):
        with pytest.raises(TypeError, match="3 tensors"):
            made(0, *wrong)
    with pytest.raises(ValueError, match="multiple of 16"):
        made(0, q, out + 8, pair)
    assert not library.named("cuLaunchKernel")


def test_a_tensor_that_was_not_aligned_need_not_be(compiled, library):
    args, (q, out, pair) = operands()
    out = torch.empty(129)[1:]
    made = launch.prepare(Kernel(compiled), (1, 1, 1), (*args[:2], out, *args[3:]), (q, out, pair), {})
    made(0, q.data_ptr(), 0x1004, pair.data_ptr())
    assert struct.unpack("<Q", library.named("cuLaunchKernel")[0][-1][6]) == (0x1004,)


def test_tensors_are_not_kept(compiled, library):
    args, tensors = operands()
    made = launch.prepare(Kernel(compiled), (1, 1, 1), args, tensors, {})
    references = [weakref.ref(tensor) for tensor in tensors]
    del args, tensors
    gc.collect()
    assert made and [reference() for reference in references] == [None] * 3


def test_threads_do_not_mix_their_addresses(compiled, library):
    made, _ = prepared(compiled)
    library.calls.clear()

    def work(address):
        for _ in range(300):
            made(0, address, address, address)

    threads = [threading.Thread(target=work, args=(0x1000 * (i + 1),)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    launched = [call[-1] for call in library.named("cuLaunchKernel")]
    assert len(launched) == 1200
    assert all(len({parameters[i][:8] for i in (1, 13, 6, 12)}) == 1 for parameters in launched)


def test_a_driver_that_is_missing_or_old(monkeypatch):
    library = Library([])
    library.cuTensorMapReplaceAddress = None
    with pytest.raises(RuntimeError, match="no cuTensorMapReplaceAddress"):
        launch.Driver(library)

    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    launch._driver.cache_clear()
    with pytest.raises(RuntimeError, match="no CUDA driver: libcuda.so.1"):
        launch._driver()
