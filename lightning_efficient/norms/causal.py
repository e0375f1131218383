"""Is this model causal? Batch statistics would then show every position the future of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CausalAttentionError(ValueError):
    """A causal model was given norms with batch statistics.

    Args:
        seen: How the causal attention was written.
        target: The norm asked for.
    """

    def __init__(self, seen: str, target: str) -> None:
        super().__init__(
            f"the model is causal ({seen}), and the batch statistics of `target={target!r}` would let every position "
            "see the future of its batch while training: the loss would be too good, and evaluation would see another "
            "network. Use `target='affine'`, which has no batch statistics, or accept the leak with "
            "`allow_causal=True`."
        )


class CausalWatch(TorchFunctionMode):
    """Context manager around one forward that notes causal attention; the forward computes what it would.

    Attributes:
        seen: How it was written; empty if none was seen.
        active: Whether the context is open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""
        self.active = False

    def __enter__(self) -> CausalWatch:
        self.active = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.active = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call as it is; look at the mask of attention calls."""
        kwargs = kwargs or {}
        if not self.seen and func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            mask = kwargs.get(
                "attn_mask", args[3] if func is F.scaled_dot_product_attention and len(args) > 3 else None
            )
            if kwargs.get("is_causal") or (isinstance(mask, Tensor) and _is_causal(mask)):
                self.seen = f"{func.__name__} with a causal mask"
        return func(*args, **kwargs)


@torch.no_grad()
def _is_causal(mask: Tensor) -> bool:
    """Whether a square mask hides every later position and shows the present one."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    last = mask.reshape(-1, *mask.shape[-2:])[-1]
    # The two usual conventions of bool masks differ in what True means; both are causal or both are not.
    hidden = ~last if last.dtype == torch.bool else last < -1e4
    later = torch.ones_like(hidden).triu(1)
    return bool(hidden[later].all() and not hidden.diagonal().any()) or bool(
        last.dtype == torch.bool and (~hidden)[later].all() and hidden.diagonal().all()
    )
