"""The widths of a network: which entries of which tensors are one unit, read off labels that went through it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.nests import outputs_in
from lightning_efficient.structured.book import Book
from lightning_efficient.structured.cuts import held_blocks, held_numbers
from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.structured.labels import Labels
from lightning_efficient.structured.slim import HEAD_ATTRIBUTES, INNER_ATTRIBUTES, LAYER_ATTRIBUTES, LAYERS
from lightning_efficient.structured.trace import Trace, watch

Role = Literal["produce", "consume"]
# An attribute of these may count the heads' channels or those of the residual stream; the trial decides which.
AMBIGUOUS = ("hidden_dim", "embed_dim", "dim")


@dataclass(frozen=True, eq=False)
class Width:
    """A width that something in the network has, before it is known whether it can be cut.

    Args:
        group: Its units.
        refused: Why it cannot be cut; empty: no reason known yet.
        heads: Its units are heads of an attention.
        mixed: The norm or reduction over the width that was seen; empty: none.
        counts: Ways in which attributes may count its units, to be tried in this order.
        doubtful: An axis of it was split into several, so that there is another way to read it.
    """

    group: UnitGroup
    refused: str = ""
    heads: bool = False
    mixed: str = ""
    counts: tuple[Mapping[str, Mapping[str, int]], ...] = ({},)
    doubtful: bool = False

    def versions(self) -> list[UnitGroup]:
        """The group with each way of counting."""
        return [replace(self.group, counts=counts) for counts in self.counts]


def find_widths(
    model: nn.Module,
    runs: Sequence[tuple[Callable[[], Any], Any]],
    unread: Mapping[str, set[str]] | None = None,
    inner: bool = False,
) -> tuple[list[Width], set[str]]:
    """Every width of a model.

    Args:
        model: A copy; nothing of it changes.
        runs: What runs it once, in one of its modes, and the inputs that it gives it, in any nest.
        unread: Module that ran → modules that it may have run, and did not: they may read what it handles.
        inner: See :class:`~lightning_efficient.structured.labels.Labels`.

    Returns:
        The widths, and the names of the parameters that were read.
    """
    tensors = own_tensors(model)
    labels = Labels(inner)
    book = Book(labels, tensors)
    trace = Trace(book)
    _tie_attention(model, book)
    names = {id(module): name for name, module in modules_by_name(model).items()}
    book.looked = {name: [] for name in unread or ()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for run, inputs in runs:
            book.feed(inputs)
            handles = watch(model, trace, lambda m: names[id(m)]) if unread else []
            try:
                with uncompiled(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), trace:
                    result = run()
            finally:
                for handle in handles:
                    handle.remove()
            book.close(outputs_in(result))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    for name, others in (unread or {}).items():
        _keep_for_unread(book, model, name, others)
    return list(_Reader(model, book, tensors).widths()), book.touched


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name → parameter or buffer, each once."""
    both = (*model.named_parameters(), *model.named_buffers())
    return {canonical_name(name): tensor for name, tensor in both}


def _tie_attention(model: nn.Module, book: Book) -> None:
    """``nn.MultiheadAttention`` takes the width of its heads from its input: with a head go channels of that."""
    for name, module in modules_by_name(model).items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        dot = f"{name}." if name else ""
        weight = f"{dot}in_proj_weight"
        if (weight, 1) not in book.own:
            why = f"nn.MultiheadAttention {name!r} has a `kdim` or `vdim` of its own, and one `embed_dim` beside"
            for (tensor, _), ids in book.own.items():
                if tensor.startswith(dot) and tensor.count(".") <= dot.count(".") + 1:
                    book.labels.fix(ids, why)
            continue
        line = book.own[weight, 1]
        book.labels.tie(line.view(module.num_heads, -1), [1])
        for part in book.own[weight, 0].view(3, -1):
            book.labels.unify(line, part)
        for axis in (0, 1):
            if (f"{dot}out_proj.weight", axis) in book.own:
                book.labels.unify(line, book.own[f"{dot}out_proj.weight", axis])


