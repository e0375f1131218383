"""Whether runs of one seed started alike: what a paired comparison rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from lightning_efficient.ablation.files import START, read_json
from lightning_efficient.ablation.plan import Planned
from lightning_efficient.ablation.variants import BASELINE

Start = Mapping[str, Mapping[str, str]]


def started_alike(runs: Sequence[Planned]) -> list[str]:
    """Say where a variant began with other weights or saw other batches than the baseline of the same seed.

    Args:
        runs: All runs; those that have not started are left out.

    Returns:
        Lines for people.
    """
    read = {(run.variant, run.seed): read_json(run.folder / START) for run in runs}
    starts: dict[tuple[str, int], Start] = {key: start for key, start in read.items() if start.get("batches")}
    notes = _seeds_that_do_nothing({seed: start for (variant, seed), start in starts.items() if variant == BASELINE})
    apart: dict[str, list[str]] = {}
    pairs = 0
    for (variant, seed), start in starts.items():
        base = starts.get((BASELINE, seed))
        if variant != BASELINE and base is not None:
            pairs += 1
            for what in _apart(start, base):
                apart.setdefault(what, []).append(f"{variant} seed {seed}")
    if pairs and not apart:
        notes.append("Every variant started from the baseline's weights and saw the same batches, seed by seed.")
    return notes + [
        f"Not as in the baseline of the same seed: {what}: {', '.join(who)}." for what, who in apart.items()
    ]


def _apart(start: Start, base: Start) -> list[str]:
    found = []
    if _differing(start["weights"], base["weights"]):
        found.append("initial weights")
    if epochs := sorted(map(int, _differing(start["batches"], base["batches"]))):
        found.append(f"first batch of epoch {epochs[0]}" + (" and later" if len(epochs) > 1 else ""))
    return found


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [key for key in one.keys() & other.keys() if one[key] != other[key]]


def _seeds_that_do_nothing(baselines: Mapping[int, Start]) -> list[str]:
    same = [pair for pair in combinations(sorted(baselines), 2) if baselines[pair[0]] == baselines[pair[1]]]
    if not same:
        return []
    first, second = same[0]
    return [f"Seeds {first} and {second} gave the same weights and batches: does the script seed itself? They are one."]
