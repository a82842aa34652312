"""Decisions drawn from bytes, so that one target serves random bytes, hypothesis and atheris alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Draw:
    """Draws from `data`, and zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, stop: int) -> int:
        """A number from 0, below `stop`."""
        size = max(1, ((stop - 1).bit_length() + 7) // 8)
        taken = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(taken, "big") % stop

    def one_in(self, n: int) -> bool:
        return self.number(n) == n - 1

    def choice(self, items: Sequence[T]) -> T:
        return items[self.number(len(items))]

    def pieces(self, items: Sequence[str], most: int) -> str:
        """Up to `most` of `items`, one behind the other, a few characters of any kind among them."""
        found = [
            chr(self.number(0x110000)) if self.one_in(30) else self.choice(items) for _ in range(self.number(most))
        ]
        return "".join(found)

    def mutated(self, data: bytes) -> bytes:
        """`data` with some bytes changed, left out, put in or doubled."""
        changed = bytearray(data)
        for _ in range(self.number(4)):
            place, kind = self.number(len(changed) + 1), self.number(4)
            if kind == 0:
                changed[place : place + 1] = bytes([self.number(256)])
            elif kind == 1:
                del changed[place : place + 1 + self.number(16)]
            elif kind == 2:
                changed[place:place] = self.choice(_BYTES)
            else:
                changed[place:place] = changed[place : place + self.number(64)]
        return bytes(changed)

    def value(self, names: Sequence[str], levels: int = 3) -> Any:
        """What JSON can hold: any of `names` as keys and texts."""
        kind = self.number(10 if levels else 7)
        if kind < 3:
            return self.choice(names)
        if kind < 7:
            return self.choice(_VALUES)
        if kind == 7:
            return {self.choice(names): self.value(names, levels - 1) for _ in range(self.number(4))}
        return [self.value(names, levels - 1) for _ in range(self.number(4))]


_BYTES = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n\n", b"[" * 50, b"{" * 50, b'"', b"\\ud800",
    b"\xe2\x80\xa8",
          b"9" * 40, b"1e999", b"NaN", b"-", b",", b":", b"&a ", b"*a ", b"!!python/name:os.system ",
          b"\x1b[31m", b"'"]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, 0.5, 1.0, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    "\x00", "\ud800", "\u2028", "1", "[", "{}", "[1]", "x" * 3000, [], {},
]  # fmt: skip