def _keep_for_unread(book: Book, model: nn.Module, name: str, others: set[str]) -> None:
    """What a module handles keeps its width if layers that it did not run are as wide."""
    modules = modules_by_name(model)
    seen: dict[int, set[int]] = defaultdict(set)
    for grid in book.looked[name]:
        for root in np.unique(book.labels.roots(grid)).tolist():
            seen[root] |= set(grid.shape)
    handled = {size for shapes in seen.values() for size in shapes if size > 1}
    for other in sorted(others):
        read, made = _widths_of(modules[other])
        if read & handled:
            why = f"{other!r} did not run on the example and may read it; pass an `example` that reaches it"
            hit = [root for root, shapes in seen.items() if root and shapes & (read | made)]
            book.labels.fix(torch.tensor(hit, dtype=torch.long), why)


def _widths_of(module: nn.Module) -> tuple[set[int], set[int]]:
    """The widths that a module may read and make; of what is no layer of torch's, all that its weights have, both."""
    weights = [p for p in module.parameters(recurse=False) if p.numel() > 1]
    plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    read, made = (
        {p.shape[a] for p in weights for a in axes if p.ndim > a and p.shape[a] > 1}
        for axes in (((1,), (0,)) if plain else ((0, 1), (0, 1)))
    )
    return read, made


