"""Which weights are pruned: layers of a known kind, checked one by one before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_efficient.attention.owners import head_count
from lightning_efficient.common.match import canonical_name, modules_by_name, select_modules
from lightning_efficient.common.shards import whole
from lightning_efficient.common.weights import (
    check_weight,
    is_transposed,
    sparse_gradients,
    weight_attributes,
    weight_layers,
)
from lightning_efficient.pruning.granularity import Granularity

# Under these names attention modules keep the layer that reads the heads side by side.
_OUTPUTS = ("proj", "out_proj", "o_proj", "c_proj")


@dataclass(frozen=True)
class PrunableWeight:
    """A weight to prune.

    Args:
        param: The parameter.
        layer: Name of the layer it belongs to.
        module: The layer.
        transposed: Stored as ``(inputs, outputs)``, as Hugging Face's ``Conv1D`` does.
        heads: How many heads the inputs hold, where the layer is the output projection of an attention.
    """

    param: nn.Parameter
    layer: str
    module: nn.Module
    transposed: bool = False
    heads: int | None = None

    def canonical(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as ``(outputs, inputs, ...)``, a view; its own inverse."""
        return tensor.t() if self.transposed else tensor


@dataclass
class Targets:
    """Parameter name → target, and why other weights are left alone."""

    matched: dict[str, PrunableWeight] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


_NO_HEADS = "not covered: no output projection of an attention"


def find_targets(
    model: nn.Module,
    granularity: str = "element",
    criterion: str = "magnitude",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    embeddings: bool = False,
    known: Collection[str] = (),
) -> Targets:
    """Choose the weights, and check every one of them, without changing anything.

    Targets are the weights of ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``nn.MultiheadAttention`` (``in_proj_weight`` or the
    three separate projections, and ``out_proj``), Hugging Face ``Conv1D`` and, on request, ``nn.Embedding``: the output
    layer is one of them, biases and norms never are.

    Args:
        model: The model.
        granularity: As :meth:`Granularity.parse`.
        criterion: The scores; ``"wanda"`` needs layers whose input can be seen.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.
        embeddings: Include ``nn.Embedding`` tables.
        known: Names of weights with a mask already, which may be zero altogether.

    Raises:
        NoMatchError: No module matches.
        ValueError: A matched weight is complex, sparse, quantized, uninitialized or not finite, or does not divide as
            the granularity needs; or every matched weight has to be left alone.
    """
    cut = Granularity.parse(granularity)
    types = weight_layers(embeddings)
    selection = select_modules(model, types=types, include=include, exclude=exclude, method="Pruning")
    found = Targets(skipped=dict(selection.skipped))
    users = _users(model)
    modules, heads = modules_by_name(model), _head_counts(model)
    for layer, module in selection.matched.items():
        for attribute in weight_attributes(module):
            name = f"{layer}.{attribute}" if layer else attribute
            param = module._parameters.get(attribute)
            if param is None:
                found.skipped[name] = "computed by a parametrization, not a parameter: a mask on it would not last"
                continue
            reason = (
                _shared(name, param, users, embeddings)
                or _unranked(name, param)
                or sparse_gradients(module)
                or _unscorable(modules, name, layer, criterion, name in known)
                or (None if cut.kind != "head" or layer in heads else _NO_HEADS)
            )
            if reason is not None:
                found.skipped[name] = reason
                continue
            target = PrunableWeight(param, layer, module, is_transposed(module), heads.get(layer))
            _check_divides(cut, name, target, param)
            found.matched[name] = target
    if not found.matched:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:8])
        raise ValueError(f"Pruning found modules but no weight it can work on ({reasons}).")
    return found


def _check_divides(cut: Granularity, name: str, target: PrunableWeight, param: nn.Parameter) -> None:
    shape = target.canonical(param).shape
    cut.check(name, (shape[0], shape[1], shape[2:].numel()))
    if cut.kind == "head" and target.heads and shape[1] % target.heads:
        raise ValueError(f"{name!r} has {shape[1]} inputs, which {target.heads} heads do not divide. Exclude it.")


def _users(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Parameter → every module that has it, by the parameter's name there; a module counts once."""
    users: dict[int, dict[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for attribute, param in module._parameters.items():
            if param is not None:
                name = canonical_name(f"{prefix}.{attribute}" if prefix else attribute)
                users.setdefault(id(param), {})[name] = module
    return users


def _shared(name: str, param: nn.Parameter, users: dict[int, dict[str, nn.Module]], embeddings: bool) -> str | None:
    others = {other: module for other, module in users[id(param)].items() if other != name}
    if not others:
        return None
    if not embeddings and any(isinstance(module, nn.Embedding) for module in others.values()):
        return f"not covered: tied to the embedding {next(iter(others))!r}"
    return f"tied, also used as {', '.join(others)}: a mask cannot tell its uses apart"


def _unranked(name: str, param: nn.Parameter) -> str | None:
    """A reason to leave a weight alone, or an error if its values cannot be ranked."""
    if (reason := check_weight(name, param, "pruning")) is None and not bool(torch.isfinite(whole(param)).all()):
        raise ValueError(f"{name!r} holds NaN or infinite values, which cannot be ranked. Check the checkpoint.")
    return reason


def _unscorable(modules: dict[str, nn.Module], name: str, layer: str, criterion: str, known: bool) -> str | None:
    """A reason why the criterion has nothing to say about a weight."""
    module, attribute = modules[layer], name[len(layer) :].lstrip(".")
    if criterion != "random" and not known and not bool(whole(module._parameters[attribute]).any()):  # type: ignore[arg-type]
        return "all zero: nothing to rank"
    if criterion == "wanda":
        if isinstance(module, nn.Embedding):
            return "an embedding, which has no input features (criterion='wanda')"
        # Its own projections are arguments of one function, and `out_proj` is never called.
        if any(isinstance(modules[m], nn.MultiheadAttention) for m in (layer, layer.rpartition(".")[0])):
            return "inside nn.MultiheadAttention, whose inputs no hook sees (criterion='wanda')"
    return None


def _head_counts(model: nn.Module) -> dict[str, int]:
    """Name of an output projection → number of heads."""
    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        heads = head_count(module)
        for child in _OUTPUTS if heads else ():
            if heads and isinstance(getattr(module, child, None), nn.Linear):
                found[canonical_name(f"{prefix}.{child}" if prefix else child)] = heads
    return found
