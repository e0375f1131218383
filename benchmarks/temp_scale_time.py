"""Inference time of a tempered model against the same model untouched: in its weights, and by forward adapters.

Every variant is a copy of one model. In each round every variant runs once, in shuffled order, and the ratio to the
untouched model's run of the same round is kept; the table shows medians and quartiles of ratios. "copy" is a second
untouched copy: its ratio is the noise. CPU time of the process is compared, so that other load does not count.

    OMP_NUM_THREADS=1 python benchmarks/temp_scale_time.py
    python benchmarks/temp_scale_time.py --device cuda      # wall time
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import RESULTS, arguments, machine, markdown, save
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_efficient.attention.adapter import install
from lightning_efficient.attention.sites import find_attention
from lightning_efficient.attention.temper import Law
from lightning_efficient.attention.temperature import apply_temp_scale

TAU = 0.7


class Bert(nn.Module):
    """The last hidden state of a small BERT (MiniLM's shape), random weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        config._attn_implementation = kind
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens).last_hidden_state


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return nn.TransformerEncoder(layer, 6)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 1000, (batch, length))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ViT-Small 224, batch 4": (
        lambda: timm.create_model("vit_small_patch16_224"), lambda: torch.randn(4, 3, 224, 224),
    ),
    "BERT 6 × 384 sdpa, 4 × 256 tokens": (lambda: Bert("sdpa"), lambda: tokens(4, 256)),
    "BERT 6 × 384 eager, 4 × 256 tokens": (lambda: Bert("eager"), lambda: tokens(4, 256)),
    "nn.TransformerEncoder 6 × 256, fast path, 4 × 256 tokens": (encoder, lambda: torch.randn(4, 256, 256)),
    "SwinV2-Tiny 256, batch 2 (no weights)": (
        lambda: timm.create_model("swinv2_tiny_window8_256"), lambda: torch.randn(2, 3, 256, 256),
    ),
}  # fmt: skip


def adapted(model: nn.Module, example: Tensor, law: Law) -> nn.Module:
    """Every attention by an adapter, whether weights could hold its temperature or not."""
    modules = dict(model.named_modules())
    for name in find_attention(model, example).sites:
        install(model, modules[name], law)
    return model


def variants(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    copies = [copy.deepcopy(model) for _ in range(5)]
    change = apply_temp_scale(copies[1], TAU, example[:2])
    made = {"untouched": model, "copy": copies[0]}
    if not any("adapter" in text for text in change.targets.values()):
        made["in weights"] = copies[1]
    theta = nn.Parameter(torch.tensor([TAU], device=example.device).log(), requires_grad=False)
    laws = {"adapter": Law(TAU), "adapter, learned": Law(log_tau=theta), "adapter, log n": Law(TAU, "log_n")}
    for (name, law), one in zip(laws.items(), copies[2:], strict=True):
        made[name] = adapted(one, example[:2], law)
    return made


@torch.no_grad()
def measure(title: str, rounds: int, device: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    make, data = MODELS[title]
    example = data().to(device)
    models = variants(make().to(device).eval(), example)
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for round_ in range(-1, rounds):
        for name in order.sample(list(models), len(models)):
            start = clock()
            models[name](example)
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 0:
                times[name].append(clock() - start)
    rows = []
    for name in list(models)[1:]:
        ratios = [a / b for a, b in zip(times[name], times["untouched"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {"model": title, "variant": name, "ratio": middle, "quartiles": f"{low:.3f} to {high:.3f}",
             "untouched_ms": 1e3 * statistics.median(times["untouched"]), "ratios": ratios}
        )  # fmt: skip
    return rows


def write(rows: list[dict[str, Any]], rounds: int, device: str) -> None:
    """The JSON and the table."""
    columns = {
        "model": "model", "variant": "variant", "untouched_ms": "untouched, ms", "ratio": "ratio",
        "quartiles": "quartiles",
    }  # fmt: skip
    head = (
        f"# TempScale at inference\n\n{'Wall' if device == 'cuda' else 'CPU'} time of one forward ÷ that of the "
        f"untouched model in the same round, medians of {rounds} rounds in shuffled order; tau = {TAU}.\n\n"
        f"`{machine()}`\n\n"
    )
    save(f"temp_scale_time_{device}", rows)
    (RESULTS / f"temp_scale_time_{device}.md").write_text(head + markdown(rows, columns) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="beginnings of titles")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"temp_scale_time_{args.device}.json"
    done = json.loads(path.read_text())["rows"] if args.only and path.exists() else []
    rows: dict[str, list[dict[str, Any]]] = {title: [r for r in done if r["model"] == title] for title in MODELS}
    for title in MODELS:
        if not args.only or any(title.startswith(only) for only in args.only):
            rows[title] = measure(title, args.rounds, args.device)
            write([row for some in rows.values() for row in some], args.rounds, args.device)  # as they come


if __name__ == "__main__":
    main()
