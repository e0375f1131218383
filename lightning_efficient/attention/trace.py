"""One forward pass, with everything that its attention calls were given: queries, keys, logits, results.

For one small example on a copy of the model; ``AttentionProbe`` watches real runs, and says why there are two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.attention.multihead import arguments_of_multihead, mask_of_multihead, project
from lightning_efficient.attention.owners import ROOT, Owners, scripted_attention
from lightning_efficient.attention.softmax import SOFTMAX, Follower
from lightning_efficient.attention.temper import Law, logits_of_softmax, logits_under, tempered, visible, without_blind
from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.nests import mapped, tensors_in

_PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm, Tensor.baddbmm}
)


@dataclass(eq=False)
class Seen:
    """One attention call.

    Args:
        site: Module that made it; ``"(model)"`` for the model itself.
        kind: Name of the torch function.
        logits: What goes into the softmax, ``-inf`` where masked; multiplied by the site's law if it has one.
        out: What the call returned first: mixed values, or for ``"softmax"`` the weights.
        q: Queries ``(..., queries, dim)``; None for a softmax whose logits are no product of two activations.
        k: Keys ``(..., keys, dim)``, likewise.
        v: Values, where the call has them, or a product after a softmax shows them.
        made: The function that was called, copies of its arguments, and which queries saw a key (None: all).
        result: A copy of all that it returned.
    """

    site: str
    kind: str
    logits: Tensor
    out: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    made: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Tensor | None] | None = None
    result: Any = None

    def alone(self) -> Seen:
        """The same without a graph."""
        return replace(self, logits=self.logits.detach(), out=self.out.detach(), q=None, k=None, v=None)

    def under(self, law: Law) -> Seen:
        """The same call on the same arguments with its logits multiplied."""
        func, args, kwargs, sees = cast(Any, self.made)
        out = _first(tempered(law, func, args, kwargs))
        out = out if sees is None else torch.where(sees, out, 0.0)
        return replace(self, logits=logits_under(law, self.logits), out=out)


class Trace(TorchFunctionMode):
    """Context manager around one forward.

    Args:
        model: Sites are named relative to it.
        laws: Site -> how to multiply its logits; the pass then computes with them.
        cut: Names of modules whose tensor arguments are replaced by fresh leaves of the graph, kept in ``aliases``:
            what depends on a module's own parameters can then be told from what depends on those before it.
        products: Look for the queries and keys behind softmax calls (needs a graph), and end the graph at the result of
            each call, so that the next one's logits do not depend on this one's.
        given: The calls of another pass, whose results take the place of this one's, call by call.
    """

    def __init__(
        self,
        model: nn.Module,
        laws: Mapping[str, Law] | None = None,
        cut: Collection[str] = (),
        products: bool = False,
        given: Sequence[Seen] = (),
    ) -> None:
        super().__init__()
        self.calls: list[Seen] = []
        self.every: list[Seen] = []  # softmax calls that are not attention among them
        self.outputs: list[Tensor] = []  # of the model, where whoever ran it has kept them
        self.unread: dict[str, str] = scripted_attention(model)
        self.blind: dict[str, None] = {}  # sites with queries that see no key, whose results are zero here
        self.others: dict[str, set[tuple[int, ...]]] = {}  # softmax calls that are not attention, by site
        self.mixing: list[str] = []  # sites that multiply activations with such products, and made no call like these
        self.aliases: list[tuple[Tensor, Tensor]] = []  # (leaf, what it stands for)
        self._laws, self.cut, self._products, self._given = dict(laws or {}), frozenset(cut), products, given
        self._made: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self._follower: Follower[Seen] = Follower()
        self._owners = Owners(model)
        self._exits = ExitStack()

    def __enter__(self) -> Trace:
        self._exits.enter_context(uncompiled())
        self._exits.enter_context(self._owners)
        for name, module in self._owners.modules.items():
            if name in self.cut:
                handle = module.register_forward_pre_hook(self._replace, with_kwargs=True)
                self._exits.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None:
            self.mixing = self._mixing()
        self._made.clear()
        self._exits.close()

    def of(self, site: str) -> list[Seen]:
        """The calls of one site, in order."""
        return [call for call in self.calls if call.site == site]

    @property
    def sites(self) -> list[str]:
        """Every module that attended, in order of its first call."""
        return list(dict.fromkeys(call.site for call in self.calls))

    @property
    def silent(self) -> list[str]:
        """Modules that have heads, ran, and made no call that could be read."""
        return self._owners.silent([*self.sites, *self.unread, *self.others])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call, under the site's law, and keep it."""
        kwargs = dict(kwargs or {})
        site = self._owners.current or ROOT
        law = self._laws.get(site, Law())
        args, kwargs, sees = without_blind(func, args, kwargs)
        out = tempered(law, func, args, kwargs) if site in self._laws else func(*args, **kwargs)
        if sees is not None:
            self.blind.setdefault(site)
            out = torch.where(sees, out, 0.0)
        call: Seen | str | None = None
        if func is F.scaled_dot_product_attention:
            call = _sdpa(site, out, *args, **kwargs)
        elif func is F.multi_head_attention_forward:
            call = _multihead(site, out[0], *args, **kwargs)
        elif func in SOFTMAX and (logits := logits_of_softmax(args, kwargs)) is not None:
            call = self._softmax(site, out, logits)
        if isinstance(call, Seen):
            call.made, call.result = (func, *mapped((args, kwargs), _copy), sees), mapped(out, _copy)
        if call is not None:
            self._keep(call, law, sees)
            if self._products:
                out = mapped(out, lambda t: t.detach() if isinstance(t, Tensor) else t)
            if self._products and isinstance(call, Seen) and func in SOFTMAX:
                self._follower.start(out, call)
            if isinstance(call, Seen):
                out = self._instead(call, out)
        elif self._products:
            self._multiplied(site, func, args, kwargs, out)
        return out

    def _instead(self, call: Seen, out: Any) -> Any:
        """What the same call returned in the other pass, if there is one."""
        here = len(self.every) - 1
        if here < len(self._given) and (other := self._given[here]).site == call.site and other.kind == call.kind:
            return mapped(other.result, _copy)
        return out

    def _multiplied(self, site: str, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what may be queries times keys, and the values that a softmax's result is multiplied with."""
        if func in _PRODUCTS:
            factors = _factors((*args, *kwargs.values()))
            self._made += [(site, out, *pair) for pair in factors if out.requires_grad]
        if (call := self._follower.see(func, args, kwargs, out)) is not None:
            call.v = next((t for t in tensors_in(args) if t.requires_grad), None)

    def _keep(self, call: Seen | str, law: Law, sees: Tensor | None) -> None:
        if isinstance(call, str):
            self.unread[self._owners.current or ROOT] = call
            return
        seen = visible(call.logits) if sees is None else visible(call.logits) & sees
        call.logits = torch.where(seen, logits_under(law, call.logits), -torch.inf)
        self.every.append(call)
        if call.q is None and self._products:
            self.others.setdefault(call.site, set()).add(tuple(call.logits.shape))
        else:
            self.calls.append(call)

    def _softmax(self, site: str, out: Tensor, logits: Tensor) -> Seen:
        call = Seen(site, "softmax", logits, out)
        own = [entry[1:] for entry in self._made if entry[0] == site]
        # A product may be a module of its own (SqueezeBERT): then the last one that the logits depend on.
        made = own or [entry[1:] for entry in reversed(self._made)]
        if made and logits.requires_grad:
            grads = torch.autograd.grad(
                logits, [m[0] for m in made], torch.ones_like(logits), retain_graph=True, allow_unused=True
            )
            behind = [m for m, g in zip(made, grads, strict=True) if g is not None]
            if behind:
                _, call.q, call.k = behind[0]
        return call

    def _mixing(self) -> list[str]:
        by_site: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for site, *product in self._made:
            by_site.setdefault(site, []).append(cast(Any, product))
        known = {*self.sites, *self.unread, *self.others}
        return [site for site, made in by_site.items() if site not in known and _in_a_row(made)]

    def _replace(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def fresh(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaf = value.detach().requires_grad_()
            self.aliases.append((leaf, value))
            return leaf

        return mapped(args, fresh), mapped(dict(kwargs), fresh)


def _in_a_row(products: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Whether a factor of one product depends on an earlier one, as values on what queries and keys give."""
    for i, (_, *factors) in enumerate(products[1:], 1):
        earlier = [out for out, *_ in products[:i]]
        for factor in (factor for factor in factors if factor.requires_grad):
            ones = torch.ones_like(factor)
            found = torch.autograd.grad(factor, earlier, ones, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in found):
                return True
    return False


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _first(out: Any) -> Tensor:
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def _factors(args: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The two factors of a product of two activations."""
    flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(t, Tensor)]
    if len(flat) >= 2:
        left, right = flat[-2:]
        if (
            left.dim() >= 3 <= right.dim()
            and not isinstance(left, nn.Parameter)
            and not isinstance(right, nn.Parameter)
        ):
            yield left, right


def _sdpa(
    site: str,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Seen | str:
    if query.is_nested or key.is_nested:
        return "scaled_dot_product_attention on nested tensors"
    k = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3) if enable_gqa else key
    v = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3) if enable_gqa else value
    logits = query @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
    return Seen(site, F.scaled_dot_product_attention.__name__, logits, out, query, key, v)


def _multihead(site: str, out: Tensor, *args: Any, **kwargs: Any) -> Seen:
    call = arguments_of_multihead(*args, **kwargs)
    query, key = (x.unsqueeze(1) if call.query.dim() == 2 else x for x in (call.query, call.key))
    q, k = project(call, query, key)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    mask = mask_of_multihead(call, batch=query.shape[1], keep=query.shape[1], extra=k.shape[2] - key.shape[0])
    logits = logits if mask is None else logits + mask.to(logits.dtype)
    return Seen(site, F.multi_head_attention_forward.__name__, logits, out, q, k)
