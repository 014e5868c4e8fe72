"""MessagePack, as far as the metadata of a code object uses it (github.com/msgpack/msgpack/blob/master/spec.md)."""

from typing import Any


def decode(text: bytes) -> Any:
    """The value that `text` begins with."""
    return _Reader(text).value()


class _Reader:
    def __init__(self, text: bytes) -> None:
        self.text, self.place = text, 0

    def take(self, count: int) -> bytes:
        self.place += count
        if self.place > len(self.text):
            raise ValueError("MessagePack: the input ends too soon")
        return self.text[self.place - count : self.place]

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "big", signed=signed)

    def value(self) -> Any:
        kind = self.number(1)
        if kind < 0x80:
            return kind
        if kind < 0x90:
            return self.table(kind & 15)
        if kind < 0xA0:
            return self.row(kind & 15)
        if kind < 0xC0:
            return self.take(kind & 31).decode()
        if kind >= 0xE0:
            return kind - 256
        return self.long(kind)

    def long(self, kind: int) -> Any:
        """Values whose size stands behind their kind."""
        if kind == 0xC0:
            return None
        if kind in (0xC2, 0xC3):
            return kind == 0xC3
        if 0xC4 <= kind <= 0xC6:
            return self.take(self.number(1 << (kind - 0xC4)))
        if 0xCC <= kind <= 0xCF:
            return self.number(1 << (kind - 0xCC))
        if 0xD0 <= kind <= 0xD3:
            return self.number(1 << (kind - 0xD0), signed=True)
        if 0xD9 <= kind <= 0xDB:
            return self.take(self.number(1 << (kind - 0xD9))).decode()
        if kind in (0xDC, 0xDD):
            return self.row(self.number(2 << (kind - 0xDC)))
        if kind in (0xDE, 0xDF):
            return self.table(self.number(2 << (kind - 0xDE)))
        raise ValueError(f"MessagePack: nothing begins with {kind:#x} here")

    def row(self, count: int) -> list[Any]:
        return [self.value() for _ in range(count)]

    def table(self, count: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(count)}
