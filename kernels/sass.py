"""Facts read from a kernel's machine code (what nvdisasm prints for sm_90a)."""

import collections
import re
from typing import NamedTuple

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T)\s+)?([^;]+);")
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
# The first register that an instruction writes: its first operand, or the second after a predicate.
_WRITES = re.compile(r"(?P<opcode>\S+)\s+(?:U?P(?:\d+|T),\s*)*R(?P<register>\d+)\b")
_PRODUCT = re.compile(r"[HQ]GMMA\.64x(?P<n>\d+)x\S+ R\d+, (?:R(?P<a>\d+)\S*, )?gdesc")
_READS_ONLY = (
    "ST",
    "BAR",
    "SYNCS",
    "UTMA",
    "RED",
    "R2UR",
    "R2P",
    "NANOSLEEP",
    "WARPSYNC",
    "BRX",
    "CCTL",
    "DEPBAR",
    "FCHK",
)
_PRODUCTS_OF_A_LOOP = 8
_A_REGISTERS = 4  # of a thread, for the 64 x 16 left operand of 16-bit numbers


class Code(NamedTuple):
    """`instructions` without their predicates, and where each label points."""

    instructions: list[str]
    labels: dict[str, int]


def parse(text: str) -> Code:
    """The instructions of nvdisasm's output, in order."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction.group(1).strip())
    return Code(instructions, labels)


def loop_spills(code: Code) -> int:
    """How many accesses to local memory there are in innermost loops of matrix products."""
    loops = []
    for end, text in enumerate(code.instructions):
        branch = _BRANCH.match(text)
        start = code.labels.get(branch.group(1), end + 1) if branch else end + 1
        if start <= end:
            loops.append((start, end))
    products = [i for i, text in enumerate(code.instructions) if text.startswith(("HGMMA", "QGMMA"))]
    around = collections.Counter(
        min((b - a, a, b) for a, b in loops if a <= i <= b)[1:] for i in products if any(a <= i <= b for a, b in loops)
    )
    # The retries of waits lie at the very end and jump back from there. What they span is no loop, though it may be the
    # shortest around the few products of an epilogue; a KV loop has those of two matrix products, each of several.
    around = {loop: count for loop, count in around.items() if count >= _PRODUCTS_OF_A_LOOP}
    innermost = [(a, b) for a, b in around if not any((c, d) != (a, b) and a <= c and d <= b for c, d in around)]
    return sum(text.startswith(("LDL", "STL")) for a, b in innermost for text in code.instructions[a:b])


def early_writes(code: Code) -> list[str]:
    """Instructions that write to the left operand of a matrix product which may not have read it yet.

    One with its left operand in registers reads them after it was issued, up to the WARPGROUP.DEPBAR that waits
    for its group. ptxas 12.8 and 12.9 have been seen to use such registers for something else before that
    (triton-lang/triton#11781); a kernel for which this list is not empty must not be shipped.
    """
    found: list[str] = []
    in_flight: list[set[int]] = []  # the left operands of each group that was closed
    group: set[int] = set()  # of the one that is open
    for text in code.instructions:
        if text.startswith("WARPGROUP.DEPBAR"):
            left = int(text.rsplit(",", 1)[1], 0)
            in_flight = in_flight[-left:] if left else []
            continue
        written = _written(text)
        if any(written & operands for operands in (*in_flight, group)):
            found.append(text)
        if product := _PRODUCT.match(text):
            if product["a"]:
                group |= set(range(int(product["a"]), int(product["a"]) + _A_REGISTERS))
            if "gsb0" in text:
                in_flight.append(group)
                group = set()
        elif text.startswith(("EXIT", "RET", "BRA `")):  # what follows is come to from elsewhere
            in_flight, group = [], set()
    return found


def _written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    write = _WRITES.match(text)
    if write is None or write["opcode"].startswith(_READS_ONLY) or "SETP" in write["opcode"]:
        return set()
    opcode, first = write["opcode"], int(write["register"])
    if product := _PRODUCT.match(text):
        count = int(product["n"]) // 2
    elif ".128" in opcode or re.match(r"LDSM.*\.4$", opcode):
        count = 4
    elif ".64" in opcode or "WIDE" in opcode or opcode == "CS2R" or re.match(r"LDSM.*\.2$|D(ADD|MUL|FMA)", opcode):
        count = 2
    else:
        count = 1
    return set(range(first, first + count))
