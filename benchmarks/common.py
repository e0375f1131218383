"""What the benchmark scripts share: arguments, silence, a description of the machine, a place for results, zoos."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's own docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def quiet() -> None:
    """Nothing of Lightning's but errors."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def machine() -> dict[str, Any]:
    """Device, versions and the command, to stand beside every table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows, **more}, indent=1))
    return path


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table: ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v := row.get(k, ""), float) else str(v) for k in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


Row = dict[str, Any]


def isolated(work: Callable[[], Row], limit: float) -> Row:
    """A row made in a process of its own, which is ended after ``limit`` seconds; else one that says why not."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send(connection: Connection) -> None:
        try:
            connection.send(work())
        except Exception as why:  # the table says so, and the next model is not concerned
            text = str(why).strip().splitlines() or [""]
            connection.send({"verdict": "not run", "why": f"{type(why).__name__}: {text[0]}"[:200]})

    process = multiprocessing.get_context("fork").Process(target=send, args=(sender,))
    process.start()
    sender.close()
    row: Row = {"verdict": "not run", "why": f"not done after {limit:.0f} s"}
    try:
        if receiver.poll(limit):
            row = receiver.recv()
    except EOFError:
        row = {"verdict": "not run", "why": "the process died (memory?)"}
    process.terminate()
    process.join()
    return row


def zoo(
    title: str,
    names: Mapping[str, Callable[[], tuple[str, Callable[[], Row]]]],
    limit: float,
    write: Callable[[list[Row]], None],
) -> None:
    """A row for every family, each in a process of its own; goes on where it stopped.

    Args:
        title: Of ``results/<title>.json``.
        names: Family → its model's name, and what makes the row.
        limit: Default of ``--limit``, in seconds.
        write: Writes what there is, after every row.
    """
    parser = arguments(sys.modules["__main__"].__doc__)
    parser.add_argument("--only", nargs="*", help="beginnings of families")
    parser.add_argument("--redo", action="store_true", help="also those that are done")
    parser.add_argument("--limit", type=float, default=limit, help="seconds a model may take")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{title}.json"
    done = {row["family"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for family, find in names.items():
        if (args.only and not family.startswith(tuple(args.only))) or (family in done and not args.redo):
            continue
        start = time.perf_counter()
        model, work = find()
        row = {"family": family, "model": model, **isolated(work, args.limit)}
        done[family] = row | {"seconds": round(time.perf_counter() - start, 1)}
        print(f"{family:28} {model:36} {row['verdict']:16} {row.get('why', '')[:150]}", flush=True)
        write([done[key] for key in sorted(done)])
