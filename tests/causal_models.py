"""Small models that hide the future from the past, and models that do not, as people write them.

Each entry makes (model, inputs); inputs are what the model is called with, as keywords if they are a dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

W, T, V = 16, 9, 13  # width, positions, vocabulary
Maker = Callable[[], tuple[nn.Module, Any]]


def tokens(length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(1, V, (2, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Norm, mixer, norm, MLP. Args: mixer: (batch, positions, width) to the same."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.LayerNorm(W), nn.LayerNorm(W), mixer
        self.mlp = nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """Token ids to logits. Args: mixers: one a block. pooled: classify the mean instead."""

    def __init__(self, *mixers: nn.Module, pooled: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.pooled = nn.Embedding(V, W), nn.Linear(W, V), pooled
        self.blocks = nn.Sequential(*map(Block, mixers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embed(ids))
        return self.head(x.mean(1) if self.pooled else x)


class Attention(nn.Module):
    """Two heads; ``how`` writes the scores: a function of q, k, v (batch, heads, positions, channels)."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(W, 3 * W), nn.Linear(W, W), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.how(q, k, v).transpose(1, 2).flatten(2))


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v


def positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(q.shape[-2], q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ones.tril() * ones.triu(-1)).bool())


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sees = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    sees[:6, :6] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(q.shape[-2], q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ones.tril(6) * ones.triu(-6)).bool())


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    kv = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return (q.unsqueeze(-2) @ kv).squeeze(-2) / (q * k.cumsum(2)).sum(-1, keepdim=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(q.shape[-2], q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ones.tril(1) * ones.triu(-1)).bool())


class LastFew(nn.Module):
    """The last four positions ask all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_norm, self.kv, self.q = (
            nn.LayerNorm(W),
            nn.LayerNorm(W),
            nn.Linear(W, 2 * W),
            nn.Linear(W, W),
        )

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.norm(x)).chunk(2, -1)
        sees = torch.ones(4, x.shape[1], dtype=torch.bool).tril(x.shape[1] - 4)
        return F.scaled_dot_product_attention(self.q(self.to_norm(x[:, -4:])), k, v, attn_mask=sees)


class Conv(nn.Module):
    """Args: kernel: its size. left: how much of the padding is on the left."""

    def __init__(self, kernel: int = 3, left: int = 1) -> None:
        super().__init__()
        self.conv, self.pad = nn.Conv1d(W, W, kernel), (left, kernel - 1 - left)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), self.pad)).transpose(1, 2)


class Strided(nn.Module):
    """Three outputs of 24 positions; the first begins where all do, the last hears more than half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.convs = nn.Sequential(*(nn.Conv1d(w, W, 3, 2, 1) for w in (3, W, W)))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(self.norm(x).mT)


class Dilated(nn.Module):
    """Two taps, one of them further back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(W, W, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Fourier(nn.Module):
    """A long causal convolution by FFT (S4, Hyena): causal up to rounding only."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(floats(W, T))

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x, n, 1) * torch.fft.rfft(self.kernel.t(), n, 0), n, 1)
        return y[:, : x.shape[1]]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn = kind(W, W // 2 if bidirectional else W, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class TwoWays(nn.Module):
    """A forward and a backward net of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.GRU(W, W // 2, batch_first=True), nn.GRU(W, W // 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.there(x)[0], self.back(x.flip(1))[0].flip(1)], -1)


class TokenShift(nn.Module):
    """RWKV's: a decayed running sum, and the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.r = (nn.Linear(W, W) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        k, v, r = self.k(x + before).exp(), self.v(before), self.r(x).sigmoid()
        out, num, den = [], torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            num, den = 0.9 * num + k[:, t] * v[:, t], 0.9 * den + k[:, t]
            out.append(r[:, t] * num / den)
        return torch.stack(out, 1)


class OverTime(nn.Module):
    """MLP-Mixer over time. Args: causal: with a triangular weight."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.mix, self.causal = nn.Linear(T, T), causal

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mix.weight.tril() if self.causal else self.mix.weight
        return torch.einsum("ts,bsc->btc", weight, x)


class ZeroStart(nn.Module):
    """A branch that starts at zero (ReZero, zero-initialised projections, layer scale)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.scale = mixer, nn.Parameter(torch.zeros(W))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.mixer(x)


class TimeFirst(nn.Module):
    """torch's encoder on (positions, batch, width)."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.layer, self.causal = nn.TransformerEncoderLayer(W, 2, 32, dropout=0.0), causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x)) if self.causal else None
        return self.layer(x, mask)


class Stemmed(nn.Module):
    """A causal stem below a bidirectional encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(Conv(3, 2))
        self.encoder = nn.Sequential(Block(Attention(full)), Block(Attention(full)))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.stem(x))


