"""Refusals on the command line: one message and exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = __name__.partition(".")[0]


@contextmanager
def short_errors() -> Iterator[None]:
    """End the process with a short message if this package refuses something.

    What is raised anywhere else (the user's model, Lightning, torch) keeps its traceback.

    Raises:
        SystemExit: Code 2, after the message.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if not _refused(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _refused(error: BaseException) -> bool:
    """Whether the statement that raised stands in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{_PACKAGE}.")
