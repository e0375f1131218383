"""TempScale on long texts: does a temperature below 1 help to find manual pages by their one-line description?

all-MiniLM-L6-v2 without training, pages cut at 128, 256 and 512 tokens. The temperature is chosen on half of the
queries (dev) and reported on the other half, against a factor that grows with log n and against whitening, with paired
bootstrap intervals over queries; also how close together the embeddings of long and short pages lie.

    python benchmarks/retrieval.py                  # about 40 minutes on one core; goes on where it stopped
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments
from retrieval_data import PAGES, RUNS, Page, minilm, read_pages
from retrieval_report import write
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.functional import apply_temp_scale, filter_rate, remove_temp_scale

TAUS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
CUTS = (128, 256, 512)
TOKENS = 4096  # of a batch, padding included
LENGTHS, PROBES = (64, 128, 256, 512), 4  # of the filter rate: first tokens, and number of pages
# Name -> arguments of `apply_temp_scale`. SSMax multiplies by s log n with a learned s; without training s is 1, or
# such that nothing changes at 512 or 128 tokens (s = 0.16 and 0.21).
ARMS: dict[str, dict[str, Any]] = {f"tau {tau:g}": {"tau": tau} for tau in TAUS} | {
    "log n / log 512": {"mode": "log_n", "length": 512.0},
    "log n / log 128": {"mode": "log_n", "length": 128.0},
    "ssmax, s = 1": {"mode": "ssmax"},
}


@torch.inference_mode()
def embed(model: nn.Module, token_ids: Sequence[Sequence[int]], pad: int = 0) -> Tensor:
    """Mean over the tokens of the last hidden state, ``(texts, width)``; texts of like length share a batch."""
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    rows: dict[int, Tensor] = {}
    while order:
        longest = len(token_ids[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, TOKENS // longest)))]
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(token_ids[i])] = torch.tensor(token_ids[i])
            mask[row, : len(token_ids[i])] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        rows |= dict(zip(batch, mean, strict=True))
    return torch.stack([rows[i] for i in range(len(token_ids))])


def place(folder: Path, cut: int, arm: str) -> Path:
    """File of the embeddings of one arm."""
    return folder / f"{cut}_{arm.replace(' ', '').replace('/', '_')}.pt"


def encode(model: nn.Module, tokenizer: Any, pages: Sequence[Page], arm: str, cut: int, path: Path) -> None:
    """Write the embeddings of queries and of documents cut at so many tokens."""
    queries = tokenizer([page.query for page in pages], truncation=True, max_length=cut)["input_ids"]
    documents = tokenizer([page.document for page in pages], truncation=True, max_length=cut)["input_ids"]
    example = dict(tokenizer([page.query for page in pages[:2]], padding=True, return_tensors="pt"))
    apply_temp_scale(model, example=example, **ARMS[arm])
    try:
        found = {"queries": embed(model, queries), "documents": embed(model, documents)}
    finally:
        remove_temp_scale(model)
    partial = path.with_suffix(".part")
    torch.save(found, partial)
    partial.rename(path)


class Filter(TorchFunctionMode):
    """Context manager that measures the filter rate of every attention in it; samples must not be padded."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scale = (kwargs or {}).get("scale") or q.shape[-1] ** -0.5
            self.rates.append(filter_rate((q @ k.mT * scale).softmax(-1), iterations=20))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def filter_rates(model: nn.Module, token_ids: Sequence[Sequence[int]], taus: Sequence[float]) -> list[dict[str, Any]]:
    """Mean filter rate of attention on the first tokens of long texts, a row per temperature."""
    example = {"input_ids": torch.tensor([token_ids[0][:8], token_ids[1][:8]])}
    rows = []
    for tau in taus:
        row: dict[str, Any] = {"arm": f"τ = {tau:g}"}
        apply_temp_scale(model, tau, example)
        try:
            for length in LENGTHS:
                ids = torch.tensor([[*ids[: length - 1], ids[-1]] for ids in token_ids])
                with Filter() as seen:
                    model(input_ids=ids)
                row[f"n = {length}"] = float(torch.stack(seen.rates).mean())
        finally:
            remove_temp_scale(model)
        rows.append(row)
    return rows


def study(
    model: nn.Module, tokenizer: Any, pages: Sequence[Page], folder: Path, cuts: Sequence[int] = CUTS, run: bool = True
) -> str:
    """Encode what is missing, and report on what is there.

    Args:
        model: The embedder.
        tokenizer: Its tokenizer.
        pages: Queries and documents.
        folder: Of the embeddings.
        cuts: Tokens at which pages are cut.
        run: False: only report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    for cut, arm in itertools.product(cuts, ARMS):
        if run and not (path := place(folder, cut, arm)).exists():
            started = time.perf_counter()
            encode(model, tokenizer, pages, arm, cut, path)
            print(f"{cut:4d} tokens, {arm}: {time.perf_counter() - started:.0f} s", flush=True)
    embedded = {
        cut: {arm: torch.load(path) for arm in ARMS if (path := place(folder, cut, arm)).exists()} for cut in cuts
    }
    ids = tokenizer([page.document for page in pages], truncation=False, verbose=False)["input_ids"]
    long = [tokens for tokens in ids if len(tokens) >= max(LENGTHS)][:PROBES]
    rates = filter_rates(model, long, (1.0, 0.7, 0.5)) if len(long) > 1 else []
    lengths = torch.tensor([len(tokens) for tokens in ids])
    return write(embedded, lengths, [page.name for page in pages], rates)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder with the unpacked manual pages")
    parser.add_argument("--report", action="store_true", help="run nothing more, report on what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pages = read_pages(options.pages)
    print(study(*minilm(), pages, RUNS / "retrieval", run=not options.report))


if __name__ == "__main__":
    main()
