"""Which channel of which module every element of a tensor is a copy of, carried along through one forward.

Instead of a rule per operation on shapes and axes, a companion tensor of the same shape holds the number of the
channel each element came from (0: from elsewhere). Whatever only moves elements (views, permutations, slices,
padding, joining) is applied to the companion as it is, so the companion is right by construction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.common.nests import mapped, tensors_in

Axis = Literal["last", 1]
K = TypeVar("K", bound=Hashable)
Function = Callable[..., Any]

_SPACES = (torch.Tensor, torch, F)


def _functions(names: str) -> frozenset[Function]:
    return frozenset(f for n in names.split() for space in _SPACES if (f := getattr(space, n, None)) is not None)


# Every element of the result is a copy of an element of an argument, or a zero.
MOVES = _functions(
    "view reshape view_as reshape_as permute transpose swapaxes swapdims movedim moveaxis t flatten ravel unflatten"
    " squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile roll flip fliplr flipud rot90"
    " chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind narrow select index_select gather"
    " take_along_dim __getitem__ cat concat concatenate stack hstack vstack dstack pad unfold pixel_shuffle"
    " pixel_unshuffle channel_shuffle diagonal"
) | {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
# Those of them that can bring in elements from elsewhere.
_JOINS = _functions("cat concat concatenate stack hstack vstack dstack pad unfold")
# A companion is laid out in memory in its own way, which only these two look at.
_ANY_LAYOUT: dict[Function, Function] = {
    torch.Tensor.view: torch.Tensor.reshape,
    torch.Tensor.view_as: torch.Tensor.reshape_as,
}
# The result is the argument, perhaps of another floating dtype, on another device or in other memory.
COPIES = _functions("to float double half bfloat16 type type_as cpu cuda clone detach contiguous requires_grad_") | {
    torch.Tensor.data.__get__  # type: ignore[attr-defined]
}
DROPOUTS = _functions("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")
# Every element of the result is a weighted mean; where the companion is constant the weights add up to one.
AVERAGES = _functions(
    "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
# Questions about a tensor that are not about its values; so are all attributes but these few.
_ASKS = _functions(
    "size dim ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point is_complex"
    " get_device data_ptr __len__ __hash__ __repr__ dim_order new_zeros new_ones new_empty new_full new_tensor"
    " zeros_like ones_like empty_like full_like rand_like randn_like is_same_size is_tensor result_type"
    " has_names is_inference is_signed untyped_storage can_cast promote_types is_shared is_pinned register_hook"
)
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad"})


def label(function: Function) -> str:
    """Name of a torch function for people; an attribute's name where torch passes its getter."""
    name = getattr(function, "__name__", str(function))
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def asks(function: Function) -> bool:
    """Whether a function reads shapes, dtypes and the like, but no values."""
    if getattr(function, "__name__", "") in ("__get__", "__set__"):
        return label(function) not in _VALUES
    return function in _ASKS


@dataclass(eq=False)
class Tag:
    """Companion of one tensor.

    Args:
        tensor: Held so that its ``id`` is not given to another tensor.
        ids: Channel numbers, same shape, float64 on the CPU.
        keys: Whose channels these may be.
        via: Functions that brought other elements in (``pad``, ``cat``, ...).
    """

    tensor: Tensor
    ids: Tensor
    keys: frozenset[Any] = frozenset()
    via: frozenset[str] = frozenset()


