"""Scheduled HLO, read from its text: computations, instructions, sizes, loops' trip counts."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# Bytes of an element; what is absent (token, opaque) has none.
_WIDTHS = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its module.
        shape: its result's type, as text.
        opcode: "fusion", "all-gather-start", ...
        operands: names of the instructions it reads.
        literal: the text between its parentheses.
        attributes: the text after them.
        is_root: whether it is what its computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, how: str) -> tuple[str, ...]:
        """The computations it calls as `how`: calls, to_apply, body, condition, ..."""
        for found, names in _CALLED.findall(self.attributes):
            if found == how:
                return tuple(_NAME.findall(names))
        return ()

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression's first match in its attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run.

    Attributes:
        name: unique in its module.
        instructions: by name.
    """

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for one device.

    Attributes:
        computations: by name.
        entry: the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The text of `jax.stages.Compiled.as_text()`.

    Raises:
        ValueError: it holds no entry computation.
    """
    computations, entry = {}, ""
    name, lines = "", []
    for line in text.splitlines():
        if not name and (header := _HEADER.match(line)):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, {i.name: i for i in map(_instruction, lines)})
            name = ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # what a kernel says of itself may hold line breaks
    if not entry:
        raise ValueError("no ENTRY computation in this HLO text")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None
    root, name, text = match.groups()
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    literal = rest[: end - 1]
    return Instruction(
        name, shape, opcode, tuple(_NAME.findall(literal)), literal, rest[end:], bool(root)
    )


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def num_bytes(shape: str) -> float:
    """Of an array or of all arrays of a tuple, by the text of its type."""
    return sum(
        math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size) * _width(dtype)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _width(dtype: str) -> float:
    if dtype in _WIDTHS:
        return _WIDTHS[dtype]
    bits = re.match(r"(?:bf|[fsuc])(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0.0


def elements(shape: str) -> list[str]:
    """The types of a tuple's elements, or the type itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for match in re.finditer(r"[(){}\[\],]", shape):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        if (match[0] == "," and depth == 1) or depth == 0:
            parts.append(shape[start : match.start()].strip())
            start = match.end()
        if depth == 0:
            break
    return [part for part in parts if part]


def trip_count(module: Module, scope: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs; None where the text does not say.

    Loops of `lax.scan` and `fori_loop` count up by one to a constant.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known is not None:
        return int(known)
    (condition,) = loop.called("condition")
    bound = _bound(module, module.computations[condition])
    if bound is None:
        return None
    index, limit = bound
    return limit - (_initial(scope, loop, index) or 0)


def _bound(module: Module, condition: Computation) -> tuple[int, int] | None:
    """The loop variable's place in the loop's state, and the constant it stays below."""
    constants = {
        name: int(i.literal)
        for name, i in condition.instructions.items()
        if i.opcode == "constant" and i.literal.lstrip("-").isdigit()
    }
    root = condition.root
    if root.opcode == "fusion":
        (inner,) = root.called("calls")
        compare = module.computations[inner].root
    else:
        compare = root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    limits = [constants[name] for name in root.operands if name in constants]
    places = [
        int(condition.instructions[name].attribute(r"index=(\d+)") or 0)
        for name in root.operands
        if name not in constants
    ]
    return (places[0], limits[0]) if len(limits) == len(places) == 1 else None


def _initial(scope: Computation, loop: Instruction, index: int) -> int | None:
    state = scope.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    value = scope.instructions.get(state.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = scope.instructions.get(value.operands[0])
    if value is None or value.opcode != "constant" or not value.literal.isdigit():
        return None
    return int(value.literal)


def fused(module: Module, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Every instruction inside a fusion, and the computation it stands in."""
    for name in fusion.called("calls"):
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "fusion":
                yield from fused(module, instruction)
            else:
                yield computation, instruction
