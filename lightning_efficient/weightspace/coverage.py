"""How much of a model sigmaReparam bounds, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_efficient.common.match import canonical_name
from lightning_efficient.weightspace.used import Use

# Layers that multiply, and that sigmaReparam does not know.
_PRODUCT_LAYERS = frozenset(
    {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Bilinear"} | {f"ConvTranspose{n}d" for n in (1, 2, 3)}
)


def coverage(
    model: nn.Module, matched: Iterable[nn.Parameter], skipped: Mapping[str, str], uses: Mapping[str, Use] | None
) -> str:
    """Which share of the trained parameters is reparametrized, and what of the rest is why not.

    Args:
        model: The model.
        matched: The parameters that are.
        skipped: Name of a parameter or module → why it is not.
        uses: What a forward has shown of parameters outside of known layers; None: none was made.

    Returns:
        One line.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    owners = {canonical_name(name): type(module).__name__ for name, module in model.named_modules()}
    mine = {id(param) for param in matched}
    shares: dict[str, int] = {}
    total = 0
    for name, param in model.named_parameters():
        if not param.requires_grad or isinstance(param, nn.parameter.UninitializedParameter):
            continue
        name, total = canonical_name(name), total + param.numel()
        if id(param) in mine:
            kind = ""
        elif id(param) in tables:
            kind = "embedding tables"
        elif param.dim() < 2 or max(param.shape) == param.numel():
            kind = "vectors"
        elif why := skipped.get(name) or skipped.get(name.rpartition(".")[0]):
            kind = f"{name} ({why.partition(':')[0]})"
        elif uses is not None and param.dim() > 1 and owners[name.rpartition(".")[0]] not in _PRODUCT_LAYERS:
            kind = "in no matrix product"
        else:
            kind = f"of {owners[name.rpartition('.')[0]]}"
        shares[kind] = shares.get(kind, 0) + param.numel()
    covered = shares.pop("", 0)
    rest = sorted(shares.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{kind} {size / total:.2%}" for kind, size in rest[:6])
    more = f", {len(rest) - 6} more {sum(size for _, size in rest[6:]) / total:.2%}" if len(rest) > 6 else ""
    left = f"; not bounded: {listed}{more}" if rest else ""
    return f"{covered / max(total, 1):.2%} of {total:,} trained parameters{left}"
