"""What plain data that came from a file must look like, said once and checked before anything is touched.

.. code-block:: python

    STATE = Record({"step": Int(low=0), "scores": MapOf(Text(), TensorOf("floating", finite=True))})
    check(state, STATE, "the state of MagnitudePruning")

:func:`check` raises one error for whatever it is given. The value stays as it is: nothing is converted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LONGEST_TEXT = 4096
_MOST_ITEMS = 1_000_000
_LARGEST = 2**63 - 1  # what a tensor of integers holds
_KEY = " (a key)"


class SchemaError(ValueError):
    """Data from a file is not what it should be; the message says where, what, and what was expected."""


class Wrong(NamedTuple):
    """The first thing in some data that is not as it should be.

    Args:
        path: Of the field, such as ``['scores'][0]``; empty for the whole.
        value: What is there.
        expected: What should be.
    """

    path: str
    value: Any
    expected: str


def check(value: Any, schema: Schema, where: str, error: type[ValueError] = SchemaError) -> None:
    """Refuse data that is not as it should be.

    Args:
        value: The data, from a file.
        schema: What it should be.
        where: Whose data it is, such as ``"the checkpoint's state of SAPPruning"``.
        error: What to raise.

    Raises:
        ValueError: ``error``, with one message: ``where`` and the field, what was expected, what was found.
    """
    if (found := schema.wrong(value)) is not None:
        path = f", field {_cut(found.path, 200)}," if found.path else ""
        raise error(f"{where}{path} should be {_cut(found.expected, 400)}; got {short(found.value)}.")


def short(value: Any) -> str:
    """A value in a few words, whatever it is and however large.

    Args:
        value: Anything.
    """
    if isinstance(value, Tensor):
        number = f" {value.item()}" if _readable(value) and value.numel() == 1 else ""
        return f"a tensor{number} of {value.dtype} and shape {tuple(value.shape)}"
    if type(value) in (dict, list, tuple):
        inside = ", ".join(_word(item) for item in islice(value, 3))
        return f"a {type(value).__name__} of {len(value)}{f' ({inside})' if inside else ''}"
    return _word(value)


def _word(value: Any) -> str:
    if type(value) is str:
        return _cut(repr(value[:200]), 100)
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) <= _LARGEST):
        return repr(value)
    return "a huge int" if type(value) is int else f"an object of type {type(value).__name__}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


def _readable(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized


class Schema:
    """What a value must look like: its own kind, and schemas of its parts."""

    def wrong(self, value: Any, path: str = "") -> Wrong | None:
        """The first thing that is wrong with a value, if anything is.

        Args:
            value: Any.
            path: Where it is.
        """
        if not self._right(value):
            return Wrong(path, value, str(self))
        parts = (schema.wrong(item, path + step) for schema, step, item in self._parts(value))
        return next((found for found in parts if found is not None), None)

    def _right(self, value: Any) -> bool:
        """Whether the value itself is of this kind."""
        return False

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        """Schema, step of the path and value of each part; called if the value is of this kind."""
        yield from ()


def _range(low: float | None, high: float | None) -> str:
    return ("" if low is None else f" from {low}") + ("" if high is None else f" up to {high}")


@dataclass(frozen=True)
class Int(Schema):
    """A whole number of at most 64 bits, from ``low`` up to ``high``; a bool is none."""

    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        return f"a whole number{_range(self.low, self.high)}"

    def _right(self, value: Any) -> bool:
        low, high = -_LARGEST if self.low is None else self.low, _LARGEST if self.high is None else self.high
        return type(value) is int and low <= value <= high


@dataclass(frozen=True)
class Number(Schema):
    """A float, or an int that fits into one: from ``low``, strictly ``above``, up to ``high``; a bool is none.

    Not NaN or infinite, unless ``finite`` is False.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    finite: bool = True

    def __str__(self) -> str:
        above = "" if self.above is None else f" above {self.above}"
        return f"a {'finite ' if self.finite else ''}number{above}{_range(self.low, self.high)}"

    def _right(self, value: Any) -> bool:
        if type(value) is not float and not (type(value) is int and abs(value) <= sys.float_info.max):
            return False
        above = self.above is None or value > self.above
        inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return above and inside and (not self.finite or math.isfinite(value))


@dataclass(frozen=True)
class Flag(Schema):
    """True or False."""

    def __str__(self) -> str:
        return "true or false"

    def _right(self, value: Any) -> bool:
        return type(value) is bool


@dataclass(frozen=True)
class Text(Schema):
    """A string of at most ``longest`` characters."""

    longest: int = LONGEST_TEXT

    def __str__(self) -> str:
        return f"a string up to {self.longest} characters"

    def _right(self, value: Any) -> bool:
        return type(value) is str and len(value) <= self.longest


