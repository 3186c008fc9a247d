"""A section of a configuration, and sentences on what is wrong with its keys."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A part of a configuration: frozen, and an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean …?` with the candidate most like a word, or an empty text; case does not matter."""
    words = {name.lower(): name for name in candidates}
    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.55)
    return f"; did you mean {words[close[0]]}?" if close else ""


def explanations(error: ValidationError, origin: str, model: type[BaseModel]) -> list[str]:
    """Return a sentence on every error of a validation: origin, key, and the keys that exist where it does not."""
    return [_explanation(details, origin, model) for details in error.errors()]


def _explanation(details: Any, origin: str, model: type[BaseModel]) -> str:
    key = ".".join(
        str(part) for part in details["loc"] if not str(part).startswith(("function-", "literal[", "float", "tuple"))
    )
    if details["type"] == "extra_forbidden":
        fields = _fields_at(details["loc"][:-1], model)
        return f"{origin}: unknown key {key}{nearest(str(details['loc'][-1]), fields)}; known here: {', '.join(fields)}"
    if details["type"] == "model_type":
        fields = _fields_at(details["loc"], model)
        return f"{origin}: {key} is a section, got {details['input']!r}; set its keys, such as {key}.{fields[0]}"
    if details["type"] == "missing":
        return f"{origin}: {key} is missing"
    message = details["msg"].removeprefix("Value error, ")
    value = "" if isinstance(details["input"], dict) else f" (got {details['input']!r})"
    return f"{origin}: {key or 'configuration'}: {message}{value}"


def _fields_at(location: tuple, model: type[BaseModel]) -> list[str]:
    annotation: Any = model
    for part in location:
        annotation = get_args(annotation)[0] if isinstance(part, int) else model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
