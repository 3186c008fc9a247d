"""The text of results: the same text for print(), a terminal and a notebook."""

import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from html import escape
from types import ModuleType
from typing import Any

WIDTH = 120  # columns of a text that no terminal limits


class Shown:
    """A result that prints as a person reads it; one that draws tables says how in `__rich__` or `__rich_console__`."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None)
        console.print(self, markup=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def columns(most: int = WIDTH) -> int:
    """Return the width of a text: the terminal's columns, at most `most`."""
    return min(most, shutil.get_terminal_size((most, 24)).columns)


def wrapped(name: str, text: str, width: int, *, indent: int) -> list[str]:
    """`name` and the text behind it, in lines of a width, those after the first indented; words longer than it stay whole,
    and so do `λ = 0.1` and `1 ± 2`."""
    unbroken = re.sub(" ([=±]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(
        unbroken,
        width,
        initial_indent=name,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [name.rstrip()]


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # the user and password of a URL
MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def printable(text: str) -> str:
    """Return a text with control characters and bytes that are no UTF-8 written out, and without the passwords of URLs."""
    return PASSWORD.sub("…", UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text))


def markdown(text: str) -> str:
    """Return a text that Markdown and HTML show as it is."""
    return MARKDOWN.sub(r"\\\1", escape(" ".join(printable(text).split()), quote=False))


def size(number: float | None) -> str:
    """`1.2 MB`; a number of bytes as people say it."""
    if number is None:
        return "size not known before"
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:,.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:,.1f} {unit}"
        number /= 1000
    return ""


def callable_as(name: str, function: Callable[..., Any] | None = None) -> None:
    """Lets the module `name`, which bears the name of its one function, be called as it.

    `pipeline.predict(…)` then means `pipeline.deploy.predict.predict(…)`, whether the module was imported before or not.
    """
    module = sys.modules[name]
    module.__class__ = _Callable
    if function:
        module.__dict__["__wrapped__"] = function  # where inspect finds the signature


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__wrapped__(*arguments, **named)
