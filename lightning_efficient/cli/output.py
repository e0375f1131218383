"""The standard output of every command, where it cannot be written; nothing heavy is imported for that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def standard_output() -> Iterator[None]:
    """End the process quietly if nobody reads what it prints any more (``| head``), with a sentence on a full disk.

    Raises:
        SystemExit: Code 1, or 2 after the sentence.
    """
    try:
        try:
            yield
        except SystemExit:  # of argparse, which has printed
            _flush()
            raise
        _flush()
    except OSError as error:
        # The system's, and of no file: one that this package raises in its own words has no number.
        if error.errno is None or error.filename is not None or (why := _not_printed()) is None:
            raise
        if isinstance(why, BrokenPipeError):
            raise SystemExit(1) from error
        print(f"error: cannot write to the standard output: {why.strerror}.", file=sys.stderr)
        raise SystemExit(2) from error


def _flush() -> None:
    if sys.stdout is not None:  # closed by the shell, `>&-`
        sys.stdout.flush()


def _not_printed() -> OSError | None:
    """Why nothing can be printed; what is left is thrown away then, or the interpreter would try again as it ends."""
    try:
        print(flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
