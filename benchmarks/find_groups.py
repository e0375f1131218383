"""How long ``find_groups`` takes and what memory, on networks of common sizes and on those of the tests.

Each measurement is a process of its own: seconds from call to return, processor seconds of all threads, and the most
memory the process held while it ran, less what it held before, in models of that size. With ``--before``, a folder
with another version of the package, the two take turns, and the table gives the ratio; the machine may be busy then.

    git archive COMMIT lightning_efficient | tar x -C OTHER
    python benchmarks/find_groups.py --before OTHER
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model(name), torch.randn(2, 3, 224, 224)


def _llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072}
    config = LlamaConfig(num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, **sizes)
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 32000, (2, 16))}


def _small_vit() -> tuple[nn.Module, Any]:
    import timm

    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2}
    return timm.models.VisionTransformer(depth=2, num_classes=4, **sizes), torch.randn(2, 1, 8, 8)


def _small_cnn() -> tuple[nn.Module, Any]:
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)]
    return nn.Sequential(*layers), torch.randn(2, 1, 8, 8)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-50, 224 px": lambda: _timm("resnet50"),
    "ConvNeXt-T, 224 px": lambda: _timm("convnext_tiny"),
    "Swin-T, 224 px": lambda: _timm("swin_tiny_patch4_window7_224"),
    "ViT-Base, 224 px": lambda: _timm("vit_base_patch16_224"),
    "Llama of 160 million, 16 tokens": _llama,
    "ViT of the tests, 8 px": _small_vit,
    "CNN of the tests, 8 px": _small_cnn,
}


def measure(name: str, threads: int) -> dict[str, float]:
    """One network in this process: seconds, processor seconds, memory, widths found and parameters."""
    from lightning_efficient.functional import find_groups

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, example = MODELS[name]()
    small, x = _small_cnn()
    find_groups(small, x)  # what is imported and set up at the first call is not its time
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter(), time.process_time()
    groups = find_groups(model, example)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    return {"seconds": spent[0], "cpu": spent[1], "memory": more / size, "found": len(groups.found), "size": size}


def in_process(name: str, package: Path, threads: int) -> dict[str, float]:
    """:func:`measure` with one version of the package."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--threads", str(threads)]
    environment = os.environ | {"PYTHONPATH": str(package)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return row


def table(rows: dict[str, dict[str, Any]], threads: int, rounds: int) -> str:
    """The measurements as a page."""
    lines = [
        "# find_groups: seconds and memory",
        "",
        f"`python benchmarks/find_groups.py`, {threads} thread(s), median of {rounds} run(s) of each version, in",
        "turns, each a process of its own; processor seconds, as the machine may be busy; memory is",
        "what the process grew by at its peak, in models (the model itself not counted). Small networks: the part of a",
        "second that a test pays.",
        "",
        "| network | processor s | on the clock | memory, in models | widths | before: processor s | memory | "
        "now ÷ before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        now, before = row["now"], row.get("before")
        cells = [name, f"{now['cpu']:.2f}", f"{now['seconds']:.2f}"]
        big = now["size"] > 1e6
        cells += [f"{now['memory']:.1f}" if big else "", f"{now['found']:.0f}"]
        if before:
            cells += [f"{before['cpu']:.2f}", f"{before['memory']:.1f}" if big else "", f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join([*cells, *[""] * (8 - len(cells))]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write, or one network for a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a folder that holds another version of lightning_efficient")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="networks whose name holds this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.threads)))
        return
    versions = {"now": HERE.parent} | ({"before": arguments.before} if arguments.before else {})
    rows: dict[str, dict[str, Any]] = {}
    for name in (name for name in MODELS if (arguments.only or "") in name):
        runs: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
        for _ in range(arguments.rounds):
            for version, package in versions.items():
                runs[version].append(in_process(name, package.resolve(), arguments.threads))
        medians = {
            version: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for version, found in runs.items()
        }
        rows[name] = dict(medians)
        if arguments.before:
            pairs = zip(runs["now"], runs["before"], strict=True)
            rows[name]["ratio"] = statistics.median(now["cpu"] / before["cpu"] for now, before in pairs)
        print(name, json.dumps(rows[name]), flush=True)
    (RESULTS / "find_groups.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "find_groups.md").write_text(table(rows, arguments.threads, arguments.rounds))


if __name__ == "__main__":
    main()
