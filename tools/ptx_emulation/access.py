"""Operands of an instruction that is executed by a function: how it reads and writes a warp's registers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.expressions import Expressions
from tools.ptx_emulation.formats import BOOL, I64, PTX_TYPES, SIGNED, SIGNED_TYPES, UNSIGNED, Array, width
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask
from tools.ptx_emulation.parse import Discard, Integer, Memory, Not, Operand, Register, Symbol, Vector

Reader: TypeAlias = Callable[[Warp], Array]
Writer: TypeAlias = Callable[[Warp, Array, Mask], None]
Effect: TypeAlias = Callable[[Warp, Mask], None]


class Access:
    """Makes readers and writers of the operands of one instruction, and notes which registers they use."""

    def __init__(self, expressions: Expressions) -> None:
        self._expressions = expressions
        self.program = expressions.program
        self.instruction = expressions.instruction
        self.parts = expressions.parts
        self.operands = expressions.operands
        self.reads: list[int] = []
        self.writes: list[int] = []

    def unsupported(self) -> Unsupported:
        """To be raised for a form of the instruction that is not emulated."""
        return Unsupported(self.instruction.op)

    def reader(self, operand: Operand, dtype: Any) -> Reader:
        """Gives 32 lanes of this type."""
        if isinstance(operand, Register):
            return self._register_reader(operand.index, dtype)
        if isinstance(operand, Not):
            inner = self.reader(operand.operand, dtype)
            return lambda warp: ~inner(warp)
        constant = np.full(32, self.program.names[self._expressions.value(operand, dtype)], dtype)
        return lambda warp: constant

    def _register_reader(self, index: int, dtype: Any) -> Reader:
        """Narrower numbers are the low bits of a register."""
        self.reads.append(index)
        kept = self.program.register_types[index]
        if kept is dtype:
            return lambda warp: warp.registers[index]
        if BOOL in (kept, dtype):
            raise Unsupported("predicate used as data")
        if width(kept) == width(dtype):
            return lambda warp: warp.registers[index].view(dtype)
        unsigned = UNSIGNED[width(dtype)]
        return lambda warp: warp.registers[index].astype(unsigned).view(dtype)

    def writer(self, operand: Operand, dtype: Any) -> Writer:
        """Takes lanes of this type and which of them to store."""
        if isinstance(operand, Discard):
            return lambda warp, value, mask: None
        if not isinstance(operand, Register):
            raise Unsupported(f"destination {operand}")
        self.writes.append(operand.index)
        index, kept = operand.index, self.program.register_types[operand.index]
        same_width = width(kept) == width(dtype)
        resized = SIGNED[width(kept)] if dtype in SIGNED_TYPES else UNSIGNED[width(kept)]

        def write(warp: Warp, value: Array, mask: Mask) -> None:
            if dtype is not kept:
                value = value.view(kept) if same_width else value.view(dtype).astype(resized).view(kept)
            warp.registers[index] = value if mask is None else np.where(mask, value, warp.registers[index])

        return write

    def addresses(self, operand: Operand) -> Reader:
        """Gives 32 addresses as signed integers."""
        if not isinstance(operand, Memory):
            raise EmuError(f"not an address: {operand} ({self.instruction.where()})")
        base, offset = operand.base, operand.offset
        if isinstance(base, Register):
            dtype = self.program.register_types[base.index]
            read = self.reader(base, dtype)
            if offset and width(dtype) == 4:
                # Addresses of 32 bits wrap: compilers add what they know to a register that holds less than nothing.
                return lambda warp: (read(warp).astype(I64) + offset) & 0xFFFFFFFF
            if offset:
                return lambda warp: read(warp).astype(I64) + offset
            return lambda warp: read(warp).astype(I64)
        if isinstance(base, Symbol):
            constant = np.full(32, self.program.address(base.name) + offset, I64)
        elif isinstance(base, Integer):
            constant = np.full(32, base.value + offset, I64)
        else:
            raise Unsupported(f"address {base}")
        return lambda warp: constant

    def space(self) -> str | None:
        """The address space that the instruction names; None: generic."""
        for part in self.parts:
            name = part.split("::")[0]
            if name in ("global", "shared", "param", "const", "local"):
                return name
        return None

    def type(self) -> Any:
        """The numpy type that the last suffix names."""
        return PTX_TYPES[self.parts[-1]]

    def one_of(self, names: Sequence[str]) -> str:
        """The first of these names that is a suffix."""
        for name in names:
            if name in self.parts:
                return name
        raise self.unsupported()

    def number(self, operand: Operand) -> int:
        """An operand that must be a constant."""
        if not isinstance(operand, Integer):
            raise self.unsupported()
        return operand.value


def items(operand: Operand) -> tuple[Operand, ...]:
    """A vector's operands; any other operand by itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)
