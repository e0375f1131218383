"""Reading runs back from what Lightning's loggers wrote: TensorBoard event files and CSVLogger's ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import os
import re
import statistics
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lightning_efficient.common.escaping import printable

_LARGEST = 1e100
_EVENTS = "events.out.tfevents.*"
_CSV = "metrics.csv"
_REPLICA = re.compile(r"(seed|version)[_-]?\d+", re.IGNORECASE)
_SEED = re.compile(r"seed[_-]?(\d+)", re.IGNORECASE)
_NOTED_SEED = re.compile(r"^(?:seed_everything|seed)\s*:\s*(\d+)\s*$", re.MULTILINE)
# Lightning's TensorBoardLogger writes this once, as a placeholder.
_NOT_LOGGED_BY_THE_USER = frozenset({"hp_metric"})


@dataclass(frozen=True)
class Series:
    """One logged quantity over a run, by increasing step.

    Args:
        steps: Global steps.
        values: The quantity at each; beyond 1e100, where sums and axes overflow, infinite.
        times: Wall time of each entry in seconds since 1970; ``None`` where the logger keeps none (CSV).
    """

    steps: list[int]
    values: list[float]
    times: list[float] | None = None

    def __post_init__(self) -> None:
        far = [math.copysign(math.inf, value) if abs(value) > _LARGEST else value for value in self.values]
        object.__setattr__(self, "values", far)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        path: The folder its log lies in.
        variant: What was trained: the name of the folder above ``seed_<n>`` or ``version_<k>``.
        replica: The part of the path that tells the runs of a variant apart; empty if there is one run only.
        series: Name → what was logged under it.
        noted_seed: What ``config.yaml`` or ``hparams.yaml`` beside the log say; ``None``: nothing.
        tags: The names as they are in the log; those of ``series`` have nothing in them that acts on a terminal.
    """

    path: Path
    variant: str
    replica: str
    series: dict[str, Series]
    noted_seed: int | None = None
    tags: frozenset[str] = frozenset()

    @property
    def seed(self) -> int | None:
        """The number in ``seed_<n>``, or the one noted: runs of two variants with the same one form a pair."""
        found = _SEED.search(self.replica)
        return int(found[1]) if found else self.noted_seed

    @property
    def last_step(self) -> int:
        """Largest step anything was logged at."""
        return max(series.steps[-1] for series in self.series.values())

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the intervals between logged steps; ``None`` without wall times or with one step only."""
        first: dict[int, float] = {}
        for series in self.series.values():
            for step, moment in zip(series.steps, series.times or (), strict=False):
                first[step] = min(moment, first.get(step, moment))
        intervals = [(t1 - t0) / (step1 - step0) for (step0, t0), (step1, t1) in pairwise(sorted(first.items()))]
        return statistics.median(found) if (found := [s for s in intervals if s > 0]) else None  # clocks are set back


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Every run in the folders and below them, ordered by variant and replica.

    A run is a folder with TensorBoard event files or a ``metrics.csv``. Folders inside a run (TensorBoard makes some)
    are no runs of their own, but for replicas in a folder that is none: a log that lies above them hides nothing.
    ``<variant>/seed_<n>`` are replicas of one variant; so are ``<variant>/version_<k>``, unless their ``hparams.yaml``
    differ in more than the seed. Of several versions of one seed the last counts.

    Args:
        paths: Folders to search.

    Raises:
        FileNotFoundError: A folder does not exist, or none holds a log.
        ValueError: No log holds a scalar.
    """
    series: dict[Path, dict[str, Series]] = {}
    broken, empty, known = [], [], set[Path]()
    for folder in _log_folders([Path(path).resolve() for path in paths]):
        if _is_part(folder, known):
            continue
        try:
            found = _read(folder)
        except ValueError as error:
            broken.append(str(error))
        else:
            if found:
                series[folder] = found
            else:
                empty.append(str(folder))
        if folder in series or _is_replica(folder):
            known.add(folder)
    if broken and not series:
        raise ValueError(broken[0] + (f" So are {len(broken) - 1} more." if len(broken) > 1 else ""))
    for text in broken:
        warnings.warn(f"{text} The run is left out.", stacklevel=2)
    if empty:
        if not series:
            raise ValueError(f"the logs hold no scalars: {', '.join(empty)}.")
        warnings.warn(f"no scalars logged in {', '.join(empty)}: left out.", stacklevel=2)
    variants = _variants(list(series))
    names = _shown({variant for variant, _ in variants.values()})
    tags = _shown({tag for logged in series.values() for tag in logged})
    runs = [
        Run(f, names[variant], printable(replica), {tags[tag]: one for tag, one in series[f].items()}, _noted_seed(f),
            frozenset(series[f]))
        for f, (variant, replica) in variants.items()
    ]  # fmt: skip
    return sorted(_last_version_of_each_seed(runs), key=lambda run: (run.variant, _natural(run.replica)))


