"""Which axes of which tensors are one width of a network, found with torch-pruning's dependency graph.

torch-pruning traces a forward through autograd and knows how indices travel through concatenation, splitting and
flattening. Only that is used of it: the graph is walked here, entry by entry, and nothing of it ever changes a model
(its own pruners replace parameters, untie tied weights and may fail half-way). Source: Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.pruner.function import BasePruningFunc

from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import tensors_behind

Role = Literal["produce", "consume"]
Entry = Callable[[int], int]

_VISITS = 6


class UntraceableError(ValueError):
    """The model's forward cannot be followed; the message says why."""


@dataclass
class Width:
    """A width that something in the network has, before it is known whether it can be cut.

    Args:
        root: Name of the layer that it was found from.
        size: Number of channels of that layer that are in it.
        axes: (tensor, axis, role) → pairs of (entry along the axis, channel of the root).
        ties: Further things that channels share, so that they can only be cut together.
        readers: Names of the layers that read it.
        divisor: How many of its units may stay: a multiple of this.
        refused: Why it cannot be cut; empty: no reason known yet.
    """

    root: str
    size: int
    axes: dict[tuple[str, int, Role], list[tuple[int, int]]] = field(default_factory=dict)
    ties: dict[Hashable, list[int]] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)
    divisor: int = 1
    refused: str = ""

    def units(self) -> list[list[int]]:
        """The channels of the root, in sets that can only be cut together, each sorted, by their first."""
        parent: dict[int, int] = {}

        def find(channel: int) -> int:
            parent.setdefault(channel, channel)
            while parent[channel] != channel:
                parent[channel] = channel = parent[parent[channel]]
            return channel

        owner: dict[Hashable, int] = {}
        pairs = [((key, entry), root) for key, found in self.axes.items() for entry, root in found]
        for key, root in [*pairs, *((key, root) for key, roots in self.ties.items() for root in roots)]:
            first, other = find(owner.setdefault(key, root)), find(root)
            parent[max(first, other)] = min(first, other)
        sets: dict[int, list[int]] = {}
        for channel in sorted(parent):
            sets.setdefault(find(channel), []).append(channel)
        return list(sets.values())


