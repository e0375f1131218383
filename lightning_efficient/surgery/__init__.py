"""Find modules, replace them, and keep optimizers and schedulers in step with the parameters that result."""

from lightning_efficient.surgery.change import Change
from lightning_efficient.surgery.match import NoMatchError, Selection, canonical_name, select_modules
from lightning_efficient.surgery.optimizer import add_parameters, plain_view, rebind
from lightning_efficient.surgery.order import CONFLICTS, ORDER, check_methods, sort_methods
from lightning_efficient.surgery.replace import reinstate_modules, replace_modules, restore_modules

__all__ = [
    "CONFLICTS",
    "ORDER",
    "Change",
    "NoMatchError",
    "Selection",
    "add_parameters",
    "canonical_name",
    "check_methods",
    "plain_view",
    "rebind",
    "reinstate_modules",
    "replace_modules",
    "restore_modules",
    "select_modules",
    "sort_methods",
]
