"""The report of ``retrieval.py``: what the ranks of the right pages say, in tables, pictures and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, save
from torch import Tensor

from lightning_efficient.metrics import plot_by_length
from lightning_efficient.metrics.functional import bin_labels, cosine_by_length, length_bins, mean_cosine
from lightning_efficient.tuning import SweepRow, TemperatureSweep, compare_paired

PLAIN = "tau 1"
METRICS = ("nDCG@10", "MRR@10")
PAGE_EDGES = (256, 512, 1024)  # whole pages, in tokens
WIDTHS = (384, 256, 128, 64)  # of whitened embeddings; chosen on dev
Ranks = dict[str, Tensor]


# -- numbers -----------------------------------------------------------------------------------------------------------


def ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """Rank of each query's own document by cosine, from 1."""
    q, d = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, documents))
    similarity = q @ d.T
    return (similarity > similarity.diagonal()[:, None]).sum(1) + 1


def score(rank: Tensor, metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Per query, with a single relevant document: 1 / log2(1 + rank), or 1 / rank; 0 beyond rank 10."""
    rank = rank.double()
    value = 1 / torch.log2(1 + rank) if metric == "nDCG@10" else 1 / rank
    return torch.where(rank <= 10, value, 0.0).numpy()


def whitened(queries: Tensor, documents: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both with the documents' mean taken off and their covariance made the identity (Su et al., arXiv 2103.15316)."""
    q, d = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, documents))
    mean = d.mean(0)
    _, values, vectors = torch.linalg.svd(d - mean, full_matrices=False)
    basis = vectors[:width].T / values[:width].clamp(min=1e-9)
    return (q - mean) @ basis, (d - mean) @ basis


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the dev and the test queries."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def all_ranks(found: Mapping[str, Mapping[str, Tensor]], dev: Tensor) -> Ranks:
    """Arm → ranks, for one cut; centring and whitening are of the unchanged model's embeddings."""
    out = {name: ranks(**embedded) for name, embedded in found.items()}
    plain = found[PLAIN]
    mean = torch.nn.functional.normalize(plain["documents"], dim=1).mean(0)
    out["centred"] = ranks(*(torch.nn.functional.normalize(plain[k], dim=1) - mean for k in ("queries", "documents")))
    by_width = {w: ranks(*whitened(plain["queries"], plain["documents"], w)) for w in WIDTHS}
    best = max(WIDTHS, key=lambda w: score(by_width[w][dev], "nDCG@10").mean())
    return out | {f"whitened, {best} dimensions": by_width[best]}


def is_tau(arm: str) -> bool:
    return arm.startswith("tau ")


def sweep_of(found: Ranks, rows: Tensor, metric: str) -> TemperatureSweep:
    """The temperatures' part of the arms as ``tune_temperature`` would have returned it."""
    arms = sorted((arm for arm in found if is_tau(arm)), key=lambda arm: -float(arm[4:]))
    table = np.stack([score(found[arm][rows], metric) for arm in arms])
    paired = compare_paired(table, baseline=arms.index(PLAIN))
    columns = zip(arms, paired.mean, paired.difference, paired.low, paired.high, strict=True)
    taus = [SweepRow(float(arm[4:]), *map(float, numbers)) for arm, *numbers in columns]
    return TemperatureSweep(taus, table, True, metric, "queries", 0.95)


# -- tables ------------------------------------------------------------------------------------------------------------


def against_plain(found: Ranks, rows: Tensor) -> list[dict[str, Any]]:
    """Every arm on some queries: means, and differences with intervals that hold for all arms at once."""
    arms = [PLAIN, *(arm for arm in found if arm != PLAIN)]
    lines = [{"arm": arm.replace("tau", "τ =")} for arm in arms]
    for metric in METRICS:
        paired = compare_paired(np.stack([score(found[arm][rows], metric) for arm in arms]))
        for i, line in enumerate(lines):
            line[metric] = f"{paired.mean[i]:.3f}"
            gap = f"{paired.difference[i]:+.3f} [{paired.low[i]:+.3f}, {paired.high[i]:+.3f}]"
            line[f"Δ {metric}"] = gap if i else ""
    return lines


