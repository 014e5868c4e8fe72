"""Turns each instruction into Python code over registers, a function, or a branch."""

from typing import TYPE_CHECKING

from tools.ptx_emulation import (
    arithmetic,
    barriers,
    conversions,
    copies,
    fragments,
    memory_instructions,
    warp_instructions,
    wgmma,
)
from tools.ptx_emulation.access import Access, Effect
from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.expressions import Expressions
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask
from tools.ptx_emulation.parse import Instruction, Operand, Register, Symbol

if TYPE_CHECKING:
    from tools.ptx_emulation.program import Program

_OPERATIONS = {**arithmetic.OPERATIONS, **conversions.OPERATIONS}
_EFFECTS = {
    **memory_instructions.EFFECTS,
    **warp_instructions.EFFECTS,
    **copies.EFFECTS,
    **barriers.EFFECTS,
    **fragments.EFFECTS,
    **wgmma.EFFECTS,
}
_BRANCHES = {"bra": "bra", "brx": "brx", "ret": "ret", "exit": "ret"}


def decode(program: "Program", instruction: Instruction) -> None:
    """Fills in what an instruction does; what is not emulated raises an error when it is reached."""
    try:
        _decode(program, instruction)
    except Unsupported as error:
        message = f"{error} ({instruction.where()})"
        instruction.kind, instruction.run = "effect", _raising(message)
        instruction.reads = instruction.writes = ()


def _raising(message: str) -> Effect:
    def run(warp: Warp, mask: Mask) -> None:
        raise Unsupported(message)

    return run


def _decode(program: "Program", instruction: Instruction) -> None:
    """Looks the name up in the tables of all topics."""
    name = instruction.parts[0]
    expressions = Expressions(program, instruction)
    if name in _BRANCHES:
        _branch(instruction, _BRANCHES[name])
    elif name in _OPERATIONS:
        instruction.kind = "arithmetic"
        _OPERATIONS[name](expressions)
        instruction.code = expressions.code
        instruction.reads = tuple(dict.fromkeys(expressions.reads))
        instruction.writes = tuple(dict.fromkeys(expressions.writes))
    elif name in _EFFECTS:
        access = Access(expressions)
        instruction.kind, instruction.run = "effect", _EFFECTS[name](access)
        instruction.reads, instruction.writes = tuple(access.reads), tuple(access.writes)
    else:
        raise Unsupported(f"instruction {instruction.op}")


def _branch(instruction: Instruction, branch: str) -> None:
    """Where a branch may lead."""
    instruction.kind, instruction.branch = "branch", branch
    if branch == "bra":
        instruction.target = _name(instruction, instruction.operands[0])
    elif branch == "brx":
        index, targets = instruction.operands
        if not isinstance(index, Register):
            raise Unsupported(instruction.op)
        instruction.target, instruction.reads = _name(instruction, targets), (index.index,)


def _name(instruction: Instruction, operand: Operand) -> str:
    if not isinstance(operand, Symbol):
        raise EmuError(f"not a label: {operand} ({instruction.where()})")
    return operand.name
