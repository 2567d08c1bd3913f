"""The parts of a page, as frozen values the template knows by their ``kind``. Draws nothing."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph; ``aside`` is why something is left out, ``heading`` a heading of the third level."""

    text: str
    style: Literal["plain", "aside", "heading"] = "plain"
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Picture:
    """A PNG with its name beside the page, what it shows for those who cannot see it, and what to look for in it.

    ``wide`` pictures hold small parts: a narrow screen scrolls them instead of shrinking them.
    """

    name: str
    png: bytes
    alt: str
    caption: str
    wide: bool = False
    kind: Literal["picture"] = "picture"

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width_px(self) -> int:
        """From the PNG's header."""
        return int.from_bytes(self.png[16:20], "big")


@dataclass(frozen=True)
class Table:
    """Text cells; columns after the first ``n_left`` are right-aligned numbers. ``folded`` tables open on a click."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    n_left: int = 1
    folded: bool = False
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Facts:
    """Large figures side by side: (value, what it is)."""

    facts: tuple[tuple[str, str], ...]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    text: str
    kind: Literal["code"] = "code"


Block = Text | Picture | Table | Facts | Code


@dataclass(frozen=True)
class Section:
    """A part of the page with its own line in the table of contents; ``anchor`` is its id."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


def left_out(why: str) -> Text:
    """The sentence that stands where a picture would."""
    return Text(f"Left out: {why}", style="aside")
