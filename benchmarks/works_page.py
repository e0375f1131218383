"""The page "Does it work on my model?", from the results of the zoos; a test keeps the page and the results together.

python benchmarks/works_page.py
"""

# ruff: noqa: E501  (prose)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "works_on_my_model.md"
Row = dict[str, Any]

TEXT = """\
# Does it work on my model?

Ask your model: it takes a minute, and nothing is trained.

```bash
lightning-efficient targets -c config.yaml   # what each method would change, and why not the rest
```

Nothing is looked up by the name of an architecture. Each method tries what it needs to know on your model (it perturbs tokens,
follows gradients, sets units to zero and removes them), and where it cannot be sure it refuses, with the name of the module and
the reason. Below is what we tried: small models with random weights, in float64, each answer against a reference of its own.

{summary}

## Hugging Face, and attention written by hand

*Temperature*: exact in the weights, or by an adapter in the forward. *Padding*: left-padded batches, forward and gradient. *Saved*:
what `save_pretrained` then does. *Monitor*: attentions whose entropy it reads. *SigmaReparam*: the share of the parameters that it
bounds. *Norm swap*: RepBN, or the affine target in causal models, where batch statistics are refused; how many norms fold away.
*Units*: the share of the parameters that structured pruning can remove exactly. *Masks*: the share that masks cover.
[All errors and reasons](../benchmarks/results/methods_zoo.md).

{families}

## Convolutional and vision networks, and others

Structured pruning: the share that can go exactly, and with `inexact=True`; whether the cut network runs, trains and reloads; what
Torch-Pruning's own pruner does with the same network. [All errors and reasons](../benchmarks/results/structured_zoo.md).

{networks}

## timm

Temperature, and norms that fold away after a swap, in the smallest model of every family. [Temperature](../benchmarks/results/attention_zoo.md),
[norms](../benchmarks/results/fold_zoo.md).

{timm}
"""


def read(name: str) -> list[Row]:
    """The rows of one result."""
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def family(row: Row) -> list[str]:
    """One family; a refusal by name is one word here."""

    def word(key: str) -> str:
        text = str(row.get(key, "–"))
        for long, short in (("refused by name", "refused"), ("nothing to do", "nothing to do"), ("no such", "–")):
            if text.startswith(long):
                return short
        return text

    temperature = word("temperature").replace("exact, ", "")
    padded = {"exact": "yes", "no padding": "–", "nothing to do": "–"}.get(word("padded"), word("padded"))
    units = "none" if row["units"].startswith("none") else row["units"].partition(";")[0]
    sigma = re.match(r"[\d.]+%", word("sigma"))
    norms = word("norms").replace("affine, as batch statistics are refused by name (causal)", "affine")
    monitor = "named" if word("monitor").startswith("named") else word("monitor").partition(",")[0]
    bounded = f"{float(sigma[0][:-1]):.0f}%" if sigma else word("sigma")
    return [row["family"], temperature, padded, word("save"), monitor, bounded, norms, units, word("masks")]


def network(row: Row) -> list[str]:
    theirs = row.get("theirs")
    same = {"yes": "the same"}.get(str(row.get("same")), "something else")
    other = "–" if theirs is None else theirs if isinstance(theirs, str) else f"{theirs:.0%} less, {same}"
    runs = "yes" if row.get("runs") == "yes" else "–"
    return [row["model"], share(row.get("exact")), share(row.get("inexact")), runs, other]


def timm_families() -> list[list[str]]:
    """Those of timm that have attention, or norms to swap."""
    temperatures = {row["family"]: row["verdict"] for row in read("attention_zoo") if "/" not in row["family"]}
    folds = {row["family"]: row for row in read("fold_zoo")}
    rows = []
    for name in sorted({*temperatures, *folds}):
        fold = folds.get(name, {})
        count = fold.get("norms") or 0
        folded = f"{count - (fold.get('left') or 0)} of {count}" if count else "none to swap"
        rows.append([name, temperatures.get(name, "–").replace("exact, ", ""), folded])
    return rows


def page() -> str:
    """The whole page."""
    families, networks, timm = read("methods_zoo"), read("structured_zoo"), timm_families()
    exact = sum(row["temperature"].startswith("exact") for row in families)
    attention = sum(row["temperature"] != "nothing to do" for row in families)
    swapped = [row for row in families if row["norms"].startswith(("repbn", "affine"))]
    worst = max(value for row in families for key, value in row.items() if key.endswith("error"))
    some = sum(bool(row.get("exact") or row.get("inexact")) for row in networks)
    wrong = sum(isinstance(row.get("error"), float) and row["error"] > row.get("bound", 1e-9) for row in networks)
    crashed = sum(isinstance(row.get("theirs"), str) for row in networks)
    other = sum(str(row.get("same", "")).startswith("no (") for row in networks)
    tried = sum("theirs" in row for row in networks)
    summary = "\n".join(
        (
            f"- **Temperature**: exact in {exact} of {attention} families with attention; the rest is refused by name.",
            f"- **Norm swap**: {len(swapped)} of {len(families)} families have norms to swap; all export to what their "
            "formula says.",
            f"- **Structured pruning**: something to remove in {some} of {len(networks)} networks, wrong in "
            f"{wrong or 'none'}. Torch-Pruning's own pruner crashes on {crashed} of the {tried} it was tried on, and "
            f"computes something else on {other}.",
            f"- The largest error of any method in any family is {worst:.1e}, relative, in float64.",
        )
    )
    head = ["family", "temperature", "padding", "saved", "monitor", "SigmaReparam", "norm swap", "units", "masks"]
    return TEXT.format(
        summary=summary,
        families=table(head, [family(row) for row in families]),
        networks=table(["network", "exactly", "inexactly", "runs", "Torch-Pruning"], [network(r) for r in networks]),
        timm=table(["family", "temperature", "norms that fold"], timm),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
