"""Tables, numbers with intervals and templates for generated Markdown pages."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol


class HasInterval(Protocol):
    """Number with the ends of its interval."""

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


def bullets(items: Iterable[str]) -> str:
    """Format a list."""
    return "\n".join(f"- {item}" for item in items)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table. Every row must have as many cells as the header."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    assert all(len(line) == len(header) for line in lines), f"a row has another width than {list(header)}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Replace every {{name}} of a template.

    Raises
    ------
    KeyError
        A name has no value, or a value is not used.
    """
    names = set(re.findall(r"{{(\w+)}}", template))
    if names != values.keys():
        raise KeyError(f"template and values differ in {sorted(names ^ values.keys())}")
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], template)


def refill(text: str, width: int = 120) -> str:
    """Break the lines of paragraphs and bullets again, after values were inserted into them."""
    blocks = re.split(r"(\n(?:\n+|(?=- )))", text.strip("\n"))
    # Every second part is a separator.
    return "".join(
        part if i % 2 or part.startswith("#") else _fill(" ".join(part.split()), width) for i, part in enumerate(blocks)
    )


def _fill(paragraph: str, width: int) -> str:
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
