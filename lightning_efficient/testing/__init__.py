"""The life-cycle battery: does a callback keep its promises on a model, from apply to export?

Our own CI runs it as a table method × model × scenario; use the same function for a callback or a model of your own::

    assert_method_contract(SigmaReparam, {"plain": MyModule}, make_loader)
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from lightning_efficient.testing.case import Callbacks, Case, Loader
from lightning_efficient.testing.histories import HISTORIES
from lightning_efficient.testing.scenarios import SCENARIOS
from lightning_efficient.testing.sharded import SHARDED

__all__ = ["HISTORIES", "SCENARIOS", "SHARDED", "Case", "assert_method_contract"]


def assert_method_contract(
    callback: Callable[[], Callbacks],
    modules: Mapping[str, Callable[[], LightningModule]],
    loader: Callable[[int, int, torch.dtype], Loader],
    *,
    folds: bool = True,
    more_graphs: int = 0,
    scenarios: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> dict[str, str]:
    """Run the battery for one callback on one model.

    Args:
        callback: Makes the callback, or a tuple of callbacks that are used together.
        modules: Variant → makes a fresh module, with the same initial weights each time; see :class:`Case`.
        loader: ``loader(batches, size, dtype)`` makes a data loader without shuffling.
        folds: Whether the method's checkpoints are loadable without this package.
        more_graphs: How many graphs more than without the callback ``torch.compile`` may build in a run.
        scenarios: Names from :data:`SCENARIOS`, :data:`HISTORIES` (how a run came to be) and :data:`SHARDED` (parts of
            weights in two processes); None: all whose variant is given.
        refused: Scenario → pattern of the error with which the method refuses it.
        root: Folder for checkpoints; None: a temporary one.

    Returns:
        Scenario → ``"passed"``, ``"refused: <message>"`` or ``"no <variant> variant given"``.

    Raises:
        AssertionError: A promise is not kept.
    """
    table: dict[str, str] = {}
    known = SCENARIOS | HISTORIES | SHARDED
    for name in scenarios if scenarios is not None else known:
        needs = name if name in _VARIANTS else "plain"
        if needs not in modules:
            table[name] = f"no {needs!r} variant given"
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            for advice in _ADVICE:
                warnings.filterwarnings("ignore", advice)
            case = Case(callback, modules, loader, root or Path(folder), folds, more_graphs=more_graphs)
            pattern = (refused or {}).get(name)
            if pattern is None:
                known[name](case)
                table[name] = "passed"
            else:
                with _refusal(pattern) as message:
                    known[name](case)
                table[name] = f"refused: {message[0]}"
    return table


# What Lightning says about runs as short and plain as these.
_ADVICE = (
    ".*callbacks used to create the checkpoint need to be provided",
    "SWA is currently only supported every epoch",
    "Swapping scheduler",
    ".*sync_dist=True",
    # our hook on the instance overrides it; nothing is sharded
    ".*WeightAveraging callback with a model that overrides the configure_model",
    ".*does not have many workers",
)

_VARIANTS = ("configure_model", "setup", "checkpointing", "manual", "prebuilt_optimizer", *SHARDED)


@contextmanager
def _refusal(pattern: str) -> Iterator[list[str]]:
    message: list[str] = []
    try:
        yield message
    except Exception as error:  # spawned processes hand theirs on in one of torch's
        if not re.search(pattern, str(error)):
            raise AssertionError(f"refused with {error!r}, expected {pattern!r}") from error
        message.append(str(error))
    else:
        raise AssertionError(f"expected to be refused with {pattern!r}, but it ran")
