"""The lines of a failed process's output that say why."""

from __future__ import annotations

import re

_TRACEBACK = "Traceback (most recent call last):\n"
_ARGPARSE = re.compile(r"^(?:[\w.\- ]+: )?error: ", re.MULTILINE)
_LONGEST = 12


def error_lines(text: str) -> str:
    """The message of the last traceback, with where it was raised; an argument parser's error; else the last lines.

    Args:
        text: What a process wrote.
    """
    if _TRACEBACK in text:
        return _of_traceback(text.rpartition(_TRACEBACK)[2])
    if matches := list(_ARGPARSE.finditer(text)):
        return "\n".join(text[matches[-1].start() :].strip().splitlines()[:_LONGEST])
    return "\n".join(text.strip().splitlines()[-_LONGEST:]) or "it wrote nothing"


def _of_traceback(text: str) -> str:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    frames = [line.strip() for line in lines[:start] if line.lstrip().startswith('File "')]
    message = lines[start : start + _LONGEST]
    return "\n".join([*message, *frames[-1:]]).strip()
