"""Which modules a method is about: module types and name globs, with errors that say what to change."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape

from torch import nn

from lightning_efficient.common.near import hint, quote

# Child names that torch's own wrappers (torch.compile, FSDP1, activation checkpointing) put into dotted
# names. The user wrote "blocks.0", so that is what globs, reports and recipes say.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

REFERENCE = "frozen and kept in evaluation mode: a reference, left alone"


class NoMatchError(ValueError):
    """No module is left to change; the message says which argument to fix, and to what."""


@dataclass(frozen=True)
class Selection:
    """What ``select_modules`` found.

    Args:
        matched: Canonical name -> module, in ``named_modules`` order; a module registered under several names
            is here once, under the first.
        skipped: Canonical name -> why a module of the right type is not in ``matched``.
        aliases: First name -> the other names of the same module, for matched modules that have any.
    """

    matched: dict[str, nn.Module]
    skipped: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)


def canonical_name(name: str) -> str:
    """Name of a module or parameter without the segments that torch's wrappers add.

    Args:
        name: Dotted name, such as ``_orig_mod.blocks.0._checkpoint_wrapped_module.attn.weight``.

    Returns:
        The name the user knows, ``blocks.0.attn.weight``.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every registration of every module, aliases included.

    Args:
        model: Any module.

    Returns:
        Canonical dotted name -> module, in ``named_modules`` order; the root is ``""``. A wrapper and what it
        wraps share a name: the wrapped module is the one returned.
    """
    # A wrapper comes before what it wraps, so the latter is what stays.
    return {canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter; a shared one under its first name.

    Args:
        model: Any module.
    """
    return {canonical_name(name): param for name, param in model.named_parameters()}


def references(model: nn.Module) -> set[str]:
    """Modules that nothing trains and that the user keeps in evaluation mode, which no method changes.

    Frozen teachers, feature extractors of perceptual losses. What tells them is the contrast: frozen (it has
    parameters, and none requires a gradient) and in evaluation mode, inside something that is in training mode. A model
    of which nothing is trained has none, nor has one that arrives in evaluation mode as a whole (``from_pretrained``),
    however much of it is frozen (LoRA).

    Args:
        model: Any module; it counts as in training mode itself.

    Returns:
        Canonical names, of everything inside such a module as well.
    """
    found: set[str] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child.training:
                visit(child, f"{prefix}{name}.")
            elif (own := list(child.parameters())) and not any(p.requires_grad for p in own):
                found.update(canonical_name(f"{prefix}{name}.{n}".rstrip(".")) for n, _ in child.named_modules())

    if any(p.requires_grad for p in model.parameters()):
        visit(model, "")
    return found


def covers(glob: str, name: str) -> bool:
    """Whether a glob names this module or one of its parents (``blocks.0`` covers ``blocks.0.attn.qkv``).

    Args:
        glob: Case-sensitive ``fnmatch`` pattern; ``*`` also matches dots.
        name: Canonical dotted name.
    """
    parts = name.split(".")
    return any(_matches(glob, ".".join(parts[:depth])) for depth in range(len(parts), 0, -1))


def _matches(glob: str, name: str) -> bool:
    return name == glob or fnmatchcase(name, glob)  # a name may hold [brackets]


def check_globs(argument: str, globs: Sequence[str], method: str) -> None:
    """Refuse what is no list of globs, whatever the model.

    Args:
        argument: Its name.
        globs: What the user wrote.
        method: Whose argument.

    Raises:
        TypeError: Not a list of non-empty strings.
        NoMatchError: An empty ``include``.
    """
    if isinstance(globs, str):
        raise TypeError(f"{method}: {argument}={globs!r} is a string; write a list: {argument}=[{globs!r}].")
    if not isinstance(globs, list | tuple):
        raise TypeError(f"{method}: {argument}={globs!r}; expected a list of globs such as ['blocks.*'].")
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise TypeError(f"{method}: {argument} holds {glob!r}; expected non-empty strings such as 'blocks.*'.")
    if argument == "include" and not globs:
        raise NoMatchError(f"{method}: include=[] covers nothing; write None for every module, or name some.")


