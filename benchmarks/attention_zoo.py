"""Attention temperature over timm and Hugging Face: exact in the weights, exact by an adapter, or refused, and why.

The smallest model of every timm family (weights random, no parameter zero), and tiny random-weight models of the
Hugging Face families, written as ``sdpa`` and as ``eager``. "error" is measured here and not taken from the method's
own check: the output in float64, against a forward in which every attention of a targeted module is computed from its
definition, softmax(logits / tau).

    python benchmarks/attention_zoo.py                  # all; goes on where it stopped
    python benchmarks/attention_zoo.py --only swin_transformer hf/t5 --redo
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import partial
from typing import Any

import torch
from attention_definition import Definition
from common import RESULTS, machine, markdown, save, zoo
from fold_zoo import build as build_timm
from fold_zoo import described, families, smallest
from tiny_transformers import FAMILIES
from tiny_transformers import build as build_hf
from torch import Tensor, nn

from lightning_efficient.attention.sites import find_attention
from lightning_efficient.attention.temperature import TempScaleError, apply_temp_scale
from lightning_efficient.common.nests import mapped, tensors_behind
from lightning_efficient.common.running import Float64

TAU = 0.7
TOLERANCE = 1e-9
COLUMNS = {
    "family": "family", "model": "model", "verdict": "verdict", "weights": "in weights", "adapters": "by adapter",
    "refused": "refused", "error": "error", "why": "why not in the weights",
}  # fmt: skip


def example_of(name: str) -> tuple[nn.Module, Any]:
    """A float64 model, and a small example: images as small as it takes."""
    if not name.startswith("hf/"):
        with torch.no_grad():
            return build_timm(name)
    model, kwargs = build_hf(*name[3:].split("/"))
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model, mapped(kwargs, lambda t: t.double() if t.is_floating_point() else t)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad(), Float64():
        out = model(example) if isinstance(example, Tensor) else model(**example)
    return [t.clone() for t in tensors_behind(out) if t.is_floating_point()]


def scale_one(name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, example = example_of(name)
    try:
        return scale(model, example)
    except TempScaleError as error:
        if "single key" not in str(error):
            return {"verdict": "refused", "why": reason(str(error))}
        # The smallest image leaves one token somewhere.
        return scale(model, torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64))


def scale(model: nn.Module, example: Any) -> dict[str, Any]:
    sites = find_attention(model, example).sites
    refused = {site.name: site.refused for site in sites.values() if site.refused}
    why = Counter(reason(text) for text in refused.values())
    row = {"weights": 0, "adapters": 0, "refused": len(refused)}
    if len(refused) == len(sites):
        return row | {"verdict": "refused" if sites else "no attention", "why": listed(why)}
    original = copy.deepcopy(model)
    change = apply_temp_scale(model, TAU, example, exclude=list(refused) or None)
    modules = dict(original.named_modules())
    definition = Definition([modules["" if n == "(model)" else n] for n in change.targets], TAU)
    with definition.watching():
        expected = outputs(original, example)
    error = max(gap(a, b) for a, b in zip(expected, outputs(model, example), strict=True))
    adapted = [
        text.partition("adapter (")[2].removesuffix(")") for text in change.targets.values() if "adapter" in text
    ]
    why.update(map(reason, adapted))
    kind = "exact, adapter" if adapted else "exact, weights"
    verdict = "WRONG" if not error <= TOLERANCE else f"{kind} (rest refused)" if refused else kind
    return row | {
        "verdict": verdict, "weights": len(change.targets) - len(adapted), "adapters": len(adapted), "error": error,
        "why": listed(why), "targets": change.targets, "skipped": change.skipped,
    }  # fmt: skip


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) if a.numel() else 0.0


def listed(why: Counter[str]) -> str:
    return "; ".join(f"{n} × {text}" for text, n in why.most_common() if text)


def reason(text: str) -> str:
    """Without the names of weights and modules."""
    text = re.sub(r"scaling .* is not", "scaling its knobs is not", re.sub(r"'[^']*'", "…", text))
    return re.sub(r"\[[^\[\]]*\]", "[…]", text).replace("|", "/")[:200]


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON and the table."""
    save("attention_zoo", rows)
    counts = Counter(row["verdict"] for row in rows)
    weights, adapters = (sum(row.get(key, 0) for row in rows) for key in ("weights", "adapters"))
    errors = [row["error"] for row in rows if "error" in row]
    head = (
        "# Attention temperature over timm and Hugging Face\n\n"
        "The smallest model of every timm family and tiny Hugging Face models, random weights, tau = "
        f"{TAU}; relative error of the output in float64 against softmax(logits / tau).\n\n"
        f"{len(rows)} models: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}. {weights} "
        f"attentions scaled in their weights, {adapters} by an adapter; largest error {max(errors, default=0.0):.1e}."
        f"\n\n`{machine()}`\n\n"
    )
    shown = [{**row, "error": f"{row['error']:.0e}" if "error" in row else ""} for row in rows]
    (RESULTS / "attention_zoo.md").write_text(head + markdown(shown, COLUMNS) + "\n")


def main() -> None:
    names = {f"hf/{family}/{kind}": "" for family in FAMILIES for kind in ("sdpa", "eager")} | families()

    def find(family: str) -> tuple[str, Any]:
        name = smallest(names[family]) if names[family] else family
        return described(name), partial(scale_one, name)

    zoo("attention_zoo", {family: partial(find, family) for family in names}, 150.0, write)


if __name__ == "__main__":
    main()
