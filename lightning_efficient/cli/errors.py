"""Errors on the command line: a user's ends in one message and exit code 2, any other keeps its traceback."""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_efficient.cli.output import standard_output
from lightning_efficient.common.escaping import printable_lines

_PACKAGE = __name__.partition(".")[0]
_DOCUMENTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
_LIBRARIES = {"lightning", "torch", "jsonargparse", *sys.stdlib_module_names}
_UNEXPECTED = (
    "lightning-efficient did not expect this error. If it comes from your own code, the traceback says where; else "
    "please report it with the traceback."
)


@contextmanager
def short_errors() -> Iterator[None]:
    """End the process with a short message if what was asked for is refused.

    Refused means raised on purpose: by a ``raise`` of this package, of a type that its docstrings name; by Lightning as
    a misconfiguration; or by the operating system about a path that this package opened. Everything else (a mistake in
    this package, or anything in the user's model) keeps its traceback and a note that says that it is unexpected.

    Raises:
        SystemExit: Code 2, after the message; 1 if nobody reads what is printed any more.
    """
    try:
        with standard_output():
            yield
    except Exception as error:
        if refused(error):
            print(f"error: {printable_lines(error)}", file=sys.stderr)
            raise SystemExit(2) from error
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(_UNEXPECTED)
        else:
            print(_UNEXPECTED, file=sys.stderr)
        raise


@contextmanager
def plain_warnings() -> Iterator[None]:
    """A line for each warning, without the place in this package that it comes from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {printable_lines(message)}", file=sys.stderr)
        yield


def refused(error: BaseException) -> bool:
    """Whether an error was raised on purpose, about what the user gave.

    Args:
        error: As caught.
    """
    if isinstance(error, MisconfigurationException):
        return True
    frames = list(_frames(error))
    if isinstance(error, OSError) and error.filename is not None:  # whoever opened the path
        while len(frames) > 1 and _top(frames[-1]) in sys.stdlib_module_names:
            frames.pop()
        return _top(frames[-1]) == _PACKAGE
    purpose = isinstance(error, _DOCUMENTED) and _top(frames[-1]) == _PACKAGE and _raised(frames[-1])
    while frames and _top(frames[-1]) == _PACKAGE:
        frames.pop()
    # Code of the user's that calls this package wrongly is a mistake like any other.
    return purpose and (not frames or _top(frames[-1]) in _LIBRARIES)


def only_libraries(error: BaseException) -> bool:
    """Whether nothing but this package, Lightning, torch and Python was running when an error was raised.

    Args:
        error: As caught.
    """
    return all(_top(frame) in _LIBRARIES | {_PACKAGE} for frame in _frames(error))


def _frames(error: BaseException) -> Iterator[TracebackType]:
    """From the outermost below ``short_errors`` to where it was raised."""
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _top(frame: TracebackType) -> str:
    """The package of a frame's code."""
    return str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0]


def _raised(frame: TracebackType) -> bool:
    """Whether it is at a ``raise`` statement, not at a call that failed by accident."""
    return dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
