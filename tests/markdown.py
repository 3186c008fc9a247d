"""The code blocks of the pages, and what each claims to be.

A line right before a block says how it is checked, where that is not by running it:
    <!-- parsed: why it cannot be run here -->   commands are checked against the real parser, settings against the schema
    <!-- prints -->                              what the block before it printed, line by line
    <!-- sample: which run, when -->             the output of a dated run, which another machine would not repeat
    <!-- formula -->                             mathematics
    <!-- run -->, <!-- test -->                  of README.md: run by .ci/run
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(p.relative_to(ROOT)) for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    mark: str  # its first word, or nothing
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        mark, _, reason = (match["mark"] or "").partition(": ")
        line = text[: match.start("text")].count("\n")
        found.append(Block(page, line, match["language"], mark, reason, match["text"]))
    return found


def prose(page: str) -> str:
    """A page without its blocks."""
    return BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))


def command_lines(text: str) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def pipeline_words(line: str) -> list[str] | None:
    """The words after `pipeline` of a command, also where docker, sbatch or torchrun starts it; None where it is another."""
    words = shlex.split(line.removesuffix("&"))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for start in ("pipeline", ".venv/bin/pipeline", "iwb-pipeline"):
        if start in words and (words[0] in (start, "torchrun", "timeout") or words[:2] == ["docker", "run"]):
            return words[words.index(start) + 1 :]
    if words[:3] == ["docker", "compose", "run"]:
        return words[next(i for i, word in enumerate(words) if i > 2 and not word.startswith("-")) + 1 :]
    if words[:1] == ["sbatch"]:
        return words[next(i for i, word in enumerate(words) if word.endswith(".sbatch")) + 1 :]
    return None
