"""Operands of an arithmetic instruction as Python expressions over R, the list of a warp's registers."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptx_emulation import parse
from tools.ptx_emulation.errors import Unsupported
from tools.ptx_emulation.formats import (
    BOOL,
    FLOAT_TYPES,
    PTX_TYPES,
    SIGNED,
    SIGNED_TYPES,
    TYPE_NAMES,
    U32,
    U64,
    UNSIGNED,
    width,
)

if TYPE_CHECKING:
    from tools.ptx_emulation.program import Program


class Expressions:
    """Builds the Python code of one instruction.

    Attributes:
        code: statements so far.
        reads, writes: numbers of the registers that they use.
    """

    def __init__(self, program: "Program", instruction: parse.Instruction) -> None:
        self.program = program
        self.instruction = instruction
        self.parts = instruction.parts
        self.operands = instruction.operands
        self.code: list[str] = []
        self.reads: list[int] = []
        self.writes: list[int] = []

    def type(self, place: int = -1) -> Any:
        """The numpy type that a suffix of the instruction names."""
        name = self.parts[place]
        if name not in PTX_TYPES:
            raise Unsupported(f"type .{name}")
        return PTX_TYPES[name]

    def unsupported(self) -> Unsupported:
        """To be raised for a form of the instruction that is not emulated."""
        return Unsupported(self.instruction.op)

    def value(self, operand: parse.Operand, dtype: Any) -> str:
        """An operand as a number of this type: 32 lanes, or one number if it is constant."""
        if isinstance(operand, parse.Register):
            return self._register(operand.index, dtype)
        if isinstance(operand, parse.Not):
            return f"(~{self.value(operand.operand, BOOL)})"
        if isinstance(operand, parse.Integer):
            return self._integer(operand.value, dtype)
        if isinstance(operand, parse.FloatBits):
            return self._float_bits(operand, dtype)
        if isinstance(operand, parse.Decimal):
            return self.program.object(dtype(operand.value))
        if isinstance(operand, parse.Symbol):
            return self._integer(self.program.address(operand.name), dtype)
        raise Unsupported(f"operand {operand}")

    def _register(self, index: int, dtype: Any) -> str:
        """A register, viewed or truncated or extended without a sign."""
        self.reads.append(index)
        kept = self.program.register_types[index]
        name = f"R[{index}]"
        if kept is dtype:
            return name
        if BOOL in (kept, dtype):
            raise Unsupported("predicate used as data")
        unsigned = UNSIGNED[width(dtype)]
        if width(kept) != width(dtype):
            name += f".astype({TYPE_NAMES[unsigned]})"
            if unsigned is dtype:
                return name
        return f"{name}.view({TYPE_NAMES[dtype]})"

    def _integer(self, value: int, dtype: Any) -> str:
        """An integer constant; for a float type, its bits."""
        if dtype is BOOL:
            return self.program.constant(bool(value), BOOL)
        bits = 8 * width(dtype)
        value &= (1 << bits) - 1
        if dtype in FLOAT_TYPES:
            return self.program.constant(float(np.array([value], UNSIGNED[bits // 8]).view(dtype)[0]), dtype)
        if dtype in SIGNED_TYPES and value >> (bits - 1):
            value -= 1 << bits
        return self.program.constant(value, dtype)

    def _float_bits(self, operand: parse.FloatBits, dtype: Any) -> str:
        bits = np.array([operand.bits], U32 if operand.size == 4 else U64)
        if dtype in FLOAT_TYPES:
            return self.program.object(bits.view(f"f{operand.size}").astype(dtype)[0])
        return self.program.object(bits.view(dtype)[0] if operand.size == width(dtype) else bits.astype(dtype)[0])

    def lanes(self, operand: parse.Operand, dtype: Any) -> str:
        """The same as 32 lanes in any case."""
        expression = self.value(operand, dtype)
        if isinstance(operand, (parse.Register, parse.Not)):
            return expression
        return self.program.object(np.full(32, self.program.names[expression]))

    def assign(self, target: parse.Operand, expression: str, dtype: Any) -> None:
        """Writes 32 lanes of this type to a register; wider registers take its sign, narrower ones its low bits."""
        if isinstance(target, parse.Discard):
            return
        if not isinstance(target, parse.Register):
            raise Unsupported(f"destination {target}")
        kept = self.program.register_types[target.index]
        self.writes.append(target.index)
        if kept is not dtype:
            expression = _converted(expression, dtype, kept)
        self.code.append(f"R[{target.index}]={expression}")


def _converted(expression: str, dtype: Any, kept: Any) -> str:
    """Bits of one type as what a register keeps."""
    if BOOL in (kept, dtype):
        raise Unsupported("predicate used as data")
    if width(kept) == width(dtype):
        return f"({expression}).view({TYPE_NAMES[kept]})"
    resized = SIGNED[width(kept)] if dtype in SIGNED_TYPES else kept
    as_integer = f".view({TYPE_NAMES[UNSIGNED[width(dtype)]]})" if dtype in FLOAT_TYPES else ""
    as_kept = "" if resized is kept else f".view({TYPE_NAMES[kept]})"
    return f"({expression}){as_integer}.astype({TYPE_NAMES[resized]}){as_kept}"
