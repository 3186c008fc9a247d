"""Methods that are not ours: made known to this process by a program, or by a Python file that `--method` names."""

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
    """From now on `rule` is a method like every other: by its name in RebalanceConfig.method, and one of `all`.

    ConfigError where its name is that of a shipped method; one of your own is replaced.
    """
    if rule.name in SHIPPED:
        raise ConfigError(f"a method called {rule.name} is there already; give yours another name")
    RIVALS[rule.name] = rule
    METHODS[rule.name] = "your own"


def methods_in(path: Path) -> tuple[str, ...]:
    """Runs a Python file, once as long as it does not change, adds every Trained and Free in it, and returns their names.

    ConfigError where the file is missing, fails or has none.
    """
    try:
        return _added(path.resolve(), path.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise ConfigError(f"--method {path}: no such file") from error


@cache
def _added(path: Path, changed: int) -> tuple[str, ...]:
    try:
        found = runpy.run_path(str(path))
    except Exception as error:  # anything may be in it
        raise ConfigError(f"--method {path}: it ends with {type(error).__name__}: {error}") from error
    rules = {id(value): value for value in found.values() if isinstance(value, Trained | Free)}
    mine = [rule for rule in rules.values() if rule not in (*TRAINED, *FREE)]
    if not mine:
        raise ConfigError(
            f"--method {path}: defines no method; it needs a Trained(…) or Free(…), see docs/own-method.md"
        )
    for rule in mine:
        add_method(rule)
    return tuple(rule.name for rule in mine)
