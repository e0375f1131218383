"""Units that live or die together: one coupled width of a network, as plain indices into its tensors.

A width of a network (the channels of a convolution, the heads of an attention, the hidden neurons of an MLP) has an
axis in many tensors: the rows of what produces it, the bias, the norm on it, the columns of what reads it. A
:class:`UnitGroup` says which entries of which tensor belong to which of its units. Scoring, shrinking and cutting need
nothing else: no graph, no module, no tracing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_efficient.common.schema import (
    Flag,
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    Record,
    Such,
    TensorOf,
    Text,
    short,
)
from lightning_efficient.folding.probes import Probe


@dataclass(frozen=True, eq=False)  # comparing records would compare tensors element by element
class Slice:
    """The part of one tensor that belongs to the units of a group.

    Args:
        name: Canonical name of a parameter or buffer, such as ``"net.0.weight"``.
        dim: The axis on which the units lie.
        index: ``(units, k)``, long, on the CPU: the ``k`` entries along ``dim`` that belong to each unit. ``k > 1`` for
            heads, for what a flatten spread out, and for grouped convolutions.
        role: ``"produce"``: rows, biases, affine maps and buffers of norms; when its parameters are zero, so is the
            unit. ``"consume"``: columns of what reads the unit, cut with it but neither shrunk nor scored.
    """

    name: str
    dim: int
    index: Tensor
    role: Literal["produce", "consume"]

    def entries(self, units: Iterable[int]) -> Tensor:
        """The entries along ``dim`` of some units.

        Args:
            units: Indices of units.

        Returns:
            ``(entries,)``, long, sorted.
        """
        return self.index[torch.as_tensor(list(units), dtype=torch.long)].flatten().sort().values

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor's entries, one row a unit.

        Args:
            tensor: Of the shape of the tensor named ``name``: the parameter, its gradient, a score.

        Returns:
            ``(units, entries a unit)``, a copy.
        """
        index = self.index.to(tensor.device)
        picked = tensor.index_select(self.dim, index.flatten()).movedim(self.dim, 0)
        return picked.reshape(index.shape[0], -1)

    def multiply_(self, tensor: Tensor, factors: Tensor) -> None:
        """Multiply every unit's entries in place.

        Args:
            tensor: Of the shape of the tensor named ``name``.
            factors: ``(units,)``; a factor of 0 writes zeros, over infinities and NaN too.
        """
        where = (factors != 1).nonzero().flatten().cpu()
        if not len(where):
            return
        entries = self.index[where].to(tensor.device)
        shape = [1] * tensor.ndim
        shape[self.dim] = entries.numel()
        factor = factors.to(tensor)[where.to(factors.device)].repeat_interleave(entries.shape[1]).to(tensor.device)
        flat = entries.flatten()
        scaled = tensor.index_select(self.dim, flat) * factor.view(shape)
        scaled.masked_fill_((factor == 0).view(shape), 0)
        tensor.index_copy_(self.dim, flat, scaled)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are cut one by one, each with everything that belongs to it.

    Args:
        name: Readable, such as ``"layer1.0.conv1"``.
        units: How many there are.
        slices: Every tensor with an axis along this width; one slice a tensor and axis.
        divisor: How many units may stay: a multiple of this.
        exact: Zeroing the parameters of the ``"produce"`` slices equals removing the units.
        note: Why it does not, in words.
        counts: Module → integer attribute → by how much one unit less lowers it (the number of heads of an attention).
        heads: Its units are heads of an attention, or sets of heads that share keys and values.
    """

    name: str
    units: int
    slices: tuple[Slice, ...]
    divisor: int = 1
    exact: bool = True
    note: str = ""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    heads: bool = False

    def __post_init__(self) -> None:
        for part in self.slices:
            if part.index.ndim != 2 or len(part.index) != self.units or part.index.dtype != torch.long:
                raise ValueError(
                    f"{self.name!r}: the index of {part.name!r} should be long, ({self.units}, k); got "
                    f"{part.index.dtype}, {tuple(part.index.shape)}."
                )

    @property
    def produced(self) -> tuple[Slice, ...]:
        """The slices that make the units."""
        return tuple(part for part in self.slices if part.role == "produce")

    @property
    def consumed(self) -> tuple[Slice, ...]:
        """The slices that read the units."""
        return tuple(part for part in self.slices if part.role == "consume")

    def zero(self, parameters: Mapping[str, Tensor], units: Iterable[int]) -> None:
        """Write zeros into the parameters that make some units; buffers and readers stay.

        Args:
            parameters: Name → parameter; slices of names that are not in it are left alone.
            units: Indices of units.
        """
        chosen = list(units)
        factors = torch.ones(self.units)
        factors[torch.as_tensor(chosen, dtype=torch.long)] = 0
        with torch.no_grad():
            for part in self.produced:
                if part.name in parameters:
                    part.multiply_(parameters[part.name], factors)

    def zeros(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which units are zero now.

        Args:
            parameters: Name → parameter; slices of names that are not in it are left out.

        Returns:
            ``(units,)`` bool, on the CPU: all parameters that make the unit are exactly zero.
        """
        zero = torch.ones(self.units, dtype=torch.bool)
        found = False
        for part in self.produced:
            if part.name in parameters:
                found = True
                zero &= ~part.rows(parameters[part.name].detach()).any(1).cpu()
        return zero & found


