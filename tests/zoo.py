"""Five LightningModules as users write them, small enough for a battery of tests; none imports the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


def vit() -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=CLASSES,
    )


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1))).mean(1))


class Decoder(nn.Module):
    """Causal, plain scaled-dot-product attention, embedding tied to the output layer."""

    def __init__(self, vocabulary: int = 12, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10] * 3).round().long().abs() % self.embed.num_embeddings
        h = self.embed(tokens)
        n = self.norm(h)
        split = [f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        a = F.scaled_dot_product_attention(*split, is_causal=True)
        h = h + self.proj(a.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(h)))
        return self.head(h)[:, -1, :CLASSES]


class Cnn(nn.Module):
    """Residual, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stem(x)))
        return self.head((h + self.conv(h)).mean((2, 3)))


class Bert(nn.Module):
    """Random weights, Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10] * 3).round().long().abs() % 12
        return self.head(self.bert(input_ids=tokens).last_hidden_state.mean(1))


class Llama(nn.Module):
    """Random weights, Hugging Face: RMS norms, rotary positions, grouped queries, causal, tied head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=16, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        self.llama = LlamaForCausalLM(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10] * 3).round().long().abs() % 12
        return self.llama(input_ids=tokens).logits[:, -1, :CLASSES]


class CappedAttention(nn.Module):
    """Soft-capped logits, two heads: no weight scales them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, tau: Tensor | float = 1.0) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        logits = 2 * torch.tanh(q @ k.mT / 2) / tau
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Capped(nn.Module):
    """One capped attention, and one that a weight scales. Args of the forward: their temperatures."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, CLASSES)
        self.attn, self.plain = CappedAttention(), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, tau: Tensor | float = 1.0) -> Tensor:
        x = self.embed(x.squeeze(1))
        x = x + self.attn(x, tau) if torch.is_tensor(tau) or tau != 1.0 else x + self.attn(x)
        x = x + self.plain(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class Both(nn.Module):
    """Two halves of an image, read apart, with batch norm and dropout where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = nn.Linear(32, 12), nn.Linear(32, 12)
        self.norm, self.drop, self.head = nn.BatchNorm1d(24), nn.Dropout(0.0), nn.Linear(24, CLASSES)

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        both = torch.cat([self.upper(upper), self.lower(lower)], 1)
        return self.head(self.drop(self.norm(both)).tanh())


class Halves(nn.Module):
    """An image whose halves are two modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both()

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = x.flatten(1).split(32, 1)
        return self.both(upper, lower=lower)


# Where only some methods apply.
SPECIAL: dict[str, Callable[[], nn.Module]] = {"llama": Llama, "capped": Capped, "halves": Halves}
NETS: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": vit,
    "encoder": EncoderClassifier,
    "decoder": Decoder,
    "cnn": Cnn,
    "bert": Bert,
}


class Classifier(pl.LightningModule):
    """Args: net: key of NETS. build: where the net is made. checkpointing: recompute the net's activations."""

    def __init__(self, net: str = "timm_vit", lr: float = 3e-3, build: str = "init", checkpointing: bool = False):
        super().__init__()
        self.save_hyperparameters()
        if build == "init":
            self.net = self._make()

    def _make(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return (NETS | SPECIAL)[self.hparams["net"]]()

    def setup(self, stage: str) -> None:
        if self.hparams["build"] == "setup" and not hasattr(self, "net"):
            self.net = self._make()

    def forward(self, x: Tensor) -> Tensor:
        if self.hparams["checkpointing"] and self.training:
            return checkpoint(self.net, x, use_reentrant=False)
        return self.net(x)

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x.to(next(self.parameters()).dtype)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        """minGPT-like groups: decay for matrices, none for the rest."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Lazy(Classifier):
    """Makes its net in ``configure_model``."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = self._make()


class Sharded(Classifier):
    """Its net is cut in ``configure_model``: by FSDP2, layer by layer, or by tensor parallel inside its MLPs."""

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        data, tensor = (self.device_mesh[f"{kind}_parallel"] for kind in ("data", "tensor"))
        for module in self.net.modules():
            if tensor.size() > 1 and hasattr(module, "fc1"):
                parallelize_module(module, tensor, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
            elif data.size() > 1 and type(module).__name__ in ("Block", "BertLayer", "TransformerEncoderLayer"):
                fully_shard(module, mesh=data)
        if data.size() > 1:
            fully_shard(self.net, mesh=data)


class Manual(Classifier):
    """Manual optimization, two optimizers stepping on different batches."""

    def __init__(self, net: str = "timm_vit", lr: float = 3e-3):
        super().__init__(net, lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = self._loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        params = list(self.net.parameters())
        half = len(params) // 2
        return [
            torch.optim.AdamW(params[:half], lr=1e-3),
            torch.optim.SGD(params[half:], lr=1e-2, momentum=0.9),
        ]


def loader(batches: int = 4, size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * size, 1, 8, 8, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(0, CLASSES, (batches * size,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=size)
