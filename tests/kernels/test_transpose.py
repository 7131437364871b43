"""The assembly that transposes a tile of V for the FP8 kernel, run by a small interpreter of it."""

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from fa3_inductor.kernels.fp8_kernel import _transpose_asm  # noqa: E402

THREADS, WARP = 64, 32
ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]  # of the keys in each 16 of a transposed V


def place(row, column, width):
    """Where TMA and wgmma have a byte of a tile whose rows are `width` bytes: 16 bytes at a time, swizzled."""
    chunk = column // 16 ^ row // (128 // width) % (width // 16)
    return row * width + chunk * 16 + column % 16


class Machine:
    """Two warps in step, every register one number for each thread."""

    def __init__(self, memory, *arguments):
        self.memory = memory
        self.registers = {f"${i + 1}": np.broadcast_to(np.uint32(x), THREADS) for i, x in enumerate(arguments)}

    def read(self, name):
        return self.registers[name] if name in self.registers else np.full(THREADS, int(name, 0), np.uint32)

    def run(self, text):
        for statement in re.split(r"[;\n]", text.strip("{}\n")):
            opcode, _, rest = statement.strip().partition(" ")
            if opcode and not opcode.startswith("."):
                self.step(opcode, re.findall(r"\[[^]]*\]|\{[^}]*\}|[^\s,]+", rest))

    def step(self, opcode, operands):
        kind = opcode.split(".")[0]
        if kind in ("ldmatrix", "stmatrix"):
            return self.matrices(kind, operands)
        to, *names = operands
        x, *more = map(self.read, names)
        self.registers[to] = {
            "mov": lambda: x,
            "and": lambda: x & more[0],
            "xor": lambda: x ^ more[0],
            "add": lambda: x + more[0],
            "shr": lambda: x >> more[0],
            "shl": lambda: x << more[0],
            "mul": lambda: x * more[0],
            "mad": lambda: x * more[0] + more[1],
            "setp": lambda: x < more[0],
            "selp": lambda: np.where(more[1], x, more[0]),
            "prmt": lambda: permuted(x, *more),
        }[kind]()

    def matrices(self, kind, operands):
        """Four of 8 rows of 16 bytes; ldmatrix hands out their transposes, of pairs of bytes."""
        names, at = sorted(operands, key=lambda x: x[0] == "[")
        names = names.strip("{}").split(", ")
        base, offset = at.strip("[]").split(" + ")
        rows = (self.read(base).astype(int) + int(offset))[:, None] + np.arange(16)
        assert (rows[:, 0] % 16 == 0).all()
        for warp in range(0, THREADS, WARP):
            threads = slice(warp, warp + WARP)
            for i, name in enumerate(names):
                bytes_at = rows[warp + 8 * i : warp + 8 * i + 8]
                banks = {tuple(row // 4 % 32) for row in bytes_at[:, ::4]}
                assert len(banks) == 8, "a bank conflict"
                if kind == "stmatrix":
                    self.memory[bytes_at] = self.registers[name][threads].view(np.uint8).reshape(8, 16)
                else:
                    pairs = self.memory[bytes_at].view(np.uint16)
                    words = pairs.T.reshape(8, 4, 2).copy().view(np.uint32)
                    self.registers.setdefault(name, np.zeros(THREADS, np.uint32))[threads] = words.flatten()


def permuted(a, b, selector):
    source = np.stack([a, b], 1).copy().view(np.uint8)
    picks = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    return np.take_along_axis(source, picks.astype(int), 1).copy().view(np.uint32)[:, 0]


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_every_byte_comes_to_its_place(keys, columns):
    size = keys * columns
    values = np.random.default_rng(0).integers(0, 256, (keys, columns), np.uint8)
    memory = np.zeros(1024 + 2 * size, np.uint8)
    raw, turned = 1024, 1024 + size
    key, column = np.mgrid[:keys, :columns]
    memory[raw + place(key, column, columns)] = values
    Machine(memory, np.arange(THREADS), raw, turned).run(_transpose_asm(keys, columns))
    column, position = np.mgrid[:columns, :keys]
    key = position // 16 * 16 + np.array(ORDER)[position % 16]
    assert (memory[turned + place(column, position, keys)] == values[key, column]).all()
