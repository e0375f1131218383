"""Attention scaled inside one module's forward, for what no weight can scale. Installed on the instance, undoable."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.attention.temper import Law, Mode, Temper
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.saving import allow_saving, refuse_saving
from lightning_efficient.common.schema import Record, Such, TensorOf, check, short

# nn.TransformerEncoder turns padded batches into nested tensors, which only the fused path can attend over.
_NESTED = "use_nested_tensor"
# What Hugging Face's and PEFT's own files would do to a temperature.
LOST = (
    "would lose the temperature of this model's attention: it is not in the weights that it writes, and "
    "from_pretrained would give other numbers without a word. Save a Trainer's checkpoint and read it by "
    "lightning_efficient.load_from_checkpoint; or take the temperature off first "
    "(lightning_efficient.functional.remove_temp_scale, where it was put on by apply_temp_scale), and on again after "
    "loading."
)


class TemperedForward:
    """Stands in a module's ``forward`` attribute and runs its own forward with scaled attention.

    An object, not a closure: it can be pickled, and a deep copy of the module runs the copy. ``torch.compile`` and
    ``torch.export`` trace through it.

    Args:
        module: The module.
        law: How its logits are multiplied.
    """

    def __init__(self, module: nn.Module, law: Law) -> None:
        self.module, self.law = module, law
        self.inner = vars(module).get("forward")  # somebody else's, on the instance
        self.hooks: list[RemovableHandle] = []
        self.nested: list[nn.TransformerEncoder] = []

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        with Temper(self.law):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)


class _Key:
    """Adds a temperature to the module's state dict, which no module without one then loads by mistake."""

    def __init__(self, law: Law) -> None:
        self.law = law

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
        state.update({prefix + key: value for key, value in _as_tensors(self.law).items()})

    def load(
        self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *others: Any
    ) -> None:
        """Take a temperature in a state dict, if it is of one kind with this one."""
        theirs = {key: state.pop(key) for key in list(state) if key.startswith(f"{prefix}{_NAME}.")}
        mine = {prefix + key: value for key, value in _as_tensors(self.law).items()}
        moves = self.law.log_tau is not None
        if any(key not in mine or not (moves or torch.equal(mine[key], value)) for key, value in theirs.items()):
            others[-1].append(f"another attention temperature: {theirs} in the state dict, {mine} here.")
        elif (log_tau := self.law.log_tau) is not None and theirs:
            value = theirs.get(f"{prefix}{_NAME}.{self.law.mode}.log_tau")
            if (wrong := _LOG_TAU.wrong(value)) is not None or cast(Tensor, value).shape != log_tau.shape:
                expected = wrong.expected if wrong is not None else f"of shape {tuple(log_tau.shape)}"
                others[-1].append(
                    f"the attention temperature {prefix}{_NAME} should be {expected}; got {short(value)}."
                )
            else:
                log_tau.data.copy_(cast(Tensor, value))


def install(model: nn.Module, module: nn.Module, law: Law, saved: bool = False) -> None:
    """Scale the attention that a module's forward computes.

    Args:
        model: The whole model: where it runs ``nn.MultiheadAttention`` through the fused inference path of
            ``nn.TransformerEncoder``, which does not call the module's forward, that path is switched off.
        module: The module.
        law: How its logits are multiplied.
        saved: Have the module's state dict hold the law, in keys of its own.
    """
    forward = TemperedForward(module, law)
    if saved:
        key = _Key(law)
        forward.hooks.append(module.register_state_dict_post_hook(key))  # type: ignore[no-untyped-call]
        forward.hooks.append(module.register_load_state_dict_pre_hook(key.load))  # type: ignore[no-untyped-call]
    if isinstance(module, nn.MultiheadAttention):
        forward.hooks.append(module.register_forward_pre_hook(_no_fast_path))
        for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
            if encoder.use_nested_tensor and any(m is module for m in encoder.modules()):
                setattr(encoder, _NESTED, False)
                forward.nested.append(encoder)
    module.forward = forward
    refuse_saving(model, module, LOST)


def compiled(module: nn.Module) -> bool:
    """Whether a compiled function stands in a module's ``forward``: what is around it would scale it once or twice.

    ``module.compile()`` and ``torch.compile(module)`` put it outside, and trace through an adapter.

    Args:
        module: The module.
    """
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def installed(module: nn.Module) -> TemperedForward | None:
    """The adapter of a module, if it has one."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, TemperedForward) else None


def remove(model: nn.Module, module: nn.Module) -> None:
    """Give a module its own forward back.

    Args:
        model: The whole model.
        module: A module that :func:`install` was called on.

    Raises:
        ValueError: It has no adapter, or something else has been put over it.
    """
    forward = installed(module)
    if forward is None:
        raise ValueError(f"{type(module).__name__} has no attention adapter on it; was its `forward` replaced since?")
    del module.forward
    if forward.inner is not None:
        module.forward = forward.inner
    for hook in forward.hooks:
        hook.remove()
    for encoder in forward.nested:
        setattr(encoder, _NESTED, True)
    allow_saving(model, module)


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook of any kind makes ``nn.TransformerEncoderLayer`` call its attention module."""