class Globs:
    """The globs of one argument, read against the names of one model.

    A glob stands for the names that it matches and for everything below them. One that matches no name from the root
    on is read from inside the model: ``head`` for ``net.head``, ``blocks.*.mlp`` for ``net.blocks.*.mlp``. Only one
    part of the model may then fit.

    Args:
        argument: Its name, for messages.
        globs: What the user wrote.
        names: Name → what bears it; two names of one thing are no two parts of the model.
        method: Whose argument, for messages.
        what: What the names are of, for messages.
        aside: Names that a glob reaches only from the root: those of reference networks.
        single: Whether one thing is asked for, so that there is no "all".

    Raises:
        TypeError: ``globs`` is not a list of strings.
        NoMatchError: A glob matches nothing, or several parts of the model.
    """

    def __init__(
        self,
        argument: str,
        globs: Sequence[str],
        names: Mapping[str, object],
        method: str,
        what: str = "module name",
        aside: Collection[str] = (),
        single: bool = False,
    ) -> None:
        check_globs(argument, globs, method)
        self._read: dict[str, str] = {}
        problems = []
        for written in globs:
            glob, at = canonical_name(written), ""
            if not any(covers(glob, name) for name in names):
                parts = _parts(glob, {name: thing for name, thing in names.items() if name not in aside})
                if len(parts) == 1:
                    at = f"{escape(parts[0][0])}."
                elif parts:
                    ends = [f"{prefix}.{glob}" for prefix, _ in parts[:3]]
                    more = f", and {len(parts) - 3} more" if len(parts) > 3 else ""
                    problems.append(
                        f"{written!r} fits {len(parts)} parts of the model ({quote(ends)}{more}): write one of these"
                        + ("" if single else f", or {'*.' + glob!r} for all")
                    )
                else:
                    problems.append(f"{written!r} matches no {what}{hint(glob, names)}")
            self._read[written] = at + glob
        if problems:
            raise NoMatchError(f"{method}: `{argument}` {'; '.join(problems)}.")

    def hits(self, *names: str) -> list[str]:
        """The globs that cover any of some names, as the user wrote them, in their order."""
        return [written for written, glob in self._read.items() if any(covers(glob, name) for name in names)]


def _parts(glob: str, names: Mapping[str, object]) -> list[tuple[str, list[int]]]:
    """Prefix below which a glob matches → what it matches there; one of several names of the same things."""
    found: dict[str, list[int]] = {}
    inside: list[str] = []
    for name, thing in names.items():
        segments = name.split(".")
        if any(name.startswith(f"{matched}.") for matched in inside):
            continue  # below a match, so covered by it
        depths = [d for d in range(1, len(segments)) if _matches(glob, ".".join(segments[d:]))]
        if depths:
            inside.append(name)
            found.setdefault(".".join(segments[: depths[0]]), []).append(id(thing))
    unique: dict[tuple[int, ...], str] = {}
    for prefix, things in found.items():
        unique.setdefault(tuple(things), prefix)
    return [(prefix, list(things)) for things, prefix in unique.items()]


class Choice:
    """What ``include`` and ``exclude`` say of the names of one model.

    Args:
        names: See :class:`Globs`, which also says what is raised; likewise ``method``, ``what`` and ``aside``.
        include: Globs; ``None``: all.
        exclude: Globs taken out again; ``None``: none.
    """

    def __init__(
        self,
        names: Mapping[str, object],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        method: str,
        what: str = "module name",
        aside: Collection[str] = (),
    ) -> None:
        self.include = None if include is None else Globs("include", include, names, method, what, aside)
        self.exclude = Globs("exclude", exclude or (), names, method, what, aside)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        method: str,
        more: Mapping[str, object] | None = None,
    ) -> Choice:
        """Among the modules of a model, and what else has a name."""
        aside = references(model) if include or exclude else ()
        return cls({**modules_by_name(model), **(more or {})}, include, exclude, method, aside=aside)

    def why_not(self, *names: str) -> str:
        """Why a thing of these names is left alone; empty if it is chosen."""
        if self.include is not None and not self.include.hits(*names):
            return _UNCOVERED
        out = self.exclude.hits(*names)
        return f"excluded by {out[0]!r}" if out else ""


def find_module(model: nn.Module, name: str, argument: str, method: str) -> nn.Module:
    """The module of a name that the user gave, which may begin inside the model as globs may.

    Raises:
        NoMatchError: There is none, or several; ``argument`` of ``method`` says where that name stands.
    """
    modules = modules_by_name(model)
    if (exact := modules.get(canonical_name(name))) is not None:
        return exact
    covered = Globs(argument, [escape(name)], modules, method, aside=references(model), single=True).hits
    return next(module for path, module in modules.items() if covered(path))


