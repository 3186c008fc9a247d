"""What a command would do, found out by the checks of the command itself; nothing is written."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.plan.after import plan_export, plan_predict, plan_progress, plan_report
    from pipeline.plan.plan import Plan, Write
    from pipeline.plan.stage1 import plan_dump, plan_training, plan_tries
    from pipeline.plan.stage2 import plan_rebalance
    from pipeline.plan.whole import plan_reproduce, plan_run

_MODULES = {
    "after": ("plan_export", "plan_predict", "plan_progress", "plan_report"),
    "plan": ("Plan", "Write"),
    "stage1": ("plan_dump", "plan_training", "plan_tries"),
    "stage2": ("plan_rebalance",),
    "whole": ("plan_reproduce", "plan_run"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
