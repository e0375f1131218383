"""The methods that exist, one record each: name, callback, place in the order, what they exclude, charts.

The one table of the package that other packages add to, by :func:`lightning_efficient.register_method`. It is the
allow-list of files, too: a name in a checkpoint's recipe, a methods file or a configuration is looked up here and
nowhere else.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from itertools import combinations
from typing import Any, Literal

from lightning_efficient.common.method import Method

# Entry points of this group are modules that register methods when they are imported.
GROUP = "lightning_efficient.methods"


def _plain(key: object) -> str:
    return str(key).rpartition(".")[2].replace("_", "").replace("-", "").lower()


class Registry(Mapping[str, Method]):
    """Methods by name, in the order in which they apply to a model, whatever the order in which they were given.

    Args:
        methods: Those that are known from the start, in their order.
        group: Entry points that add further ones, imported when a name is first looked up. None: no further ones.
    """

    def __init__(self, methods: Iterable[Method], group: str | None = None) -> None:
        self._methods = {method.name: method for method in methods}
        self._group = group

    def _all(self) -> dict[str, Method]:
        if self._group is not None:
            group, self._group = self._group, None  # at once: what is imported here registers here
            for point in sorted(entry_points(group=group), key=lambda point: point.name):
                try:
                    point.load()
                except Exception as error:
                    # A broken package must not stop the runs that do not use it; those that do will miss the name.
                    warnings.warn(
                        f"lightning_efficient: the entry point {point.name!r} ({point.value}) in the group {group!r} "
                        f"does not load, and its methods are unknown: {type(error).__name__}: {error}",
                        stacklevel=2,
                    )
        return self._methods

    def __getitem__(self, name: str) -> Method:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @property
    def with_callback(self) -> tuple[str, ...]:
        """Names of the methods that have a callback: keys in YAML, columns of hyper-parameters."""
        return tuple(name for name, method in self.items() if method.callback is not None)

    def named(self, key: object) -> str | None:
        """The method that a key of a file or an option means, if it is one that has a callback.

        Args:
            key: Its name or that of its class, in any case, with or without underscores: ``norm_swap``, ``PRepBN``,
                ``prepbn``, ``lightning_efficient.PRepBN``.
        """
        known = self.with_callback
        if key in known:
            return str(key)
        return next((name for name in known if _plain(key) in (_plain(name), _plain(self[name].class_name))), None)

    def near(self, key: object) -> str:
        """A hint at the method that a mistyped key may have meant, or nothing."""
        spelled = {_plain(name): f"{name!r}" for name in self.with_callback}
        for name in self.with_callback:
            spelled.setdefault(_plain(self[name].class_name), f"{name!r}, the key of {self[name].class_name}")
        written = _plain(key)
        # A name that is not all there (`hesso`) is nearer than one with other letters.
        begun = [name for name in spelled if len(written) > 2 and written in name]
        close = begun or difflib.get_close_matches(written, spelled, 1)
        return f" (did you mean {' or '.join(dict.fromkeys(spelled[name] for name in close[:4]))}?)" if close else ""

    def pruning(self, what: Literal["weights", "units"]) -> set[str]:
        """Names of the methods that make single weights zero, or whole units."""
        return {name for name, method in self.items() if method.prunes == what}

    def add(self, method: Method) -> None:
        """Take in a method; the same one again replaces itself.

        Args:
            method: Follows its ``after`` (and what followed that before), else precedes its ``before``, else is last.

        Raises:
            ValueError: The name belongs to another method, or a method that it names is unknown.
        """
        known = self._methods.get(method.name)
        if known is not None and not known.same_as(method):
            raise ValueError(f"the method {method.name!r} is registered already, as {known}: choose another name.")
        for argument in ("after", "before", "excludes"):
            value = getattr(method, argument)
            for name in [value] if isinstance(value, str) else value or ():
                if name not in self._methods and name not in self:
                    raise ValueError(
                        f"`{argument}` of the method {method.name!r} names {name!r}{near(name, self)}, which is "
                        f"unknown; expected one of {', '.join(self)}."
                    )
        if known is not None:
            self._methods[method.name] = method
            return
        names = list(self._methods)
        place = len(names) if method.before is None else names.index(method.before)
        if method.after is not None:
            first = names.index(method.after) + 1
            if first > place:
                raise ValueError(
                    f"the method {method.name!r} cannot stand after {method.after!r} and before {method.before!r}: the "
                    f"order is {', '.join(names)}."
                )
            place = first
            while place < len(names) and self._methods[names[place]].after == method.after:
                place += 1
        names.insert(place, method.name)
        methods = self._methods | {method.name: method}
        self._methods = {name: methods[name] for name in names}

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What is registered inside is forgotten afterwards; for tests."""
        before = dict(self._all())
        try:
            yield
        finally:
            self._methods = before

    def check(self, names: Sequence[str]) -> None:
        """Refuse combinations that cannot work.

        Args:
            names: Methods to be used on one model; a method may appear twice, aimed at different modules.

        Raises:
            ValueError: A name is unknown, or two methods exclude each other; says what to do instead.
        """
        for name in names:
            if name not in self:
                hint = self.near(name) or f"; expected one of {', '.join(self)}"
                raise ValueError(
                    f"unknown method {name!r}{hint}. A method of your own is made known by "
                    "`lightning_efficient.register_method`."
                )
        for first, second in combinations(names, 2):
            reason = self[first].excludes.get(second) or self[second].excludes.get(first)
            if reason is not None:
                raise ValueError(f"{first} and {second} cannot be used together: {reason}.")

    def position(self, name: str) -> int:
        """Place of a known method in the order, from 0."""
        return list(self).index(name)


