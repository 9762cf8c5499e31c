"""Writer for generated Markdown pages: headings, wrapped paragraphs, tables, images, numbers with intervals."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

WIDTH = 120


class HasInterval(Protocol):
    """A number with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def format_interval(number: HasInterval | None, digits: int = 2, *, signed: bool = False) -> str:
    """Format as "0.68 [0.61, 0.73]"; empty if there is no number."""
    if number is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (f"{n:{sign}.{digits}f}" for n in (number.value, number.low, number.high))
    return f"{value} [{low}, {high}]"


def bold(text: str) -> str:
    """Mark as bold."""
    return f"**{text}**"


class Page:
    """A Markdown page that is built from top to bottom."""

    def __init__(self, title: str) -> None:
        self._blocks = [f"# {title}"]

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self._blocks.append(f"{'#' * level} {text}")

    def paragraph(self, text: str) -> None:
        """Add a paragraph. Line breaks of the text are not kept."""
        self._blocks.append(_wrap(text))

    def bullets(self, items: Iterable[str]) -> None:
        """Add a list."""
        self._blocks.append("\n".join(_wrap(item, "- ", "  ") for item in items))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table. A row must have as many cells as the header."""
        lines = [list(header), ["---"] * len(header), *map(list, rows)]
        assert all(len(line) == len(header) for line in lines), f"rows of another width than {list(header)}"
        self._blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def image(self, description: str, path: str) -> None:
        """Add an image."""
        self._blocks.append(f"![{description}]({path})")

    def raw(self, text: str) -> None:
        """Add Markdown as it is."""
        self._blocks.append(text.strip())

    def render(self) -> str:
        """Return the page."""
        return "\n\n".join(self._blocks) + "\n"

    def write(self, path: Path) -> None:
        """Write the page."""
        path.write_text(self.render())


def _wrap(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
