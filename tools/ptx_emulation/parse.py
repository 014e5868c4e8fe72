"""PTX text -> instructions with their operands resolved: registers to numbers, labels to their scope."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.formats import BOOL, PTX_TYPES, UNSIGNED, width


@dataclass(frozen=True)
class Register:
    """A register, by its number in the program."""

    index: int


@dataclass(frozen=True)
class Not:
    """A negated predicate."""

    operand: "Operand"


@dataclass(frozen=True)
class Integer:
    """An integer constant."""

    value: int


@dataclass(frozen=True)
class FloatBits:
    """A floating-point constant, 0f... or 0d...; size: 4 or 8 bytes."""

    bits: int
    size: int


@dataclass(frozen=True)
class Decimal:
    """A floating-point constant with a decimal point."""

    value: float


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Memory:
    """[base + offset, more...]; TMA names its coordinates as more."""

    base: "Operand"
    offset: int
    more: "tuple[Operand, ...]" = ()


@dataclass(frozen=True)
class Pair:
    """a|b: two destinations."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Discard:
    """_: a destination that is not wanted."""


@dataclass(frozen=True)
class Symbol:
    """A variable, a parameter or a label."""

    name: str


Operand: TypeAlias = Register | Not | Integer | FloatBits | Decimal | Vector | Memory | Pair | Discard | Symbol


class Instruction:
    """One instruction.

    Attributes:
        op: the name with all its suffixes; parts: the same, split at the dots.
        guard: the register that predicates it, or None; negated: whether it runs where the guard is false.
        text, line: as in the PTX.
        pc: its place in the program.
        kind: "arithmetic" (`code` is Python over registers), "effect" (`run` is called) or "branch".
        branch: "bra", "brx" or "ret"; target: its label or its list of labels.
        reads, writes: numbers of registers.
    """

    __slots__ = (
        *("op", "parts", "operands", "guard", "negated", "text", "line", "pc"),
        *("kind", "code", "run", "branch", "target", "reads", "writes"),
    )

    def __init__(self, text: str, line: int) -> None:
        self.text, self.line = text, line
        self.op = ""
        self.parts: list[str] = []
        self.operands: tuple[Operand, ...] = ()
        self.guard: int | None = None
        self.negated = False
        self.pc = -1
        self.kind = "arithmetic"
        self.code: list[str] = []
        self.run: Callable[..., None] | None = None
        self.branch = self.target = ""
        self.reads: tuple[int, ...] = ()
        self.writes: tuple[int, ...] = ()

    def where(self) -> str:
        """For messages."""
        return f"ptx line {self.line}: {self.text[:140]}"


def split(text: str) -> list[str]:
    """What commas separate outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def without_comments(ptx: str) -> str:
    """The same lines, so that line numbers stay."""
    ptx = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group(0).count("\n"), ptx, flags=re.S)
    return re.sub(r"//[^\n]*", "", ptx)


def closing_brace(text: str, opening: int) -> int:
    """Where the brace that opens here is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise EmuError("a brace of the PTX is not closed")


_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LABELS = re.compile(r"(?:^|[;{}])\s*([A-Za-z_$][\w$]*)\s*:(?!:)", re.M)
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+(.*)")
_WHOLE_LINES = (".loc", ".file", ".pragma")


class _Scope:
    """Names declared between two braces."""

    def __init__(self) -> None:
        self.registers: dict[str, int] = {}
        self.labels: dict[str, str] = {}


