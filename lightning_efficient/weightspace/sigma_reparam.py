"""sigmaReparam: ``Ŵ = γ W / σ(W)`` with a learned gain (Zhai et al., ICML 2023, arXiv 2303.06296).

Bounding the spectral norm of every weight matrix bounds the attention logits, which keeps attention entropy from
collapsing; the paper trains without warm-up, weight decay or layer normalization. Differences from the published
code (apple/ml-sigma-reparam): pretrained weights are kept, the power iteration runs once per optimizer step in
float32 rather than in every forward, and no module is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import (
    Choice,
    NoMatchError,
    Selection,
    canonical_name,
    references,
    select_modules,
)
from lightning_efficient.common.running import Inputs, as_call, evaluating
from lightning_efficient.common.shards import is_cut, whole
from lightning_efficient.common.weights import check_weight, is_transposed, trained_by, weight_attributes, weight_layers
from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.schedulers import Scheduler
from lightning_efficient.weightspace import Block, Boundary, SpectralTransform
from lightning_efficient.weightspace.block import as_matrices
from lightning_efficient.weightspace.coverage import coverage
from lightning_efficient.weightspace.used import Use, low_rank, matrices_used

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
        gain: ``"log"`` trains ``log γ``: a step is relative, and none leads through zero. ``"linear"`` trains ``γ``, as
            published.
        gain_lr: Factor on the learning rate of each gain, which else is that of its weight; published: 1.
    """

    init: Literal["preserve", "one"] = "preserve"
    qkv: Literal["fused", "split"] = "fused"
    monitor_only: bool = False
    embeddings: bool = False
    learnable_gain: bool = True
    gain: Literal["linear", "log"] = "log"
    gain_lr: float = 10.0

    def __post_init__(self) -> None:
        words = (("init", ("preserve", "one")), ("qkv", ("fused", "split")), ("gain", ("linear", "log")))
        for name, allowed in words:
            if getattr(self, name) not in allowed:
                raise ValueError(f"SigmaReparam(`{name}`) takes one of {allowed}; got {getattr(self, name)!r}.")
        if not (math.isfinite(self.gain_lr) and self.gain_lr > 0):
            raise ValueError(
                f"SigmaReparam(`gain_lr`) takes a finite factor above 0; got {self.gain_lr!r}. For gains that stay as "
                "they are: `learnable_gain=False`."
            )


@dataclass
class Targets:
    """The weights sigmaReparam works on: parameter name → (parameter, its matrices), why others are left alone,
    and in one line which share of the trained parameters that is."""

    matched: dict[str, tuple[nn.Parameter, tuple[Block, ...]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    coverage: str = ""


def find_targets(
    model: nn.Module,
    config: SigmaReparamConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    uses: Mapping[str, Use] | None = None,
) -> Targets:
    """Choose the weights, and check every one of them, without changing anything.

    Targets are the weights of ``nn.Linear``, ``nn.Conv1d/2d/3d`` (a grouped kernel counts as one flattened matrix,
    as in ``torch.nn.utils.spectral_norm``), ``nn.MultiheadAttention`` (``in_proj_weight`` or the three separate
    projections, and ``out_proj``), Hugging Face ``Conv1D`` and, on request, ``nn.Embedding``; and what other modules
    hold and multiply with, a stack of matrices (experts) among it, as ``uses`` says.

    Args:
        model: The model.
        config: Hyper-parameters; only ``qkv`` and ``embeddings`` matter here.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.
        uses: What :func:`find_uses` saw in a forward; None: parameters of other modules are left alone, and named.

    Raises:
        NoMatchError: No module matches.
        ValueError: A matched weight is a factor of a low-rank update of a frozen one (LoRA), complex, sparse,
            quantized, uninitialized, not finite or beyond 1e15, or does not divide by three under ``qkv="split"``; or
            every matched weight has to be left alone.
    """
    config = config or SigmaReparamConfig()
    loose = find_loose(model)
    choice = Choice.of(model, include, exclude, "SigmaReparam", loose)
    chosen = {name: param for name, param in loose.items() if not choice.why_not(name)}
    used = {name: use for name, use in (uses or {}).items() if name in chosen and use != "other"}
    selection = _layers(model, weight_layers(config.embeddings), include, exclude, loose, bool(used))
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
    for name, param in chosen.items():
        cut = (Block(0, param.shape[0], stack=used.get(name) == "stack"),)
        if name not in used:
            if uses is None or name in uses:
                found.skipped[name] = _LOOSE if uses is None else "multiplied in another shape than its own"
        elif reason := check_weight(name, param, "sigmaReparam") or _vanishes(name, param, cut):
            found.skipped[name] = reason
        elif id(param) not in seen:
            found.matched[name] = (param, cut)
    _refuse_low_rank(model, found)
    found.coverage = coverage(model, (param for param, _ in found.matched.values()), found.skipped, uses)
    if not found.matched:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:8])
        raise ValueError(f"SigmaReparam found modules but no weight it can work on ({reasons}).")
    return found


_LOOSE = "held by no layer: whether it multiplies as a matrix shows when the model runs (give an `example`)"


