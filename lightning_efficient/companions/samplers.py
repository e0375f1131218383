"""Batch samplers that know how long samples are: ``DataLoader(dataset, batch_sampler=...)``."""

from __future__ import annotations

import heapq
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_efficient.companions.batch_sampler import LengthBatchSampler
from lightning_efficient.companions.lengths import Lengths, balance, sequence_cost


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` is {value}; expected more than 0.")


class _FixedSizes(LengthBatchSampler):
    """Batches of a given size: a step takes that many samples times processes, in some order."""

    def count(self, lengths: Tensor, replicas: int) -> int:
        return len(self._sizes(len(lengths), replicas))

    def _sizes(self, samples: int, replicas: int) -> list[int]:
        """Samples of every step. What is left over is a smaller step, of one sample a process at least."""
        step = self._batch_size * replicas
        full, left = divmod(samples, step)
        sizes = [step] * full
        if left and not self.drop_last:
            if left < replicas and full and step > replicas:
                left += sizes.pop()
                sizes.append(left - left // 2)
                left //= 2
            sizes.append(left)
        if not sizes or sizes[-1] < replicas:
            raise ValueError(
                f"{samples} samples in batches of {self._batch_size} for {replicas} processes: some would get none in "
                "a step. Set drop_last=True, or another `batch_size`."
            )
        return sizes


class LengthGroupedBatchSampler(_FixedSizes):
    """Batches of samples that are about equally long, so that little is padded.

    The samples are shuffled, cut into pools, and sorted by length within each; batches are neighbours there, and come
    in random order. Every sample comes once an epoch, in one process. Batches of the same step are of about one length
    in all processes.

    Args:
        lengths: Length of every sample, in any unit: numbers (list or tensor); the name of an attribute or column of
            ``dataset``; a function of a sample.
        batch_size: Samples of a batch in each process. Where an epoch does not divide, its last batches are smaller.
        dataset: Where ``lengths`` is looked up. None: not needed for numbers, or given later, by :meth:`bind`.
        pool: Batches of each process that are sorted together: more pads less and mixes less.
        shuffle: False: the same batches in every epoch, all sorted together, the longest first.
        seed: Of the order, together with the epoch. The same in all processes.
        drop_last: Leave out what does not fill a batch in every process, other samples in every epoch.
        num_replicas: Processes. None: those of ``torch.distributed``, once it is initialised.
        rank: Which one this is.

    Raises:
        ValueError: An argument out of range; lengths that are not one number a sample; samples too few for all
            processes to get one in every step.
    """

    def __init__(
        self,
        lengths: Lengths,
        batch_size: int,
        dataset: Any = None,
        *,
        pool: int = 50,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if self.remade(lengths, batch_size, drop_last):
            return
        _positive(batch_size=batch_size, pool=pool)
        self._batch_size, self.pool = batch_size, pool
        self.begin(lengths, dataset, shuffle, seed, drop_last, num_replicas, rank)

    def steps(self, lengths: Tensor, replicas: int, generator: torch.Generator | None) -> list[list[Tensor]]:  # noqa: D102
        sizes = self._sizes(len(lengths), replicas)
        pool = self._batch_size * replicas * self.pool if generator is not None else len(lengths)
        order = _order(len(lengths), generator)
        if generator is None:
            order = order[lengths.argsort(descending=True, stable=True)]
        order = order[: sum(sizes)]
        order = torch.cat(
            [part[lengths[part].argsort(descending=True, stable=True)] for part in torch.split(order, pool)]
        )
        steps = [list(step.tensor_split(replicas)) for step in torch.split(order, sizes)]
        return [steps[i] for i in _order(len(steps), generator).tolist()]


class BalancedDistributedBatchSampler(_FixedSizes):
    """Random batches whose samples are dealt out so that every process has as much to compute.

    For models that do not pad (packed sequences): in each step all wait for the slowest process. The samples of a step
    are those of a random epoch, whatever their lengths, so what is learned from is a plain shuffle. Where batches are
    padded to their longest, group by length instead.

    Args:
        lengths: Length of every sample, in tokens: numbers (list or tensor); the name of an attribute or column of
            ``dataset``; a function of a sample.
        batch_size: Samples of a step, divided by the processes. With ``"lpt"`` processes get more short ones or fewer
            long ones than that.
        dataset: Where ``lengths`` is looked up. None: not needed for numbers, or given later, by :meth:`bind`.
        d_model: Width of the model, for the cost of a sample: l + l² / (6 d).
        method: ``"lpt"``: the costliest sample left to the process that has least. ``"snake"``: back and forth, so that
            all processes have as many samples.
        shuffle: False: samples in their order, the same steps in every epoch.
        seed: Of the order, together with the epoch. The same in all processes.
        drop_last: Leave out what does not fill a step, other samples in every epoch.
        num_replicas: Processes. None: those of ``torch.distributed``, once it is initialised.
        rank: Which one this is.

    Raises:
        ValueError: An argument out of range; lengths that are not one number a sample; samples too few for all
            processes to get one in every step.
    """

    def __init__(
        self,
        lengths: Lengths,
        batch_size: int,
        dataset: Any = None,
        *,
        d_model: float = 768,
        method: Literal["lpt", "snake"] = "lpt",
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if self.remade(lengths, batch_size, drop_last):
            return
        _positive(batch_size=batch_size, d_model=d_model)
        if method not in ("lpt", "snake"):
            raise ValueError(f"`method` is {method!r}; expected 'lpt' or 'snake'.")
        self._batch_size, self.d_model, self.method = batch_size, d_model, method
        self.begin(lengths, dataset, shuffle, seed, drop_last, num_replicas, rank)

    def steps(self, lengths: Tensor, replicas: int, generator: torch.Generator | None) -> list[list[Tensor]]:  # noqa: D102
        costs = sequence_cost(lengths, self.d_model)
        sizes = self._sizes(len(lengths), replicas)
        steps = torch.split(_order(len(lengths), generator)[: sum(sizes)], sizes)
        return [[step[part] for part in balance(costs[step], replicas, self.method)] for step in steps]


class TokenBudgetBatchSampler(LengthBatchSampler):
    """Batches of as many samples of about one length as fit into a number of tokens, padding included.

    Long samples come in small batches and short ones in large batches, so memory and time of a step stay about the
    same. Samples are sorted by length and cut where a batch, padded to its longest, would exceed the budget; batches
    come in random order. Every sample comes once an epoch, in one process.

    Losses are usually means over a batch, so a sample of a large batch then counts for less: see ``token_mean``.

    Args:
        lengths: Length of every sample: numbers (list or tensor); the name of an attribute or column of ``dataset``; a
            function of a sample.
        tokens: Most of a batch in each process: its longest length × its samples, in the unit of ``lengths``.
        batch_size: Most samples of a batch. None: no limit but the tokens.
        dataset: Where ``lengths`` is looked up. None: not needed for numbers, or given later, by :meth:`bind`.
        bucket: Lengths are rounded up to a multiple of it, and samples of one rounded length change places in every
            epoch: more mixes more and pads more.
        shuffle: False: the same batches in every epoch, the longest samples first.
        seed: Of the order, together with the epoch. The same in all processes.
        drop_last: Where the batches do not divide by the processes: leave batches out, others in every epoch. False:
            some batches are halved instead.
        num_replicas: Processes. None: those of ``torch.distributed``, once it is initialised.
        rank: Which one this is.

    Raises:
        ValueError: An argument out of range; lengths that are not one number a sample; a sample longer than the budget;
            samples too few for all processes to get one in every step.
    """

    def __init__(
        self,
        lengths: Lengths,
        tokens: float = 4096,
        batch_size: int | None = None,
        dataset: Any = None,
        *,
        bucket: float = 8,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if self.remade(lengths, batch_size, drop_last):
            return
        _positive(batch_size=batch_size, tokens=tokens, bucket=bucket)
        self.tokens, self.bucket, self._limit = tokens, bucket, batch_size
        self.begin(lengths, dataset, shuffle, seed, drop_last, num_replicas, rank)
        self._cut: tuple[tuple[int, bool], list[int]] | None = None
        if self._lengths is not None:
            self._check_budget(self._lengths)

    def bind(self, dataset: Any) -> Self:  # noqa: D102
        super().bind(dataset)
        self._cut = None
        self._check_budget(self.known())
        return self

    def _check_budget(self, lengths: Tensor) -> None:
        longest = int(lengths.argmax())
        if (rounded := self._rounded(lengths)[longest].item()) > self.tokens:
            raise ValueError(
                f"`tokens` is {self.tokens}, and sample {longest} has {lengths[longest].item():g} ({rounded:g} in "
                f"steps of `bucket`={self.bucket}): cut the sample, or allow more."
            )

    def _rounded(self, lengths: Tensor) -> Tensor:
        return (lengths / self.bucket).ceil() * self.bucket

    def most(self) -> int:  # noqa: D102
        return self._limit or max(1, int(self.tokens // self.bucket))

    def count(self, lengths: Tensor, replicas: int) -> int:  # noqa: D102
        return len(self._batches(lengths, replicas)) // replicas

    def _batches(self, lengths: Tensor, replicas: int) -> list[int]:
        """Samples of every batch, along the sorted lengths; the same in every epoch."""
        asked = (replicas, self.drop_last)
        if self._cut is None or self._cut[0] != asked:
            self._cut = (asked, self._fitted(self._rounded(lengths).sort(descending=True).values.tolist(), replicas))
        return self._cut[1]

    def _fitted(self, longest_first: list[float], replicas: int) -> list[int]:
        sizes, place = [], 0
        while place < len(longest_first):
            fits = int(self.tokens // longest_first[place]) if longest_first[place] else len(longest_first)
            sizes.append(min(fits, self._limit or fits, len(longest_first) - place))
            place += sizes[-1]
        if not self.drop_last:
            sizes = _halved(sizes, -len(sizes) % replicas)
        if len(sizes) < replicas or (not self.drop_last and len(sizes) % replicas):
            raise ValueError(
                f"{len(longest_first)} samples make {len(sizes)} batches of {self.tokens} tokens, which {replicas} "
                "processes cannot share. Use fewer tokens, fewer processes, or drop_last=True."
            )
        return sizes

    def steps(self, lengths: Tensor, replicas: int, generator: torch.Generator | None) -> list[list[Tensor]]:  # noqa: D102
        order = _order(len(lengths), generator)
        order = order[self._rounded(lengths)[order].argsort(descending=True, stable=True)]
        batches = torch.split(order, self._batches(lengths, replicas))
        left_out = len(batches) % replicas
        kept = _order(len(batches), generator)[: len(batches) - left_out].sort().values.tolist()
        steps = [[batches[i] for i in kept[at : at + replicas]] for at in range(0, len(kept), replicas)]
        return [steps[i] for i in _order(len(steps), generator).tolist()]


def _order(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)


def _halved(sizes: list[int], more: int) -> list[int]:
    """As many more batches, by halving the largest ones in their places; fewer where all have one sample."""
    parts = {place: [size] for place, size in enumerate(sizes)}
    heap = [(-size, place) for place, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(more):
        negative, place = heapq.heappop(heap)
        if (size := -negative) < 2:
            break
        parts[place].remove(size)
        for half in (size // 2, size - size // 2):
            parts[place].append(half)
            heapq.heappush(heap, (-half, place))
    return [size for place in sorted(parts) for size in parts[place]]
