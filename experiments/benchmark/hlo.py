"""Reads what a compiled program moves and multiplies from its optimised HLO text.

XLA's own `cost_analysis` adds accesses to a TPU's vector memory to those to HBM and counts the body of a loop once.
Here a buffer counts if it lies in HBM: its layout names no other memory space, such as S(1), the vector memory. Each
instruction reads its operands once and writes its results once, as tiled and padded as they lie in memory:

* A fusion is one instruction: nothing inside it touches memory.
* Of an operand that is only sliced, the slices count; of a buffer that is updated in place, the update counts.
* The body of a loop counts as often as it runs, and the dearest branch of a conditional once.
* An asynchronous copy between memories counts at the end that is in HBM.

Assumptions: a convolution reads each operand once, however often its window passes over it, and no cache keeps a
buffer between two instructions. Arithmetic is that of convolutions and matrix products, without products with padding.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

HBM = 0  # the memory space of a layout that names none; on a CPU, all of its memory

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)((?::[^{}]*)?)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "domain", "add-dependency"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Array(NamedTuple):
    """An array as it lies in memory."""

    sides: tuple[int, ...]
    nbytes: int
    space: int

    @property
    def in_hbm(self) -> int:
        return self.nbytes if self.space == HBM else 0


class Collective(NamedTuple):
    """One exchange between chips."""

    kind: str  # one of COLLECTIVES
    nbytes: int  # of the result on one chip; of the operand for a reduce-scatter
    group: int  # chips that take part
    times: int  # per step


@dataclass
class Work:
    """The work of one chip in one run of a program."""

    hbm_bytes: float = 0.0
    flops: float = 0.0
    cycles: float = 0.0  # as XLA's cost model for a TPU estimates its own instructions, vector unit included
    collectives: list[Collective] = field(default_factory=list)
    by_operation: dict[str, float] = field(default_factory=dict)  # HBM bytes by the name that JAX gave

    def add(self, other: "Work", times: int = 1) -> None:
        self.hbm_bytes += times * other.hbm_bytes
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.collectives += [c._replace(times=c.times * times) for c in other.collectives]
        for name, nbytes in other.by_operation.items():
            self.by_operation[name] = self.by_operation.get(name, 0.0) + times * nbytes


@dataclass
class Instruction:
    name: str
    opcode: str
    arrays: list[Array]  # the result, or the parts of a tuple
    operands: list[str]
    attributes: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def in_hbm(self) -> int:
        return sum(array.in_hbm for array in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """Returns the computations that these attributes name."""
        found = []
        for key in keys:
            if match := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes):
                found += [name.strip().lstrip("%") for name in (match[1] or match[2]).split(",")]
        return found


class Computation(dict[str, Instruction]):
    """The instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.is_root)

    def parameters(self) -> list[Instruction]:
        found = [(int(i.attributes.split(")")[0]), i) for i in self.values() if i.opcode == "parameter"]
        return [i for _, i in sorted(found, key=lambda pair: pair[0])]

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self.values() if name in i.operands]


