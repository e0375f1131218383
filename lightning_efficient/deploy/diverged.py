"""Whether a network is fit to be exported: what a training that diverged leaves behind is refused by name.

NaN is refused wherever it is found. An infinity may be meant: masks are buffers of ``-inf``, and make such logits. So
infinities are refused where training alone can have put them: in parameters, in running statistics, and in outputs
that are finite, but beyond the range of their type, once the network is run in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.running import Call, Float64, evaluating
from lightning_efficient.deploy.plain import detached_copy


def check_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not finite.

    Args:
        model: Its parameters may hold neither NaN nor infinities, nor may its running statistics (buffers called
            ``running_...``); other buffers may hold infinities.

    Raises:
        ExportError: Naming the tensors.
    """
    found = [f"{name!r} ({what})" for name, what in _not_finite(model)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ExportError(
            f"{type(model).__name__} has diverged: {', '.join(found[:3])}{more}. Export an earlier checkpoint. (A mask "
            "of infinities is accepted in a buffer; a parameter is taken for a weight.)"
        )


def _not_finite(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in model.named_parameters():
        if what := _counted(parameter, infinities=True):
            yield name, what
    for name, buffer in model.named_buffers():
        if what := _counted(buffer, infinities=name.rpartition(".")[2].startswith("running_")):
            yield name, what


def _counted(tensor: Tensor, infinities: bool) -> str:
    lazy = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer) or tensor.is_meta
    if lazy or not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
        return ""
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values  # torch asks float8 nothing
    if bool(values.isfinite().all()):
        return ""
    counts = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum()) if infinities else 0}
    bad = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{bad} of {values.numel()} values" if bad else ""


def check_range(model: nn.Module, call: Call, outputs: Any) -> None:
    """Refuse a model whose outputs have outgrown their type.

    Args:
        model: As it was run.
        call: The arguments.
        outputs: What came out.

    Raises:
        ExportError: An infinite output is finite in float64, and too large for its type.
    """
    infinite = {n: t for n, t in named_tensors(outputs) if t.is_floating_point() and bool(t.isinf().any())}
    if not infinite:
        return
    try:
        twin = detached_copy(model).double()
        args, kwargs = apply_to_collection((call.args, dict(call.kwargs or {})), Tensor, _double)
        with evaluating(twin), Float64():
            wide = dict(named_tensors(Call(args, kwargs).run(twin)))
    except Exception:  # a network that does not run in float64 gets the benefit of the doubt
        return
    for name, output in infinite.items():
        value = wide.get(name)
        if value is None or value.shape != output.shape:
            continue
        largest = torch.finfo(output.dtype).max
        if bool((output.isinf() & value.isfinite() & (value.abs() > largest)).any()):
            where = f"output {name!r}" if name else "output"
            raise ExportError(
                f"{type(model).__name__} has diverged: its {where} is infinite, since {output.dtype} ends at "
                f"{largest:.2g}; in float64 it goes up to {float(value[value.isfinite()].abs().max()):.2g}. Export an "
                "earlier checkpoint, or pass other example inputs."
            )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
