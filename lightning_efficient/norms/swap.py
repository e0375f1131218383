"""Trade the norms of a model for ones that can vanish: which, for what, and how they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import (
    NoMatchError,
    canonical_name,
    modules_by_name,
    select_modules,
)
from lightning_efficient.common.near import near_names
from lightning_efficient.norms.base import Target
from lightning_efficient.norms.blend import BlendNorm
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.sources import Source, recognise
from lightning_efficient.norms.targets import RMS, DynamicTanh, FixedAffine
from lightning_efficient.norms.unified import UnifiedNorm
from lightning_efficient.surgery.replace import replace_modules

METHOD = "norm_swap"
TARGETS = ("repbn", "affine", "un", "dyt", "rms")


# Arguments that are about some targets only.
ONLY_WITH = (
    ("target", ("repbn", "un"), ("eps", "frozen")),
    ("target", ("repbn",), ("momentum", "learn_eta")),
    ("target", ("affine",), ("decay",)),
    ("target", ("dyt",), ("alpha",)),
    ("target", ("un",), ("window", "warmup", "filtration")),
)


@dataclass(frozen=True)
class NormSwapConfig:
    """What norms turn into, and how that starts.

    Args:
        target: ``"repbn"`` (BatchNorm plus eta times identity, SLAB), ``"affine"`` (a fixed affine map, as TaperNorm;
            the one without batch statistics that folds), ``"un"`` (Unified Normalization), ``"dyt"`` (Dynamic Tanh) or
            ``"rms"`` (RMSNorm).
        init: ``"copy"``: scale and shift of the old norm, eta = 0 (for trained models). ``"slab"``: as published: ones,
            zeros, eta = 1 (for training from scratch).
        eps: Added to variances (``repbn``, ``un``). ``rms`` keeps the old norm's.
        momentum: Weight of a batch in RepBN's running statistics.
        frozen: Train with running statistics (batches too small to have any); they then come from recalibration only.
        decay: Share of the old value in the moving averages that calibrate ``affine``.
        alpha: Start of Dynamic Tanh's scalar.
        window: Iterations that Unified Normalization smooths over.
        warmup: Iterations before it does.
        filtration: Whether it skips outlier batches (published: on for vision, off for language).
        learn_eta: Whether RepBN's eta is trained.

    Raises:
        ValueError: A value is of the wrong type or out of range.
    """

    target: Literal["repbn", "affine", "un", "dyt", "rms"] = "repbn"
    init: Literal["copy", "slab"] = "copy"
    eps: float = 1e-5
    momentum: float = 0.1
    frozen: bool = False
    decay: float = 0.99
    alpha: float = 0.5
    window: int = 4
    warmup: int = 4000
    filtration: bool = True
    learn_eta: bool = True

    def __post_init__(self) -> None:
        _require("target", self.target, self.target in TARGETS, f"one of {TARGETS}")
        _require("init", self.init, self.init in ("copy", "slab"), "'copy' or 'slab'")
        for name, low, high in (("eps", 0.0, 1.0), ("momentum", 0.0, 1.0), ("decay", 0.0, 1.0)):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and low < value < high, f"a number between {low} and {high}")
        valid = _is_number(self.alpha) and 0 < self.alpha <= 1e6
        _require("alpha", self.alpha, valid, "a number above 0, up to 1000000")
        for name in ("frozen", "filtration", "learn_eta"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _require("window", self.window, type(self.window) is int and self.window >= 2, "an integer from 2")
        valid = type(self.warmup) is int and self.warmup >= self.window
        _require("warmup", self.warmup, valid, f"an integer not below `window` ({self.window})")

    def too_short(self, steps: int | None) -> str:
        """What a run of so many steps (None: unknown) is too short for, as a sentence; empty: nothing."""
        if self.target != "un" or steps is None or steps > self.warmup:
            return ""
        return (
            f"Unified Normalization begins to smooth after `warmup`={self.warmup} training forwards, and this run has "
            f"{steps} steps: it will normalize with the statistics of each batch alone. Set `warmup` to a part of the "
            f"run, such as {max(steps // 10, self.window)}."
        )

    @classmethod
    def of(cls, config: Mapping[str, Any] | NormSwapConfig | None) -> NormSwapConfig:
        """The part of a callback's arguments, or of a recipe, that is about the norms themselves."""
        if isinstance(config, NormSwapConfig):
            return config
        config = config or {}
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"norm swap: `{name}` must be {expected}; got {value!r}.")