class Space(Generic[K]):
    """Tags of one kind, with the numbering of their channels.

    A key stands for whatever has channels: a module's output, a weight's rows.
    """

    def __init__(self) -> None:
        self._tags: dict[int, Tag] = {}
        self._range: dict[K, range] = {}
        self._next = 1

    def of(self, value: Any) -> Tag | None:
        """The tag of a tensor, if it has one."""
        return self._tags.get(id(value))

    def mark(self, key: K, tensor: Tensor, axis: int) -> None:
        """Tag a tensor whose ``axis`` runs over the channels of ``key``."""
        size = tensor.shape[axis]
        known = self._range.setdefault(key, range(self._next, self._next + size))
        if len(known) != size:
            raise ValueError(f"{key!r} had {len(known)} channels in one call and {size} in another.")
        self._next = max(self._next, known.stop)
        ids = along(torch.arange(known.start, known.stop, dtype=torch.float64), tensor, axis)
        self._tags[id(tensor)] = Tag(tensor, ids, frozenset({key}))

    def keys(self, tag: Tag) -> frozenset[K]:
        """Whose channels a tensor really holds."""
        if len(tag.keys) < 2:
            return tag.keys
        counts = torch.bincount(tag.ids.flatten().long(), minlength=self._next)
        return frozenset(key for key in tag.keys if bool(counts[self._range[key].start : self._range[key].stop].any()))

    def local(self, key: K, ids: Tensor) -> Tensor:
        """Channel of ``key`` for every number in ``ids``; -1 where it is not one of them."""
        numbers = self._range.get(key, range(0))
        return torch.where((ids >= numbers.start) & (ids < numbers.stop), ids - numbers.start, -1.0).long()

    def size(self, key: K) -> int:
        """Number of channels of a key."""
        return len(self._range[key])

    def follow(self, function: Function, args: Any, kwargs: Mapping[str, Any], out: Any) -> list[Tag]:
        """Tag what a function made of tagged tensors.

        Returns:
            The tags it did something else with than moving, copying or averaging channels.
        """
        found = [tag for t in tensors_in((args, kwargs)) if (tag := self.of(t)) is not None]
        if not found or asks(function):
            return []
        if function in COPIES or _does_nothing(function, args, kwargs):
            source = self.of(args[0] if args else kwargs.get("input"))
            if source is None:
                return []  # only asked for its dtype
            if isinstance(out, Tensor) and out.shape == source.ids.shape and out.is_floating_point():
                self._tags[id(out)] = Tag(out, source.ids, source.keys, source.via)
                return []
        elif function in MOVES and not _makes_values(function, args, kwargs):
            self._move(function, args, kwargs, out, found)
            return []
        elif function in AVERAGES and self._average(function, args, kwargs, out, found):
            return []
        return found

    def _companion(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if (tag := self.of(value)) is not None:
            return tag.ids
        if value.is_floating_point():
            return torch.zeros(value.shape, dtype=torch.float64)
        return value.cpu()  # an index

    def _move(self, function: Function, args: Any, kwargs: Mapping[str, Any], out: Any, found: list[Tag]) -> None:
        args, kwargs = mapped(args, self._companion), mapped(dict(kwargs), self._companion)
        keys, via = (frozenset[Any]().union(*sets) for sets in ([t.keys for t in found], [t.via for t in found]))
        moved = _ANY_LAYOUT.get(function, function)(*args, **kwargs)
        for tensor, ids in zip(tensors_in(out), tensors_in(moved), strict=True):
            brought = function in _JOINS and (len(found) > 1 or bool((ids == 0).any()))
            self._tags[id(tensor)] = Tag(tensor, ids, keys, via | {label(function)} if brought else via)

    def _average(self, function: Function, args: Any, kwargs: Mapping[str, Any], out: Any, found: list[Tag]) -> bool:
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        first, second = (
            function(*mapped(args, power), **mapped(kwargs, power))
            for power in (self._companion, lambda value: _squared(self._companion(value)))
        )
        # Zero variance: all that went into an element had one number, and the weights added up to one.
        if len(found) > 1 or not torch.equal(first * first, second):
            return False
        self._tags[id(out)] = Tag(out, first, found[0].keys, found[0].via)
        return True


def along(channels: Tensor, like: Tensor, axis: int) -> Tensor:
    """``channels`` laid along one axis of a tensor of the shape of ``like``."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return channels.view(shape).expand(like.shape)


def constant_along_others(ids: Tensor, axis: int) -> Tensor | None:
    """Numbers along ``axis`` if they are the same at every other position, else None."""
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    return rows[0] if len(rows) and bool((rows == rows[0]).all()) else None


def _squared(value: Any) -> Any:
    return value * value if isinstance(value, Tensor) else value


def _does_nothing(function: Function, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if function not in DROPOUTS:
        return False
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a builtin: `input, p, train`, all required
        return len(args) == 3 and (args[1] == 0 or not args[2])
    bound.apply_defaults()
    return bound.arguments["p"] == 0 or not bound.arguments["training"]


def _makes_values(function: Function, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Padding with another value than zero, and views that read the bits as another dtype."""
    if function is F.pad:
        return (args[3] if len(args) > 3 else kwargs.get("value")) not in (None, 0, 0.0)
    return any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