# -- in files ----------------------------------------------------------------------------------------------------------

_NAME = "temp_scale"
_PATTERN = re.compile(rf"(?:(.*)\.)?{_NAME}\.(constant|log_n|ssmax)\.(tau|log_tau|length)")


def _as_tensors(law: Law) -> dict[str, Tensor]:
    now = {"tau": torch.tensor(law.tau, dtype=torch.float64)}
    if law.log_tau is not None:
        now = {"log_tau": law.log_tau.detach().clone()}
    if law.mode == "log_n":
        now["length"] = torch.tensor(law.length, dtype=torch.float64)
    return {f"{_NAME}.{law.mode}.{what}": value for what, value in now.items()}


def write_laws(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the temperatures of a model's adapters into a state dict, of the model or of an averaged copy.

    Args:
        model: The model.
        state: Its state dict.
    """
    for name, module in model.named_modules():
        if (forward := installed(module)) is not None:
            prefix = canonical_name(name) + "." if name else ""
            state.update({prefix + key: value for key, value in _as_tensors(forward.law).items()})


def take_laws(state: dict[str, Tensor]) -> dict[str, Law]:
    """Take the temperatures of adapters out of a state dict.

    Args:
        state: Holds the model's own keys only afterwards.

    Returns:
        Name of the module -> law.

    Raises:
        SchemaError: A temperature is no law: malformed, out of range, or two for one module.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key in list(state):
        if match := _PATTERN.fullmatch(key):
            site, mode, what = match.groups()
            found.setdefault(canonical_name(site or ""), {}).setdefault(mode, {})[what] = state.pop(key)
    return {site: _law(site, modes) for site, modes in found.items()}


_SCALAR = TensorOf("floating", shape=(), finite=True)
_TAU = Such(_SCALAR, lambda value: float(value) > 0, "above 0")
# A factor between e-20 and e20, which no softmax needs to leave.
_LOG_TAU = Such(
    TensorOf("floating", ndim=1, finite=True), lambda value: len(value) > 0 and float(value.abs().max()) <= 20,
    "from -20 up to 20, one for all heads or one a head",
)  # fmt: skip
_LENGTH = Such(_SCALAR, lambda value: float(value) > 1, "above 1")


def _law(site: str, modes: Mapping[str, Mapping[str, Any]]) -> Law:
    """The law that some tensors of a file say.

    Raises:
        SchemaError: They are not one law, or a value is out of range.
    """
    where = f"the attention temperature of {site!r} in the file"
    mode = next(iter(modes))
    moves = "log_tau" in modes[mode]
    fields = {"log_tau": _LOG_TAU} if moves else {"tau": _TAU}
    fields |= {"length": _LENGTH} if mode == "log_n" else {}
    check(modes, Record({mode: Record(fields)}), where)
    values = modes[mode]
    return Law(
        1.0 if moves else float(values["tau"]),
        cast(Mode, mode),
        float(values["length"]) if mode == "log_n" else Law.length,
        nn.Parameter(values["log_tau"].clone(), False) if moves else None,
    )


def set_laws(model: nn.Module, laws: Mapping[str, Law]) -> None:
    """Give a model's modules these adapters, which its state dict then holds, and no others.

    A temperature that moves and is there already takes the value, as an optimizer may hold its parameter.

    Args:
        model: The model.
        laws: What :func:`take_laws` returned.

    Raises:
        ValueError: A module is missing. Nothing has changed then.
    """
    modules = modules_by_name(model)
    if missing := [name for name in laws if name not in modules]:
        raise ValueError(
            f"there are attention temperatures for {missing[:4]}, and {type(model).__name__} has no such modules. Was "
            "the model built with other arguments?"
        )
    wanted = {id(modules[name]): law for name, law in laws.items()}
    for module in list(model.modules()):
        law, now = wanted.get(id(module)), installed(module)
        if now is not None and law is not None and _alike(now.law, law):
            cast(nn.Parameter, now.law.log_tau).data.copy_(cast(nn.Parameter, law.log_tau).data)
            continue
        if now is not None:
            remove(model, module)
        if law is not None:
            install(model, module, law, saved=True)


def _alike(one: Law, two: Law) -> bool:
    shapes = [None if law.log_tau is None else law.log_tau.shape for law in (one, two)]
    return one == two and shapes[0] == shapes[1] is not None