@dataclass
class Norms:
    """The norms to swap.

    Args:
        matched: Name -> (module, what it computes).
        skipped: Name -> why a norm is left alone.
    """

    matched: dict[str, tuple[nn.Module, Source]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_norms(
    model: nn.Module,
    config: Mapping[str, Any] | NormSwapConfig | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Norms:
    """Choose the layer norms and RMS norms of a model, by what they compute; nothing is changed.

    Args:
        model: Any module. Norms that are being swapped already do not count.
        config: Checked, so that a mistake in it shows before training.
        include: Globs over module names; None: all.
        exclude: Globs over module names left alone.

    Raises:
        NoMatchError: There is no such norm (left), or none that the globs allow.
        ValueError: ``config`` is invalid.
    """
    NormSwapConfig.of(config)
    inside = {model} | {module for blend in _blends(model) for module in blend.modules()}
    found = {module: what for module in model.modules() if module not in inside and (what := recognise(module))}
    types = tuple({type(module): None for module, what in found.items() if isinstance(what, Source)})
    if not types:
        left = [f"{count} are swapped already"] if (count := len(_blends(model))) else []
        left += [f"{type(module).__name__}: {what}" for module, what in found.items()]
        raise NoMatchError(f"{METHOD}: no layer norm or RMS norm to swap ({'; '.join(left[:5]) or 'none found'}).")
    selection = select_modules(model, types=types, include=include, exclude=exclude, method=METHOD)
    modules = modules_by_name(model)
    norms = Norms(skipped={name: why for name, why in selection.skipped.items() if modules[name] in found})
    for name, module in model.named_modules():
        if isinstance(what := found.get(module), str):
            norms.skipped.setdefault(canonical_name(name), what)
    for name, module in selection.matched.items():
        if isinstance(what := found.get(module), Source):
            norms.matched[name] = (module, what)
    if not norms.matched:
        raise NoMatchError(f"{METHOD}: none of the norms that `include` covers can be swapped: {norms.skipped}.")
    return norms


def _blends(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BlendNorm)]


def make_target(config: NormSwapConfig, spec: Source) -> Target:
    """A fresh target for a source.

    Args:
        config: What to make.
        spec: What the source computes: a bias is made only where it has one, or the target's formula needs one.
    """
    channels, bias = spec.channels, spec.bias is not None
    target: Target
    if config.target == "repbn":
        target = RepBN(channels, 1.0 if config.init == "slab" else 0.0, config.eps, config.momentum)
        target.eta.requires_grad_(config.learn_eta)
    elif config.target == "affine":
        target = FixedAffine(channels, bias, config.decay)
    elif config.target == "un":
        target = UnifiedNorm(channels, config.window, config.warmup, config.filtration, eps=config.eps)
    elif config.target == "dyt":
        target = DynamicTanh(channels, bias, config.alpha)
    else:
        target = RMS(channels, bias, spec.eps)
    target.frozen = config.frozen
    return target


def apply_norm_swap(
    model: nn.Module,
    config: Mapping[str, Any] | NormSwapConfig | None = None,
    names: Sequence[str] | None = None,
) -> Change:
    """Put a ``BlendNorm`` in the place of each norm; with its ``lam`` of 1 the model still computes the same.

    A norm in several places is one ``BlendNorm`` there. The old norms stay inside, with the identity of their
    parameters. Where a norm of ``nn.TransformerEncoderLayer`` is swapped, the layer's evaluation fast path and the
    nested tensors of ``nn.TransformerEncoder`` are turned off by their own flags, which also covers what comes after
    the blend (they would run a LayerNorm that is no longer there).

    Args:
        model: The model.
        config: A ``NormSwapConfig``, or a mapping with (some of) its fields; ``include`` and ``exclude`` are read from
            a mapping too, other keys are not.
        names: Exactly these modules instead (replaying a recipe).

    Returns:
        What was done. New parameters follow the learning rate of the old norm's scale.

    Raises:
        NoMatchError: There is nothing to swap.
        ValueError: The configuration is invalid, or a name is no norm that can be swapped. Nothing is changed then.
    """
    swap = NormSwapConfig.of(config)
    globs = config if isinstance(config, Mapping) else {}
    if names is None:
        norms = find_norms(model, swap, globs.get("include"), globs.get("exclude"))
    else:
        norms = _named(model, names)
    change = Change(METHOD, skipped=norms.skipped)
    new = {name: _blend(module, spec, swap) for name, (module, spec) in norms.matched.items()}
    change.swaps = replace_modules(model, new)
    for name, blend in new.items():
        blend._apply(lambda tensor: tensor)  # takes buffers that were cast to a narrow dtype back to float32
        change.targets[name] = f"{type(blend.source).__name__} becomes {swap.target}"
        follows = blend.weight if isinstance(blend.weight, nn.Parameter) else None
        follows = follows if follows is not None else next(blend.source.parameters(), None)
        change.added += [(parameter, follows) for parameter in blend.target.parameters() if parameter.requires_grad]
    _leave_fast_paths(model)
    return change


def _named(model: nn.Module, names: Sequence[str]) -> Norms:
    modules = modules_by_name(model)
    norms = Norms()
    for name in names:
        if name not in modules:
            raise ValueError(f"{METHOD}: the model has no module {name!r}; close names: {near_names(name, modules)}.")
        module = modules[name]
        what = "it is being swapped already" if isinstance(module, BlendNorm) else recognise(module)
        if not isinstance(what, Source):
            why = what or "it computes neither a layer norm nor an RMS norm"
            raise ValueError(f"{METHOD}: {name!r} ({type(module).__name__}) cannot be swapped: {why}.")
        norms.matched[name] = (module, what)
    if not norms.matched:
        raise NoMatchError(f"{METHOD}: no norms named.")
    return norms


def _blend(module: nn.Module, spec: Source, config: NormSwapConfig) -> BlendNorm:
    target = make_target(config, spec)
    blend = BlendNorm(module, target, spec)
    old = next(module.parameters(), None)
    if old is not None and old.is_meta:
        blend.target.to("meta")
        blend.lam = blend.lam.to("meta")
    elif config.init == "copy":
        blend.recopy()
    if old is not None and not any(p.requires_grad for p in module.parameters()):
        target.requires_grad_(False)  # a frozen norm stays frozen
    return blend


def _leave_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _blends(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _blends(module):
            module.use_nested_tensor = False
