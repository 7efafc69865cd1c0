"""What a compiled program sends between devices and computes with, read off its HLO text (`compiled.as_text()`).

XLA prints one instruction a line, `%name = shape opcode(%operands), attributes`, in computations that call each other.
A loop's body counts as often as the loop turns: its known trip count, or else the largest constant of its condition.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEAD = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_LINE = re.compile(r"(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")


class Instruction(NamedTuple):
    """One line: `arrays` are the dtypes and shapes of its result, `times` how often a step runs it."""

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    computation: str
    times: int
    line: str


class Sent(NamedTuple):
    """An array that a collective makes (a reduction: takes)."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """In one step."""
        return self.elements * BYTES[self.dtype] * self.times


def instructions(text: str) -> list[Instruction]:
    """All instructions of a program."""
    found, inside = [], ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        line = line.strip()
        if match := _HEAD.match(line):
            inside = match[1]
        elif inside and (match := _LINE.match(line)):
            name, shape, opcode, rest = match.groups()
            arrays = tuple(
                (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims, _ in _ARRAY.findall(shape)
            )
            operands = tuple(re.findall(r"%([\w.-]+)", rest.split("), ")[0]))
            found.append(Instruction(name, opcode, arrays, operands, inside, 1, line))
    times = _times(found, re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)[1])
    return [i._replace(times=times.get(i.computation, 0)) for i in found]


def _times(found: list[Instruction], entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    inner: dict[str, list[Instruction]] = {}
    for i in found:
        inner.setdefault(i.computation, []).append(i)
    times: dict[str, int] = {}

    def visit(computation: str, turns: int) -> None:
        times[computation] = times.get(computation, 0) + turns
        for i in inner.get(computation, ()):
            called = dict(re.findall(r"(body|condition)=%?([\w.-]+)", i.line)) if i.opcode == "while" else {}
            trips = _trips(i, inner.get(called.get("condition", ""), ())) if called else 1
            for names in _CALLED.findall(i.line):
                for name in re.findall(r"[\w.-]+", names):
                    visit(name, turns * trips)

    visit(entry, 1)
    return times


def _trips(loop: Instruction, condition: "list[Instruction] | tuple[()]") -> int:
    if match := re.search(r"known_trip_count\D*(\d+)", loop.line):
        return int(match[1])
    return max((int(n) for i in condition for n in re.findall(r" constant\((\d+)\)", i.line)), default=1)


def sent(text: str) -> list[Sent]:
    """What the collectives of a program carry; an all-reduce of which each device keeps a part is a reduce-scatter."""
    found = []
    for i in instructions(text):
        kind = next((k for k in KINDS if i.opcode in (k, f"{k}-start")), None)
        if kind is None:
            continue
        arrays = i.arrays
        if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):  # operands, then results
            arrays = arrays[len(i.operands) : 2 * len(i.operands)]
        if kind == "all-reduce" and i.computation.startswith("all-reduce-scatter"):  # as the TPU backend writes it
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            parts = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", i.line)
            size = len(parts[1].split(",")) if parts and parts[1] else int(parts[2]) if parts else 1
            arrays = tuple((dtype, (size, *shape)) for dtype, shape in arrays)
        found += [Sent(kind, dtype, shape, i.times) for dtype, shape in arrays]
    return sorted(found)


def dots(text: str) -> list[tuple[str, ...]]:
    """The dtypes of the operands of every matrix product, convolutions among them."""
    every = instructions(text)
    dtype = {i.name: i.arrays[0][0] for i in every if i.arrays}
    return [tuple(dtype[o] for o in i.operands if o in dtype) for i in every if i.opcode in ("dot", "convolution")]


def outputs(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Dtypes and shapes of what a program puts out; JAX leaves out what is an argument as it stands."""
    entry = re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)[1]
    return next(i.arrays for i in instructions(text) if i.computation == entry and i.line.startswith("ROOT"))


# What holds an array that is there already, or passes it on.
_HELD = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "bitcast",
    "opt-barrier",
    "conditional",
    "call",
    "copy-done",
)


def made(text: str) -> dict[tuple[str, tuple[int, ...]], int]:
    """`{(dtype, shape): how many}` of the arrays that a program makes in main memory.

    Left out are those inside fusions, and copies into a TPU's fast memory (space `S(1)`).
    """
    every = instructions(text)
    fused = {name for i in every if i.opcode == "fusion" for name in re.findall(r"calls=%?([\w.-]+)", i.line)}
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for i in every:
        if i.computation in fused or i.opcode in _HELD or i.opcode.endswith("-start"):
            continue
        spaces = [space for _, _, space in _ARRAY.findall(i.line.split(f" {i.opcode}(")[0])]
        for array, space in zip(i.arrays, spaces[-len(i.arrays) :] if i.arrays else (), strict=True):
            if not space:
                found[array] = found.get(array, 0) + 1
    return found
