"""What SigmaReparam costs where the model is sharded (FSDP2): collectives a step, their bytes, and the step's time.

Two copies of a model, one with the method, are sharded over the same processes and take steps in turn; the ratio of
their times in the same round is kept. Below the table of what was run stands what the same counts come to on clusters
that were not at hand: a law on paper, with its assumptions.

    python benchmarks/sharded.py                          # CPU, gloo, 1, 2 and 4 processes; written to results/
    python benchmarks/sharded.py --device cuda --processes 8   # has not been run yet
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import markdown, save
from step_time import Decoder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from lightning_efficient.functional import apply_sigma_reparam

SIZES = {"1.9 M": (4, 192), "6.4 M": (8, 256)}  # layers, width


class Counted:
    """Our all-reduces and their bytes."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    def __call__(self, tensor: torch.Tensor, **kwargs: Any) -> Any:
        self.calls, self.bytes = self.calls + 1, self.bytes + tensor.numel() * tensor.element_size()
        return _all_reduce(tensor, **kwargs)


_all_reduce = dist.all_reduce


def work(size: str, rounds: int, device: str) -> dict[str, Any]:
    """One process of several."""
    layers, width = SIZES[size]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (world,))
    torch.manual_seed(0)
    plain = Decoder(layers, width).to(device)
    models = {"plain": plain, "SigmaReparam": copy.deepcopy(plain)}
    optimizers = {}
    for name, model in models.items():
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizers[name] = torch.optim.AdamW(model.parameters(), 1e-4)
    apply_sigma_reparam(models["SigmaReparam"], optimizers["SigmaReparam"])
    tokens = torch.randint(96, (4, 128), generator=torch.Generator().manual_seed(rank)).to(device)

    def step(name: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizers[name].zero_grad()
        models[name](tokens).float().square().mean().backward()
        optimizers[name].step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in models:
        step(name)
    counted, fsdp = Counted(), CommDebugMode()
    with patch("lightning_efficient.weightspace.sums.dist.all_reduce", counted), fsdp:
        step("SigmaReparam")
    pairs = [(step("plain"), step("SigmaReparam")) for _ in range(rounds)]
    ratios = [ours / alone for alone, ours in pairs]
    quarter = statistics.quantiles(ratios, n=4)
    result = {
        "model": f"{size} parameters", "processes": world, "our_calls": counted.calls, "our_kB": counted.bytes / 1e3,
        "fsdp_calls": sum(n for name, n in fsdp.get_comm_counts().items() if "all_reduce" not in str(name)),
        "step_ms": statistics.median(alone for alone, _ in pairs) * 1e3, "ratio": statistics.median(ratios),
        "quartiles": f"{quarter[0]:.3f} to {quarter[2]:.3f}",
    }  # fmt: skip
    dist.destroy_process_group()
    return result


# -- on paper ------------------------------------------------------------------------------------------------------

ASSUMED = """\
Assumed, not measured: float32 weights; bandwidth of an all-reduce 200 GB/s inside a node of 8 GPUs and 40 GB/s across
nodes, latency 15 µs a hop of a tree; 2 TB/s of memory bandwidth that 16 reads or writes of the local weights a step
share; 40 % of 989 TFLOP/s for the model's own 6 · parameters · tokens, with 2 M tokens a step for 1 B and 4 M for 70 B
parameters. Nothing of ours overlaps with anything. Matrices: attention of 4 and a gated MLP of 3 a layer."""
PAPER = {"1 B": (24, 2048, 5632, 1.2e9, 2e6), "70 B": (80, 8192, 28672, 70e9, 4e6)}


def on_paper(name: str, gpus: int) -> dict[str, Any]:
    """Bytes, latency and share of a step, from counts that the runs above confirm."""
    layers, width, inner, parameters, tokens = PAPER[name]
    matrices = 7 * layers
    # Shard(0): a scalar a matrix before the step; after it a vector as long as the inputs, and a scalar.
    sent = 4 * (matrices + layers * (6 * width + inner) + matrices)
    seconds_sent = 2 * sent / (200e9 if gpus <= 8 else 40e9) + 2 * 2 * math.log2(gpus) * 15e-6
    seconds_local = 16 * 4 * parameters / gpus / 2e12
    step = 6 * parameters * tokens / (gpus * 0.4 * 989e12)
    return {
        "parameters": name, "gpus": gpus, "our_MB": sent / 1e6, "sent_ms": seconds_sent * 1e3,
        "local_ms": seconds_local * 1e3, "step_s": step, "share": f"{(seconds_sent + seconds_local) / step:.2%}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(1)
        result = work(args.worker[0], args.rounds, args.device)
        if int(os.environ["RANK"]) == 0:
            Path(args.worker[1]).write_text(json.dumps(result), encoding="utf-8")
        return
    rows = []
    for size in args.sizes:
        for processes in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "row.json"
                command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
                more = ["--worker", size, str(file), "--rounds", str(args.rounds), "--device", args.device]
                subprocess.run([sys.executable, *command, *more], check=True)
                rows.append(json.loads(file.read_text("utf-8")))
    columns = {
        "model": "model", "processes": "processes", "our_calls": "our all-reduces", "our_kB": "kB",
        "fsdp_calls": "FSDP's calls", "step_ms": "step without, ms", "ratio": "÷ without", "quartiles": "quartiles",
    }  # fmt: skip
    law = [on_paper(name, gpus) for name in PAPER for gpus in (8, 512)]
    paper = {
        "parameters": "parameters", "gpus": "GPUs", "our_MB": "MB a step", "sent_ms": "sending, ms",
        "local_ms": "local, ms", "step_s": "step, s", "share": "share of a step",
    }  # fmt: skip
    text = f"{markdown(rows, columns)}\n\n## On paper\n\n{ASSUMED}\n\n{markdown(law, paper)}\n"
    print(text)
    path = save(f"sharded_{args.device}", [*rows, *law])
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
