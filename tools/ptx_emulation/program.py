"""One entry of a PTX module, parsed and decoded: straight-line arithmetic is compiled to Python functions."""

import re
import time
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from tools.ptx_emulation.decode import decode
from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.flow import meeting_points
from tools.ptx_emulation.formats import PTX_TYPES, Array, width
from tools.ptx_emulation.lane_math import NAMESPACE
from tools.ptx_emulation.machine import SPECIAL_REGISTERS
from tools.ptx_emulation.memory import ARRAY_SHIFT, FIRST_VARIABLE, PARAMETER_BASE, SHARED_BASE
from tools.ptx_emulation.parse import Body, Instruction, closing_brace, split, without_comments

# Longer runs of arithmetic become several functions.
_LONGEST_BLOCK = 400


class Parameter(NamedTuple):
    """A parameter of the entry; size and offset in bytes, kind: its PTX type."""

    name: str
    kind: str
    size: int
    offset: int


class Block(NamedTuple):
    """Arithmetic up to `end` as one function, and the registers that it uses."""

    run: Callable[[list[Array]], None]
    end: int
    length: int
    reads: frozenset[int]
    writes: frozenset[int]


_VARIABLE = re.compile(
    r"^\s*(?:\.visible\s+|\.extern\s+|\.weak\s+)?\.(shared|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*([^;]+))?;",
    re.M,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Program:
    """A decoded entry.

    Attributes:
        entry: its name.
        parameters: in order; parameter_bytes: of all of them.
        threads: of a block, if the PTX says so.
        variables: initial contents of variables in global memory.
        dynamic_shared_start: bytes of shared memory before the dynamic part.
        code, labels, branch_targets, register_types: see `Body`.
        special_registers: name -> number.
        blocks: for each instruction the block that starts there, or None.
        names: the namespace of the generated code.
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        started = time.time()
        text = without_comments(ptx)
        header = self._find(text, entry)
        self.entry = header.group(1)
        self._shared_variables: dict[str, int | None] = {}
        self.variables: dict[str, Array] = {}
        self._read_variables(text)
        parameters_end = text.index(")", header.end())
        self.parameters = _parameters(text[header.end() : parameters_end])
        self._parameter_offsets = {parameter.name: parameter.offset for parameter in self.parameters}
        self.parameter_bytes = max((each.offset + each.size for each in self.parameters), default=0)
        opening = text.index("{", parameters_end)
        sizes = _THREADS.search(text, parameters_end, opening)
        self.threads = int(np.prod([int(size or 1) for size in sizes.groups()])) if sizes else None
        body = Body(SPECIAL_REGISTERS)
        body.parse(text, opening + 1, closing_brace(text, opening))
        self.code, self.labels, self.branch_targets = body.code, body.labels, body.branch_targets
        self.register_types, self.special_registers = body.register_types, body.special
        self.names: dict[str, Any] = dict(NAMESPACE)
        self._constants: dict[tuple[str, Any], str] = {}
        for instruction in self.code:
            decode(self, instruction)
        self.blocks = self._compile_blocks()
        self.decode_seconds = time.time() - started

    @staticmethod
    def _find(text: str, entry: str | None) -> re.Match[str]:
        for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
            if entry in (None, match.group(1)):
                return match
        raise EmuError(f"no entry {entry} in the PTX")

    def _read_variables(self, text: str) -> None:
        """Variables of the module, with their initial numbers."""
        static_bytes = 0
        for space, alignment, kind, name, count, initial in (match.groups() for match in _VARIABLE.finditer(text)):
            dtype = PTX_TYPES[kind]
            if space != "shared":
                data = np.zeros(int(count or 1), dtype)
                values = [int(value, 0) for value in re.split(r"[{},\s]+", initial or "") if value]
                data[: len(values)] = values
                self.variables[name] = data
            elif count == "":
                self._shared_variables[name] = None
            else:
                offset = _rounded_up(static_bytes, int(alignment or width(dtype)))
                self._shared_variables[name] = offset
                static_bytes = offset + width(dtype) * int(count or 1)
        self.dynamic_shared_start = _rounded_up(static_bytes, 16)

    def address(self, name: str) -> int:
        """The address of a variable or a parameter."""
        if name in self._shared_variables:
            offset = self._shared_variables[name]
            return SHARED_BASE + (self.dynamic_shared_start if offset is None else offset)
        if name in self._parameter_offsets:
            return PARAMETER_BASE + self._parameter_offsets[name]
        if name in self.variables:
            return (FIRST_VARIABLE + list(self.variables).index(name)) << ARRAY_SHIFT
        raise Unsupported(f"symbol {name}")

    def constant(self, value: Any, dtype: Any) -> str:
        """The name of a number in the generated code; equal ones share it."""
        # By its text: 0.0 and -0.0 are equal.
        key = (repr(value), dtype)
        if key not in self._constants:
            self._constants[key] = self.object(dtype(value))
        return self._constants[key]

    def object(self, value: Any) -> str:
        """The name of anything else."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def _compile_blocks(self) -> list[Block | None]:
        """Blocks end at labels, branches, and whatever is no plain arithmetic."""
        after_branches = {instruction.pc + 1 for instruction in self.code if instruction.kind == "branch"}
        starts = set(self.labels.values()) | after_branches
        source, spans = [], []
        first = 0
        while first < len(self.code):
            end = first
            while end < len(self.code) and _plain(self.code[end]) and end - first < _LONGEST_BLOCK:
                if end in starts and end > first:
                    break
                end += 1
            if end > first:
                lines = [line for instruction in self.code[first:end] for line in instruction.code]
                source.append(_function(f"b{first}", lines))
                spans.append((first, end))
            first = max(end, first + 1)
        exec(compile("\n".join(source), f"<ptx {self.entry}>", "exec"), self.names)
        blocks: list[Block | None] = [None] * (len(self.code) + 1)
        for first, end in spans:
            reads = frozenset(index for instruction in self.code[first:end] for index in instruction.reads)
            writes = frozenset(index for instruction in self.code[first:end] for index in instruction.writes)
            blocks[first] = Block(self.names[f"b{first}"], end, end - first, reads, writes)
        return blocks

    def single(self, instruction: Instruction) -> Callable[..., None]:
        """An arithmetic instruction by itself, as a function of the registers."""
        if instruction.run is None:
            exec(_function("_single", instruction.code), self.names)
            instruction.run = self.names["_single"]
        return instruction.run

    @cached_property
    def meeting_points(self) -> dict[int, int]:
        """See flow.py."""
        return meeting_points(self.code, self.labels, self.branch_targets)


def _plain(instruction: Instruction) -> bool:
    return instruction.kind == "arithmetic" and instruction.guard is None


def _function(name: str, lines: list[str]) -> str:
    return f"def {name}(R):\n    " + "\n    ".join(lines or ["pass"])


def _parameters(text: str) -> list[Parameter]:
    """Each one aligned as declared, or as its type."""
    parameters: list[Parameter] = []
    end = 0
    for declaration in split(text):
        match = _PARAMETER.match(declaration)
        if match is None:
            raise EmuError(f"cannot read {declaration}")
        alignment, kind, name, count = match.groups()
        element = width(PTX_TYPES[kind])
        offset = _rounded_up(end, max(int(alignment or 1), min(element, 8)))
        parameters.append(Parameter(name, kind, element * int(count or 1), offset))
        end = offset + parameters[-1].size
    return parameters


@lru_cache(maxsize=64)
def program(ptx: str, entry: str | None = None) -> Program:
    """The same program for the same text."""
    return Program(ptx, entry)