def near(name: object, names: Iterable[str]) -> str:
    """A hint at what a mistyped name may have meant, or nothing.

    Args:
        name: What the user wrote.
        names: What exists.
    """
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _ours(name: str, place: str | None = None, **kwargs: Any) -> Method:
    return Method(name, None if place is None else f"lightning_efficient.callbacks.{place}", **kwargs)


def _core(place: str) -> str:
    return f"lightning_efficient.{place}"


_TWO_PRUNERS = (
    "both decide which units go, and each would count those of the other: run one of them first, export the"
    " smaller model, and use the other in a second run"
)
_MASKS_ON_UNITS = dict.fromkeys(
    ("hesso_pruning", "pagcp_pruning"),
    "structured pruning removes the rows whose single entries masks would score: run structured pruning"
    " first, export the smaller model, and mask that one in a second run",
)

# What keeps the model as it was comes first: a teacher. Then methods that replace modules: the rest bind to the
# Parameters they leave behind. What follows is the chain raw weight -> used weight, from the inside out:
# - temp_scale after sigma_reparam: W / sigma(W) divides any factor inside it out again, so a temperature inside would
#   do nothing and a learned one would get a zero gradient;
# - structured pruning and masks last: what they zero stays zero. They act on the raw weight, so that a spectral norm is
#   that of what is left;
# - slim, the cutting out of what they zeroed, after everything that changes a model.
METHODS = Registry(
    (
        _ours(
            "distillation",
            "distillation:Distillation",
            charts={
                "distillation, unweighted": "efficient/distillation/loss",
                "weight of the teacher": "efficient/distillation/weight",
            },
        ),
        _ours("remove_norms", replay=_core("norms.remove:apply_remove_norms")),
        _ours(
            "norm_swap",
            "prepbn:PRepBN",
            replay=_core("norms.swap:apply_norm_swap"),
            config=_core("norms.swap:NormSwapConfig"),
            charts={
                "lambda, share of the old norm": "efficient/norm_swap/lam",
                "validation loss: blend, and finished form": "(efficient/norm_swap/finished/)?val.*loss",
                "validation accuracy: blend, and finished form": "(efficient/norm_swap/finished/)?val.*acc.*",
            },
        ),
        _ours(
            "linear_attention",
            "linear_attention:SimplifiedLinearAttention",
            replay=_core("attention.linear:apply_linear_attention"),
            config=_core("attention.linear:LinearAttentionConfig"),
        ),
        _ours(
            "sigma_reparam",
            "sigma_reparam:SigmaReparam",
            charts={
                "spectral norms of the raw weights": "efficient/sigma_reparam/sigma_(max|mean)",
                "gains": "efficient/sigma_reparam/gain_(min|mean|max)",
            },
        ),
        _ours(
            "temp_scale",
            "temp_scale:TempScale",
            excludes={
                "linear_attention": "linear attention has no softmax, so there is no temperature to scale: drop"
                " temp_scale, or keep softmax attention"
            },
            charts={"temperature": "efficient/temp_scale/tau_(min|mean|max)"},
            lasting=True,
        ),
        _ours(
            "hesso_pruning",
            "hesso_pruning:HESSOPruning",
            charts={
                "share removed": "efficient/hesso_pruning/removed",
                "units that shrink": "efficient/hesso_pruning/shrinking",
            },
            prunes="units",
        ),
        _ours(
            "pagcp_pruning",
            "pagcp_pruning:PAGCPPruning",
            excludes={"hesso_pruning": _TWO_PRUNERS},
            charts={
                "units left": "efficient/pagcp_pruning/units_left",
                "compute left": "efficient/pagcp_pruning/compute_left",
            },
            prunes="units",
        ),
        _ours(
            "magnitude_pruning",
            "magnitude_pruning:MagnitudePruning",
            excludes=_MASKS_ON_UNITS,
            charts={"sparsity": "efficient/magnitude_pruning/sparsity"},
            prunes="weights",
        ),
        _ours(
            "sap_pruning",
            "sap_pruning:SAPPruning",
            excludes=_MASKS_ON_UNITS,
            charts={
                "sparsity": "efficient/sap_pruning/(sparsity|left)",
                "PQ index": "efficient/sap_pruning/pqi(_scope)?",
            },
            prunes="weights",
        ),
        _ours("slim"),
        _ours(
            "collapse_monitor",
            "collapse_monitor:CollapseMonitor",
            charts={
                "attention entropy, nats": "efficient/collapse_monitor/entropy_(min|mean)",
                "share of heads": "efficient/collapse_monitor/(collapsed|sink)_fraction",
                "largest spectral norm": "efficient/collapse_monitor/spectral_norm_max",
            },
        ),
        _ours(
            "collapse_guard",
            "collapse_guard:CollapseGuard",
            charts={
                "the canary's score": "efficient/collapse_guard/canary",
                "rollbacks": "efficient/collapse_guard/(trips|rollbacks)",
            },
        ),
        _ours(
            "representation_monitor",
            "representation_monitor:RepresentationMonitor",
            charts={
                "effective dimensions": "efficient/representation_monitor/(.*/)?"
                "(rankme|effective_rank|stable_rank|participation_ratio|lidar)",
                "decay of the eigenvalues": "efficient/representation_monitor/(.*/)?alpha_req",
            },
        ),
        _ours("fixed_etf_head", "fixed_etf_head:FixedETFHead"),
        _ours(
            "adaptive_gradient_modulation",
            "adaptive_gradient_modulation:AdaptiveGradientModulation",
            charts={
                "loss of a modality alone": "efficient/adaptive_gradient_modulation/score/.*",
                "factor of its gradient": "efficient/adaptive_gradient_modulation/factor/.*",
            },
        ),
        _ours(
            "padding_report",
            "padding_report:PaddingReport",
            charts={
                "share of tokens that are no padding": "efficient/padding_report/(batch_)?fill",
                "share of compute that is padding": "efficient/padding_report/wasted",
            },
        ),
        _ours(
            "module_timer",
            "module_timer:ModuleTimer",
            charts={"a measured step, ms": "efficient/module_timer/(forward|backward|step)_ms"},
        ),
        _ours(
            "neural_collapse_monitor",
            "neural_collapse_monitor:NeuralCollapseMonitor",
            charts={"neural collapse": "efficient/neural_collapse_monitor/(.*/)?nc[1-4]"},
        ),
        _ours(
            "posterior_collapse_monitor",
            "posterior_collapse_monitor:PosteriorCollapseMonitor",
            charts={"active units": "efficient/posterior_collapse_monitor/(.*/)?active_units"},
        ),
        _ours(
            "state_drift_monitor",
            "state_drift_monitor:StateDriftMonitor",
            charts={"drift of recurrent states": "efficient/state_drift_monitor/(.*/)?(ratio_max|drifting)"},
        ),
        _ours(
            "run_cost",
            "run_cost:RunCost",
            charts={
                "time a step, ms": "efficient/run_cost/step_ms",
                "peak memory, MiB": "efficient/run_cost/peak_memory_mib",
            },
        ),
    ),
    GROUP,
)