@dataclass(frozen=True, eq=False)
class Groups:
    """What can be cut, and what cannot.

    Args:
        found: Name → group.
        refused: Name of a width, layer or module → why its units cannot be cut, for people.
        notes: What the search could not see.
        share: Share of the model's parameters that goes if every group keeps as little as it may.
        held: Name of a width that was refused → share of the parameters in tensors that no group touches and it does.
        calls: How the models of Hugging Face's inside were called on the example, in float64; in no file.
    """

    found: dict[str, UnitGroup] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    share: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    calls: Mapping[str, Probe] = field(default_factory=dict)

    def report(self) -> str:
        """One line a group and a refusal, for people."""
        lines = [f"{len(self.found)} widths can be cut, {len(self.refused)} cannot"]
        if self.share:
            lines[0] += f"; up to {self.share:.0%} of the parameters can go"
        most = sorted(self.held.items(), key=lambda item: -item[1])[:3]
        if most := [(name, share) for name, share in most if share >= 0.01]:
            lines.append(f"  most is held by {', '.join(f'{name} ({share:.0%})' for name, share in most)}")
        for group in self.found.values():
            unit = "" if group.divisor == 1 else f", a multiple of {group.divisor} stays"
            units = "heads" if group.heads else "units"
            lines.append(f"  {group.name}: {group.units} {units} in {len(group.slices)} tensors{unit}")
            if not group.exact:
                lines.append(f"    zeroing is not removing: {group.note}")
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_rounding(round_to: int) -> int:
    """A number of channels to keep a multiple of, as given.

    Raises:
        ValueError: It is not a whole number from 1.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"`round_to` is a number of channels such as 8, a whole number from 1; got {round_to!r}.")
    return round_to


def rounded(group: UnitGroup, round_to: int) -> UnitGroup:
    """A group that keeps as many units as give every weight on it a multiple of so many channels.

    Channels count, not units: heads of 16 channels are aligned to 8 already.

    Args:
        group: The group.
        round_to: Channels.
    """
    sizes = {part.index.shape[1] for part in group.slices}
    return replace(group, divisor=math.lcm(group.divisor, *(round_to // math.gcd(round_to, size) for size in sizes)))


def check_keep(groups: Groups, keep: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """The units that stay, checked and sorted.

    Args:
        groups: The groups.
        keep: Name of a group → indices of the units that stay. Groups that are not named stay whole.

    Returns:
        The same, without groups that stay whole.

    Raises:
        ValueError: A name is unknown, an index is out of range or given twice, nothing of a group would stay, or the
            number of units that stay is no multiple of the group's divisor.
    """
    checked: dict[str, list[int]] = {}
    for name, units in keep.items():
        group = groups.found.get(name)
        if group is None:
            why = f" It cannot be cut: {groups.refused[name]}." if name in groups.refused else ""
            near = difflib.get_close_matches(name, groups.found, 3)
            raise ValueError(f"`keep` names {name!r}, which is no group.{why} Close names: {near or 'none'}.")
        kept = sorted(int(unit) for unit in units)
        if len(set(kept)) != len(kept) or (kept and not 0 <= kept[0] <= kept[-1] < group.units):
            raise ValueError(
                f"`keep[{name!r}]` should hold different units from 0 to {group.units - 1}; got {_short(kept)}."
            )
        if not kept:
            raise ValueError(
                f"`keep[{name!r}]` is empty: all {group.units} units would go, and nothing would pass any more. Keep "
                f"at least {group.divisor}."
            )
        if len(kept) % group.divisor and len(kept) < group.units:
            raise ValueError(
                f"`keep[{name!r}]` holds {len(kept)} units; the width needs a multiple of {group.divisor}, such as "
                f"{max(len(kept) // group.divisor, 1) * group.divisor}."
            )
        if len(kept) < group.units:
            checked[name] = kept
    return checked


def check_groups(groups: Groups, shapes: Mapping[str, tuple[int, ...]], round_to: int = 1) -> None:
    """Refuse groups that are not those of a model.

    Args:
        groups: From a file.
        shapes: Name of a parameter or buffer of the model → its shape.
        round_to: See :func:`rounded`.

    Raises:
        ValueError: Names the group, the tensor, and what was expected.
    """
    for name, group in groups.found.items():
        if (whole := math.lcm(group.units, round_to)) % group.divisor:
            raise ValueError(f"the `divisor` of {name!r} should divide {whole}; got {group.divisor}.")
        if not group.slices:
            raise ValueError(f"the `slices` of {name!r} should not be empty.")
        for part in group.slices:
            shape = shapes.get(part.name, ())
            size = shape[part.dim] if part.dim < len(shape) else 0
            flat = part.index.flatten()
            if not len(flat) or int(flat.max()) >= size or len(set(flat.tolist())) != len(flat):
                raise ValueError(
                    f"the `slices` of {name!r} should name each entry of {part.name!r} along axis `dim`={part.dim} "
                    f"once, and the model has {size} of them; got {len(flat)} from {short(flat[:3].tolist())}."
                )


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{numbers[:4]} ... {numbers[-4:]}".replace("] ... [", ", ..., ")


_SLICE = Record(
    {
        "name": Text(), "dim": Int(low=0), "index": TensorOf(torch.long, ndim=2, low=0),
        "role": OneOf(("produce", "consume")),
    }
)  # fmt: skip
_GROUP = Such(
    Record(
        {
            "units": Int(low=1), "slices": ListOf(_SLICE), "divisor": Int(low=1), "exact": Flag(), "note": Text(),
            "counts": MapOf(Text(), MapOf(Text(), Int(low=0))), "heads": Flag(),
        }
    ),
    lambda group: all(len(part["index"]) == group["units"] for part in group["slices"]),
    "with a row for each of its `units` in the index of every slice",
)  # fmt: skip
GROUPS = Record(
    {
        "found": MapOf(Text(), _GROUP), "refused": MapOf(Text(), Text()), "notes": ListOf(Text()),
        "share": Number(low=0), "held": MapOf(Text(), Number(low=0)),
    }
)  # fmt: skip


def groups_as_plain(groups: Groups) -> dict[str, Any]:
    """Groups as plain data, for a checkpoint."""
    found = {}
    for name, group in groups.found.items():
        slices = [{"name": s.name, "dim": s.dim, "index": s.index, "role": s.role} for s in group.slices]
        counts = {module: dict(attributes) for module, attributes in group.counts.items()}
        found[name] = {
            "units": group.units, "slices": slices, "divisor": group.divisor, "exact": group.exact, "note": group.note,
            "counts": counts, "heads": group.heads,
        }  # fmt: skip
    rest = {"notes": list(groups.notes), "share": groups.share, "held": dict(groups.held)}
    return {"found": found, "refused": dict(groups.refused), **rest}


def groups_from_plain(plain: Mapping[str, Any]) -> Groups:
    """The inverse of :func:`groups_as_plain`."""
    found = {}
    for name, group in plain["found"].items():
        slices = tuple(Slice(s["name"], s["dim"], s["index"], s["role"]) for s in group["slices"])
        rest = {key: value for key, value in group.items() if key != "slices"}
        found[name] = UnitGroup(name, slices=slices, **rest)
    return Groups(found, dict(plain["refused"]), tuple(plain["notes"]), plain["share"], dict(plain["held"]))