class Waves(nn.Module):
    """A one-dimensional convnet with channels first. Args: left: padding of a kernel of three."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.inner, self.last, self.left = nn.Conv1d(3, W, 3), nn.Conv1d(W, W, 3), left
        self.norm1, self.norm2 = nn.LayerNorm(W), nn.LayerNorm(W)

    def forward(self, x: Tensor) -> Tensor:
        pad = (self.left, 2 - self.left)
        h = self.norm1(self.inner(F.pad(x, pad)).transpose(1, 2)).transpose(1, 2)
        return self.norm2(self.last(F.pad(h, pad)).transpose(1, 2)).mean(1)


class ImageNorm(nn.LayerNorm):
    """Over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pictures(nn.Module):
    """Args: stem: a convolution on three channels."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.conv, self.head = stem, ImageNorm(W), nn.Conv2d(W, W, 1), nn.Linear(W, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(self.stem(x))).mean((2, 3)))


class Spectrogram(nn.Module):
    """(batch, 1, frames, bands): a convolution over neighbouring bands, and attention over frames."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.bands, self.block = nn.Conv2d(1, 4, (1, 3), padding=(0, 1)), Block(Attention(how))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.bands(x).transpose(1, 2).flatten(2)).mean(1)


class Raster(nn.Module):
    """Patches of an image in reading order behind a class token. Args: how: the attention between them."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, W, 4, 4), nn.Parameter(floats(1, 1, W))
        self.blocks = nn.Sequential(Block(Attention(how)), Block(Attention(how)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        return self.blocks(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1))[:, -1]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(W, W), nn.LayerNorm(W), nn.ReLU(), nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NextToken(nn.Module):
    """Shifts inside; the batch is a dict with labels and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Language(Attention(filled))

    def forward(self, ids: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return (loss * weight[:, 1:].flatten()).mean()


class FromEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(Attention(positional)), Block(Attention(positional)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)[:, -1]


def hf(
    kind: str, config: str, inputs: Callable[[], dict[str, Tensor]], attn: str | None = "eager", **sizes: Any
) -> Maker:
    """A Hugging Face model from its config."""

    def make() -> tuple[nn.Module, Any]:
        import transformers

        common = {"vocab_size": V, "hidden_size": W, "num_hidden_layers": 2, "use_cache": False}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        made = getattr(transformers, config)(**{**common, **special, **sizes})
        options = {} if attn is None else {"attn_implementation": attn}
        return getattr(transformers, kind)._from_config(made, **options), inputs()

    return make


def ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def timm(name: str, size: int = 32, **options: Any) -> Maker:
    def make() -> tuple[nn.Module, Any]:
        import timm as library

        return library.create_model(name, num_classes=3, **options), (floats(2, 3, size, size),)

    return make


def language(*mixers: Callable[[], nn.Module], **options: Any) -> Maker:
    return lambda: (Language(*(mixer() for mixer in mixers), **options), (tokens(),))


HEADS = {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}

CAUSAL: dict[str, Maker] = {
    "masked_fill": language(lambda: Attention(filled)),
    "masked_fill, pooled": language(lambda: Attention(filled), pooled=True),
    "sdpa, all positional": language(lambda: Attention(positional)),
    "causal window": language(lambda: Attention(window), lambda: Attention(window)),
    "behind a long prefix": language(lambda: Attention(prefix)),
    "the last few positions": lambda: (nn.Sequential(LastFew(), nn.Linear(W, 3)), (floats(2, T, W),)),
    "linear attention": language(lambda: Attention(linear)),
    "causal convolution": language(lambda: Conv(3, 2)),
    "dilated convolutions, two taps": language(lambda: Conv(2, 1), Dilated),
    "convolution by FFT": language(Fourier),
    "LSTM": language(lambda: Recurrent(nn.LSTM)),
    "GRU, pooled": language(lambda: Recurrent(nn.GRU), pooled=True),
    "token shift": language(TokenShift),
    "triangular mixer": language(lambda: OverTime(True)),
    "zero-initialised branch": language(lambda: ZeroStart(Attention(filled))),
    "torch encoder, time first": lambda: (TimeFirst(True), (floats(T, 2, W),)),
    "waves, padded left": lambda: (Waves(2), (floats(2, 3, 24),)),
    "next token": lambda: (
        NextToken(),
        {"ids": tokens(), "labels": tokens(seed=1), "weight": padded()["attention_mask"]},
    ),
    "embedded, last position": lambda: (FromEmbeddings(), (floats(2, T, W),)),
    "spectrogram": lambda: (Spectrogram(filled), (floats(2, 1, T, 4),)),
    "image in reading order": lambda: (Raster(positional), (floats(2, 3, 16, 8),)),
    "GPT-2, eager": hf("GPT2LMHeadModel", "GPT2Config", ids, n_embd=W, n_head=2, n_positions=16),
    "GPT-NeoX, padded": hf("GPTNeoXForCausalLM", "GPTNeoXConfig", padded, **HEADS),
    "OPT": hf("OPTForCausalLM", "OPTConfig", ids, "sdpa", ffn_dim=32, word_embed_proj_dim=W, num_attention_heads=2),
    "Mamba": hf("MambaForCausalLM", "MambaConfig", ids, state_size=4, attn=None),
    "T5": hf(
        "T5ForConditionalGeneration", "T5Config", lambda: {**padded(), "labels": tokens(seed=1)},
        d_model=W, d_kv=8, num_heads=2, d_ff=32, num_layers=2, decoder_start_token_id=0, attn=None,
    ),
}  # fmt: skip

OTHERS: dict[str, Maker] = {
    "attention": language(lambda: Attention(full)),
    "local attention": language(lambda: Attention(local), lambda: Attention(local)),
    "wide local attention": language(lambda: Attention(wide)),
    "convolution": language(Conv),
    "convolution, even kernel": language(lambda: Conv(4, 1)),
    "convolution, two taps ahead": language(lambda: Conv(2, 0)),
    "strided convolutions": lambda: (Strided(), (floats(2, 24, 3),)),
    "bidirectional LSTM": language(lambda: Recurrent(nn.LSTM, True)),
    "two recurrent nets": language(TwoWays),
    "mixer over time": language(lambda: OverTime(False)),
    "zero-initialised branch": language(lambda: ZeroStart(Attention(full))),
    "causal stem": lambda: (Stemmed(), (floats(2, T, W),)),
    "torch encoder, time first": lambda: (TimeFirst(False), (floats(T, 2, W),)),
    "waves": lambda: (Waves(1), (floats(2, 3, 24),)),
    "token by token": lambda: (Perceptron(), (floats(2, T, W),)),
    "rows": lambda: (Perceptron(), (floats(8, W),)),
    "images, 3x3": lambda: (Pictures(nn.Conv2d(3, W, 3, padding=1)), (floats(2, 3, 8, 8),)),
    "images, strided stem": lambda: (Pictures(nn.Conv2d(3, W, 3, 2, 1)), (floats(2, 3, 8, 8),)),
    "images, wide strided stem": lambda: (Pictures(nn.Conv2d(3, W, 7, 4, 3)), (floats(2, 3, 16, 16),)),
    "images, patches": lambda: (Pictures(nn.Conv2d(3, W, 4, 4)), (floats(2, 3, 16, 16),)),
    "spectrogram": lambda: (Spectrogram(full), (floats(2, 1, T, 4),)),
    "image, patches and a token": lambda: (Raster(full), (floats(2, 3, 16, 8),)),
    "ViT": timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2),
    "Swin": timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    ),
    "ConvNeXt": timm("convnext_atto", 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "PVT v2": timm("pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)),
    "CaiT": timm("cait_xxs24_224", 32, img_size=32, depth=2, embed_dim=24, num_heads=2),
    "BERT, padded": hf("BertModel", "BertConfig", padded, **HEADS),
    "DistilBERT": hf("DistilBertModel", "DistilBertConfig", padded, dim=W, n_heads=2, n_layers=2, hidden_dim=32),
    "T5 encoder": hf(
        "T5EncoderModel", "T5Config", padded, d_model=W, d_kv=8, num_heads=2, d_ff=32, num_layers=2, attn=None
    ),
}  # fmt: skip
