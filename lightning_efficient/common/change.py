"""The one record of what a method did to a model: the optimizer, the recipe and the log all read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(eq=False)  # comparing records would compare tensors element by element
class Change:
    """What applying one method did.

    Args:
        method: Name of the method, such as ``"norm_swap"``.
        targets: Module name -> what was done to it, for people.
        skipped: Module name -> why it was left alone.
        swaps: Module name -> (old module, new module).
        replaced: (old parameter, new parameter) in the same role: the optimizer's state moves from one to the other.
        added: (new parameter, the weight whose learning rate it follows). ``None``: no weight to follow.
        removed: Parameters the model no longer uses.
        notes: Lines for people on the whole of it.
        cuts: Parameter that was made smaller, in place -> axis -> bool over the axis as it was: True where an entry
            stayed.
    """

    method: str
    targets: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    swaps: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    replaced: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)
    added: list[tuple[nn.Parameter, nn.Parameter | None]] = field(default_factory=list)
    removed: list[nn.Parameter] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cuts: dict[nn.Parameter, dict[int, Tensor]] = field(default_factory=dict)

    def report(self, examples: int = 3) -> str:
        """A few lines for a person.

        Args:
            examples: How many module names to show per kind of action or reason.

        Returns:
            Counts of modules by action, of skipped modules by reason, and of parameters.
        """
        lines = [f"{self.method}: {len(self.targets)} modules changed, {len(self.skipped)} skipped"]
        lines += [f"  {line}" for line in self.notes]
        lines += [f"  {line}" for line in _group(self.targets, examples)]
        lines += [f"  skipped, {line}" for line in _group(self.skipped, examples)]
        counts = {"replaced": len(self.replaced), "added": len(self.added), "removed": len(self.removed)}
        if any(counts.values()):
            lines.append("  parameters: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n))
        return "\n".join(lines)


def _group(notes: dict[str, str], examples: int) -> list[str]:
    lines = []
    for note, count in Counter(notes.values()).most_common():
        names = [name for name, its_note in notes.items() if its_note == note]
        more = f", ... {count - examples} more" if count > examples else ""
        lines.append(f"{note}: {count} ({', '.join(names[:examples])}{more})")
    return lines