def by_page_length(found: Ranks, rows: Tensor, lengths: Tensor, metric: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Mean of a metric per arm and bin of the length of the whole right page; number of queries per bin."""
    bins = length_bins(lengths[rows], PAGE_EDGES)
    labels = bin_labels(PAGE_EDGES)
    counts = [int((bins == i).sum()) for i in range(len(labels))]
    lines = []
    for arm, rank in found.items():
        values = score(rank[rows], metric)
        cells = {label: f"{values[(bins == i).numpy()].mean():.3f}" for i, label in enumerate(labels) if counts[i]}
        lines.append({"arm": arm.replace("tau", "τ =")} | cells)
    return lines, counts


def seen_edges(cut: int) -> tuple[int, ...]:
    """Bins of what the model sees; pages that are cut have one of their own, ``> cut - 1``."""
    return (*range(128, cut, 128), cut - 1)


def cosines(found: Mapping[str, Mapping[str, Tensor]], lengths: Tensor, cut: int) -> dict[str, list[float]]:
    """Arm → mean cosine between pages in each bin of the length that the model sees."""
    seen = lengths.clamp(max=cut)
    return {
        arm: cosine_by_length(embedded["documents"].double(), seen, seen_edges(cut)).tolist()
        for arm, embedded in found.items()
    }


# -- words -------------------------------------------------------------------------------------------------------------


def findings(dev: Mapping[int, TemperatureSweep], test: Mapping[int, TemperatureSweep], of_long: Any) -> list[str]:
    """What the numbers say."""
    said = []
    for cut, sweep in dev.items():
        if len(sweep.rows) == 1:
            said.append(f"**{cut} tokens.** Not run yet at other temperatures than 1.")
            continue
        row = next(row for row in test[cut].rows if row.tau == sweep.best.tau)
        text = f"**{cut} tokens.** Dev half: {sweep.verdict}"
        if row.tau != 1.0:
            held = "better than 1 there" if row.beats else "worse than 1 there" if row.loses else "noise there"
            text += (
                f" On the test half τ = {row.tau:g} changes {sweep.metric} by {row.difference:+.3f} [{row.low:+.3f}, "
                f"{row.high:+.3f}]: {held}."
            )
        said.append(text)
    for tau, values in of_long.items():
        parts = ", ".join(f"{value:.3f} cut at {cut}" for cut, value in sorted(values.items()))
        said.append(f"Mean cosine between the same long pages (over {max(dev)} tokens) at {tau}: {parts}.")
    return said


def write(
    embedded: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
    lengths: Tensor,
    names: Sequence[str],
    rates: Sequence[dict[str, Any]] = (),
) -> str:
    """Write ``results/retrieval.json``, ``.md`` and the pictures; return the text.

    Args:
        embedded: Tokens at which pages are cut → arm → ``queries`` and ``documents``.
        lengths: Tokens of the whole pages.
        names: Of the pages.
        rates: Rows of :func:`retrieval.filter_rates`.
    """
    dev, test = halves(len(lengths))
    embedded = {cut: arms for cut, arms in embedded.items() if PLAIN in arms}
    cuts, longest = sorted(embedded), max(embedded)
    found = {cut: all_ranks(embedded[cut], dev) for cut in cuts}
    sweeps = {cut: (sweep_of(found[cut], dev, "nDCG@10"), sweep_of(found[cut], test, "nDCG@10")) for cut in cuts}
    close = {cut: cosines(embedded[cut], lengths, cut) for cut in cuts}
    long = lengths > longest
    of_long = {
        arm.replace("tau", "τ ="): {c: float(mean_cosine(embedded[c][arm]["documents"][long])) for c in cuts}
        for arm in embedded[longest]
        if all(arm in embedded[c] for c in cuts)
    }
    path = save(
        "retrieval", [], pages=list(names), lengths=lengths.tolist(), dev=dev.tolist(), test=test.tolist(),
        ranks={cut: {arm: rank.tolist() for arm, rank in arms.items()} for cut, arms in found.items()},
        cosine_by_seen_length=close, cosine_of_long_pages=of_long, filter_rates=list(rates),
    )  # fmt: skip
    _pictures(path, sweeps[longest][0], close[longest], lengths, longest)
    said = findings({c: s[0] for c, s in sweeps.items()}, {c: s[1] for c, s in sweeps.items()}, of_long)
    parts = [f"# Retrieval of manual pages at several attention temperatures\n\n{_about(lengths, dev, test)}"]
    parts.append("## Findings\n\n" + "\n".join(f"- {sentence}" for sentence in said))
    for cut in cuts:
        lines = against_plain(found[cut], test)
        parts.append(f"## Test half, pages cut at {cut} tokens\n\n{markdown(lines, {k: k for k in lines[0]})}")
    for cut in cuts:
        lines, counts = by_page_length(found[cut], test, lengths, "nDCG@10")
        labels = dict(zip(bin_labels(PAGE_EDGES), counts, strict=True))
        heading = {"arm": "arm"} | {label: f"{label} ({count})" for label, count in labels.items()}
        parts.append(
            f"## nDCG@10 by tokens of the whole page, cut at {cut}\n\nTest half; number of queries in brackets.\n\n"
            f"{markdown(lines, heading)}"
        )
    parts.append(_cosine_section(close[longest], longest))
    if rates:
        parts.append(f"## Filter rate of attention\n\n{_RATES}\n\n{markdown(list(rates), {k: k for k in rates[0]})}")
    text = "\n\n".join(parts)
    path.with_suffix(".md").write_text(text + "\n")
    return text


_RATES = "Mean over layers, heads and pages of `σ_a = ‖H A‖₂` on the first n tokens of long pages; 0: all averaged."


def _about(lengths: Tensor, dev: Tensor, test: Tensor) -> str:
    return (
        f"all-MiniLM-L6-v2, untrained; {len(lengths)} pages of `manpages` and `manpages-dev`, a query being the page's "
        f"one-line description. Dev {len(dev)}, test {len(test)} queries, all pages as candidates. Differences are to "
        "τ = 1, paired; intervals: 95 % bootstrap over queries, for all rows of a table at once. `centred` and "
        "`whitened` use the mean and covariance of all pages, at τ = 1; the dimensions are chosen on dev. "
        "Raw ranks: `retrieval.json`. Made by `python benchmarks/retrieval.py`."
    )


def _cosine_section(close: Mapping[str, Sequence[float]], cut: int) -> str:
    labels = bin_labels(seen_edges(cut))
    labels = [*labels[:-1], f"{cut} (cut)"]
    lines = []
    for arm, values in close.items():
        cells = {label: "" if math.isnan(v) else f"{v:.3f}" for label, v in zip(labels, values, strict=True)}
        lines.append({"arm": arm.replace("tau", "τ =")} | cells | {"gap": f"{values[-1] - values[1]:+.3f}"})
    columns = {"arm": "arm"} | {label: label for label in labels} | {"gap": f"{labels[-1]} minus {labels[1]}"}
    return (
        f"## Mean cosine between pages, by the tokens that the model sees\n\nPages cut at {cut}.\n\n"
        f"{markdown(lines, columns)}\n\n![mean cosine against length](retrieval_cosine.png)\n\n"
        f"![nDCG@10 on dev against τ, cut at {cut}](retrieval_sweep.png)"
    )


def _pictures(
    path: Path, sweep: TemperatureSweep, close: Mapping[str, Sequence[float]], lengths: Tensor, cut: int
) -> None:
    bins = length_bins(lengths.clamp(max=cut), seen_edges(cut))
    counts = [int((bins == i).sum()) for i in range(len(seen_edges(cut)) + 1)]
    curves: dict[float | str, Sequence[float]] = {float(a[4:]): v for a, v in close.items() if is_tau(a)}
    ordered = dict(sorted(curves.items(), key=lambda item: -float(item[0])))
    figure = plot_by_length(
        ordered, seen_edges(cut), "mean cosine between pages", f"all-MiniLM-L6-v2, manual pages cut at {cut} tokens",
        counts,
    )  # fmt: skip
    figure.savefig(path.with_name("retrieval_cosine.png"), dpi=150)
    sweep.figure().savefig(path.with_name("retrieval_sweep.png"), dpi=150)
