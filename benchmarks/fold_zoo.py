"""Folding over the smallest model of every timm family: what folds, what does not and why, and that nothing is wrong.

Every norm is replaced by what it would be after training: a per-channel affine with the statistics of its input, and
then some noise, so that scale and shift are large and random. Weights are random (nothing is downloaded). "error" is
measured here, not taken from the fold's own check: plain forwards before and after, in float64.

    python benchmarks/fold_zoo.py                  # all families; goes on where it stopped
    python benchmarks/fold_zoo.py --only swin_transformer --redo
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.layers as layers
import torch
from common import RESULTS, machine, markdown, save, zoo
from torch import Tensor, nn

from lightning_efficient.common.running import Float64
from lightning_efficient.folding.affine import Affine, ChannelAffine
from lightning_efficient.folding.fold import FoldReport, fold_affines
from lightning_efficient.surgery.replace import replace_modules

TOLERANCE = 1e-12
SIZES = ("test", "zepto", "atto", "femto", "pico", "nano", "micro", "tiny", "mini", "xxs", "xs", "small", "_s", "base")
CANDIDATES = 4
LAST = tuple(getattr(layers, n) for n in ("RmsNorm", "RmsNormFp32", "SimpleNorm") if hasattr(layers, n))
FIRST = tuple(
    getattr(layers, n)
    for n in ("LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d", "LayerNormAct2d", "RmsNorm2d", "RmsNorm2dFp32")
    + ("RmsNormAct2d", "SimpleNorm2d", "GroupNorm1", "GroupNorm1Act")
    if hasattr(layers, n)
)
COLUMNS = {
    "family": "family", "model": "model", "verdict": "verdict", "norms": "norms", "forwards": "forwards",
    "backwards": "backwards", "left": "left", "error": "error", "checked": "inputs", "why": "why the rest stays",
}  # fmt: skip


def families() -> dict[str, list[str]]:
    """Module of timm -> names of its models."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        found[timm.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    return dict(sorted(found.items()))


def smallest(names: Iterable[str]) -> str:
    """The one with the fewest parameters among those whose name promises few, counted without allocating them."""

    def promise(name: str) -> tuple[int, list[int], str]:
        word = next((i for i, size in enumerate(SIZES) if size in name), len(SIZES))
        return word, [int(number) for number in re.findall(r"\d+", name)], name

    counts = {}
    for name in sorted(names, key=promise)[:CANDIDATES]:
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:  # some initialisers need data; then the name has to do
            counts.setdefault(name, 10**12)
    return min(counts, key=lambda name: counts[name])


def channel_axis(module: nn.Module) -> Any:
    """``"last"`` or 1 for a norm whose finished form is one affine per channel; None for anything else."""
    if isinstance(module, (*FIRST, nn.BatchNorm1d, nn.BatchNorm2d)):
        return 1
    return "last" if isinstance(module, (*LAST, nn.LayerNorm, nn.RMSNorm)) else None


class Calibrated(nn.Module):
    """An affine that takes the statistics of the first input it sees, perturbed."""

    def __init__(self, axis: Any) -> None:
        super().__init__()
        self.axis, self.affine = axis, None

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is None:
            values = x.movedim(1 if self.axis == 1 else -1, 0).flatten(1)
            mean, std = values.mean(1), values.std(1, correction=0)
            # A floor, so that channels that are nearly constant in these images do not explode at others.
            std = std.clamp(min=0.5 * float(values.std(correction=0)) + 1e-6)
            a = (0.6 * torch.rand_like(mean) + 0.7) / std
            self.affine = (a, 0.3 * torch.randn_like(mean) - mean * a, self.axis)
        return ChannelAffine(*self.affine)(x)


def swap_norms(model: nn.Module, x: Tensor) -> dict[str, Affine]:
    """Put a perturbed affine of its input's statistics in the place of every norm that runs."""
    norms = {name: (m, axis) for name, m in model.named_modules() if (axis := channel_axis(m)) is not None}
    # What else a layer holds (an activation) stays behind the affine.
    new = {name: nn.Sequential(Calibrated(axis), *norm.children()) for name, (norm, axis) in norms.items()}
    replace_modules(model, new)
    model(torch.randn(8, *x.shape[1:], dtype=x.dtype))
    ran = {f"{name}.0": layer[0].affine for name, layer in new.items() if layer[0].affine is not None}
    replace_modules(model, {name: ChannelAffine(*affine) for name, affine in ran.items()})
    return ran