def _shown(names: Iterable[str]) -> dict[str, str]:
    """Name → what is shown of it; names that would read alike are numbered."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (printable(name) != name, name)):
        taken, number = set(found.values()), 1
        shown = printable(name)
        while shown in taken:
            number += 1
            shown = f"{printable(name)} ({number})"
        found[name] = shown
    return found


def _log_folders(roots: Iterable[Path]) -> list[Path]:
    roots = list(roots)
    if missing := [str(root) for root in roots if not root.exists()]:
        raise FileNotFoundError(f"no such folder: {', '.join(missing)}.")
    files = [file for root in roots for pattern in (_EVENTS, _CSV) for file in _files(root, pattern, below=True)]
    folders = sorted({file.parent for file in files})
    if not folders:
        looked = ", ".join(map(str, roots)) or "an empty list of folders"
        raise FileNotFoundError(
            f"no logs in {looked}: looked for TensorBoard event files ({_EVENTS}) and Lightning's CSVLogger ({_CSV}) "
            "there and in every folder below. What Weights & Biases, MLflow and others write is not read: give the "
            "Trainer a CSVLogger beside theirs."
        )
    return folders


def _is_replica(folder: Path) -> bool:
    return _REPLICA.fullmatch(folder.name) is not None


def _is_part(folder: Path, runs: Collection[Path]) -> bool:
    """Of a run around it, and no run of its own."""
    around = [parent for parent in folder.parents if parent in runs]
    return bool(around) and not (_is_replica(folder) and not any(map(_is_replica, around)))


# -- one log -------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, Series]:
    points, broken = _read_events(folder)  # first: they know the wall time
    if (folder / _CSV).is_file() and (broken or not points):
        try:
            points = _read_csv(folder / _CSV)
        except ValueError as error:
            broken.append(str(error))
    if broken and not points:
        raise ValueError(broken[0])
    for text in broken:
        warnings.warn(f"{text} It is skipped.", stacklevel=3)
    return {n: _series(rows) for n, rows in points.items() if rows and n not in _NOT_LOGGED_BY_THE_USER}


def _files(folder: Path, pattern: str, below: bool = False) -> list[Path]:
    """Regular files, the later of a process's after the earlier: opening a pipe would wait for ever."""
    found = (file for file in (folder.rglob if below else folder.glob)(pattern) if file.is_file())
    return sorted(found, key=lambda file: _natural(str(file)))


_Point = tuple[int, float, float | None]


