"""Result of a check of `counterpart doctor`, and the output of the command."""

import textwrap
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

from app.settings import PREFIX, SETTINGS_FILE_VARIABLE, Settings

Status = Literal["ok", "warn", "fail"]
COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
INDENT = " " * 5


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes
    ----------
    name : str
    status : {"ok", "warn", "fail"}
        With a warning, the service still works.
    found : str
    fix : str
        Advice. Empty if the status is "ok".
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def print_checks(checks: list[Check], console: Console) -> None:
    """Print each check, with its fix on a separate line."""
    for check in checks:
        text = _wrap(f"{check.status:4} {check.name}: {check.found}", console)
        text.stylize(COLOURS[check.status], 0, len(check.status))
        console.print(text)
        if check.fix:
            console.print(_wrap(f"{INDENT}fix: {check.fix}", console))


def print_settings(settings: Settings, console: Console) -> None:
    """Print each setting with its value, origin and description. Secrets are masked."""
    console.print(f"\nSettings (environment, or the file that {SETTINGS_FILE_VARIABLE} names)", highlight=False)
    for name, field in type(settings).model_fields.items():
        value = f"{settings.format_value(name)} ({settings.origin(name)})"
        console.print(_wrap(f"{PREFIX}{name.upper()} = {value}", console))
        console.print(_wrap(f"{INDENT}{field.description}", console))


def _wrap(text: str, console: Console) -> Text:
    """Break a text into lines of the console's width, and indent the second and later lines."""
    return Text(textwrap.fill(text, console.width, subsequent_indent=INDENT, break_on_hyphens=False))