# Whole, it took over 25 minutes of a core, or died (of memory, beside other work): fewer of its blocks, all alike.
SHORTENED = {"deepseek_vit_412m": {"depth": 2}}


def described(name: str) -> str:
    """The name, and what was made smaller."""
    return name + "".join(f", {key} {value}" for key, value in SHORTENED.get(name, {}).items())


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A float64 model in which no parameter is zero, and the smallest images it takes."""
    with warnings.catch_warnings(action="ignore"):
        model = timm.create_model(name, **SHORTENED.get(name, {})).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    native = model.pretrained_cfg.get("input_size", (3, 224, 224))
    error: Exception | None = None
    for size in (*((s, s) for s in (64, 128) if s < native[1]), native[1:]):
        x = torch.randn(2, native[0], *size, dtype=torch.float64)
        try:
            with Float64():
                model(x)
            return model, x
        except Exception as why:  # whatever a model raises at a size that is not its own
            error = why
    raise RuntimeError(f"takes no image: {type(error).__name__}: {error}")


@torch.no_grad()
def fold_one(name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, x = build(name)
    with Float64():
        table = swap_norms(model, x)
        before = outputs(model(x))
    row: dict[str, Any] = {"norms": len(table), "image": x.shape[-1]}
    if not table:
        return row | {"verdict": "no norms"}
    report = fold_affines(model, table, lambda: model(x), tolerance=TOLERANCE)
    with Float64():
        after = outputs(model(x))
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))
    if not error <= TOLERANCE:
        verdict = "WRONG"
    else:
        verdict = "pass" if not report.left else "partly" if report.folded else "refused"
    return row | {"verdict": verdict, "error": error, **summary(report)}


def outputs(value: Any) -> list[Tensor]:
    """The tensors a model returned."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in outputs(item)]


def summary(report: FoldReport) -> dict[str, Any]:
    """Counts, and the reasons without the names of modules."""
    how = Counter(outcome.how for outcome in report.norms.values())
    why = Counter(re.sub(r"'[^']*'", "…", reason) for reason in report.left.values())
    return {
        "forwards": how["forwards"], "backwards": how["backwards"], "left": how["left"],
        "checked": len(report.checked), "why": "; ".join(f"{n} × {reason}" for reason, n in why.most_common()),
        "norms_left": report.left, "rejected": report.rejected,
    }  # fmt: skip


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON and the table."""
    save("fold_zoo", rows)
    counts = Counter(row["verdict"] for row in rows)
    norms = sum(row.get("norms", 0) for row in rows)
    gone = sum(row.get("forwards", 0) + row.get("backwards", 0) for row in rows)
    errors = [row["error"] for row in rows if "error" in row]
    head = (
        "# Folding over timm\n\nThe smallest model of every family, random weights, every norm replaced by a random "
        "affine; relative error in float64.\n\n"
        f"{len(rows)} families: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}. "
        f"{gone} of {norms} norms folded; largest error {max(errors, default=0.0):.1e}.\n\n![what became of the norms]"
        f"(fold_zoo.png)\n\n`{machine()}`\n\n"
    )
    picture(rows, RESULTS / "fold_zoo.png")
    shown = [{**row, "error": f"{row['error']:.0e}" if "error" in row else ""} for row in rows]
    (RESULTS / "fold_zoo.md").write_text(head + markdown(shown, COLUMNS) + "\n")


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of each family's norms that vanish forwards, vanish backwards, or stay one multiply-add."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with_norms = [row for row in rows if row.get("norms")]
    with_norms.sort(key=lambda row: (row["left"] / row["norms"], row["family"]))
    figure, axes = plt.subplots(figsize=(6.5, 0.16 * len(with_norms) + 1.2), layout="constrained")
    names, left = [f"{row['family']} ({row['norms']})" for row in with_norms], [0.0] * len(with_norms)
    for kind, colour, label in (
        ("forwards", "#0072b2", "into what reads it"),
        ("backwards", "#56b4e9", "into what makes its input"),
        ("left", "#d55e00", "left: one multiply-add"),
    ):
        share = [100 * row[kind] / row["norms"] for row in with_norms]
        axes.barh(names, share, left=left, color=colour, label=label, height=0.8)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.set_xlim(0, 100)
    axes.set_xlabel("norms, % (in brackets: how many)")
    axes.tick_params(axis="y", labelsize=5.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    known = families()

    def find(family: str) -> tuple[str, Any]:
        name = smallest(known[family])
        return described(name), partial(fold_one, name)

    zoo("fold_zoo", {family: partial(find, family) for family in known}, 100.0, write)


if __name__ == "__main__":
    main()
