"""One sentence a variant, in plain words: whether it helps, as far as its seeds can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_efficient.comparison.estimate import LEVEL, Difference, holm, json_number
from lightning_efficient.comparison.quantities import Quantity

MIN_SEEDS = 3
_WORDS = {("min", True): "worse", ("min", False): "better", ("max", True): "better", ("max", False): "worse"}


@dataclass(frozen=True)
class Verdict:
    """What can be said of one variant.

    Args:
        variant: Its name.
        call: ``"better"``, ``"worse"``, ``"higher"`` and ``"lower"`` (where it is not known which is better),
            ``"none"`` for no evidence of a difference, ``"open"`` where the runs cannot tell.
        text: The sentence.
        p_corrected: Of the difference, Holm-corrected for ``comparisons``; ``None`` if it was not tested.
        comparisons: How many differences were tested, so one a variant that has enough seeds.
        cost: What it does to size, latency, memory and time, and at what price; empty if none of these is logged.
        gain: ``"smaller"``, ``"faster"`` or ``"smaller and faster"`` by 5 % or more beyond noise, where there is no
            evidence of a difference in what it is judged by; else empty.
    """

    variant: str
    call: str
    text: str
    p_corrected: float | None
    comparisons: int
    cost: str = ""
    gain: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return vars(self) | {"p_corrected": json_number(self.p_corrected)}


def verdicts(quantity: Quantity, baseline: str, differences: Mapping[str, Difference | None]) -> list[Verdict]:
    """Judge every variant by one quantity, the family of tests held to 5 % together.

    Nothing is called from fewer than 3 seeds: two failures that hit the same variant, or two rounded accuracies that
    happen to be equal, are no rare event.

    Args:
        quantity: What variants are judged by.
        baseline: Name of the variant they are compared with.
        differences: Variant → its difference; ``None``: one side does not have the quantity.
    """
    open_texts = {name: _open(quantity, baseline, difference) for name, difference in differences.items()}
    tested = {n: d for n, d in differences.items() if d is not None and open_texts[n] is None}
    corrected = dict(zip(tested, holm([_p(d) for d in tested.values()]), strict=True))
    found = []
    for name, text in open_texts.items():
        if text is not None:
            found.append(Verdict(name, "open", text, None, len(tested)))
        else:
            found.append(_judge(name, quantity, baseline, tested[name], corrected[name], len(tested)))
    return found


# What is logged, the nearest to what a user pays first → how it is called.
_COSTS = {
    ("exported: size", "exported: parameters", "parameters"): "the size",
    ("exported: latency",): "the latency",
    ("peak memory",): "the peak memory",
    ("ms per step",): "the time a step",
}
_CLEARLY = 0.95  # a ratio of size or latency that is worth a word
_PRICES = {
    "better": "and better {}", "worse": "and worse {}", "none": "at no measurable loss of {}",
    "higher": "and higher {}", "lower": "and lower {}", "open": "and too few runs to tell what {} loses",
}  # fmt: skip


def cost_of(differences: Mapping[str, Difference | None], call: str, headline: Quantity) -> str:
    """What a variant costs, in one sentence beside its verdict.

    Args:
        differences: Quantity of time or size → its ratio to the baseline.
        call: Of the verdict.
        headline: What the verdict is about.
    """
    said, noisy = [], []
    for name, difference in _logged(differences).items():
        ends = difference.interval
        if difference.vague:
            noisy.append(name)
        elif _same(difference):
            continue
        elif abs(difference.mean - 1) >= 0.005:
            alone = " (1 run)" if ends is None and "size" not in name else ""
            said.append(f"{_two_digits(difference.mean)} × {name}{alone}")
    text = f"{', '.join(said)} {_PRICES[call].format(headline.metric or headline.name)}." if said else ""
    return " ".join(filter(None, (text, f"Too noisy to tell: {', '.join(noisy)}." if noisy else "")))


def gain_of(differences: Mapping[str, Difference | None], call: str) -> str:
    """What a variant is without a measurable loss: ``"smaller"``, ``"faster"``, both, or nothing.

    Args:
        differences: Quantity of time or size → its ratio to the baseline.
        call: Of the verdict.
    """
    if call != "none":
        return ""
    logged = _logged(differences)
    return " and ".join(
        word
        for name, word in (("the size", "smaller"), ("the latency", "faster"))
        if (d := logged.get(name)) is not None and not d.vague and not _same(d) and d.mean <= _CLEARLY
    )


def _logged(differences: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """How a cost is called → its difference, of those that are there."""
    found = {}
    for starts, name in _COSTS.items():
        matching = (d for start in starts for n, d in differences.items() if n.startswith(start) and d is not None)
        if (difference := next(matching, None)) is not None and math.isfinite(difference.mean):
            found[name] = difference
    return found


def _same(difference: Difference) -> bool:
    """Whether a ratio is no measurable difference."""
    ends = difference.interval
    return ends is not None and not difference.constant and ends[0] <= 1 <= ends[1]


def _two_digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


def _p(difference: Difference) -> float:
    return 1.0 if difference.p_value is None else difference.p_value


def _open(quantity: Quantity, baseline: str, difference: Difference | None) -> str | None:
    """Why the runs cannot tell, or ``None``."""
    if difference is None:
        return f"No verdict: {quantity.name} is not logged on both sides."
    bad = [sum(not math.isfinite(v) for v in group) for group in (difference.after, difference.before)]
    if any(bad):
        counts = [f"{n} of {len(g)}" for n, g in zip(bad, (difference.after, difference.before), strict=True)]
        return (
            f"No verdict: {counts[0]} runs ended in nan or infinity ({baseline}: {counts[1]}), so there is no mean of "
            f"{quantity.name}."
        )
    seeds = difference.seeds
    if seeds < MIN_SEEDS:
        return (
            f"No verdict from {_seeds(difference)}: {quantity.name} {difference.mean:+.4g}; from noise it can be told "
            f"with {MIN_SEEDS} or more."
        )
    if difference.constant and difference.mean:
        measured = f"{quantity.name} {difference.mean:+.4g}, the same for every one of {_seeds(difference)}"
        if len(set(difference.before)) == 1:
            return f"No verdict: {measured}. The seed does not seem to change anything in these runs."
        return f"No verdict: {measured}. It moves in steps that are too coarse for an interval; more seeds tell more."
    return None


def _judge(
    variant: str, quantity: Quantity, baseline: str, difference: Difference, corrected: float, count: int
) -> Verdict:
    measured = f"{quantity.name} {difference.show()}"
    if corrected <= LEVEL:
        call = _WORDS.get((quantity.better or "", difference.mean > 0), "higher" if difference.mean > 0 else "lower")
        text = f"{call.capitalize()} than {baseline} with {_seeds(difference)}: {measured}."
    elif difference.constant:
        call, text = "none", f"Equal to {baseline} to the last digit, with {_seeds(difference)}: {quantity.name}."
    else:
        call, text = "none", f"No evidence of a difference with {_seeds(difference)}: {measured}."
        if _p(difference) <= LEVEL:
            text = text[:-1] + f" alone, not among {count} comparisons (Holm-corrected p {corrected:.2g})."
    return Verdict(variant, call, text, corrected, count)


def _seeds(difference: Difference) -> str:
    if difference.paired:
        return f"{difference.seeds} seed{'s' if difference.seeds > 1 else ''}"
    return f"{len(difference.after)} and {len(difference.before)} unpaired runs"
