"""The parts that the page carries inside itself: its style and script, plotly's library, and data for them."""

import base64
import functools
import gzip
import json
from importlib.resources import files
from typing import Any


def style() -> str:
    return f"<style>{_own('page.css')}</style>"


def script() -> str:
    """The page's script, at the end of the body."""
    return f"<script>{_own('page.js')}</script>"


def data(name: str, value: Any) -> str:
    """A value for the script to read by name, as JSON that no text in it can break out of."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f'<script type="application/json" id="{name}">{text.replace("<", chr(92) + "u003c")}</script>'


@functools.cache
def library() -> str:
    """plotly.js, packed: 2 MB instead of 5; its licence, which packing hides, in clear."""
    from plotly.offline import get_plotlyjs

    code = get_plotlyjs()
    licence = code[: code.index("*/") + 2] if code.startswith("/*") else ""
    packed = base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()
    return f'<!-- {licence} -->\n<script type="text/plain" id="plotly">{packed}</script>'


def _own(name: str) -> str:
    return (files("pipeline.report") / name).read_text(encoding="utf-8")
