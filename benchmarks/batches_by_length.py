"""Real tokens a second of a training step, random batches against batches by length, on Python's own documentation.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/batches_by_length.py [--rounds N]``. The texts are the paragraphs of
``pydoc_data.topics``, tokens are words. Orders take turns in every round; CPU time, median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any

import torch
from common import arguments, markdown, save
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from lightning_efficient import LengthGroupedBatchSampler, TokenBudgetBatchSampler

WIDTH, LONGEST, SIZE = 128, 256, 16


def texts() -> list[Tensor]:
    """Word numbers of every paragraph."""
    paragraphs = [p.split() for topic in topics.values() for p in topic.split("\n\n")]
    numbers: dict[str, int] = {}
    kept = [p[:LONGEST] for p in paragraphs if len(p) >= 2]
    return [torch.tensor([numbers.setdefault(word, len(numbers) + 1) for word in p]) for p in kept]


class Encoder(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = ids == 0
        out = self.layers(self.embed(ids), src_key_padding_mask=hidden)
        return out.square().masked_fill(hidden[..., None], 0).sum() / (~hidden).sum()  # type: ignore[no-any-return]


def run(model: Encoder, data: list[Tensor], batches: Iterable[list[int]], steps: int) -> tuple[float, float]:
    """Real tokens a second of CPU time, and fill, over the first steps of an epoch."""
    optimizer, spent, real, full = torch.optim.SGD(model.parameters(), 1e-3), 0.0, 0, 0
    for _, batch in zip(range(steps), batches, strict=False):
        ids = nn.utils.rnn.pad_sequence([data[i] for i in batch], batch_first=True)
        begun = time.process_time()
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()
        spent += time.process_time() - begun
        real, full = real + int((ids != 0).sum()), full + ids.numel()
    return real / spent, real / full


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = texts()
    sizes = [len(text) for text in data]
    model = Encoder(int(max(int(text.max()) for text in data)) + 1)
    orders: dict[str, Any] = {
        "random": BatchSampler(RandomSampler(data), SIZE, drop_last=True),
        "LengthGroupedBatchSampler": LengthGroupedBatchSampler(sizes, SIZE),
        "TokenBudgetBatchSampler": TokenBudgetBatchSampler(sizes, 16 * 64),
    }
    speeds: dict[str, list[float]] = {name: [] for name in orders}
    fills: dict[str, list[float]] = {name: [] for name in orders}
    for number in range(options.rounds):
        for name, order in orders.items():
            if hasattr(order, "set_epoch"):
                order.set_epoch(number)
            speed, fill = run(model, data, order, options.steps)
            speeds[name].append(speed)
            fills[name].append(fill)
    rows = []
    for name in orders:
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["random"], strict=True))
        speed, fill = statistics.median(speeds[name]), statistics.median(fills[name])
        rows.append({"order": name, "fill": round(fill, 3), "speed": round(speed), "ratio": round(ratio, 2)})
    table = markdown(rows, {"order": "batches", "fill": "fill", "speed": "real tokens/s", "ratio": "× random"})
    print(f"{len(data)} texts, {statistics.mean(sizes):.0f} words on average, {max(sizes)} at most")
    print(table)
    save("batches_by_length", rows, texts=len(data), longest=max(sizes)).with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