class _Reader:
    """Labels read as groups of units."""

    def __init__(self, model: nn.Module, book: Book, tensors: Mapping[str, Tensor]) -> None:
        self.model, self.book, self.tensors = model, book, tensors
        self.modules = modules_by_name(model)
        self.parameters = {canonical_name(name) for name, _ in model.named_parameters()}
        self.made = {book.keys[i] for i in book.produced}
        self.taken = {book.keys[i] for i in book.consumed}  # some do both, such as weights that are used both ways
        roots = book.labels.roots
        self.attended = {r for grid in [*book.attended, *book.labels.blocks] for r in np.unique(roots(grid)).tolist()}
        self.split = self.attended | {
            r for grid in [*book.splits, *book.folded] for r in np.unique(roots(grid)).tolist()
        }
        self.parts = [[roots(line) for line in lines] for lines in book.parts]
        self.read = {r for grid in book.read for r in np.unique(roots(grid)).tolist()}
        self.mixed = {r: name for grid, name in book.mixed for r in np.unique(roots(grid)).tolist()}

    def widths(self) -> Iterator[Width]:
        """Classes of labels that take as many entries of the same tensors are units of one width."""
        widths = [self._width(*one) for roots, parts in self._alike() for one in self._apart(roots, parts)]
        taken: dict[str, int] = {}
        for width in sorted(widths, key=lambda width: bool(width.refused)):
            count = taken[width.group.name] = taken.get(width.group.name, 0) + 1
            if count > 1:
                if width.refused:  # such as the rows of an embedding, beside its columns
                    continue
                width = replace(width, group=replace(width.group, name=f"{width.group.name}#{count}"))
            yield width

    def _alike(self) -> list[tuple[list[int], dict[tuple[str, int], Tensor]]]:
        """Classes of labels with as many entries of the same tensors, and which: ``(classes, entries)`` of each."""
        keys = list(self.book.own)
        sizes = [len(ids) for ids in self.book.own.values()]
        roots = self.book.labels.roots(np.concatenate([np.zeros(0, dtype=np.int64), *self.book.own.values()]))
        owner = np.repeat(np.arange(len(keys)), sizes)
        entry = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(size) for size in sizes)])
        makes = np.array([key in self.made and key[0] in self.parameters for key in keys], dtype=bool)
        kept = np.isin(roots, roots[makes[owner]])
        order = np.lexsort((entry[kept], owner[kept], roots[kept]))
        roots, owner, entry = (part[kept][order] for part in (roots, owner, entry))
        # A run: the entries of one tensor that are in one class. A class: all its runs.
        starts = np.flatnonzero(np.r_[True, (roots[1:] != roots[:-1]) | (owner[1:] != owner[:-1])][: len(roots)])
        counts = np.diff(np.r_[starts, len(roots)])
        firsts = np.flatnonzero(np.r_[True, np.diff(roots[starts]) != 0][: len(starts)])
        many = np.diff(np.r_[firsts, len(starts)])
        found = []
        for number in np.unique(many).tolist():  # of runs
            runs = firsts[many == number][:, None] + np.arange(number)
            held = np.concatenate([owner[starts[runs]], counts[runs]], 1)
            _, where = np.unique(held, axis=0, return_inverse=True)
            for group in range(int(where.max()) + 1):
                mine = runs[where.reshape(-1) == group]
                parts = {}
                for run in mine.T:
                    index = starts[run][:, None] + np.arange(counts[run[0]])
                    parts[keys[owner[starts[run[0]]]]] = torch.from_numpy(entry[index])
                found.append((roots[starts[mine[:, 0]]].tolist(), parts))
        return sorted(found, key=lambda item: item[0][0])

    def _apart(
        self, roots: list[int], parts: dict[tuple[str, int], Tensor]
    ) -> list[tuple[list[int], dict[tuple[str, int], Tensor]]]:
        """Classes that lie in different parts of an axis that was split go apart: each part has a size of its own."""
        for _, each in self._in_parts(roots):
            kinds, where = np.unique(each, axis=0, return_inverse=True)
            if len(kinds) > 1:
                some = [np.flatnonzero(where.reshape(-1) == kind).tolist() for kind in range(len(kinds))]
                return [([roots[i] for i in s], {key: index[s] for key, index in parts.items()}) for s in some]
        return [(roots, parts)]

    def _in_parts(self, roots: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Axes that were split and on which these classes lie: sizes of the parts, and ``(units, parts)`` entries."""
        for lines in self.parts:
            if any(np.isin(line, roots).any() for line in lines):
                each = np.stack([(line[None] == np.array(roots)[:, None]).sum(1) for line in lines], 1)
                yield [len(line) for line in lines], each

    def _width(self, roots: list[int], parts: Mapping[tuple[str, int], Tensor]) -> Width:
        keys = list(parts)
        slices = []
        for (name, dim), index in parts.items():
            role: Role = "produce" if (name, dim) in self.made else "consume"
            slices.append(Slice(name, dim, index, role))
        multihead = any(self._multihead(name) for name, _ in keys)
        heads = not multihead and any(root in self.attended for root in roots)
        divisor = self._divisor(slices, len(roots))
        group = UnitGroup(
            self._name(slices, heads), len(roots), tuple(slices), divisor, heads=heads and not self.book.labels.inner
        )
        mixed = next((self.mixed[r] for r in roots if r in self.mixed), "")
        refused = next((why for r in roots if (why := self.book.labels.why_fixed(r))), "")
        if not refused and len(roots) < 2:
            refused = "all its channels are coupled with each other, so none can go alone"
        elif not (refused or group.consumed or self.taken & set(keys) or any(r in self.read for r in roots)):
            refused = "no layer that can be cut reads it"
        counts = tuple(self._counts(group, heads, roots)) if not refused else ({},)
        return Width(group, refused, heads, mixed, counts, any(r in self.split for r in roots))

    def _multihead(self, tensor: str) -> nn.MultiheadAttention | None:
        owner = tensor.rpartition(".")[0]
        for name in (owner, owner.rpartition(".")[0]):
            if isinstance(found := self.modules.get(name), nn.MultiheadAttention):
                return found
        return None

    def _divisor(self, slices: Iterable[Slice], units: int) -> int:
        """Whether ``nn.TransformerEncoder`` takes its fused inference was decided when built, for an even number."""
        counts = [m.num_heads for part in slices if (m := self._multihead(part.name)) is not None]
        return 2 if any(heads % 2 == 0 and heads // units % 2 for heads in counts) else 1

    def _name(self, slices: Sequence[Slice], heads: bool) -> str:
        made = [s for s in slices if s.role == "produce" and s.name in self.parameters]
        owners = [s.name.rpartition(".")[0].partition(".parametrizations")[0] for s in made]
        if heads and (shared := common_parent(owners)):
            return shared.rpartition(".")[0] or shared if shared in owners else shared
        wide = [o for s, o in zip(made, owners, strict=True) if o and self.tensors[s.name].ndim > 1]
        return next(iter([*wide, *filter(None, owners), made[0].name]))

    def _counts(self, group: UnitGroup, heads: bool, roots: Sequence[int]) -> Iterator[dict[str, dict[str, int]]]:
        """Ways in which integer attributes may count the units, the likeliest first."""
        holders = {part.name.rpartition(".")[0] for part in group.slices}
        top = common_parent(holders)
        top = top.rpartition(".")[0] if holders == {top} else top  # as of queries and keys that one layer makes
        inside = f"{top}." if top else ""
        near = [
            (name, module)
            for name, module in self.modules.items()
            if (name == top or name.startswith(inside))
            and not isinstance(module, nn.MultiheadAttention)
            and (not any(True for _ in module.parameters()) or any(_within(h, name) for h in holders))
        ]
        sizes, split = {part.index.numel() for part in group.slices}, list(self._in_parts(roots))
        kinds = ("heads", "inner", "lists", "parts", "ambiguous", "any", "held", "near")
        found: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in kinds}
        for name, module in near:
            taken = LAYER_ATTRIBUTES if isinstance(module, LAYERS) else ()  # which go with the tensors
            for attribute, value in vars(module).items():
                if type(value) is not int or value < 2 or value % group.units or attribute.startswith("_"):
                    continue
                step, equal = value // group.units, value in sizes
                if attribute in HEAD_ATTRIBUTES and heads:
                    found["heads"].setdefault(name, {})[attribute] = step
                elif equal and attribute in INNER_ATTRIBUTES:
                    kind = "ambiguous" if attribute in AMBIGUOUS else "inner"
                    found[kind].setdefault(name, {})[attribute] = step
                elif (equal or heads) and attribute not in taken:
                    found["any"].setdefault(name, {})[attribute] = step
            for path, value in held_numbers(module):
                attribute = path.partition(".")[2]
                step, rest = divmod(value, group.units)
                if rest or not step:
                    continue
                if (heads and attribute in HEAD_ATTRIBUTES) or (value in sizes and attribute in INNER_ATTRIBUTES):
                    found["held"].setdefault(name, {})[path] = step
                elif heads and ("head" in attribute or "group" in attribute):
                    found["near"].setdefault(name, {})[path] = step
            lists = dict(held_blocks(module))
            for ends, each in split:
                steps = {i: int(step) for i, step in enumerate(each[0]) if step}
                for attribute in (a for a, value in lists.items() if list(value) == ends):
                    found["lists"].setdefault(name, {}).update({f"{attribute}.{i}": steps[i] for i in steps})
                of_size = {ends[i]: step for i, step in steps.items()}
                for path, value in (*vars(module).items(), *held_numbers(module)):
                    if type(value) is int and value in of_size and path[0] != "_" and path not in taken:
                        found["parts"].setdefault(name, {})[path] = of_size[value]
        sure = _joined(found["heads"], found["inner"], found["lists"])
        held = _joined(sure, found["held"])
        seen: list[dict[str, dict[str, int]]] = []
        ways = [_joined(sure, {}), _joined(sure, found["ambiguous"]), {}] if heads else [{}, sure]
        ways = [sure, {}] if found["lists"] and not heads else ways  # without it, it does not run
        ways += [held, *(_joined(held, some) for some in _subsets(found["near"])), _joined(held, found["near"])]
        ways += [_joined(sure, some) for some in _subsets(found["parts"])] + [_joined(sure, found["parts"])]
        ways += [_joined(sure, some) for some in _subsets(found["any"])]
        ways += [_joined(sure, found["any"]), _joined(sure, found["ambiguous"], found["any"])]
        for way in ways:
            if way not in seen:
                seen.append(way)
                yield way


def counts_above(modules: Mapping[str, nn.Module], groups: Sequence[UnitGroup]) -> dict[str, dict[str, int]]:
    """Module around several groups → attribute that may count their heads → by how much one less lowers it."""
    top = common_parent(part.name.rpartition(".")[0] for group in groups for part in group.slices)
    found: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        for attribute, value in vars(module).items() if _within(top, name) else ():
            if attribute in HEAD_ATTRIBUTES and type(value) is int and value and not value % groups[0].units:
                found.setdefault(name, {})[attribute] = value // groups[0].units
    return found


def _subsets(found: Mapping[str, Mapping[str, int]]) -> Iterator[dict[str, dict[str, int]]]:
    """Some of the attributes, if they are few: the fewest first."""
    every = [(name, attribute, step) for name, values in found.items() for attribute, step in values.items()]
    for count in range(1, len(every) if len(every) <= 4 else 0):
        for chosen in itertools.combinations(every, count):
            yield _joined(*({name: {attribute: step}} for name, attribute, step in chosen))


def _joined(*parts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    both: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, values in part.items():
            both.setdefault(name, {}).update(values)
    return both


def _within(name: str, parent: str) -> bool:
    return name == parent or not parent or name.startswith(f"{parent}.")


def common_parent(names: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    paths = [name.split(".") for name in set(names)]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