class Body:
    """Parses a function's body.

    Attributes:
        code: the instructions.
        labels: name -> place in the code.
        branch_targets: the label of a .branchtargets directive -> labels.
        register_types: the numpy type of each register.
    """

    def __init__(self, special_registers: dict[str, Any]) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.branch_targets: dict[str, list[str]] = {}
        self.register_types: list[Any] = []
        self.special = {name: self._new_register(dtype) for name, dtype in special_registers.items()}
        self._scopes = [_Scope()]
        self._scopes_seen = 0
        self._last_label = ""

    def parse(self, text: str, start: int, end: int) -> None:
        """Reads text[start:end], which lies between the function's braces."""
        self._text, self._at, self._end = text, start, end
        self._line = text.count("\n", 0, start) + 1
        while self._skip_space():
            char = text[self._at]
            if char == "{":
                self._open_scope()
            elif char == "}":
                self._scopes.pop()
                self._at += 1
            elif not self._label() and not self._whole_line():
                self._statement()

    def _new_register(self, dtype: Any) -> int:
        self.register_types.append(dtype)
        return len(self.register_types) - 1

    def _skip_space(self) -> bool:
        """Whether text is left."""
        start = self._at
        while self._at < self._end and self._text[self._at] in " \t\r\n;":
            self._at += 1
        self._line += self._text.count("\n", start, self._at)
        return self._at < self._end

    def _move_to(self, at: int) -> None:
        self._line += self._text.count("\n", self._at, at)
        self._at = at

    def _open_scope(self) -> None:
        """Labels of the scope must be known before they are used."""
        scope = _Scope()
        self._scopes.append(scope)
        self._scopes_seen += 1
        inside = self._text[self._at + 1 : closing_brace(self._text, self._at) + 1]
        for match in _LABELS.finditer(inside):
            scope.labels[match.group(1)] = f"{match.group(1)}@{self._scopes_seen}"
        self._at += 1

    def _scoped_label(self, name: str) -> str | None:
        for scope in reversed(self._scopes):
            if name in scope.labels:
                return scope.labels[name]
        return None

    def _label(self) -> bool:
        """Whether a label was read."""
        match = _LABEL.match(self._text, self._at)
        if match is None:
            return False
        self._last_label = self._scoped_label(match.group(1)) or match.group(1)
        self.labels[self._last_label] = len(self.code)
        self._move_to(match.end())
        return True

    def _whole_line(self) -> bool:
        """Directives that end with their line."""
        if not self._text.startswith(_WHOLE_LINES, self._at):
            return False
        end = self._text.find("\n", self._at)
        self._at = end if end >= 0 else self._end
        return True

    def _statement(self) -> None:
        """A directive or an instruction, up to its semicolon."""
        end = self._text.index(";", self._at)
        statement = " ".join(self._text[self._at : end].split())
        line = self._line
        self._move_to(end + 1)
        if statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith(".branchtargets"):
            names = statement.removeprefix(".branchtargets").split(",")
            self.branch_targets[self._last_label] = [name.strip() for name in names]
        elif statement.startswith(".local"):
            raise Unsupported(f"local memory: {statement}")
        elif not statement.startswith("."):
            self._instruction(statement, line)

    def _declare(self, statement: str) -> None:
        """.reg, with single names or with a count."""
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if match is None:
            raise EmuError(f"cannot read {statement}")
        dtype = PTX_TYPES[match.group(1)]
        if dtype is not BOOL:
            dtype = UNSIGNED[width(dtype)]
        for name in match.group(2).split(","):
            many = re.match(r"(.+)<(\d+)>$", name.strip())
            names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name.strip()]
            for each in names:
                self._scopes[-1].registers[each] = self._new_register(dtype)

    def _instruction(self, statement: str, line: int) -> None:
        """Guard, name and operands."""
        instruction = Instruction(statement, line)
        guard = _GUARD.match(statement)
        if guard:
            instruction.negated = bool(guard.group(1))
            instruction.guard = self._register(guard.group(2))
            if instruction.guard is None:
                raise EmuError(f"unknown guard in {statement}")
            statement = guard.group(3)
        instruction.op, _, rest = statement.partition(" ")
        instruction.parts = instruction.op.split(".")
        instruction.operands = tuple(self._operand(operand) for operand in split(rest))
        instruction.pc = len(self.code)
        self.code.append(instruction)

    def _register(self, name: str) -> int | None:
        for scope in reversed(self._scopes):
            if name in scope.registers:
                return scope.registers[name]
        return None

    def _operand(self, text: str) -> Operand:
        """Everything that may stand between commas."""
        text = text.strip()
        if text == "_":
            return Discard()
        if text.startswith("{"):
            return Vector(tuple(self._operand(item) for item in split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text)
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        register = self._register(text)
        if register is None:
            register = self.special.get(text)
        return self._constant(text) if register is None else Register(register)

    def _memory(self, text: str) -> Memory:
        base, *more = split(text[1:-1])
        offset = 0
        match = re.match(r"(.+?)\s*\+\s*(-?\w+)$", base)
        if match and self._register(base) is None:
            base, offset = match.group(1).strip(), int(match.group(2), 0)
        return Memory(self._operand(base), offset, tuple(self._operand(item) for item in more))

    def _constant(self, text: str) -> Operand:
        """A number, or else a name."""
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return FloatBits(int(text[2:], 16), 4)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return FloatBits(int(text[2:], 16), 8)
        if re.match(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$", text):
            text = text.rstrip("U")
            return Integer(int(text, 8 if re.match(r"-?0\d+$", text) else 0))
        if re.match(r"-?\d+\.\d*(e[+-]?\d+)?$", text):
            return Decimal(float(text))
        if text == "WARP_SZ":
            return Integer(32)
        return Symbol(self._scoped_label(text) or text)