def find_loose(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters that may be matrices, or stacks of them, and belong to no layer that is known.

    Args:
        model: The model.
    """
    layers = weight_layers(embeddings=True) + (nn.EmbeddingBag,)
    known = {id(p) for m in model.modules() if isinstance(m, layers) for p in m.parameters(recurse=False)}
    idle = references(model)
    found = {}
    for name, param in model.named_parameters():
        name = canonical_name(name)
        if isinstance(param, nn.parameter.UninitializedParameter):
            continue
        # (1, tokens, width) and (width, 1, 1): added or multiplied.
        many = param.dim() > 1 and min(param.shape[-2:]) > 1 and (param.dim() == 2 or param.shape[0] > 1)
        real = param.is_floating_point() and param.requires_grad
        if many and real and id(param) not in known and name.rpartition(".")[0] not in idle:
            found[name] = param
    return found


def find_uses(model: nn.Module, run: Callable[[], Any]) -> dict[str, Use]:
    """How the parameters that no known layer holds take part in matrix products.

    Args:
        model: Evaluated, and as before afterwards.
        run: Makes a forward of it.
    """
    loose = find_loose(model)
    if not loose:
        return {}
    with evaluating(model):
        return matrices_used(loose, run)


def _layers(
    model: nn.Module,
    types: tuple[type[nn.Module], ...],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    loose: Mapping[str, nn.Parameter],
    others: bool,
) -> Selection:
    """The layers; perhaps none, where other parameters are enough."""
    try:
        return select_modules(model, types=types, include=include, exclude=exclude, method="SigmaReparam", more=loose)
    except NoMatchError:
        if not others:
            raise
        return Selection({})


def _refuse_low_rank(model: nn.Module, found: Targets) -> None:
    factors = {canonical_name(name): canonical_name(base) for name, base in low_rank(model)}
    if mine := [name for name in found.matched if name in factors]:
        bases = list(dict.fromkeys(factors[name] for name in mine))
        raise ValueError(
            f"SigmaReparam: {_some(mine)} are factors of low-rank updates of frozen weights (LoRA, in {_some(bases)}): "
            "the norm of one factor bounds nothing that the network multiplies with. Train the weights themselves "
            f"(merge the updates first: `model.merge_and_unload()`), or exclude={bases}."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")


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
    matrices = [matrix for block in blocks for matrix in as_matrices(block, whole(param))]
    largest = [torch.linalg.vector_norm(matrix, ord=float("inf")) for matrix in matrices]
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
    return SpectralTransform(
        blocks,
        init=config.init,
        learnable=config.learnable_gain,
        log_gain=config.gain == "log",
        gain_lr=config.gain_lr,
        monitor=config.monitor_only,
    )


def apply_sigma_reparam(
    model: nn.Module,
    optimizer: Optimizer,
    config: SigmaReparamConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    schedulers: Sequence[Scheduler] = (),
    example: Inputs | Callable[[], Any] | None = None,
) -> tuple[Change, Boundary]:
    """sigmaReparam in a training loop of your own; inside a Lightning Trainer use the callback.

    The model stays plain. From here on every ``optimizer.step()`` updates the raw weights and the gains;
    ``boundary.detach()`` ends it and leaves the trained weights in the model. Where gradients are clipped, call
    ``boundary.before_step(optimizer)`` first. After an exception out of ``step`` that you catch, call
    ``boundary.restore()``: until then, or the next step, weights may be the raw ones.

    Args:
        model: The model; the weights of its matched layers are in ``optimizer``.
        optimizer: The optimizer; the gains join it in a group without weight decay. Those of weights that are cut over
            processes (``fully_shard``, before) are with it while it steps only.
        config: Hyper-parameters.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.
        schedulers: Learning-rate schedulers of ``optimizer``, grown by the new group.
        example: Arguments of the model, or a function that runs it: shows which parameters outside of known layers are
            matrices (experts). None: such are left alone.

    Returns:
        What was done, and the boundary that does it.

    Raises:
        ValueError: As :func:`find_targets`; or a weight is not in ``optimizer``; or that or a scheduler cannot take the
            gains. The weights are unchanged then.
    """
    config = config or SigmaReparamConfig()
    uses = None
    if example is not None:
        uses = find_uses(model, example if callable(example) else partial(as_call(example).run, model))
    targets = find_targets(model, config, include, exclude, uses)
    trained = trained_by(optimizer)
    if missing := [name for name, (param, _) in targets.matched.items() if id(param) not in trained]:
        raise ValueError(f"not in the optimizer, so they would never be trained: {missing}. Exclude them.")
    boundary = Boundary()
    change = Change(method=METHOD, skipped=targets.skipped, notes=[targets.coverage])
    for name, (param, blocks) in targets.matched.items():
        boundary.add(name, param, make_transform(config, blocks))
        change.targets[name] = describe(param, blocks, targets.notes.get(name))
    boundary.check([optimizer])
    # Of weights that are cut over processes they visit, as beside parts of parameters none may be that is whole.
    thetas = [(theta, weight) for theta, weight in boundary.thetas(optimizer) if not is_cut(weight)]
    add_parameters(optimizer, thetas, schedulers)
    change.added.extend(thetas)
    boundary.start()
    boundary.attach([optimizer])
    return change, boundary


def describe(param: nn.Parameter, blocks: Sequence[Block], note: str | None = None) -> str:
    """One line on a target, for reports."""
    shape = "×".join(map(str, param.shape))
    gains = sum(block.length if block.stack else 1 for block in blocks)
    text = f"{shape}, {gains} gain{'s' if gains > 1 else ''}"
    if param.dim() > 2 and not blocks[0].stack and max(param.shape[2:]) > 1:
        # The norm of a convolution is up to sqrt(k_h k_w) times that of its flattened kernel.
        text += ", of the flattened kernel: no bound of the convolution"
    return f"{text} ({note})" if note else text
