"""Padding: which argument of which module hides tokens, and from which of the swapped norms; found by what it does.

A mask belongs to the tokens that reach a norm, not to whatever has its shape: in an encoder-decoder both sequences may
be of one length. So one token is hidden, the others are not, and the hidden token is exchanged for another. The mask is
that of the norms at which this token alone moves, if nothing real moves, and if with nothing hidden something does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import tensors_in
from lightning_efficient.common.running import as_found, evaluating
from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.effects import exchanged

# Which token the probe hides: neither the first, without which a causal query would see nothing, nor the last.
_HIDDEN = 1


@dataclass(frozen=True)
class PaddingMask:
    """An argument that hides tokens.

    Args:
        module: Name of the module that gets it.
        path: Where it is among the arguments: a position or keyword, then keys of nested containers.
        keeps: What it says of tokens that count: ``"nonzero"`` or ``"zero"``.
        norms: Norm -> whether its rows have the tokens first, (tokens, batch).
    """

    module: str
    path: tuple[Any, ...]
    keeps: str
    norms: Mapping[str, bool] = field(default_factory=dict)

    def valid(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of a call count: bool (batch, tokens); None if the argument is not given."""
        value: Any = {**dict(enumerate(args)), **kwargs}
        for key in self.path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        if not isinstance(value, Tensor):
            return None
        return _keep(value.reshape(value.shape[0], -1), self.keeps)


def _keep(mask: Tensor, keeps: str) -> Tensor:
    return mask == 0 if keeps == "zero" else mask != 0


