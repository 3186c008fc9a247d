"""Methods of users: added by a program, or by a Python file that `--method` names."""

import runpy
from functools import cache
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.method_names import METHODS
from pipeline.rebalance.methods.api import Free, Rule, Trained
from pipeline.rebalance.methods.trained import TRAINED
from pipeline.rebalance.methods.training_free import FREE

RIVALS: dict[str, Rule] = {rule.name: rule for rule in (*TRAINED, *FREE)}
SHIPPED = frozenset(METHODS)


def add_method(rule: Rule) -> None:
    """Add a method, so that RebalanceConfig.method can name it and `all` includes it; one added before is replaced.

    Raises: ConfigError: a shipped method has its name.
    """
    if rule.name in SHIPPED:
        raise ConfigError(f"a method called {rule.name} is there already; give yours another name")
    RIVALS[rule.name] = rule
    METHODS[rule.name] = "your own"


def methods_in(path: Path) -> tuple[str, ...]:
    """Run a Python file, add every Trained and Free in it, and return their names; a file runs again only if it changed.

    Raises: ConfigError: the file is missing, fails or defines no method.
    """
    try:
        return _added(path.resolve(), path.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise ConfigError(f"--method {path}: no such file") from error


@cache
def _added(path: Path, changed: int) -> tuple[str, ...]:
    try:
        definitions = runpy.run_path(str(path))
    except Exception as error:  # of whatever the file does
        raise ConfigError(f"--method {path}: it ends with {type(error).__name__}: {error}") from error
    rules = {id(value): value for value in definitions.values() if isinstance(value, Trained | Free)}
    new_rules = [rule for rule in rules.values() if rule not in (*TRAINED, *FREE)]
    if not new_rules:
        raise ConfigError(
            f"--method {path}: defines no method; it needs a Trained(…) or Free(…), see docs/own-method.md"
        )
    for rule in new_rules:
        add_method(rule)
    return tuple(rule.name for rule in new_rules)
