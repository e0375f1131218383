"""Whether runs of one seed started alike: what a paired comparison rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lightning_efficient.ablate.files import START, read_json
from lightning_efficient.ablate.plan import Planned
from lightning_efficient.ablate.variants import BASELINE


def started_alike(runs: Sequence[Planned]) -> list[str]:
    """Say where a variant began with other weights or saw other batches than the baseline of the same seed.

    Args:
        runs: All runs; those that have not started are left out.

    Returns:
        Lines for people.
    """
    starts = {(run.variant, run.seed): start for run in runs if (start := read_json(run.folder / START)).get("batches")}
    notes = _seeds_that_do_nothing(starts)
    weights, first, later = [], [], []
    pairs = [(key, start, starts[BASELINE, key[1]]) for key, start in starts.items() if key[0] != BASELINE
             and (BASELINE, key[1]) in starts]  # fmt: skip
    for (variant, seed), start, base in pairs:
        name = f"{variant} seed {seed}"
        shared = start["weights"].keys() & base["weights"].keys()
        if any(start["weights"][key] != base["weights"][key] for key in shared):
            weights.append(name)
        differs = sorted(int(e) for e in start["batches"].keys() & base["batches"].keys()
                         if start["batches"][e] != base["batches"][e])  # fmt: skip
        if differs and differs[0] == 0:
            first.append(name)
        elif differs:
            later.append(f"{name} from epoch {differs[0]}")
    if not pairs:
        return notes
    if not (weights or first):
        notes.append("Every variant started from the baseline's weights and first batch, seed by seed.")
    if weights:
        notes.append(f"Other initial weights than the baseline of the same seed: {', '.join(weights)}.")
    if first:
        notes.append(f"Another first batch than the baseline of the same seed: {', '.join(first)}.")
    if later:
        notes.append(f"Another order of data than the baseline of the same seed: {', '.join(later)}.")
    return notes


def _seeds_that_do_nothing(starts: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    base = {seed: start for (variant, seed), start in starts.items() if variant == BASELINE}
    same = [(a, b) for a, b in combinations(sorted(base), 2) if base[a] == base[b]]
    if not same:
        return []
    first, second = same[0]
    return [f"Seeds {first} and {second} gave the same weights and batches: does the script seed itself? They are one."]
