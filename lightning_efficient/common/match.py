"""Which modules a method is about: module types and name globs, with errors that say what to change."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

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
    return any(fnmatchcase(".".join(parts[:depth]), glob) for depth in range(len(parts), 0, -1))


def near_names(glob: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Existing names that a mistyped glob may have meant, best first.

    Args:
        glob: What the user wrote.
        names: Names that exist.
        count: How many to return at most.
    """
    literal = glob.replace("*", "").replace("?", "").strip(".")
    depth = literal.count(".") + 1
    # "*.atn" should find "blocks.0.attn": compare with the end of each name too, as many segments as were written.
    tails: dict[str, str] = {}
    names = [name for name in names if name]
    for name in names:
        tails.setdefault(".".join(name.split(".")[-depth:]), name)
    close = difflib.get_close_matches(literal, names, count)
    close += [tails[tail] for tail in difflib.get_close_matches(literal, tails, count)]
    return list(dict.fromkeys(close))[:count]


def select_modules(
    model: nn.Module,
    *,
    types: tuple[type[nn.Module], ...],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    method: str,
) -> Selection:
    """Choose the modules a method changes.

    Args:
        model: The model; torch's wrappers inside it are looked through.
        types: A module qualifies if it is an instance of one of these.
        include: Globs over canonical dotted names; each also covers everything below what it names. ``None``: all.
        exclude: Globs taken out again, after ``include``. ``None``: none.
        method: Name of the method, for messages.

    Returns:
        The modules found, the ones left out with the reason, and second names. A glob that has no effect
        while others do is a ``UserWarning``.

    Raises:
        TypeError: ``include`` or ``exclude`` is not a list of strings.
        NoMatchError: Nothing is left: the model has no such module, the globs match no name, they match
            modules of other types only, or everything was excluded.
    """
    include_globs = None if include is None else _check_globs("include", include, method)
    exclude_globs = [] if exclude is None else _check_globs("exclude", exclude, method)
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

    included, dead_include = _cover(include_globs, candidates)
    if not included:
        assert include_globs is not None
        raise NoMatchError(_nothing_included(include_globs, modules, list(candidates), kind, method))
    excluded, _ = _cover(exclude_globs, candidates)
    matched = {name: modules[name] for name in candidates if name in included and name not in excluded}
    idle = references(model) & set(matched)
    if matched and len(idle) == len(matched):
        raise NoMatchError(
            f"{method}: all {len(matched)} {kind} modules are {REFERENCE} ({_quote(list(matched)[:5])}). Train them, "
            "or put them into training mode."
        )
    matched = {name: module for name, module in matched.items() if name not in idle}
    if not matched:
        globs = sorted({excluded[name] for name in included})
        raise NoMatchError(
            f"{method}: all {len(included)} {kind} modules that `include` covers are excluded by `exclude` glob"
            f" {_quote(globs)}: narrow it. Excluded: {_quote(list(included)[:5])}."
        )
    for glob in dead_include:
        _warn_dead(f"`include` glob {glob!r} covers no {kind} module", glob, modules, method)
    for glob in exclude_globs:
        # A glob for modules that another method changes is no mistake: only a name that does not exist is.
        if not any(covers(glob, name) for name in modules):
            _warn_dead(f"`exclude` glob {glob!r} matches no module name", glob, modules, method)
    return Selection(
        matched=matched,
        skipped={
            name: f"excluded by {excluded[name]!r}" if name in excluded else REFERENCE if name in idle else _UNCOVERED
            for name in candidates
            if name not in matched
        },
        aliases={name: candidates[name][1:] for name in matched if len(candidates[name]) > 1},
    )


_UNCOVERED = "not covered by include"


def _check_globs(argument: str, globs: Sequence[str], method: str) -> list[str]:
    if isinstance(globs, str):
        raise TypeError(f"{method}: {argument}={globs!r} is a string; write a list: {argument}=[{globs!r}].")
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise TypeError(f"{method}: {argument} holds {glob!r}; expected non-empty strings such as 'blocks.*'.")
    if argument == "include" and not globs:
        raise NoMatchError(f"{method}: include=[] covers nothing; write None for every module, or name some.")
    return [canonical_name(glob) for glob in globs]


def _cover(globs: Sequence[str] | None, candidates: dict[str, list[str]]) -> tuple[dict[str, str], list[str]]:
    """First name -> the glob that covers any name of the module, and the globs that cover none."""
    if globs is None:
        return dict.fromkeys(candidates, "*"), []
    hits = {
        name: [glob for glob in globs if any(covers(glob, alias) for alias in aliases)]
        for name, aliases in candidates.items()
    }
    used = {glob for found in hits.values() for glob in found}
    return {name: found[0] for name, found in hits.items() if found}, [g for g in globs if g not in used]


def _nothing_included(
    globs: Sequence[str], modules: dict[str, nn.Module], candidates: list[str], kind: str, method: str
) -> str:
    findings = []
    for glob in globs:
        named = {id(module): module for name, module in modules.items() if covers(glob, name)}
        counts = Counter(type(module).__name__ for module in named.values())
        only = ", ".join(f"{n} {cls}" for cls, n in counts.most_common(6))
        missing = f"matches no module name{_did_you_mean(glob, modules)}"
        findings.append(f"{glob!r} " + (f"covers no {kind} module, only {only}" if named else missing))
    return (
        f"{method}: `include` {'; '.join(findings)}."
        f" {kind} modules of this model: {_quote(candidates[:5])}{', ...' if len(candidates) > 5 else '.'}"
    )


def _warn_dead(problem: str, glob: str, names: Iterable[str], method: str) -> None:
    hint = "" if any(covers(glob, name) for name in names) else _did_you_mean(glob, names)
    # Level 3 is the caller of select_modules.
    warnings.warn(f"{method}: {problem}{hint}.", UserWarning, stacklevel=3)


def _did_you_mean(glob: str, names: Iterable[str]) -> str:
    near = near_names(glob, names)
    return f" (did you mean {_quote(near)}?)" if near else ""


def _quote(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
