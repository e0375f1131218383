"""``export``: a copy of a trained model that needs nothing of this package, checked to compute the same.

Methods in weight space leave the model plain at every moment, so for them exporting is copying. Layers of
ours that change the function's form offer ``fuse()``, which returns their plain equivalent, as the layers
that ``timm.utils.reparameterize_model`` knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_efficient.attention.temperature import hold_in_weights
from lightning_efficient.common.comparing import Difference, ExportError, difference
from lightning_efficient.common.eager import inside_compiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.running import Call, Inputs, as_call, calls_of_batch, device_of, evaluating, first_line
from lightning_efficient.deploy.batch_norms import batch_norms
from lightning_efficient.deploy.diverged import check_range, check_weights
from lightning_efficient.deploy.formats import save_exported, to_onnx, to_torch_export
from lightning_efficient.deploy.plain import check_foreign, detached_copy, plain_copy
from lightning_efficient.deploy.semi_structured import to_semi_structured
from lightning_efficient.folding.affine import Affine
from lightning_efficient.folding.fold import fold_affines
from lightning_efficient.lifecycle.state import NAME, zeroed
from lightning_efficient.norms.recalibrate import recalibrate as recalibrate_norms
from lightning_efficient.structured.cuts import Cuts
from lightning_efficient.structured.pretrained import calls_of, find_configs, put_configs
from lightning_efficient.structured.slim import replay_slim

_ALONE = (
    " Units that structured pruning has set to zero were cut out of this submodule alone; if layers outside it make or "
    "read some of them, export the LightningModule, or this with `slim=False`."
)

__all__ = ["ExportError", "export", "save_exported", "to_onnx", "to_semi_structured", "to_torch_export"]


def export(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    tolerance: float = 1e-5,
    fold: bool = True,
    recalibrate: Iterable[Any] | None = None,
    slim: bool = True,
    fuse_norms: bool = False,
) -> nn.Module:
    """A plain copy of ``model`` in evaluation mode, verified on ``example_inputs``; ``model`` stays as it is.

    A LightningModule stays one (it needs lightning, not us); ``export(pl_module.net, x)`` gives the bare
    network. The largest difference between the two outputs is logged. Parametrizations, hooks, weight tying
    and ``requires_grad`` of the user's own survive; ``torch.compile`` wrappers are left out.

    Args:
        model: A LightningModule or any other module, in any mode.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``forward``.
            ``None``: the module's ``example_input_array``, else a batch it saw in training (the whole batch,
            or its first element).
        tolerance: Largest accepted difference of the outputs, relative to the output's scale ``max |y|``.
        fold: Fold layers that have become one multiply-add a channel (a finished norm swap) into the weights
            around them; what cannot fold stays that multiply-add. The report is logged.
        recalibrate: Training batches, a data loader for instance, over which running statistics of swapped norms are
            averaged first; for weights that have none of their own, such as averaged ones. All batches are read.
        slim: Cut out the units that structured pruning has set to zero, so that the copy is smaller; of a submodule
            those that lie in it.
        fuse_norms: Fold batch norms with running statistics into the convolutions and linear layers around them, where
            that is exact: tried in float64, those that change anything stay. Layers without bias get one.

    Returns:
        The copy. It shares no tensor with ``model``.

    Raises:
        ValueError: No example inputs, or ``tolerance`` is not a number ≥ 0.
        TypeError: ``example_inputs`` is of another type.
        ExportError: The model has no ``forward``, fails on the inputs or on a batch of ``recalibrate``, cannot be
            copied, is sharded (FSDP), holds layers without a plain form, has diverged (NaN or infinite weights, NaN in
            buffers or outputs, outputs beyond the range of their type), or the copy's outputs differ by more than
            ``tolerance``.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` is {tolerance!r}; expected a number >= 0, relative to the output's scale.")
    model = _whole(model)
    candidates = _calls(model, example_inputs)
    if recalibrate is not None:
        model = _recalibrated(model, recalibrate)
    check_weights(model)
    with evaluating(model):
        call, expected = _first_that_runs(model, candidates)
    check_range(model, call, expected)
    plain = plain_copy(model).eval()
    _hold_temperatures(plain, call)
    check_foreign(plain)
    if fold and (affines := _channel_affines(model)):
        rank_zero_info(f"export: {fold_affines(plain, affines, lambda: call.run(plain))}")
    cuts = zeroed(model) if slim else None
    if cuts is not None:
        _cut(plain, cuts, call)
    if fuse_norms and (norms := batch_norms(plain)):
        rank_zero_info(f"export: {fold_affines(plain, norms, lambda: call.run(plain))}")
    alone = cuts is not None and not isinstance(model, LightningModule)
    apart = _compared(plain, call, expected, tolerance, _ALONE if alone else "")
    rank_zero_info(f"export: {type(model).__name__} on [{call}]: {apart}")
    return plain


def _hold_temperatures(plain: nn.Module, call: Call) -> None:
    try:
        left = hold_in_weights(plain, lambda: call.run(plain))
    except ValueError as why:
        raise ExportError(f"the attention temperature of the copy cannot be put into its weights: {why}") from why
    if left:
        some = "; ".join(f"{site} ({why})" for site, why in list(left.items())[:3]) + ("; ..." if len(left) > 3 else "")
        raise ExportError(
            f"no weights hold the attention temperature of {some}: a plain module cannot have it. torch.export.export "
            "and torch.onnx.export trace through the trained module as it is."
        )


def _compared(plain: nn.Module, call: Call, expected: Any, tolerance: float, hint: str) -> Difference:
    """How far the copy is from the model, not more than the tolerance; an error ends with the hint."""
    with evaluating(plain):
        try:
            found = call.run(plain)
        except Exception as error:
            raise ExportError(f"the exported copy fails where the model does not: {first_line(error)}{hint}") from error
    try:
        apart = difference(expected, found)
        apart.check(tolerance, "the exported copy")
    except ExportError as error:
        raise ExportError(f"{error}{hint}") from error.__cause__
    return apart


def _cut(plain: nn.Module, cuts: Cuts, call: Call) -> None:
    before = sum(p.numel() for p in plain.parameters())
    cuts = cuts.of(plain)
    calls = calls_of(plain, lambda: call.run(plain))
    try:
        replay_slim(plain, cuts)
    except ValueError as error:
        raise ExportError(f"the pruned units cannot be cut out ({error}) Export with `slim=False`.") from error
    after = sum(p.numel() for p in plain.parameters())
    rank_zero_info(f"export: pruned units cut out: {before:,} -> {after:,} parameters ({after / before:.1%}).")
    if why := put_configs(plain, *find_configs(plain, cuts, calls), refuse=False):
        rank_zero_warn(f"export: save_pretrained of the copy {why}")


def _recalibrated(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy with fresh statistics, or the model itself if it has no norms that use any."""
    copy = detached_copy(model)
    try:
        done = recalibrate_norms(copy, batches, device=device_of(model))
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} fails on a batch of `recalibrate` ({first_line(error)}): it is called with the "
            "batch, the first part of a tuple, or the items of a mapping as keywords. Give batches of that form."
        ) from error
    if not done.norms:
        rank_zero_warn("export: `recalibrate` was given, but no norm of the model uses batch statistics.")
        return model
    rank_zero_info(f"export: statistics of {done.norms} norms averaged over {done.batches} batches.")
    return copy


def _channel_affines(model: nn.Module) -> dict[str, Affine]:
    offers = {canonical_name(n): getattr(m, "channel_affine", None) for n, m in model.named_modules()}
    found = {name: offer() for name, offer in offers.items() if callable(offer)}
    return {name: affine for name, affine in found.items() if affine is not None}


def _calls(model: nn.Module, example_inputs: Inputs | None) -> list[Call]:
    """The calls to try, in order, on the model."""
    if example_inputs is not None:
        return [as_call(example_inputs)]
    array = getattr(model, "example_input_array", None)
    if array is not None:
        return [as_call(array)]
    batch = getattr(vars(model).get(NAME), "example_batch", None)
    if batch is None:
        raise ValueError(
            f"`export({type(model).__name__}, example_inputs=None)`: the model has no `example_input_array` "
            "and kept no training batch. Pass `example_inputs`: a tensor, a tuple of positional or a dict of "
            "keyword arguments."
        )
    return calls_of_batch(model, batch)


def _whole(model: nn.Module) -> nn.Module:
    """Without ``torch.compile`` around it; refused if it is sharded."""
    while (wrapped := inside_compiled(model)) is not None:
        model = wrapped
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    sharded += [name or "the model" for name, m in model.named_modules() if "_fsdp_wrapped_module" in m._modules]
    if sharded:
        raise ExportError(
            f"{', '.join(sharded[:3])}{', ...' if len(sharded) > 3 else ''}: sharded over processes. Save a full "
            "checkpoint, load it into an unsharded module and export that."
        )
    return model


def _first_that_runs(model: nn.Module, calls: list[Call]) -> tuple[Call, Any]:
    forward = getattr(model.forward, "__func__", None)
    if forward in (LightningModule.forward, nn.Module.forward):
        children = [name for name, child in model.named_children() if type(child).forward is not nn.Module.forward]
        instead = ", ".join(f"export(module.{name}, x)" for name in children) or "a module that has one"
        raise ExportError(
            f"{type(model).__name__} defines no `forward`, so its copy cannot be verified. Export a "
            f"submodule: {instead}."
        )
    failures = []
    for call in calls:
        try:
            return call, call.run(model)
        except Exception as error:
            failures.append((call, error))
    tried = "; ".join(f"[{call}]: {first_line(error)}" for call, error in failures)
    raise ExportError(
        f"{type(model).__name__} fails in evaluation mode on the example inputs {tried}. "
        "Pass `example_inputs` that its `forward` accepts."
    ) from failures[-1][1]