def select_modules(
    model: nn.Module,
    *,
    types: tuple[type[nn.Module], ...],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    method: str,
    more: Mapping[str, object] | None = None,
) -> Selection:
    """Choose the modules a method changes.

    Args:
        model: The model; torch's wrappers inside it are looked through.
        types: A module qualifies if it is an instance of one of these.
        include: Globs over canonical dotted names; each also covers everything below what it names. ``None``: all.
        exclude: Globs taken out again, after ``include``. ``None``: none.
        method: Name of the method, for messages.
        more: Other names that the globs may be about: parameters that no layer holds.

    Returns:
        The modules found, the ones left out with the reason, and second names. A glob of ``include`` that covers
        modules of other types only, while others have an effect, is a ``UserWarning``; one of ``exclude`` may be
        about the modules of another method.

    Raises:
        TypeError: ``include`` or ``exclude`` is not a list of strings.
        NoMatchError: A glob matches nothing, or several parts of the model (:class:`Globs`); or nothing is left: the
            model has no such module, the globs cover modules of other types only, or everything was excluded.
    """
    modules = modules_by_name(model)
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(module, []).append(name)
    candidates = {names[0]: names for module, names in names_of.items() if isinstance(module, types)}
    kind = " or ".join(cls.__name__ for cls in types)
    if not candidates:
        counts = Counter(type(module).__name__ for module in names_of)
        present = ", ".join(f"{n} {cls}" for cls, n in counts.most_common(12))
        raise NoMatchError(f"{method}: the model has no module of type {kind}. It has: {present}.")

    listed = f"{kind} modules of this model: {quote(list(candidates)[:5])}{', ...' if len(candidates) > 5 else '.'}"
    try:
        choice = Choice.of(model, include, exclude, method, more)
    except NoMatchError as error:
        raise NoMatchError(f"{error} {listed}") from None
    why_not = {name: why for name, names in candidates.items() if (why := choice.why_not(*names))}
    included = [name for name in candidates if why_not.get(name) != _UNCOVERED]
    dead = _dead(choice, modules, candidates, more or {})
    if not included:
        only = "; ".join(f"{glob!r} covers no {kind} module, only {found}" for glob, found in dead.items())
        raise NoMatchError(f"{method}: `include` {only or 'covers none of them'}. {listed}")
    matched = {name: modules[name] for name in included if name not in why_not}
    idle = references(model) & set(matched)
    if matched and len(idle) == len(matched):
        raise NoMatchError(
            f"{method}: all {len(matched)} {kind} modules are {REFERENCE} ({quote(list(matched)[:5])}). Train them, "
            "or put them into training mode."
        )
    matched = {name: module for name, module in matched.items() if name not in idle}
    if not matched:
        globs = sorted({choice.exclude.hits(*candidates[name])[0] for name in included})
        raise NoMatchError(
            f"{method}: all {len(included)} {kind} modules that `include` covers are excluded by `exclude` glob"
            f" {quote(globs)}: narrow it. Excluded: {quote(included[:5])}."
        )
    for glob, found in dead.items():
        # Level 2 is the caller.
        warnings.warn(f"{method}: `include` glob {glob!r} covers no {kind} module, only {found}.", stacklevel=2)
    return Selection(
        matched=matched,
        skipped=why_not | dict.fromkeys(sorted(idle, key=list(candidates).index), REFERENCE),
        aliases={name: candidates[name][1:] for name in matched if len(candidates[name]) > 1},
    )


def _dead(
    choice: Choice,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, Sequence[str]],
    more: Mapping[str, object],
) -> dict[str, str]:
    """Globs of ``include`` that cover none of the candidates, nor anything else a method works on → what they cover."""
    if choice.include is None:
        return {}
    used = {glob for names in [*candidates.values(), list(more)] for glob in choice.include.hits(*names)}
    named: dict[str, dict[int, str]] = {}
    for name, module in modules.items():
        for glob in choice.include.hits(name):
            named.setdefault(glob, {})[id(module)] = type(module).__name__
    return {
        glob: ", ".join(f"{n} {cls}" for cls, n in Counter(found.values()).most_common(6))
        for glob, found in named.items()
        if glob not in used
    }


_UNCOVERED = "not covered by include"
