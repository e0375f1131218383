"""One record of the registry: what the package knows of a method."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, Literal

_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# Keys that a configuration or the logged names have already.
_RESERVED = {
    "ckpt_path", "config", "data", "export", "lr_scheduler", "model", "optimizer", "seed_everything", "trainer",
    "weights_only",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What the package knows of a method.

    Args:
        name: Its key in YAML, on the command line, in recipes and in logged names (``efficient/<name>/...``).
        callback: The class of its callback, or where it is, ``"package.module:Class"``. None: other callbacks record
            it, and it has no key of its own.
        after: The method that it follows in the order.
        before: The method that it precedes.
        replay: ``function(model, config, names) -> Change``, or where it is: replaces the modules ``names`` of a new
            model as the callback did, before :func:`lightning_efficient.load_from_checkpoint` loads weights. None: the
            method replaces no modules.
        config: A dataclass, or where it is: its fields are what ``replay`` reads of ``config``, all of which a file has
            to give. None: nothing is asked of it before ``replay`` sees it.
        excludes: Method that cannot be used on the same model → why, and what to do instead.
        charts: Title of a TensorBoard chart → regular expression for the names of the scalars in it.
        prunes: What it makes zero, which stays so only while it runs: no run may then resume without it. None: nothing.
        lasting: Whether it multiplies weights by something that stays in them, whoever trains them next, so that all
            later files name it.
    """

    name: str
    callback: str | type[Any] | None = None
    after: str | None = None
    before: str | None = None
    replay: str | Callable[..., Any] | None = None
    config: str | type[Any] | None = None
    excludes: Mapping[str, str] = field(default_factory=dict)
    charts: Mapping[str, str] = field(default_factory=dict)
    prunes: Literal["weights", "units"] | None = None
    lasting: bool = False

    def __post_init__(self) -> None:
        for name in ("excludes", "charts"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not self.name.isidentifier() or keyword.iskeyword(self.name) or self.name in _RESERVED:
            raise ValueError(
                f"a method cannot be called {self.name!r}: `name` is a key in YAML and a word of the command line, so "
                f"it should be a Python identifier other than {', '.join(sorted(_RESERVED))}."
            )
        for argument in ("callback", "replay", "config"):
            place = getattr(self, argument)
            if isinstance(place, str) and not _PLACE.fullmatch(place):
                raise ValueError(f"`{argument}` of {self.name} is {place!r}; expected 'package.module:name'.")
        for title, pattern in self.charts.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`charts[{title!r}]` of {self.name} is no regular expression: {error}.") from None

    @property
    def class_name(self) -> str:
        """Of its callback, without importing it; empty if it has none."""
        return (_place(self.callback) or "").rpartition(":")[2].rpartition(".")[2]

    def same_as(self, other: Method) -> bool:
        """Whether both are one record, made twice: a class that a notebook defines again counts as the same."""
        one, two = (
            replace(m, callback=_place(m.callback), replay=_place(m.replay), config=_place(m.config))
            for m in (self, other)
        )
        return one == two

    def find(self, argument: str) -> Any:
        """The thing itself that ``callback``, ``replay`` or ``config`` names, imported.

        Raises:
            ValueError: It is not there, or ``config`` is no dataclass.
        """
        place = getattr(self, argument)
        try:
            found = resolve_name(place) if isinstance(place, str) else place
        except (ImportError, AttributeError) as error:
            raise ValueError(f"`{argument}` of the method {self.name} is {place!r}: {error}.") from error
        if argument == "config" and found is not None and not is_dataclass(found):
            raise ValueError(f"`config` of the method {self.name} is {found!r}; expected a dataclass.")
        return found


def _place(thing: Any) -> str | None:
    return f"{thing.__module__}:{thing.__qualname__}" if callable(thing) else thing
