"""How the pages become a site: sphinx-build -W docs build/docs

The pages are plain Markdown, to be read on GitHub as well. What only a site needs is added here while they are read: the
table of contents from the lists of index.md, the reference from the docstrings, and the two pages that lie above docs/.
"""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the reference is that of this checkout

project, author, copyright = "iwb-pipeline", "", "its authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "iwb-pipeline"
html_static_path, html_css_files = ["site"], ["site.css"]
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["site"]
myst_heading_anchors = 4
suppress_warnings = ["ref.python"]  # two classes may have properties of one name
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90
nitpick_ignore_regex = [("py:.*", ".*")]

ABOVE = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
MODULES = ("pipeline", "pipeline.rebalance.methods", "pipeline.deploy.predict", "pipeline.config", "cache")
WITHOUT_ALL = {
    "pipeline.deploy.predict": ("predict", "Prediction", "Guess"),
    "pipeline.config": ("find_config", "shipped_configs"),
}


def contents(index: str) -> str:
    """The table of contents that the lists of index.md mean: a caption for each heading, an entry for each link in bold."""
    parts = []
    for section in index.split("\n## ")[1:]:
        pages = [
            f"{title} <{page}>" for title, page in re.findall(r"^- \*\*\[([^]]+)\]\(([\w-]+)\.md\)", section, re.M)
        ]
        caption = section.splitlines()[0]
        if pages:
            parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n")
    return "\n".join(parts)


def reference() -> str:
    """Directives for every public name of MODULES, each once, where it is public first."""
    parts, known = [], set()
    for module in map(import_module, MODULES):
        names = WITHOUT_ALL.get(module.__name__) or module.__all__
        parts.append(f"\n## {module.__name__}\n")
        for name in sorted(names, key=lambda name: (name[0].isupper(), name)):  # functions first
            thing, path = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.ismodule(thing):  # that can be called as its function
                thing, path = getattr(thing, name), f"{path}.{name}"
            if not callable(thing) or id(thing) in known or not inspect.getdoc(thing):
                continue
            known.add(id(thing))
            kind = "autoclass" if inspect.isclass(thing) else "autofunction"
            members = "   :members:\n   :exclude-members: model_config\n" if inspect.isclass(thing) else ""
            parts.append(f"```{{eval-rst}}\n.. {kind}:: {path}\n{members}```\n")
    return "\n".join(parts)


def from_above(text: str) -> str:
    """A page of the root as one of docs/: its links lead from there."""
    return re.sub(r"\]\(docs/", "](", re.sub(r"\]\((?!docs/|https?:|#)", "](../", text))


def read(app, docname, source):
    if docname == "index":
        source[0] += "\n" + contents(source[0])
    elif docname == "reference":
        source[0] += reference()
    elif docname in ABOVE:
        source[0] = from_above((ROOT / ABOVE[docname]).read_text(encoding="utf-8"))


def as_plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with `names` in them: nothing else in them is markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"`([^`]+)`", line)
        parts[::2] = [re.sub(r"([*|_`\\])", r"\\\1", text) for text in parts[::2]]
        parts[1::2] = [f"``{name}``" for name in parts[1::2]]
        lines[i] = "".join(parts)
    lines[:] = with_sections(lines)


SECTION = re.compile(r"(Arguments|Returns|Yields|Raises|Source|Sources|Example): *(.*)$")


def with_sections(lines):
    """Return the docstring with `Arguments:` and the like as headings, and what is indented below them as a list."""
    page, rest = [], list(lines)
    while rest:
        line = rest.pop(0)
        heading = SECTION.match(line)
        if heading is None:
            page.append(line)
            continue
        block = []
        while rest and (rest[0].startswith(" ") or (not rest[0] and rest[1:] and rest[1].startswith(" "))):
            block.append(rest.pop(0))
        if heading[2]:
            page += ["", " ".join([f"**{heading[1]}:** {heading[2]}", *(text.strip() for text in block)]), ""]
            continue
        indent = min((len(text) - len(text.lstrip()) for text in block if text), default=0)
        items = []
        for text in filter(None, block):
            if len(text) - len(text.lstrip()) == indent or not items:
                items.append(text.strip())
            else:
                items[-1] += " " + text.strip()
        page += ["", f"**{heading[1]}**", "", *(f"* {item}" for item in items), ""]
    return page


ARRAY = re.compile(r"~?(numpy\.)?ndarray\[~?(tuple|typing\.Any).*?dtype\[[^]]*\]\]")
ARRAY_LIKE = re.compile(r"~?(numpy\._typing\.\S+\.)?_Buffer \|.*?_NestedSequence\[[^]]*?str\]")


def shorter(app, what, name, obj, options, signature, returns):
    """Numpy's types by the names one knows them by."""
    return tuple(text and ARRAY_LIKE.sub("ArrayLike", ARRAY.sub("ndarray", text)) for text in (signature, returns))


def setup(app):
    app.connect("autodoc-process-signature", shorter)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", as_plain_text)