class Widths:
    """All widths of one traced model.

    Args:
        model: A copy, in evaluation mode: its parameters come out requiring gradients. Every parameter that is reached
            is followed, frozen ones too.
        call: Runs the model; its outputs are what gradients flow back from.

    Raises:
        UntraceableError: No output depends on a parameter through autograd, or torch-pruning cannot follow.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.names = {id(module): canonical_name(name) for name, module in model.named_modules()}
        self.parameters = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        self.owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
        self._model = model
        self._graph = torch_pruning.DependencyGraph()
        self._graph.IGNORED_LAYERS_IN_TRACING = _ByIdentity()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about torch-pruning's own assumptions; ours are checked by running
                self._graph.build_dependency(
                    model,
                    example_inputs=(),
                    forward_fn=lambda *_: _differentiable(call()),
                    unwrapped_parameters=[],
                    customized_pruners=_customized(),
                    verbose=False,
                )
        except UntraceableError:
            raise
        except Exception as why:
            raise UntraceableError(f"torch-pruning cannot trace it ({type(why).__name__}: {why})") from why
        self.nodes = {id(module): node for module, node in self._graph.module2node.items()}

    def __iter__(self) -> Iterator[Width]:
        """Every width once, from the first layer that makes it."""
        covered: dict[int, set[int]] = {}
        for module in [m for m in self._model.modules() if id(m) in self.nodes]:
            if not isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, *_customized())):
                continue
            fresh = sorted(set(range(self._channels(module))) - covered.get(id(module), set()))
            if fresh:
                yield self._from(module, fresh, covered)

    def _channels(self, module: nn.Module) -> int:
        return int(self._graph.get_pruner_of_module(module).get_out_channels(module))

    def _from(self, root: nn.Module, channels: list[int], covered: dict[int, set[int]]) -> Width:
        """Follow some output channels of a layer through the network."""
        width = Width(self.names[id(root)], len(channels))
        pairs: dict[tuple[int, Any], dict[tuple[int, int], None]] = {}
        trigger = self._graph.get_pruner_of_module(root).prune_out_channels
        stack = [(self.nodes[id(root)], trigger, [_HybridIndex(c, c) for c in channels])]
        # Rotations of queries send torch-pruning's indices around in circles that never close.
        budget = _VISITS * len(channels) * len(self.nodes)
        while stack:
            node, function, found = stack.pop()
            seen = pairs.setdefault((id(node), function), {})
            new = [pair for pair in found if (pair.idx, pair.root_idx) not in seen]
            if not new:
                continue
            seen.update(dict.fromkeys((pair.idx, pair.root_idx) for pair in new))
            budget -= len(new)
            if budget < 0 or any(pair.root_idx is None for pair in new):
                width.refused = width.refused or "its channels are coupled in a way that cannot be followed"
                return width
            makes = self._graph.is_out_channel_pruning_fn(function)
            self._record(width, node, makes, new, covered)
            for edge in node.dependencies:
                if not edge.is_triggered_by(function):
                    continue
                travelled = new
                try:
                    for mapping in edge.index_mapping:
                        travelled = travelled if mapping is None else mapping(travelled)
                except Exception as why:  # torch-pruning's own indices do not fit, as behind a GRU
                    recurrent = [self.names[id(m)] for m in self._model.modules() if isinstance(m, nn.RNNBase)]
                    width.refused = width.refused or (
                        f"torch-pruning cannot follow it ({type(why).__name__}: {why}); recurrent layers of the model, "
                        f"which it cannot follow: {recurrent or 'none'}"
                    )
                    return width
                if travelled:
                    stack.append((edge.target, edge.handler, travelled))
        return width

    def _record(self, width: Width, node: Any, makes: bool, pairs: list[Any], covered: dict[int, set[int]]) -> None:
        module = node.module
        if isinstance(module, nn.Parameter):
            name = self.parameters[id(module)]
            parts = Parts([(name, node.pruning_dim % module.ndim, "produce", _same)])
            if isinstance(owner := self.owners[id(module)], (nn.RNNBase, nn.MultiheadAttention)):
                parts.refused = parts_of(owner, name.rpartition(".")[0], makes).refused
        elif id(module) in self.names:
            name = self.names[id(module)]
            parts = parts_of(module, name, makes)
            if any(role == "consume" for _, _, role, _ in parts.axes):
                width.readers.add(name)
            if makes or isinstance(module, nn.Embedding):
                covered.setdefault(id(module), set()).update(pair.idx for pair in pairs)
                if not node.outputs:
                    width.refused = "an output of the model: its shape would change"
        else:
            if node.type == ops.OPTYPE.OUTPUT:
                width.refused = "an output of the model: its shape would change"
            return
        width.refused = width.refused or parts.refused
        width.divisor = math.lcm(width.divisor, parts.divisor)
        for tensor, dim, role, entry in parts.axes:
            along = width.axes.setdefault((tensor, dim, role), [])
            along += [(entry(pair.idx), pair.root_idx) for pair in pairs]
        for tie in parts.ties:
            for pair in pairs:
                width.ties.setdefault((id(module), makes, tie(pair.idx)), []).append(pair.root_idx)


@dataclass
class Parts:
    """What a channel of a layer is made of.

    Args:
        axes: (tensor, axis, role, channel → entry along the axis).
        ties: Channels with the same value can only go together.
        divisor: How many of the things that ties make may stay: a multiple of this.
        refused: Why nothing of it can be cut.
    """

    axes: list[tuple[str, int, Role, Entry]] = field(default_factory=list)
    ties: list[Entry] = field(default_factory=list)
    divisor: int = 1
    refused: str = ""


def _same(channel: int) -> int:
    return channel


def _behind(start: int, channel: int) -> int:
    return start + channel


def _head(size: int, channel: int) -> int:
    return channel // size


def _within(size: int, channel: int) -> int:
    return channel % size


def parts_of(module: nn.Module, name: str, makes: bool) -> Parts:
    """The axes of a layer's tensors along its output channels, or along its input channels.

    Args:
        module: The layer.
        name: Its name.
        makes: Output channels; False: input channels.
    """
    own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
    dims = {n: f"{name}.{n}" if name else n for n in own}
    parts = Parts()
    if isinstance(module, (_ConvNd, nn.Linear, nn.Embedding)) and "weight" not in own:
        parts.refused = f"{name!r} computes its weight (parametrized, or by a hook): bake it in first"
    elif isinstance(module, _ConvNd):
        _conv(module, dims, makes, parts)
    elif isinstance(module, nn.Linear):
        parts.axes = [(dims["weight"], 0, "produce", _same)] if makes else [(dims["weight"], 1, "consume", _same)]
    elif isinstance(module, nn.Embedding):
        parts.axes = [(dims["weight"], 1, "produce", _same)]
    elif isinstance(module, (_NormBase, nn.GroupNorm)):
        parts.axes = [(dims[n], 0, "produce", _same) for n, t in own.items() if t.ndim == 1]
        if isinstance(module, nn.GroupNorm):
            parts.ties = [partial(_within, module.num_channels // module.num_groups)]
    elif isinstance(module, nn.LayerNorm):
        parts.axes = [(dims[n], own[n].ndim - 1, "produce", _same) for n in own]
    elif isinstance(module, nn.PReLU):
        parts.axes = [(dims["weight"], 0, "consume", _same)] if module.num_parameters > 1 else []
    elif isinstance(module, nn.RNNBase):
        parts.refused = f"{type(module).__name__} {name!r} is recurrent: its gates share one axis"
    elif isinstance(module, nn.MultiheadAttention):
        _multihead(module, name, parts)
    elif is_conv1d(module):
        parts.axes = [(dims["weight"], 1, "produce", _same)] if makes else [(dims["weight"], 0, "consume", _same)]
    else:
        parts.refused = f"{type(module).__name__} {name!r} is not a layer that can be cut"
    if makes and "bias" in own and isinstance(module, (nn.Linear, _ConvNd, *_customized())):
        parts.axes.append((dims["bias"], 0, "produce", _same))
    return parts


def _conv(module: _ConvNd, dims: dict[str, str], makes: bool, parts: Parts) -> None:
    groups, weight = module.groups, dims["weight"]
    if groups == module.out_channels > 1:  # depthwise: a channel is its own input, and torch-pruning says so
        parts.axes = [(weight, 0, "produce", _same)]
        if module.in_channels != groups:
            parts.refused = f"{type(module).__name__}: more than one input channel for each of its {groups} groups"
        if not makes and "bias" in dims:
            parts.axes.append((dims["bias"], 0, "produce", _same))
        return
    per_group = partial(_within, (module.out_channels if makes else module.in_channels) // groups)
    first, role = makes != module.transposed, ("produce" if makes else "consume")
    # A weight is (out, in / groups), transposed (in, out / groups): the second axis counts within a group.
    parts.axes = [(weight, 0 if first else 1, role, _same if first else per_group)]  # type: ignore[list-item]
    if groups > 1:
        parts.ties = [per_group]  # as many channels in every group


def _multihead(module: nn.MultiheadAttention, name: str, parts: Parts) -> None:
    """A head with as many channels of the input and of the output as it has itself: they share ``embed_dim``."""
    own = dict(module.named_parameters())
    if "in_proj_weight" not in own:
        parts.refused = f"nn.MultiheadAttention {name!r} has a `kdim` or `vdim` of its own, and one `embed_dim` beside"
        return
    for i in range(3):  # queries, keys and values lie one below the other
        parts.axes.append((f"{name}.in_proj_weight", 0, "produce", partial(_behind, i * module.embed_dim)))
        if "in_proj_bias" in own:
            parts.axes.append((f"{name}.in_proj_bias", 0, "produce", partial(_behind, i * module.embed_dim)))
    parts.axes += [(f"{name}.{n}", 2, "produce", _same) for n in ("bias_k", "bias_v") if n in own]
    parts.axes += [(f"{name}.in_proj_weight", 1, "consume", _same), (f"{name}.out_proj.weight", 1, "consume", _same)]
    parts.axes.append((f"{name}.out_proj.weight", 0, "produce", _same))
    if "out_proj.bias" in own:
        parts.axes.append((f"{name}.out_proj.bias", 0, "produce", _same))
    parts.ties = [partial(_head, module.head_dim)]
    # Whether the fused inference of `nn.TransformerEncoder` is taken was decided when it was built, for an even number.
    parts.divisor = 2 - module.num_heads % 2


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with a weight of (inputs, outputs)."""
    return isinstance(module, tuple(_customized()))