def _read_events(folder: Path) -> tuple[dict[str, list[_Point]], list[str]]:
    """As written: a clock that was set back changes nothing. And what cannot be read, as a sentence a file."""
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    kinds = ("images", "audio", "histograms", "compressedHistograms", "tensors")
    guidance = {"scalars": 0, **dict.fromkeys(kinds, 1)}  # 0: all of them
    points: dict[str, list[_Point]] = {}
    broken: list[str] = []
    for file in _files(folder, _EVENTS):
        log = event_accumulator.EventAccumulator(str(file), size_guidance=guidance)
        try:
            with file.open("rb"):
                log.Reload()
            if log.file_version is None and file.stat().st_size:  # which comes first, and the reader stops at rubbish
                raise ValueError("there is no event in it")
            for name in log.Tags()["scalars"]:
                points.setdefault(name, []).extend((e.step, e.value, e.wall_time) for e in log.Scalars(name))
        except Exception as error:  # whatever the bytes of a broken file make of the reader
            broken.append(f"cannot read the log {str(file)!r}: {_reason(error)}.")
    return points, broken


def _read_csv(file: Path) -> dict[str, list[_Point]]:
    points: dict[str, list[_Point]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as lines:
            for row in csv.DictReader(lines):
                if not (row.get("step") or "").strip():
                    raise ValueError(f"a row without `step`: {row}; expected what Lightning's CSVLogger writes")
                for name, text in row.items():
                    if name not in ("step", None) and text:
                        points.setdefault(name, []).append((int(float(row["step"])), float(text), None))
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise ValueError(f"cannot read the log {str(file)!r}: {_reason(error)}.") from error
    return points


def _reason(error: Exception) -> str:
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return printable(text.strip().rstrip(".") or type(error).__name__)


def _series(points: list[_Point]) -> Series:
    # A resumed run repeats the steps since its checkpoint: what was written last counts.
    last = {step: (value, moment) for step, value, moment in points}
    steps = sorted(last)
    times = [moment for step in steps if (moment := last[step][1]) is not None]
    return Series(steps, [last[step][0] for step in steps], times or None)


# -- which runs belong together ------------------------------------------------------------------------------------


def _variants(folders: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Folder → (variant, replica)."""
    split = {folder: _split(folder) for folder in folders}
    hparams: dict[Path, set[str]] = {}
    for folder, (variant, _) in split.items():
        if not _SEED.search(str(folder.relative_to(variant))):
            hparams.setdefault(variant, set()).add(_hparams(folder))
    mixed = {variant for variant, found in hparams.items() if len(found) > 1}
    split = {folder: (folder, "") if variant in mixed else (variant, r) for folder, (variant, r) in split.items()}
    names = _names({variant for variant, _ in split.values()})
    return {folder: (names[variant], replica) for folder, (variant, replica) in split.items()}


def _split(folder: Path) -> tuple[Path, str]:
    replica: list[str] = []
    while _REPLICA.fullmatch(folder.name):
        replica.insert(0, folder.name)
        folder = folder.parent
    return folder, "/".join(replica)


def _noted_seed(folder: Path) -> int | None:
    for name in ("config.yaml", "hparams.yaml"):
        file = folder / name
        if found := _NOTED_SEED.search(_text(file)):
            return int(found[1])
    return None


def _text(file: Path) -> str:
    """Empty if it is not there, or cannot be read: it only says more of a run."""
    with suppress(OSError):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""


def _hparams(folder: Path) -> str:
    file = folder / "hparams.yaml"
    return "\n".join(sorted(line for line in _text(file).splitlines() if not re.match(r"\s*\w*seed\w*\s*:", line)))


def _names(folders: set[Path]) -> dict[Path, str]:
    """The shortest path of each that starts where they part."""
    common = Path(os.path.commonpath(folders))
    return {f: f.name if f == common else f.relative_to(common).as_posix() for f in folders}


def _last_version_of_each_seed(runs: list[Run]) -> list[Run]:
    kept: dict[tuple[str, object], Run] = {}
    for run in sorted(runs, key=lambda run: _natural(run.replica)):
        seed = _SEED.search(run.replica)
        key = (run.variant, seed[1] if seed else run.replica)
        if key in kept:
            warnings.warn(f"{run.variant}: {kept[key].replica} left out, {run.replica} is newer.", stacklevel=3)
        kept[key] = run
    return list(kept.values())


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorting key that puts version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