@dataclass(frozen=True)
class OneOf(Schema):
    """One of a few strings, numbers, bools or None, of the same type."""

    values: tuple[str | float | bool | None, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def _right(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)


@dataclass(frozen=True)
class TensorOf(Schema):
    """A strided tensor, no subclass, of one dtype or kind, ``ndim`` axes, ``shape``, and entries from ``low``."""

    dtype: torch.dtype | Literal["floating", "integer"] | None = None
    ndim: int | None = None
    shape: tuple[int, ...] | None = None
    finite: bool = False
    low: float | None = None

    def __str__(self) -> str:
        kind = "a" if self.dtype is None else f"a {str(self.dtype).removeprefix('torch.')}"
        axes = "" if self.ndim is None else f" of {self.ndim} axes"
        shape = "" if self.shape is None else f" of shape {self.shape}"
        return f"{kind} tensor{axes}{shape}{' of finite numbers' if self.finite else ''}{_range(self.low, None)}"

    def _right(self, value: Any) -> bool:
        if type(value) is not Tensor or not _readable(value):
            return False
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        kinds = {None: True, "floating": value.is_floating_point(), "integer": whole}
        typed = kinds.get(self.dtype, value.dtype == self.dtype)  # type: ignore[arg-type]
        if not typed or self.ndim not in (None, value.ndim) or self.shape not in (None, tuple(value.shape)):
            return False
        finite = not self.finite or bool(value.isfinite().all())
        return finite and (self.low is None or bool((value >= self.low).all()))


@dataclass(frozen=True)
class OrNone(Schema):
    """A value, or None."""

    schema: Schema

    def __str__(self) -> str:
        return f"null or {self.schema}"

    def wrong(self, value: Any, path: str = "") -> Wrong | None:  # noqa: D102
        found = None if value is None else self.schema.wrong(value, path)
        return found._replace(expected=str(self)) if found is not None and found.path == path else found


@dataclass(frozen=True)
class Such(Schema):
    """A value of which more is known than its kind: ``holds(value)``, called once all else is right; ``says`` what."""

    schema: Schema
    holds: Callable[[Any], bool]
    says: str

    def __str__(self) -> str:
        return f"{self.schema}, {self.says}"

    def wrong(self, value: Any, path: str = "") -> Wrong | None:  # noqa: D102
        found = self.schema.wrong(value, path)
        return found if found is not None or self.holds(value) else Wrong(path, value, str(self))


@dataclass(frozen=True)
class ListOf(Schema):
    """A list or tuple of values of one kind: ``length`` of them, or at most ``most``."""

    item: Schema
    length: int | None = None
    most: int = _MOST_ITEMS

    def __str__(self) -> str:
        most = f" of at most {self.most}" if self.most != _MOST_ITEMS else ""
        return f"a list{most if self.length is None else f' of {self.length}'}, each item {self.item}"

    def _right(self, value: Any) -> bool:
        return type(value) in (list, tuple) and len(value) <= self.most and self.length in (None, len(value))

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        yield from ((self.item, f"[{i}]", item) for i, item in enumerate(value))


@dataclass(frozen=True)
class TupleOf(Schema):
    """A list or tuple of fixed length, each item with a schema of its own."""

    items: tuple[Schema, ...]

    def __str__(self) -> str:
        return f"a list of {len(self.items)} ({'; '.join(map(str, self.items))})"

    def _right(self, value: Any) -> bool:
        return type(value) in (list, tuple) and len(value) == len(self.items)

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        yield from ((self.items[i], f"[{i}]", item) for i, item in enumerate(value))


@dataclass(frozen=True)
class MapOf(Schema):
    """A mapping whose keys are of one kind, and whose values are."""

    key: Schema
    value: Schema

    def __str__(self) -> str:
        return f"a mapping, each key {self.key}, each value {self.value}"

    def _right(self, value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) <= _MOST_ITEMS

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        for key, item in value.items():
            yield self.key, _KEY, key
            yield self.value, f"[{_word(key)}]", item


@dataclass(frozen=True)
class _Never(Schema):
    """What must not be there, or not be missing."""

    says: str

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class Part(Schema):
    """A mapping with these fields, perhaps the ``optional`` ones, and whatever else."""

    fields: Mapping[str, Schema]
    optional: Mapping[str, Schema] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"a mapping with {', '.join(map(repr, self.fields)) or 'nothing in it'}"

    def _right(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        known = {**self.fields, **self.optional}
        for name in self.fields:
            if name not in value:
                yield _Never(f"there, {self.fields[name]}"), f"[{name!r}]", None
        yield from ((known[key], f"[{key!r}]", item) for key, item in value.items() if key in known)


@dataclass(frozen=True)
class Record(Part):
    """A mapping with these fields, perhaps the ``optional`` ones, and no others."""

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        yield from super()._parts(value)
        known = ", ".join(map(repr, {**self.fields, **self.optional})) or "none"
        strangers = (key for key in value if key not in self.fields and key not in self.optional)
        yield from ((_Never(f"a known field: {known}"), _KEY, key) for key in strangers)


@dataclass(frozen=True)
class Anything(Schema):
    """What is checked elsewhere."""

    def __str__(self) -> str:
        return "anything"

    def _right(self, value: Any) -> bool:
        return True


@dataclass(frozen=True)
class Plain(Schema):
    """Any plain data: None, bools, numbers and strings, in lists and mappings by string, not deeper than ``depth``.

    With ``tensors`` also these, and mappings by whole numbers, which an optimizer's state has.
    """

    tensors: bool = False
    depth: int = 8

    def __str__(self) -> str:
        return f"plain data{' and tensors' if self.tensors else ''}, not too deep"

    def _right(self, value: Any) -> bool:
        single = value is None or type(value) in (bool, int, float) or Text()._right(value)
        nest = self.depth >= 0 and (type(value) in (list, tuple) or isinstance(value, Mapping))
        return single or nest or (self.tensors and type(value) is Tensor)

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        below = Plain(self.tensors, self.depth - 1)
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield (Text() if type(key) is not int or not self.tensors else Int()), _KEY, key
                yield below, f"[{_word(key)}]", item
        elif type(value) in (list, tuple):
            yield from ((below, f"[{i}]", item) for i, item in enumerate(value))
