"""What must hold for swapped norms to learn what they evaluate with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_efficient.common.running import first_line
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.repbn import RepBN


def check_training(model: nn.Module, wake: bool = False) -> None:
    """In training: norms that take statistics from training forwards have to be in training mode.

    Args:
        model: The model, in the modes in which its step runs.
        wake: Put these norms, and nothing else, into training mode instead of refusing.

    Raises:
        ValueError: Some are in evaluation mode.
    """
    asleep = {n: norm for n, norm in blend_norms(model).items() if norm.learns_in_training and not norm.training}
    if asleep and not wake:
        raise ValueError(
            f"{len(asleep)} of the norms that PRepBN swaps train in evaluation mode ({_some(list(asleep))}), so they "
            "collect no statistics. Models from `from_pretrained` arrive that way, and Lightning keeps it: call "
            "`.train()` on the network before `fit`, or `exclude` what is to stay as it is. PRepBN(eval_mode='train') "
            "puts the swapped norms, and nothing else, into training mode."
        )
    for norm in asleep.values():
        norm.train()


def own_statistics(model: nn.Module) -> str:
    """What several processes that each have the whole model do not share; empty: they take statistics together.

    Args:
        model: The model, on one of them.
    """
    own = [norm.target for norm in blend_norms(model).values() if norm.learns_in_training and not norm.target.pools]
    if not own:
        return ""
    said = "each process takes the statistics of its own samples, and running ones are averaged over the processes"
    synced = any(isinstance(target, RepBN) for target in own)
    return f"{said}. Trainer(sync_batchnorm=True) takes those of all samples." if synced else f"{said}."


def check_statistics(model: nn.Module, recalibrated: bool = True) -> None:
    """Before running statistics matter: there are some.

    Args:
        model: The model.
        recalibrated: Whether its statistics are averaged over batches before training, where they have to be.

    Raises:
        ValueError: Some norms have the mean 0 and the variance 1 that they were made with.
    """
    norms = {name: norm.target for name, norm in blend_norms(model).items()}
    starved = [name for name, target in norms.items() if not target.has_statistics()]
    if not starved:
        return
    why = (
        "no training batch had two values a channel for them (pooled features of one sample), or they did not run. "
        f"Larger batches help, target='affine' needs no statistics, exclude={starved[:3]} leaves them as they were"
    )
    if not recalibrated and norms[starved[0]].frozen:
        why = "with `frozen` they come from recalibration alone: set `recalibrate` to a number of batches"
    raise ValueError(
        f"PRepBN: {len(starved)} norms ({_some(starved)}) still have the running mean 0 and variance 1 that they began "
        f"with, and the transition starts: {why}."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def not_seen(model: str, error: Exception) -> str:
    """What it means that a model could not be looked at, for people.

    Args:
        model: Name of its class.
        error: With which its step failed.
    """
    return (
        "whether the model is causal and what is padding could not be found out, because "
        f"{model} does not run on a training batch outside its loop ({first_line(error)}). With batch statistics a "
        "causal model sees the future while training (target='affine' has none), and padded tokens count in the "
        "statistics."
    )
