"""Which weights scale an attention's logits: found from how the logits depend on them, not from the names of classes.

A set ``S`` of weights is right if the logits are homogeneous of degree one in it, ``ℓ(c·S) = c·ℓ(S)``; then dividing
``S`` by ``τ`` divides the logits by ``τ``, biases and all. Euler's theorem turns that into one number a weight:
``Σ_S ⟨∂ℓ/∂s, s⟩ = ℓ``, for any projection of ``ℓ``. A query projection satisfies it with its bias, a query norm with
its own affine (and the projection before it then contributes nothing), a table of position biases joins them, and
where nothing does (a clamped logarithm of a scale, ``1 + weight``, a soft cap) no set satisfies it. It is necessary,
not sufficient: who uses a knob checks the scaled model. Where no set holds the queries' weights, keys will do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from lightning_efficient.attention.trace import Seen
from lightning_efficient.weightspace import Block

# A key with less weight than this (e^-57) counts as masked: the constant -100 of windowed attention is a mask.
MASK_GAP = 57.0
_LARGEST_SET = 5
_MOST_SETS = 20_000
# Relative to the projected logits as a whole, whose sum may be next to nothing. Sums of those that are proportional
# round to 1e-14, and a soft cap far above its logits shows at 1e-9.
_TOLERANCE = 1e-11


@dataclass(frozen=True)
class Knob:
    """Blocks of one parameter, which scale logits together with the site's other knobs.

    Args:
        parameter: Its name in the model.
        blocks: The blocks, without overlap.
        heads: The head that each block belongs to, if the blocks are cut by heads; else None.
    """

    parameter: str
    blocks: tuple[Block, ...]
    heads: tuple[int, ...] | None = None


class NoKnobError(ValueError):
    """No set of weights scales all logits; the message says why."""


@dataclass
class Graph:
    """The gradients of one traced pass.

    Args:
        parameters: Name -> parameter, of the model that was traced.
        aliases: Leaves of the graph and what they stand for.
    """

    parameters: Mapping[str, nn.Parameter]
    aliases: Sequence[tuple[Tensor, Tensor]] = ()
    names: list[str] = field(init=False)
    _random: torch.Generator = field(init=False)
    _behind: dict[Tensor, tuple[dict[str, Tensor], list[Tensor | None]]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = list(self.parameters)
        self._random = torch.Generator().manual_seed(0)
        self._behind: dict[Tensor, tuple[dict[str, Tensor], list[Tensor | None]]] = {}

    def cotangent(self, tensor: Tensor) -> Tensor:
        """A random projection of a tensor, from an own generator."""
        return torch.randn(tensor.shape, generator=self._random, dtype=torch.float32).to(tensor)

    def local(
        self,
        tensor: Tensor,
        cotangent: Tensor,
        names: Sequence[str] | None = None,
        leaves: Collection[int] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Non-zero gradients with respect to parameters, by name, and to the leaves, by position.

        Args:
            tensor: Of the graph.
            cotangent: What is projected on.
            names: Only of these parameters.
            leaves: Only of these leaves; each costs a product as large as the forward's.
        """
        names = self.names if names is None else names
        places = range(len(self.aliases)) if leaves is None else leaves
        inputs = [*(self.parameters[name] for name in names), *(self.aliases[i][0] for i in places)]
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if tensor.requires_grad and inputs:
            gradients = torch.autograd.grad(tensor, inputs, cotangent, retain_graph=True, allow_unused=True)
        found = [g if g is not None and bool((g != 0).any()) else None for g in gradients]
        own = {name: g for name, g in zip(names, found, strict=False) if g is not None}
        by_place = dict(zip(places, found[len(names) :], strict=True))
        return own, [by_place.get(i) for i in range(len(self.aliases))]

    def behind(self, tensor: Tensor) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Gradients of a random projection, as :meth:`local`; the same ones until :meth:`forget`."""
        if tensor not in self._behind:
            self._behind[tensor] = self.local(tensor, self.cotangent(tensor))
        return self._behind[tensor]

    def forget(self) -> None:
        """Let go of what :meth:`behind` keeps, which is as large as the weights."""
        self._behind.clear()

    def through(self, tensor: Tensor, cotangent: Tensor, stop: set[int]) -> dict[str, Tensor]:
        """Gradients by parameter, also through leaves into what they stand for, except those numbered in ``stop``."""
        total, leaves = self.local(tensor, cotangent, leaves=sorted({*range(len(self.aliases))} - stop))
        for i, gradient in enumerate(leaves):
            if gradient is not None:
                for name, more in self.through(self.aliases[i][1], gradient, stop).items():
                    total[name] = total[name] + more if name in total else more
        return total


def reaches_weights(calls: Sequence[Seen], graph: Graph) -> bool:
    """Whether any parameter lies between the last cut and the queries or the keys."""
    return any(graph.behind(t)[0] for call in calls for t in (call.q, call.k) if t is not None)


def over_channels(calls: Sequence[Seen], graph: Graph, projections: Mapping[str, int]) -> bool:
    """Whether a query is one channel at all tokens (cross-covariance), not all channels at one token.

    Args:
        calls: The calls of one site.
        graph: Of the pass.
        projections: Parameters that multiply activations -> their axis of outputs.
    """
    q = calls[0].q
    if q is None or q.shape[-2] < 2:
        return False
    cotangent, names = graph.cotangent(q), [name for name in graph.names if name in projections]

    def touched(tokens: slice) -> dict[str, int]:
        """Rows of the projections behind these queries of the first head."""
        mask = torch.zeros(q.shape).to(q)
        mask.view(-1, *q.shape[-2:])[0, tokens] = 1.0
        gradients = graph.local(q, mask * cotangent, names, leaves=())[0]
        return {n: len(_indices(g, projections[n])) for n, g in gradients.items()}

    single = [name for name, rows in touched(slice(1)).items() if rows == 1]
    whole = touched(slice(None)) if single else {}
    return any(whole[name] > 1 for name in single)


def find_knobs(calls: Sequence[Seen], graph: Graph, heads: int | None = None, keys: bool = False) -> tuple[Knob, ...]:
    """The smallest set of weights in which the logits of each call are homogeneous of degree one, for all calls.

    Args:
        calls: The calls of one site, in float64, none of whose parameters is zero.
        graph: Of the pass.
        heads: Cut the blocks by so many heads, axis 1 of 4-D logits. None: do not.
        keys: Do not try the weights of the queries.

    Raises:
        NoKnobError: There is none.
    """
    found: dict[str, Knob] = {}
    for call in calls:
        try:
            own = _find(call, graph, heads, *("kq" if keys else "qk"))
        except NoKnobError as why:
            if keys:
                raise
            try:  # queries that are made elsewhere (GCViT)
                own = _find(call, graph, heads, "k", "q")
            except NoKnobError:
                raise why from None
        for knob in own:
            if found.setdefault(knob.parameter, knob) != knob:
                raise NoKnobError(f"its calls share {knob.parameter!r}, each another part of it")
    return tuple(found.values())


def _find(call: Seen, graph: Graph, heads: int | None, scaled: str, fixed: str) -> tuple[Knob, ...]:
    """Knobs of one call, among what makes its queries (or keys), and what is added to its logits."""
    nothing: tuple[dict[str, Tensor], list[Tensor | None]] = {}, [None] * len(graph.aliases)
    (of_mine, my_leaves), (of_theirs, their_leaves) = (
        nothing if (t := getattr(call, n)) is None else graph.behind(t) for n in (scaled, fixed)
    )
    of_v = {} if call.v is None else graph.local(call.v, graph.cotangent(call.v), leaves=())[0]
    # What feeds queries or keys is the sequence; what feeds only logits is a bias, whose parameters may be elsewhere.
    stop = {i for i, pair in enumerate(zip(my_leaves, their_leaves, strict=True)) if pair != (None, None)}
    logits, cotangent, target, tolerance = _projected(call, graph)
    of_logits = graph.through(logits, cotangent, stop)
    blocks = _candidates(graph, of_logits, of_mine, of_theirs, of_v)
    if not blocks:
        shared = of_mine.keys() & of_theirs.keys()
        raise NoKnobError(
            f"its queries and keys share their weights: {sorted(shared)}" if shared else "no weight reaches its logits"
        )
    shares = {name: _share(graph.parameters[name], of_logits[name], cut) for name, cut in blocks.items()}
    chosen = _smallest_set(shares, target, tolerance)
    if heads is None:
        return tuple(Knob(name, blocks[name]) for name in chosen)
    return tuple(_by_head(name, blocks[name], logits, graph, stop, heads) for name in chosen)


def are_knobs(knobs: Sequence[Knob], calls: Sequence[Seen], graph: Graph) -> bool:
    """Whether the logits of each call are homogeneous of degree one in these weights, without a look for others.

    Args:
        knobs: What is proposed.
        calls: The calls of one site.
        graph: Of the pass.
    """
    for call in calls:
        logits, cotangent, target, tolerance = _projected(call, graph)
        gradients = graph.local(logits, cotangent, [knob.parameter for knob in knobs], leaves=())[0]
        own = [knob for knob in knobs if knob.parameter in gradients]
        shares = (_share(graph.parameters[k.parameter], gradients[k.parameter], k.blocks) for k in own)
        if not abs(sum(shares) - target) <= tolerance:
            return False
    return True


def _projected(call: Seen, graph: Graph) -> tuple[Tensor, Tensor, float, float]:
    """The logits that matter, a random projection, what that comes to, and how exactly sums have to come to it."""
    counts = call.logits.detach() > call.logits.detach().amax(-1, keepdim=True) - MASK_GAP
    logits = torch.where(counts, call.logits, 0.0)
    cotangent = graph.cotangent(logits) * counts
    products = cotangent * logits.detach()
    return logits, cotangent, float(products.sum()), _TOLERANCE * float(products.norm())


def _candidates(
    graph: Graph,
    of_logits: Mapping[str, Tensor],
    of_mine: Mapping[str, Tensor],
    of_theirs: Mapping[str, Tensor],
    of_v: Mapping[str, Tensor],
) -> dict[str, tuple[Block, ...]]:
    """Parameters, or blocks of them, that reach the logits, and not through the other factor; the nearest first."""
    found: dict[str, tuple[Block, ...]] = {}
    for name in [n for n in graph.names if n in of_mine] + [n for n in graph.names if n not in of_mine]:
        if name not in of_logits or (name in of_theirs and name not in of_mine):
            continue
        parameter = graph.parameters[name]
        others = [g[name] for g in (of_theirs, of_v) if name in g]
        if not others:
            found[name] = (Block(0, parameter.shape[0]),) if parameter.dim() else ()
        elif cut := _own_blocks(of_mine.get(name, of_logits[name]), others):
            found[name] = cut
    return {name: cut for name, cut in found.items() if cut}


def _own_blocks(mine: Tensor, others: Sequence[Tensor]) -> tuple[Block, ...]:
    """The slices that matter here, along the first axis on which they share none with the others."""
    for dim in range(mine.dim()):
        own = _indices(mine, dim)
        if own.isdisjoint(set().union(*(_indices(g, dim) for g in others))):
            return _runs(sorted(own), dim)
    return ()


def _indices(gradient: Tensor, dim: int) -> set[int]:
    flat = gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)
    return set(flat.ne(0).any(1).nonzero().flatten().tolist())


def _runs(indices: Sequence[int], dim: int) -> tuple[Block, ...]:
    """Consecutive numbers as blocks."""
    blocks: list[Block] = []
    for i in indices:
        if blocks and blocks[-1].start + blocks[-1].length == i:
            blocks[-1] = Block(blocks[-1].start, blocks[-1].length + 1, dim)
        else:
            blocks.append(Block(i, 1, dim))
    return tuple(blocks)


def _share(parameter: Tensor, gradient: Tensor, cut: Sequence[Block]) -> float:
    """``⟨∂ℓ/∂s, s⟩``."""
    return sum(float((block.of(gradient) * block.of(parameter.detach())).sum()) for block in cut)


def _smallest_set(shares: Mapping[str, float], target: float, tolerance: float) -> tuple[str, ...]:
    """The first of the smallest sets of names whose shares add up to the target."""
    # A share of zero: the logits do not change with it (a projection before a norm).
    names = [name for name, share in shares.items() if abs(share) > tolerance]
    for size in range(1, min(_LARGEST_SET, len(names)) + 1):
        if math.comb(len(names), size) > _MOST_SETS:
            break
        for chosen in combinations(names, size):
            if abs(sum(shares[name] for name in chosen) - target) <= tolerance:
                return chosen
    raise NoKnobError(f"its logits are not proportional to any set of these weights: {list(shares)}")


def _by_head(name: str, blocks: Sequence[Block], logits: Tensor, graph: Graph, stop: set[int], heads: int) -> Knob:
    """The same knob, cut by heads."""
    if logits.dim() != 4 or logits.shape[1] != heads:
        raise NoKnobError(f"logits of shape {tuple(logits.shape)} do not say which axis holds {heads} heads")
    touched = []
    for head in range(heads):
        mask = torch.zeros_like(logits)
        mask[:, head] = 1.0
        touched.append(graph.through(logits, mask * graph.cotangent(logits), stop).get(name))
    shape = graph.parameters[name].shape
    within = {i for block in blocks for i in range(block.start, block.start + block.length)}
    whole = len(within) == shape[blocks[0].dim]
    for dim in range(len(shape)) if whole else (blocks[0].dim,):
        allowed = set(range(shape[dim])) if whole else within
        sets = [set() if g is None else _indices(g, dim) & allowed for g in touched]
        if all(sets) and sum(map(len, sets)) == len(set().union(*sets)):
            cut = [(block, head) for head, own in enumerate(sets) for block in _runs(sorted(own), dim)]
            return Knob(name, tuple(b for b, _ in cut), tuple(h for _, h in cut))
    raise NoKnobError(f"{name!r} is shared by the heads")
