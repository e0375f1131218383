"""The optimizer boundary: weights are ``W`` inside ``optimizer.step()`` and ``Ŵ`` everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.weightspace.site import Site
from lightning_efficient.weightspace.transform import Transform


class Boundary:
    """Opens and closes the window in which parameters hold ``W``, once per optimizer step.

    Build it by :meth:`add`, give the optimizers the parameters of :meth:`thetas`, then :meth:`start` and
    :meth:`attach`; up to :meth:`start` nothing of the model has changed. From then on the optimizers' own hooks do the
    rest, whether ``step`` is given a closure or not. Clip gradients between :meth:`before_step` and the step, as a
    Lightning Trainer does.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self._members: dict[Optimizer, list[Site]] = {}
        self._handles: list[RemovableHandle] = []
        self._in_closure: set[Optimizer] = set()
        self._grads_done: set[Optimizer] = set()

    # -- building ------------------------------------------------------------------------------------------------

    def add(
        self, name: str, param: nn.Parameter, transform: Transform, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Put a transform on a parameter.

        Args:
            name: Name of the parameter.
            param: The parameter; with a state it holds ``Ŵ`` already.
            transform: The transform.
            state: A saved state of the transform, with ``"raw"`` for ``W`` where that was kept.

        Raises:
            ValueError: The parameter already has a transform of this kind, or the state does not fit.
        """
        site = self.sites.get(name) or Site(name, param)
        if any(t.kind == transform.kind for t in site.chain):
            raise ValueError(
                f"{name!r} already has a {transform.kind!r} transform. Two callbacks of one method may not target the "
                "same weight: make their `include`/`exclude` disjoint."
            )
        site.add(transform)
        if state is not None:
            site.load(transform, state)
        self.sites[name] = site

    @torch.no_grad()
    def start(self) -> list[str]:
        """Start all transforms: the parameters become ``Ŵ``.

        Returns:
            Names of weights that had changed since their state was saved; it was derived anew, function unchanged.
        """
        return [name for name, site in self.sites.items() if not site.start()]

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that cannot work.

        Raises:
            ValueError: One is ``LBFGS``, or a parameter is in several.
        """
        owners: dict[int, Optimizer] = {}
        names = {id(site.param): name for name, site in self.sites.items()}
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "LBFGS evaluates the model several times inside one step, while the weights are not the network's. "
                    "Use a first-order optimizer, or switch the weight-space callbacks off (`enabled=False`)."
                )
            for key in (id(p) for group in optimizer.param_groups for p in group["params"]):
                if key in names and owners.setdefault(key, optimizer) is not optimizer:
                    raise ValueError(
                        f"{names[key]!r} is in two optimizers ({type(owners[key]).__name__}, "
                        f"{type(optimizer).__name__}); its gain can follow one only. Give each weight to one "
                        "optimizer, or `exclude` it."
                    )

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook the optimizers that hold the parameters; raises as :meth:`check` does."""
        optimizers = list(optimizers)
        self.check(optimizers)
        self.detach()
        for optimizer in optimizers:
            if members := self._held(optimizer):
                self._members[optimizer] = members
                self._handles.append(optimizer.register_step_pre_hook(self._pre_hook))
                self._handles.append(optimizer.register_step_post_hook(self._post_hook))

    def detach(self) -> None:
        """Take the hooks off the optimizers; the model stays as it is, plain."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._members.clear()
        self._in_closure.clear()
        self._grads_done.clear()

    @property
    def attached(self) -> bool:
        """Whether any optimizer is hooked."""
        return bool(self._members)

    def thetas(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a transform's parameter and the weight whose learning rate it follows, for one optimizer.

        In the order of the weights in the optimizer, which saved optimizer states rely on; one that several weights
        share is there once, with the first of them.
        """
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for site in self._held(optimizer):
            for theta in (t.theta for t in site.chain):
                if theta is not None:
                    pairs.setdefault(id(theta), (theta, site.param))
        return list(pairs.values())

    def _held(self, optimizer: Optimizer) -> list[Site]:
        sites = {id(site.param): site for site in self.sites.values()}
        return [sites[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in sites]

    # -- stepping ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled: pull them back to ``W``, so that clipping sees what the step will.

        Optional, but then before every step of this optimizer. A ``GradScaler`` may skip the step.
        """
        if optimizer in self._in_closure:
            self._open(optimizer)
        elif optimizer in self._members:
            # Gradients only. The weights stay the network's until the step itself: clipping, other callbacks and an
            # exception come in between, and a step that a `GradScaler` skips calls neither of the optimizer's hooks.
            for site in self._with_gradient(optimizer):
                assert site.param.grad is not None
                site.pull_gradient(site.param.grad)
            self._grads_done.add(optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Close the window without a step, for instance after an exception inside it."""
        for optimizer in self._members:
            self._close(optimizer, advance=False)
        self._in_closure.clear()
        self._grads_done.clear()

    def _with_gradient(self, optimizer: Optimizer) -> list[Site]:
        """Without a gradient the optimizer leaves the parameter alone, and so do we."""
        members = self._members[optimizer]
        found = [site for site in members if site.param.grad is not None]
        moved = {id(t.theta) for site in found for t in site.chain}
        for theta in (t.theta for site in members for t in site.chain):
            if theta is not None and id(theta) not in moved:
                theta.grad = None  # of an earlier step: a `zero_grad` of the module does not reach it
        return found

    def _open(self, optimizer: Optimizer) -> None:
        done = optimizer in self._grads_done
        for site in self._with_gradient(optimizer):
            if not site.pulled:
                site.pull(None if done else site.param.grad)

    def _close(self, optimizer: Optimizer, advance: bool) -> None:
        for site in self._members[optimizer]:
            if site.pulled:
                site.push(advance)

    @torch.no_grad()
    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._close(optimizer, advance=False)  # the step before this one failed, and its exception was caught
        # torch passes the optimizer itself as the first positional argument
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._open(optimizer)
            return None
        # Its forward needs the network's weights, and the window may open only when its gradients are there.
        evaluated = self._evaluated(optimizer, closure)
        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluated}

    def _evaluated(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, which makes the gradients, and then the window, unless :meth:`before_step` opened it inside."""

        def once() -> Any:
            self._in_closure.add(optimizer)
            try:
                if any(site.pulled for site in self._members[optimizer]):
                    raise RuntimeError(
                        f"{type(optimizer).__name__} evaluated its closure twice in one step, and the second "
                        "evaluation would have seen weights that are not the network's. Use an optimizer that "
                        "evaluates the closure once, or switch the weight-space callbacks off (`enabled=False`)."
                    )
                result = closure()
            except BaseException:
                with torch.no_grad():
                    self._close(optimizer, advance=False)
                raise
            finally:
                self._in_closure.discard(optimizer)
            with torch.no_grad():
                self._open(optimizer)
            return result

        return once

    @torch.no_grad()
    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._close(optimizer, advance=True)
        self._grads_done.discard(optimizer)