def hand_over(model: nn.Module, masks: Sequence[PaddingMask]) -> list[RemovableHandle]:
    """Hooks by which the norms get the masks of each forward.

    Args:
        model: The model.
        masks: What was found in it.

    Returns:
        Handles that remove the hooks.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    norms = blend_norms(model)
    handles = []
    for mask in masks:

        def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any], mask: PaddingMask = mask) -> None:
            valid = mask.valid(args, kwargs)
            for name, tokens_first in mask.norms.items():
                norms[name].mask = valid if valid is None or not tokens_first else valid.t()

        def after(module: nn.Module, args: Any, out: Any, mask: PaddingMask = mask) -> None:
            for name in mask.norms:
                norms[name].mask = None

        handles.append(modules[mask.module].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(modules[mask.module].register_forward_hook(after, always_call=True))
    return handles


@dataclass(frozen=True)
class Padding:
    """What is known about padding.

    Args:
        masks: Those that reach norms.
        unknown: Tokens that seem to be padding and count in statistics, for people; empty: none.
    """

    masks: list[PaddingMask]
    unknown: str = ""


_Calls = dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
_Padded = tuple[str, nn.Embedding, Tensor]


class Recording:
    """Runs a model on inputs, the first time on those as they are, and keeps how its modules were called then.

    Args:
        model: With ``BlendNorm`` in it.
        run: Runs it.
    """

    def __init__(self, model: nn.Module, run: Callable[[Any], object]) -> None:
        self.calls: _Calls | None = None  # of every module with norms inside, the first, outermost first
        self.padded: _Padded | None = None  # an embedding that was given padding
        self._model, self._run = model, run

    def __call__(self, inputs: Any) -> object:
        """One run."""
        if self.calls is not None:
            return self._run(inputs)
        calls: _Calls = {}

        def record(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                fresh = apply_to_collection((args, dict(kwargs)), Tensor, lambda t: t.detach().clone())
                calls.setdefault(name, (module, *fresh))

            return hook

        def look(name: str) -> Any:
            def hook(module: nn.Embedding, args: Any) -> None:
                if args and bool((places := args[0] == module.padding_idx).any()) and not places.all():
                    self.padded = self.padded or (name, module, places.cpu())

            return hook

        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                handles.append(module.register_forward_pre_hook(look(canonical_name(name))))
            elif name and not isinstance(module, BlendNorm) and blend_norms(module):
                handles.append(module.register_forward_pre_hook(record(canonical_name(name)), with_kwargs=True))
        try:
            out = self._run(inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.calls = calls
        return out


def find_padding(model: nn.Module, run: Callable[[Any], object], inputs: Any) -> Padding:
    """Find the padding masks of a model by calling its modules with one token hidden.

    Args:
        model: With ``BlendNorm`` in it; as before afterwards.
        run: Runs the model on inputs; a :class:`Recording` may have done so.
        inputs: Tensors in any nest, a few samples.

    Returns:
        The masks, the outermost where several modules get the same.

    Raises:
        Exception: ``run`` fails on the inputs as they are.
    """
    norms = blend_norms(model)
    with evaluating(model), uncompiled():
        recording = run if isinstance(run, Recording) else Recording(model, run)
        if recording.calls is None:
            with as_found(model):
                recording(apply_to_collection(inputs, Tensor, torch.clone))
        found: list[PaddingMask] = []
        for name, (module, args, kwargs) in (recording.calls or {}).items():
            known = {norm for mask in found for norm in mask.norms}
            mine = {n: norm for n, norm in norms.items() if n not in known and n.startswith(f"{name}.")}
            found += _Probe(
                model, name, mine, _caller(module, args, kwargs), {**dict(enumerate(args)), **kwargs}
            ).masks()
        missing = {n: norm for n, norm in norms.items() if not any(n in mask.norms for mask in found)}
        # What hides tokens from the whole step, and is no argument of any module.
        step = _Probe(model, "", missing, run, inputs)
        hidden = step.masks()
        unheard = "" if hidden or recording.padded is None else step.unheard(*recording.padded)
    if hidden:
        path = ".".join(map(str, hidden[0].path))
        names = list(hidden[0].norms)
        return Padding(found, f"{path!r} of the batch hides tokens, which reach {len(names)} norms ({names[0]}, ...)")
    return Padding(found, unheard)


def _caller(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], object]:
    def call(given: Mapping[Any, Any]) -> object:
        return module(*[given[i] for i in range(len(args))], **{name: given[name] for name in kwargs})

    return call


@dataclass
class _Probe:
    """One call, repeated with a token hidden and exchanged.

    Args:
        model: Whose memory is put back after each call.
        name: Of the module that is called.
        norms: Those to look at.
        call: Calls it.
        given: What it is called with, in any nest.
    """

    model: nn.Module
    name: str
    norms: Mapping[str, BlendNorm]
    call: Callable[[Any], object]
    given: Any

    def masks(self) -> list[PaddingMask]:
        """The masks among the arguments."""
        found = []
        for path, mask in _paths(self.given) if self.norms else ():
            for tokens in (t for _, t in _paths(self.given) if t is not mask and t.dtype != torch.bool):
                for keeps in _meanings(mask):
                    if hit := self._hit(path, mask, tokens, keeps):
                        found.append(hit)
                        break
                else:
                    continue
                break
        return found

    def _hit(self, path: tuple[Any, ...], mask: Tensor, tokens: Tensor, keeps: str) -> PaddingMask | None:
        batch, length = mask.shape[0], mask.shape[-1]
        first = tokens.shape[:2] == (length, batch) and tokens.shape[:2] != (batch, length)
        if tokens.shape[:2] != (batch, length) and not first:
            return None
        if (values := exchanged(tokens)) is None:
            return None
        other, axis = tokens.clone(), 0 if first else 1
        other.select(axis, _HIDDEN).copy_(values.select(axis, _HIDDEN))
        hidden = torch.zeros(batch, length, dtype=torch.bool)
        hidden[:, _HIDDEN] = True
        free, masked = (
            self._moved(mask, self._like(mask, torch.zeros_like(hidden) if open_ else hidden, keeps), tokens, other)
            for open_ in (True, False)
        )
        if free is None or masked is None or not _real(free, hidden) or _real(masked, hidden):
            return None
        reached = {n: masked[n].flatten() for n in self.norms if masked[n].any()}
        norms = {n: bool((rows & ~hidden.flatten()).any()) for n, rows in reached.items()}
        return PaddingMask(self.name, path, keeps, norms) if norms else None

    @staticmethod
    def _like(mask: Tensor, hidden: Tensor, keeps: str) -> Tensor:
        drop = torch.finfo(mask.dtype).min if mask.is_floating_point() and mask.min() < 0 else 1
        kept, dropped = (0, drop) if keeps == "zero" else (1, 0)
        return torch.where(hidden, dropped, kept).to(mask).reshape(mask.shape)

    def unheard(self, name: str, embedding: nn.Embedding, padding: Tensor) -> str:
        """Whether tokens that an embedding calls padding reach norms and nothing else; a sentence, empty if not.

        Args:
            name: Of the embedding.
            embedding: Its ``padding_idx`` is set.
            padding: Where it was given that, bool (batch, tokens).
        """

        def other(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            # Not a constant, which a layer norm would take out again.
            shift = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
            return torch.where((args[0] == embedding.padding_idx)[..., None], out + shift, out)

        before = self._run({})
        handle = embedding.register_forward_hook(other)
        try:
            moved = self._difference(before, self._run({}))
        finally:
            handle.remove()
        reached = [norm for norm in self.norms if moved is not None and norm in moved and moved[norm].any()]
        if moved is None or not reached or padding.dim() != 2 or _real(moved, padding):
            return ""
        return (
            f"the `padding_idx` of {name!r} reaches {len(reached)} norms ({reached[0]}, ...) and nothing else hears it"
        )

    def _moved(self, mask: Tensor, new: Tensor, tokens: Tensor, other: Tensor) -> dict[str, Tensor] | None:
        """For norms and outputs: what moves, under a mask, when tokens are exchanged. None: it cannot be called so."""
        try:
            before, after = (self._run({id(mask): new, id(tokens): t}) for t in (tokens, other))
        except Exception:  # the module checks its arguments
            return None
        return self._difference(before, after)

    def _difference(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        moved = {}
        for name, x in before.items():
            y = after.get(name)
            if y is None or y.shape != x.shape:
                return None
            change = (y - x).abs().nan_to_num()
            moved[name] = (change > 1e-5 * x.abs().nan_to_num().max()).cpu()
        return {name: m.any(-1) if name in self.norms else m for name, m in moved.items()}

    def _run(self, swaps: Mapping[int, Tensor]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def look(name: str, norm: BlendNorm) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                seen[name] = args[0].detach().movedim(norm.spec.axis, -1).float()

            return hook

        handles = [norm.register_forward_pre_hook(look(name, norm)) for name, norm in self.norms.items()]
        try:
            with as_found(self.model):
                out = self.call(apply_to_collection(self.given, Tensor, lambda t: swaps.get(id(t), t).clone()))
        finally:
            for handle in handles:
                handle.remove()
        return seen | {f"#{i}": t.detach().float() for i, t in enumerate(tensors_in(out))}


def _real(moved: Mapping[str, Tensor], hidden: Tensor) -> bool:
    """Whether anything moved but the hidden token."""
    for m in moved.values():
        if m.shape[:2] == hidden.shape:
            m = m & ~hidden.reshape(*hidden.shape, *[1] * (m.dim() - 2))
        elif m.shape[:2] == hidden.t().shape:
            m = m & ~hidden.t().reshape(*hidden.t().shape, *[1] * (m.dim() - 2))
        elif m.shape == (hidden.numel(),):
            m = m & ~hidden.flatten()
        if m.any():
            return True
    return False


def _meanings(mask: Tensor) -> tuple[str, ...]:
    """What a tensor could say as a mask of (batch, tokens): nothing, if it has another form or other values."""
    long_enough = mask.dim() >= 2 and mask.numel() == mask.shape[0] * mask.shape[-1] and mask.shape[-1] > 2
    if not long_enough or mask.is_complex():
        return ()
    if mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()):
        return ("nonzero", "zero")
    additive = mask.is_floating_point() and bool(((mask == 0) | (mask <= -100)).all())
    return ("zero",) if additive else ()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Tensors in nested mappings and sequences, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _paths(item, (*path, index))
