"""sigmaReparam: ``Ŵ = γ W / σ(W)`` with a learned gain (Zhai et al., ICML 2023, arXiv 2303.06296).

Bounding the spectral norm of every weight matrix bounds the attention logits, which keeps attention entropy from
collapsing; the paper trains without warm-up, weight decay or layer normalization. Differences from the published
code (apple/ml-sigma-reparam): pretrained weights are kept, the power iteration runs once per optimizer step in
float32 rather than in every forward, and no module is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import canonical_name, select_modules
from lightning_efficient.common.weights import check_weight, is_transposed, trained_by, weight_attributes, weight_layers
from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.schedulers import Scheduler
from lightning_efficient.weightspace import Block, Boundary, SpectralTransform

METHOD = "sigma_reparam"

# Attribute names under which models fuse query, key and value rows [q; k; v] into one projection.
_FUSED_QKV = ("qkv", "to_qkv", "c_attn", "Wqkv", "in_proj")

# Largest entries between which a spectral norm neither under- nor overflows in float32.
_SMALLEST, _LARGEST = 1e-15, 1e15


@dataclass(frozen=True)
class SigmaReparamConfig:
    """Hyper-parameters of sigmaReparam.

    Args:
        init: ``"preserve"`` starts with ``γ = σ(W)`` (function unchanged, as the published PyTorch code and as needed
            for pretrained models); ``"one"`` starts with ``γ = 1`` (the paper's pseudo-code).
        qkv: Treat a fused query-key-value projection as one matrix (``"fused"``, the published ViT) or as three with
            a gain each (``"split"``).
        monitor_only: Track the spectral norms, change nothing.
        embeddings: Include ``nn.Embedding`` tables (the paper leaves them alone).
        learnable_gain: Train ``γ``; False is plain spectral normalization, the paper's control arm.
    """

    init: Literal["preserve", "one"] = "preserve"
    qkv: Literal["fused", "split"] = "fused"
    monitor_only: bool = False
    embeddings: bool = False
    learnable_gain: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("init", ("preserve", "one")), ("qkv", ("fused", "split"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"SigmaReparam(`{name}`) takes one of {allowed}; got {getattr(self, name)!r}.")


@dataclass
class Targets:
    """The weights sigmaReparam works on: parameter name → (parameter, its matrices), and why others are left alone."""

    matched: dict[str, tuple[nn.Parameter, tuple[Block, ...]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def find_targets(
    model: nn.Module,
    config: SigmaReparamConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Targets:
    """Choose the weights, and check every one of them, without changing anything.

    Targets are the weights of ``nn.Linear``, ``nn.Conv1d/2d/3d`` (a grouped kernel counts as one flattened matrix,
    as in ``torch.nn.utils.spectral_norm``), ``nn.MultiheadAttention`` (``in_proj_weight`` or the three separate
    projections, and ``out_proj``), Hugging Face ``Conv1D`` and, on request, ``nn.Embedding``.

    Args:
        model: The model.
        config: Hyper-parameters; only ``qkv`` and ``embeddings`` matter here.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.

    Raises:
        NoMatchError: No module matches.
        ValueError: A matched weight is complex, sparse, quantized, uninitialized, not finite or beyond 1e15, or does
            not divide by three under ``qkv="split"``; or every matched weight has to be left alone.
    """
    config = config or SigmaReparamConfig()
    selection = select_modules(
        model, types=weight_layers(config.embeddings), include=include, exclude=exclude, method="SigmaReparam"
    )
    found = Targets(skipped=dict(selection.skipped))
    users = _users(model)
    seen: dict[int, str] = {}
    for module_name, module in selection.matched.items():
        for attribute, blocks in _weights(module_name, module, config.qkv):
            name = f"{module_name}.{attribute}" if module_name else attribute
            param = module._parameters.get(attribute)
            if param is None:
                found.skipped[name] = "computed by a parametrization, not a parameter"
            elif id(param) in seen:
                found.skipped[name] = f"the same parameter as {seen[id(param)]!r}, reparametrized there"
            elif isinstance(module, nn.Embedding) and module.sparse:
                found.skipped[name] = "its gradients are sparse (Embedding(sparse=True))"
            elif reason := check_weight(name, param, "sigmaReparam") or _vanishes(name, param, blocks(param)):
                found.skipped[name] = reason
            else:
                seen[id(param)] = name
                found.matched[name] = (param, blocks(param))
                if others := [user for user in users[id(param)] if user != name]:
                    found.notes[name] = f"tied: also used as {', '.join(others)}"
    if not found.matched:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:8])
        raise ValueError(f"SigmaReparam found modules but no weight it can work on ({reasons}).")
    return found


def _users(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(param), []).append(canonical_name(name))
    return users


def _weights(
    name: str, module: nn.Module, qkv: str
) -> Iterator[tuple[str, Callable[[torch.Tensor], tuple[Block, ...]]]]:
    """The weight attributes of a module and how each is cut into matrices."""

    def whole(weight: torch.Tensor) -> tuple[Block, ...]:
        return (Block(0, weight.shape[0]),)

    def thirds(dim: int) -> Callable[[torch.Tensor], tuple[Block, ...]]:
        def cut(weight: torch.Tensor) -> tuple[Block, ...]:
            size, rest = divmod(weight.shape[dim], 3)
            if rest:
                raise ValueError(
                    f"`qkv='split'` needs three equal parts, but {name!r} has {weight.shape[dim]} outputs (grouped-"
                    "query attention?). Exclude it, or use `qkv='fused'`."
                )
            return tuple(Block(i * size, size, dim) for i in range(3))

        return cut

    for attribute in weight_attributes(module):
        fused = attribute == "in_proj_weight" or (attribute == "weight" and name.rpartition(".")[2] in _FUSED_QKV)
        yield attribute, thirds(1 if is_transposed(module) else 0) if fused and qkv == "split" else whole


def _vanishes(name: str, param: nn.Parameter, blocks: Sequence[Block]) -> str | None:
    """A reason to leave alone what cannot be divided by its norm, or an error if it has none."""
    largest = [torch.linalg.vector_norm(block.of(param.detach()), ord=float("inf")) for block in blocks]
    magnitudes: list[float] = torch.stack(largest).tolist()
    if not all(value <= _LARGEST for value in magnitudes):  # false for NaN
        raise ValueError(
            f"{name!r} holds NaN, infinite or huge (> {_LARGEST:g}) values; its spectral norm is undefined. "
            "Check the checkpoint, or exclude it."
        )
    if min(magnitudes) < _SMALLEST:
        return f"all zero, or below {_SMALLEST:g} (or one of q, k, v is): no spectral norm to divide by"
    return None


def make_transform(config: SigmaReparamConfig, blocks: Sequence[Block]) -> SpectralTransform:
    """The transform of one weight under ``config``."""
    return SpectralTransform(blocks, init=config.init, learnable=config.learnable_gain, monitor=config.monitor_only)


def apply_sigma_reparam(
    model: nn.Module,
    optimizer: Optimizer,
    config: SigmaReparamConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    schedulers: Sequence[Scheduler] = (),
) -> tuple[Change, Boundary]:
    """sigmaReparam in a training loop of your own; inside a Lightning Trainer use the callback.

    The model stays plain. From here on every ``optimizer.step()`` updates the raw weights and the gains;
    ``boundary.detach()`` ends it and leaves the trained weights in the model. Where gradients are clipped, call
    ``boundary.before_step(optimizer)`` first. After an exception out of ``step`` that you catch, call
    ``boundary.restore()``: until then, or the next step, weights may be the raw ones.

    Args:
        model: The model; the weights of its matched layers are in ``optimizer``.
        optimizer: The optimizer; the gains join it in a group without weight decay.
        config: Hyper-parameters.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.
        schedulers: Learning-rate schedulers of ``optimizer``, grown by the new group.

    Returns:
        What was done, and the boundary that does it.

    Raises:
        ValueError: As :func:`find_targets`; or a weight is not in ``optimizer``; or that or a scheduler cannot take the
            gains. The weights are unchanged then.
    """
    config = config or SigmaReparamConfig()
    targets = find_targets(model, config, include, exclude)
    trained = trained_by(optimizer)
    if missing := [name for name, (param, _) in targets.matched.items() if id(param) not in trained]:
        raise ValueError(f"not in the optimizer, so they would never be trained: {missing}. Exclude them.")
    boundary = Boundary()
    change = Change(method=METHOD, skipped=targets.skipped)
    for name, (param, blocks) in targets.matched.items():
        boundary.add(name, param, make_transform(config, blocks))
        change.targets[name] = describe(param, blocks, targets.notes.get(name))
    boundary.check([optimizer])
    thetas = boundary.thetas(optimizer)
    add_parameters(optimizer, thetas, schedulers)
    change.added.extend(thetas)
    boundary.start()
    boundary.attach([optimizer])
    return change, boundary


def describe(param: nn.Parameter, blocks: Sequence[Block], note: str | None = None) -> str:
    """One line on a target, for reports."""
    shape = "×".join(map(str, param.shape))
    text = f"{shape}, {len(blocks)} gain{'s' if len(blocks) > 1 else ''}"
    return f"{text} ({note})" if note else text
