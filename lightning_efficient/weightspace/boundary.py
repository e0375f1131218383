"""The optimizer boundary: weights are ``W`` inside ``optimizer.step()`` and ``Ŵ`` everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.weightspace.memory import Memory, is_factored, misfit
from lightning_efficient.weightspace.site import Site
from lightning_efficient.weightspace.sums import run
from lightning_efficient.weightspace.transform import Transform


class Boundary:
    """Opens and closes the window in which parameters hold ``W``, once per optimizer step.

    Build it by :meth:`add`, then :meth:`start` and :meth:`attach`; up to :meth:`start` nothing of the model has
    changed. From then on the optimizers' own hooks do the rest, whether ``step`` is given a closure or not. Clip
    gradients between :meth:`before_step` and the step, as a Lightning Trainer does.

    The transforms' own parameters (:meth:`thetas`) *visit* the optimizer of their weight, in groups that are copied
    from the weight's, without decay, from :meth:`before_step` until the step is done. So schedulers, the optimizer's
    state dictionary and files of any strategy see the user's own parameters and nothing else. What the optimizer
    remembers of a visitor is kept in :attr:`memory`. Those that an optimizer holds anyhow stay there.

    Parameters that are cut over processes are worked on where they are; all sites move in lockstep, so that a step
    costs one small all-reduce before and one after it, however many they are.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.memory: Memory = {}
        self._members: dict[Optimizer, list[Site]] = {}
        self._handles: list[RemovableHandle] = []
        self._in_closure: set[Optimizer] = set()
        self._grads_done: set[Optimizer] = set()
        self._visits: dict[Optimizer, _Visit] = {}

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
        site = self.sites.get(name) or Site(name, param, self.memory)
        if any(t.kind == transform.kind for t in site.chain):
            raise ValueError(
                f"{name!r} already has a {transform.kind!r} transform. Two callbacks that do the same may not target "
                "the same weight: make their `include`/`exclude` disjoint."
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
        # One after the other: each may gather its weight.
        return [name for name, site in self.sites.items() if not run([site.start()])[0]]

    @torch.no_grad()
    def saved(self, transforms: Mapping[str, Transform]) -> dict[str, dict[str, Tensor]]:
        """States of transforms, one of each named site, as :meth:`add` takes them; whole ones on every process."""
        return {name: run([self.sites[name].saved(transform)])[0] for name, transform in transforms.items()}

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that cannot work.

        Raises:
            ValueError: One is ``LBFGS``, a parameter is in several, or ``Muon`` would have to take a vector.
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
            if isinstance(optimizer, getattr(torch.optim, "Muon", ())) and (visitors := self._visitors(optimizer)):
                raise ValueError(
                    f"Muon optimizes matrices only, so the parameter of shape {tuple(visitors[0][0].shape)} that the "
                    f"transform of {visitors[0][1].name!r} has cannot be with it: exclude that weight, or give it to "
                    "another optimizer."
                )

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook the optimizers that hold the parameters.

        Raises:
            ValueError: As :meth:`check`; or what a file says that they remember of a transform's parameter does not go
                with what they remember of its weight.
        """
        optimizers = list(optimizers)
        self.check(optimizers)
        for optimizer in optimizers:
            self._check_memory(optimizer)
        self.detach()
        for optimizer in optimizers:
            if members := self._held(optimizer):
                self._members[optimizer] = members
                self._handles.append(optimizer.register_step_pre_hook(self._pre_hook))
                self._handles.append(optimizer.register_step_post_hook(self._post_hook))

    def detach(self) -> None:
        """Take the hooks off the optimizers; the model stays as it is, plain."""
        self.leave()
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

        In the order of the weights in the optimizer; one that several weights share is there once, with the first of
        them.
        """
        return [(theta, site.param) for theta, site in self._thetas(optimizer)]

    def _thetas(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, Site]]:
        pairs: dict[nn.Parameter, Site] = {}
        for site in self._held(optimizer):
            for theta in (t.theta for t in site.chain):
                if theta is not None:
                    pairs.setdefault(theta, site)
        return list(pairs.items())

    def _held(self, optimizer: Optimizer) -> list[Site]:
        sites = {id(site.param): site for site in self.sites.values()}
        return [sites[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in sites]

    # -- visits --------------------------------------------------------------------------------------------------

    def _visitors(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, Site]]:
        residents = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [(theta, site) for theta, site in self._thetas(optimizer) if id(theta) not in residents]

    def _check_memory(self, optimizer: Optimizer) -> None:
        for theta, site in ((t, site) for t, site in self._visitors(optimizer) if t in self.memory):
            wrong = [misfit(self.memory[theta], theta, state) for state in self._like(theta, optimizer)]
            if wrong and all(wrong):
                raise ValueError(f"the saved state of {site.name!r} does not fit: {wrong[0]}.")

    def _like(self, theta: nn.Parameter, optimizer: Optimizer) -> list[dict[str, Any]]:
        """What the optimizer remembers of parameters that it treats as it does this one of a transform."""
        states = {p: optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]}
        weights = [site.param for site in self._sites_of(theta, optimizer)]
        mine = [states[p] for p in weights if states[p] and not is_factored(states[p], p)]
        return mine or [state for p, state in states.items() if state and p.ndim == theta.ndim]

    def _sites_of(self, theta: nn.Parameter, optimizer: Optimizer) -> list[Site]:
        return [site for site in self._held(optimizer) if any(t.theta is theta for t in site.chain)]

    def _enter(self, optimizer: Optimizer) -> None:
        """The transforms' parameters that have a gradient come to the optimizer, for one step."""
        self._leave(optimizer)
        homes = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        visit = self._visits[optimizer] = _Visit(len(optimizer.param_groups))
        groups: dict[int, dict[str, Any]] = {}
        for theta, site in self._visitors(optimizer):
            if theta.grad is None:
                continue
            # Beside parts of parameters only what is placed on the same mesh may be: the same memory, seen so.
            guest = theta if site.layout.of is None else nn.Parameter(site.layout.repeated(theta.data))
            guest.grad = site.layout.repeated(theta.grad)
            visit.guests.append((theta, guest))
            home = homes[id(site.param)]
            group = groups.setdefault(id(home), _zero_decay_copy(home))
            group["params"].append(guest)
            # An optimizer that knows nothing of the weights (a new one, or set back) knows nothing of their parameter.
            mine = self._sites_of(theta, optimizer)
            if (memory := self.memory.pop(theta, None)) and any(optimizer.state.get(s.param) for s in mine):
                optimizer.state[guest] = memory
        optimizer.param_groups.extend(groups.values())

    def _leave(self, optimizer: Optimizer) -> None:
        visit = self._visits.pop(optimizer, None)
        if visit is None:
            return
        del optimizer.param_groups[visit.groups :]
        for theta, guest in visit.guests:
            if guest in optimizer.state:
                self.memory[theta] = optimizer.state.pop(guest)
            theta.grad = None

    def leave(self) -> None:
        """Send visitors home, if a step was skipped (a `GradScaler` does, and calls no hook)."""
        for optimizer in list(self._visits):
            self._leave(optimizer)

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
            run([site.pull_gradient(cast(Tensor, site.gradient)) for site in self._with_gradient(optimizer)])
            self._enter(optimizer)
            self._grads_done.add(optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Close the window without a step, for instance after an exception inside it."""
        self.leave()
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
        sites = [site for site in self._with_gradient(optimizer) if not site.pulled]
        run([site.pull(None if done else site.gradient) for site in sites])
        for site in sites:
            for transform in site.chain:
                transform.tend(optimizer.state.get(site.param, {}))
        if not done and sites:
            self._enter(optimizer)

    def _close(self, optimizer: Optimizer, advance: bool) -> None:
        run([site.push(advance) for site in self._members[optimizer] if site.pulled])

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
        self._leave(optimizer)
        self._close(optimizer, advance=True)
        self._grads_done.discard(optimizer)


@dataclass
class _Visit:
    """Parameters that an optimizer has for one step.

    Args:
        groups: How many groups it has without them.
        guests: (parameter of a transform, what the optimizer is given for it).
    """

    groups: int
    guests: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)


def _zero_decay_copy(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the options of another one, without decay, empty."""
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "param_names"}
    return own | {"params": []} | ({"weight_decay": 0.0} if "weight_decay" in group else {})
