"""The rules for names that people give: of classes, of the folders of splits, and of folders that hold no images."""

import re
import unicodedata
from collections.abc import Iterable

from pipeline.errors import DataError

SPLIT_FOLDER = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)|(?P<test>test(?:ing)?))(?:[ _-]?(?:set|data|images|split))?",
    re.IGNORECASE,
)
TOOL_FOLDERS = {
    "__macosx",
    "@eadir",
    "__pycache__",
    "$recycle.bin",
    "#recycle",
    "system volume information",
    "lost+found",
}
BLANKS = "\ufeff"  # beside what str.strip takes: the mark with which some editors begin a file
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no UTF-8, line and paragraph separators
TURNED = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they let text appear in another order


def split_of(folder: str) -> str | None:
    """Return train, val or test for the usual names of a folder of that split, in any case and spelling; else None."""
    match = SPLIT_FOLDER.fullmatch(folder.strip())
    return None if match is None else next(split for split, text in match.groupdict().items() if text)


def holds_no_images(folder: str) -> bool:
    """Return True for hidden folders and those in which archivers, file servers and notebooks keep files of their own."""
    return folder.startswith(".") or folder.lower() in TOOL_FOLDERS


def same_name(name: str) -> str:
    """Return the form in which two spellings of one class name are equal: é is one letter or two, as who packed it has it."""
    return unicodedata.normalize("NFC", name.strip(BLANKS).strip())


def class_names_from(names: Iterable[object], origin: str) -> tuple[str, ...]:
    """Return class names without blanks around them.

    Arguments:
        names: texts, or bytes in UTF-8.
    Raises: DataError: names origin and the name that is empty, twice there, or holds a character that cannot be printed.
    """
    checked: dict[str, str] = {}
    for number, value in enumerate(names):
        text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        name = text.strip(BLANKS).strip()
        if not name:
            raise DataError(f"{origin}: the name of class {number} is empty; every class needs one")
        wrong = next((c for c in name if unicodedata.category(c) in UNPRINTABLE or c in TURNED), None)
        if wrong is not None:
            kind = "bytes that are no UTF-8" if unicodedata.category(wrong) == "Cs" else f"the character {wrong!r}"
            raise DataError(f"{origin}: class name {text!r} holds {kind}; rename it")
        if (twin := checked.get(same_name(name))) is not None:
            raise DataError(f"{origin}: two classes have one name, {twin!r} and {text!r}; rename one, or join them")
        checked[same_name(name)] = name
    return tuple(checked.values())