def work(text: str) -> Work:
    """Returns what a compiled program (`compiled.as_text()`) does. Raises ValueError for a loop of unknown length."""
    program = _Program(text)
    return program.work(program.entry)


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", Computation()
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = Computation()
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                instruction = _instruction(match)
                current[instruction.name] = instruction

    def work(self, name: str) -> Work:
        computation, total = self.computations[name], Work()
        for i in computation.values():
            if i.opcode == "while":
                (body,) = i.called("body")
                total.add(self.work(body), self.trips(i))
            elif i.opcode == "conditional":
                branches = i.called("branch_computations") or i.called("true_computation", "false_computation")
                total.add(max((self.work(branch) for branch in branches), key=lambda work: work.hbm_bytes))
            elif i.opcode in ("call", "async-start") and not self.is_plain(i):
                total.add(self.work(i.called("to_apply", "calls")[0]))
            else:
                total.add(self.of_instruction(computation, i))
        return total

    def is_plain(self, i: Instruction) -> bool:
        """Tells whether an asynchronous instruction only copies or slices: such a one counts as its operands say."""
        called = i.called("calls", "to_apply")
        return i.opcode == "async-start" and all(
            inner.opcode in _SLICES | {"copy", "parameter", "constant", "bitcast", "dynamic-update-slice"}
            for name in called
            for inner in self.computations[name].values()
        )

    def of_instruction(self, computation: Computation, i: Instruction) -> Work:
        nbytes = self.read(computation, i) + self.written(computation, i)
        flops = self.flops(computation, i)
        exchanged = [self.collective(computation, i)] if self.is_collective(i) else []
        label = re.search(r'op_name="([^"]*)"', i.attributes)
        key = f"{i.opcode} {label[1] if label else i.name}"
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        named = {key: nbytes} if nbytes else {}
        return Work(nbytes, flops, float(cycles[1]) if cycles else 0.0, exchanged, named)

    def read(self, computation: Computation, i: Instruction) -> float:
        """Returns the bytes of the operands in HBM that an instruction reads."""
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or "AllocateBuffer" in i.attributes:
            return 0.0
        total = 0.0
        for place, operand in enumerate(i.operands):
            array = computation.get(operand)
            if array is None or operand in i.operands[:place] or not array.in_hbm:
                continue
            if i.opcode == "fusion":
                (called,) = i.called("calls")
                total += min(array.in_hbm, self.used(called, place))
            elif i.opcode in _SLICES:
                total += min(array.in_hbm, i.nbytes) if place == 0 else array.in_hbm
            elif i.opcode == "dynamic-update-slice":
                total += 0 if place == 0 else array.in_hbm
            elif i.opcode.endswith("-start"):
                done = [user.nbytes for user in computation.users(i.name) if user.opcode.endswith("-done")]
                total += min(array.in_hbm, *done) if done and not self.is_collective(i) else array.in_hbm
            else:
                total += array.in_hbm
        return total

    def written(self, computation: Computation, i: Instruction) -> float:
        """Returns the bytes of the results in HBM that an instruction writes."""
        if i.opcode in _FREE or i.opcode.endswith(("-start", "-update")) or "AllocateBuffer" in i.attributes:
            return 0.0  # what starts is written when it is done
        if i.opcode == "dynamic-update-slice":
            return min(i.in_hbm, computation[i.operands[1]].nbytes) if i.operands[1] in computation else i.in_hbm
        if i.opcode != "fusion":
            return i.in_hbm
        inner = self.computations[i.called("calls")[0]]
        roots = [inner.root]
        if inner.root.opcode == "tuple":
            roots = [inner[name] for name in inner.root.operands]
        total = 0.0
        for array, root in zip(i.arrays, roots, strict=False):
            total += min(array.in_hbm, self.updated(inner, root, array.nbytes))
        return total

    def updated(self, inner: Computation, root: Instruction, whole: int) -> int:
        """Returns the bytes that a fusion writes to one result: of an update in place, the update."""
        while root.opcode == "bitcast" and root.operands[0] in inner:
            root = inner[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return inner[root.operands[1]].nbytes
        if root.opcode == "fusion":
            nested = self.computations[root.called("calls")[0]]
            return self.updated(nested, nested.root, whole)
        return whole

    def used(self, called: str, place: int) -> float:
        """Returns the bytes that a fusion reads of one operand, at most: slices, or nothing if it is only updated."""
        inner = self.computations[called]
        return self.used_of(inner, inner.parameters()[place].name)

    def used_of(self, inner: Computation, name: str) -> float:
        total = 0.0
        for user in inner.users(name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += user.nbytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode == "bitcast" and not user.is_root:
                total += self.used_of(inner, user.name)
            elif user.opcode == "fusion":
                total += self.used(user.called("calls")[0], user.operands.index(name))
            else:
                return math.inf
        return total

    def trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: as XLA says, or as its condition compares a counter that starts at 0."""
        if match := re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes):
            return int(match[1])
        condition = self.computations[loop.called("condition")[0]]
        limits = [c for c in self.constants(condition) if c > 0]
        if len(limits) != 1:
            raise ValueError(f"the loop {loop.name} does not say how often it runs")
        return limits[0]

    def constants(self, computation: Computation) -> Iterator[int]:
        for i in computation.values():
            if i.opcode == "constant" and (match := re.match(r"(-?\d+)\)", i.attributes)):
                yield int(match[1])
            elif i.opcode == "fusion":
                yield from self.constants(self.computations[i.called("calls")[0]])

    def is_collective(self, i: Instruction) -> bool:
        return i.opcode.removesuffix("-start") in COLLECTIVES

    def collective(self, computation: Computation, i: Instruction) -> Collective:
        kind = i.opcode.removesuffix("-start")
        operands = sum(computation[name].nbytes for name in i.operands if name in computation)
        results = i.nbytes
        if i.opcode.endswith("-start"):
            results = sum(user.nbytes for user in computation.users(i.name) if user.opcode.endswith("-done"))
        nbytes = operands if kind == "reduce-scatter" else results
        return Collective(kind, nbytes, 2 if kind == "collective-permute" else _group(i.attributes), 1)

    def flops(self, computation: Computation, i: Instruction) -> float:
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")[0]]
            return sum(self.flops(inner, each) for each in inner.values())
        if i.opcode not in ("convolution", "dot"):
            return 0.0
        left, right = (computation[name].arrays[0].sides for name in i.operands[:2])
        result = i.arrays[0].sides
        if i.opcode == "dot":
            match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
            contracted = [left[int(axis)] for axis in match[1].split(",")] if match and match[1] else []
            return 2.0 * math.prod(result) * math.prod(contracted)
        return _convolution_flops(left, right, result, i.attributes)


def _instruction(match: re.Match[str]) -> Instruction:
    is_root, name, shape, opcode, rest = match.groups()
    end = _closing(rest)
    operands = [part.split()[-1].lstrip("%") for part in _split(rest[:end]) if "%" in part]
    attributes = rest[end + 1 :] if opcode not in ("parameter", "constant") else rest
    return Instruction(name, opcode, list(_arrays(shape)), operands, attributes, bool(is_root))


def _closing(text: str) -> int:
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth < 0:
            return place
    return len(text)


def _split(text: str) -> list[str]:
    """Splits operands at the commas between them, without their comments."""
    parts, depth, start = [], 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for place, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _arrays(shape: str) -> Iterator[Array]:
    for kind, sides, order, tiling in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])
        numbers = tuple(int(side) for side in sides.split(",") if side)
        space = re.search(r"S\((\d+)\)", tiling)
        yield Array(numbers, math.ceil(_padded(numbers, order, tiling) * bits / 8), int(space[1]) if space else HBM)


def _padded(sides: tuple[int, ...], order: str, tiling: str) -> int:
    """Returns the elements that an array takes: its minor axes are padded to whole tiles."""
    tile = re.search(r"T\(([\d,]*)\)", tiling)
    minor_first = [int(axis) for axis in order.split(",") if axis] or list(range(len(sides)))[::-1]
    lengths = [sides[axis] for axis in minor_first]
    for place, length in enumerate(reversed([int(n) for n in tile[1].split(",")] if tile and lengths else [])):
        if place < len(lengths):
            lengths[place] = -(-lengths[place] // length) * length
    return math.prod(lengths)


def _group(attributes: str) -> int:
    """Returns the number of chips in a group of a collective, in any of the forms in which XLA writes groups."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sides = dict(re.findall(r"'?(\w+)'?=(\d+)", match[1]))
        return math.prod(int(sides[name]) for name in re.findall(r"'?(\w+)'?(?:,|$)", match[2].replace(" ", "")))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    return 1


def _convolution_flops(image: Sequence[int], kernel: Sequence[int], result: Sequence[int], attributes: str) -> float:
    """Counts the products of values: those with padding and with the zeros of a dilation are left out."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    options = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    total = 2.0 * kernel[labels[2].index("i")] * result[labels[3].index("b")] * result[labels[3].index("f")]
    for axis in range(len(kernel) - 2):
        sides = [s[n.index(str(axis))] for s, n in zip((image, kernel, result), labels.groups(), strict=True)]

        def option(name: str, default: str, axis: int = axis) -> str:
            return options[name].split("x")[axis] if name in options else default

        before = int(option("pad", "0_0").rsplit("_", 1)[0])
        dilation = int(option("lhs_dilate", "1"))
        place = np.arange(sides[2])[:, None] * int(option("stride", "1"))
        place = place + np.arange(sides[1]) * int(option("rhs_dilate", "1")) - before
        inside = (place >= 0) & (place <= (sides[0] - 1) * dilation) & (place % dilation == 0)
        total *= int(inside.sum())
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return total / (int(groups[1]) if groups else 1)