def _customized() -> dict[type[nn.Module], Any]:
    # A model can only hold that layer if the library has been imported.
    library = sys.modules.get("transformers.pytorch_utils")
    return {} if library is None else {library.Conv1D: _Conv1D()}


class _Conv1D(BasePruningFunc):  # type: ignore[misc]
    """What the graph needs to know of Hugging Face's ``Conv1D``; it never cuts."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Stands for the outputs in the graph."""
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Stands for the inputs in the graph."""
        raise NotImplementedError

    def get_out_channels(self, layer: Any) -> int:
        """Outputs."""
        return int(layer.weight.shape[1])

    def get_in_channels(self, layer: Any) -> int:
        """Inputs."""
        return int(layer.weight.shape[0])


class _ByIdentity(list[nn.Module]):
    """Modules that torch-pruning leaves out. A torchmetrics metric "equals" everything: ``==`` makes a new metric."""

    def __contains__(self, module: object) -> bool:
        return any(module is one for one in self)


def _differentiable(result: Any) -> list[Tensor]:
    found = [t for t in tensors_behind(result) if t.grad_fn is not None]
    if not found:
        raise UntraceableError(
            "no output depends on a parameter through autograd (a forward under torch.no_grad, or outputs in a class "
            "of their own)"
        )
    return found
