"""From an empty process to the first step of ViT-Small: a plain Trainer, and one with methods.

Arguments are the defaults, but for TempScale, whose temperature of 1 changes nothing: it has 0.9.

Every run is a process of its own, the arms in turn; CPU time (wall time with ``--device cuda``) of the imports, and of
everything up to the end of the first training step, all callbacks' ``on_train_batch_end`` included.

    OMP_NUM_THREADS=1 python benchmarks/start_of_run.py
    python benchmarks/start_of_run.py --device cuda
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = {
    "plain": (), "SigmaReparam": ("SigmaReparam",), "PRepBN": ("PRepBN",), "TempScale": ("TempScale",),
    "MagnitudePruning": ("MagnitudePruning",), "CollapseMonitor": ("CollapseMonitor",),
    "all five": ("SigmaReparam", "PRepBN", "TempScale", "MagnitudePruning", "CollapseMonitor"),
}  # fmt: skip

ARGUMENTS = {"TempScale": {"tau": 0.9}}


def start(arm: str, device: str) -> dict[str, float]:
    """What a process does that is there for this alone."""
    begun = time.perf_counter()
    import timm
    import torch
    from common import quiet
    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import functional

    import lightning_efficient

    quiet()
    callbacks = [getattr(lightning_efficient, name)(**ARGUMENTS.get(name, {})) for name in ARMS[arm]]
    imported = time.process_time(), time.perf_counter()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("vit_small_patch16_224", num_classes=10)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            stepped.extend((time.process_time(), time.perf_counter()))  # after the callbacks'

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    stepped: list[float] = []
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(2, 3, 224, 224), torch.randint(0, 10, (2,)))
    trainer = Trainer(
        accelerator=device, devices=1, max_steps=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))
    return {
        "import_cpu": imported[0], "cpu": stepped[0],
        "import_wall": imported[1] - begun, "wall": stepped[1] - begun,
    }  # fmt: skip


def run(arm: str, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--device", device, "--arm", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    from common import arguments, machine, markdown, save

    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="*", default=list(ARMS)[1:], choices=list(ARMS)[1:], help="beside plain")
    parser.add_argument("--arm", choices=list(ARMS), help="make this one start, here")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(start(args.arm, args.device)))
        return
    clock = "wall" if args.device == "cuda" else "cpu"
    times: dict[str, list[dict[str, float]]] = {arm: [] for arm in ("plain", *args.arms)}
    for _ in range(args.rounds):
        for arm, some in times.items():
            some.append(run(arm, args.device))
    rows = []
    for arm, some in times.items():
        over = [a[clock] - b[clock] for a, b in zip(some, times["plain"], strict=True)]
        rows.append(
            {
                "arm": arm, "import": statistics.median(one[f"import_{clock}"] for one in some),
                "whole": statistics.median(one[clock] for one in some), "over": statistics.median(over),
                "range": f"{min(over):.2f} to {max(over):.2f}", "times": some,
            }
        )  # fmt: skip
    columns = {
        "arm": "callbacks", "import": "imports, s", "whole": "to the end of the first step, s", "over": "over plain, s",
        "range": "lowest to highest",
    }  # fmt: skip
    table = markdown(rows, columns)
    clocks = {"wall": "Wall time", "cpu": "CPU time of the process"}
    head = (
        f"# The start of a run\n\nViT-Small, two images; {clocks[clock]}, medians of {args.rounds} rounds, differences "
        "within a round."
    )
    path: Path = save(f"start_of_run_{args.device}", rows)
    path.with_suffix(".md").write_text(f"{head}\n\n{table}\n\n`{machine()}`\n")
    print(table)


if __name__ == "__main__":
    main()
