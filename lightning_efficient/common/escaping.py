"""User's text (names of metrics, variants, modules, errors) where it is shown: terminals, pictures, pages.

Whatever reads names from outside makes them :func:`printable` at once; what shows them as Rich's or matplotlib's text
escapes what these read as markup.
"""

from __future__ import annotations

import os
import tempfile
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_LONGEST = 200
_MOST_MARKS = 3  # on one letter; more reach into the lines around it
# Control characters, formats that turn or hide text around them, lone surrogates, and line separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, longest: int = _LONGEST) -> str:
    """Text on one line without anything that acts on a terminal; what does is shown as in a Python string.

    Args:
        text: What a user or a file named something.
        longest: More characters than this are cut in the middle.
    """
    shown, marks = [], 0
    for char in str(text):
        kind = unicodedata.category(char)
        marks = marks + 1 if kind == "Mn" else 0
        shown.append(char.encode("unicode_escape").decode() if kind in _HIDDEN or marks > _MOST_MARKS else char)
    line = "".join(shown)
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]}...{line[-longest // 3 + 3 :]}"


def printable_lines(text: object) -> str:
    """Likewise, with its line ends: a message."""
    return "\n".join(printable(line, 1000) for line in str(text).split("\n"))


def rich_text(text: object, style: str = "") -> Text:
    """For Rich, which would read ``[/s]`` as markup.

    Args:
        text: What a user or a file named something.
        style: Of Rich.
    """
    from rich.text import Text

    return Text(printable(text), style)


def picture_text(text: object, longest: int = 60) -> str:
    """For matplotlib, which would read ``$`` as mathematics and leave out what begins with an underscore.

    Args:
        text: What a user or a file named something.
        longest: Pictures have little room.
    """
    line = printable(text, longest).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def picture_lines(text: object, width: int, longest: int = 90) -> str:
    """For matplotlib, in lines of so many characters.

    Args:
        text: What a user or a file named something, and words of ours.
        width: Of a line.
        longest: More characters than this are cut in the middle.
    """
    lines = textwrap.wrap(printable(text, longest), width)
    return "\n".join(picture_text(line, width) for line in lines)


@contextmanager
def shown_or_skipped(what: str, say: Callable[[Text], object]) -> Iterator[None]:
    """Something to look at, which is not worth the end of a command: if it fails there is one line instead.

    Args:
        what: Such as ``"picture"``.
        say: Takes that line: ``console.print``; of a file, which is written before anything is printed, a list's
            ``append``.

    Raises:
        OSError: A file cannot be written; that is for the user to know.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        why = printable(str(error).partition("\n")[0])
        say(rich_text(f"The {what} is left out: {type(error).__name__}: {why}"))


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, its folders as needed: wholly, or not at all.

    Args:
        path: The file; an existing one is replaced.
        content: Of it.

    Raises:
        OSError: In one sentence, with the file and the reason.
    """
    target = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with cannot_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a device, or a pipe: whole is what it takes
            target.write_bytes(data)
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            draft = Path(folder, target.name)
            draft.write_bytes(data)
            if target.exists():
                draft.chmod(target.stat().st_mode)
            os.replace(draft, target)


@contextmanager
def cannot_write(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system in one sentence that names the file that the user asked for, not a draft of it.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error


def umask() -> int:
    """Which rights new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
