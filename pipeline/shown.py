"""How results read: the same text for print(), a terminal and a notebook."""

import io
import sys
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


def callable_as(name: str, function: Callable[..., Any]) -> None:
    """Lets the module `name`, which bears the name of its one function, be called as it.

    `pipeline.predict(…)` then means `pipeline.predict.predict(…)`, whether the module was imported before or not.
    """
    module = sys.modules[name]
    module.__class__ = _Callable
    module.__dict__["__wrapped__"] = function  # where inspect finds the signature


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__dict__["__wrapped__"](*arguments, **named)
