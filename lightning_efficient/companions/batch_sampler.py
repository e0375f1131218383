"""What batch samplers that know lengths share: epochs, processes, resuming, and how Lightning makes them anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler
from typing_extensions import Self

from lightning_efficient.companions.lengths import Lengths, sample_lengths


class _Handle(int):
    """A batch size that knows its sampler.

    For a run of several processes, and to predict, Lightning makes a batch sampler anew from what the interface of
    torch's promises: ``type(s)(sampler, batch_size=s.batch_size, drop_last=s.drop_last)``. Lengths are none of that, so
    the batch size brings the sampler along, of which the new one becomes a copy.
    """

    sampler: LengthBatchSampler

    def __new__(cls, value: int, sampler: LengthBatchSampler) -> Self:
        handle = super().__new__(cls, value)
        handle.sampler = sampler
        return handle


class LengthBatchSampler(Sampler[list[int]]):
    """Base of the batch samplers that know lengths: epochs, processes, resuming.

    A subclass says which batches a step has, one for each process, by :meth:`steps`; the number of steps is the same
    in every epoch. All processes compute the same steps and take their own batch of each.
    """

    _lengths: Tensor | None
    _batch_size: int
    num_replicas: int | None
    rank: int | None

    def remade(self, sampler: Any, batch_size: Any, drop_last: bool) -> bool:
        """Whether Lightning makes this sampler from another one, which it is a copy of then.

        Args:
            sampler: What Lightning has put in the place of the lengths.
            batch_size: As the constructor gets it.
            drop_last: False to predict.
        """
        if not isinstance(batch_size, _Handle):
            return False
        vars(self).update(vars(batch_size.sampler))
        self.drop_last = drop_last
        if isinstance(sampler, DistributedSampler) and (sampler.num_replicas, sampler.rank) != self._place():
            self.num_replicas, self.rank = sampler.num_replicas, sampler.rank  # processes that torch knows not of
        return True

    def begin(
        self,
        lengths: Lengths,
        dataset: Any,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        num_replicas: int | None,
        rank: int | None,
    ) -> None:
        """What every constructor does; see its arguments."""
        if (num_replicas is None) != (rank is None) or not 0 <= (rank or 0) < (num_replicas or 1):
            raise ValueError(
                f"`num_replicas` is {num_replicas} and `rank` is {rank}; expected both, with a rank from 0 to "
                "num_replicas - 1, or neither."
            )
        if not 0 <= seed < 2**31:
            raise ValueError(f"`seed` is {seed}; expected a whole number from 0 to 2**31 - 1.")
        self.lengths, self.shuffle, self.seed, self.drop_last = lengths, shuffle, seed, drop_last
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch = self._start = self._done = 0
        self._lengths = None
        if dataset is not None or not (isinstance(lengths, str) or callable(lengths)):
            self._lengths = sample_lengths(lengths, dataset)

    @abstractmethod
    def steps(self, lengths: Tensor, replicas: int, generator: torch.Generator | None) -> list[list[Tensor]]:
        """The steps of an epoch: indices of samples, one tensor for each process.

        Args:
            lengths: Of every sample.
            replicas: How many processes.
            generator: Of this epoch, the same in every process; None: no shuffling.
        """

    @abstractmethod
    def count(self, lengths: Tensor, replicas: int) -> int:
        """How many steps an epoch has."""

    @property
    def batch_size(self) -> int:
        """Most samples of a batch."""
        return _Handle(self.most(), self)

    def most(self) -> int:
        """Most samples of a batch."""
        return self._batch_size

    @property
    def sampler(self) -> Self:
        """Itself: Lightning calls ``set_epoch`` on the ``sampler`` of a batch sampler."""
        return self

    def bind(self, dataset: Any) -> Self:
        """Say where ``lengths`` are found, for a sampler that was made without a data set, as from YAML.

        Args:
            dataset: That of the ``DataLoader``.

        Returns:
            The sampler itself.
        """
        self._lengths = sample_lengths(self.lengths, dataset)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next: its batches follow from it and the seed. Lightning calls this.

        Args:
            epoch: From 0. The same epoch again leaves a position in it alone.
        """
        if epoch != self.epoch:
            self.epoch, self._start, self._done = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch this sampler is, in this process: batches handed out."""
        return {"epoch": self.epoch, "batches": self._done, "of": len(self)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on there: the next iteration has the rest of that epoch.

        Args:
            state_dict: As :meth:`state_dict` gives it. Where a loader reads ahead, ``batches`` has to be those it gave.

        Raises:
            ValueError: It is no such state, or an epoch had another number of batches.
        """
        state = {name: state_dict.get(name) for name in ("epoch", "batches", "of")}
        if any(type(value) is not int or value < 0 for value in state.values()):
            raise ValueError(f"the state of a {type(self).__name__} has whole numbers epoch, batches, of; got {state}.")
        epoch, done, total = (int(state_dict[name]) for name in state)
        if total != len(self) or done > total:
            raise ValueError(
                f"the state of this {type(self).__name__} is batch {done} of {total}, and an epoch has {len(self)} now:"
                " the data, the batch size or the number of processes is another one. Begin an epoch: set_epoch(...)."
            )
        if done == total:  # a loader that reads ahead asks for batches before it is told the next epoch
            epoch, done = epoch + 1, 0
        self.epoch, self._start, self._done = epoch, done, done

    def __len__(self) -> int:
        """Batches of an epoch in this process; the same in every epoch and process."""
        return self.count(self.known(), self._place()[0])

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this epoch from the position on."""
        self._done = self._start
        return self._run()

    def _run(self) -> Iterator[list[int]]:
        # Not earlier: Lightning says which epoch it is after it has made the iterator.
        replicas, rank = self._place()
        # Not their sum, by which epoch 1 of one seed would be epoch 0 of the next; torch's generator takes 32 bits.
        generator = (
            torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**32) if self.shuffle else None
        )
        for batches in self.steps(self.known(), replicas, generator)[self._start :]:
            self._done += 1
            yield batches[rank].tolist()
        self._start = self._done = 0

    def known(self) -> Tensor:
        """The lengths.

        Raises:
            ValueError: They are still to be found in a data set.
        """
        if self._lengths is None:
            raise ValueError(
                f"{type(self).__name__} was given lengths={self.lengths!r} and no data set to find them in: pass "
                "`dataset`, or call `bind(dataset)`."
            )
        return self._lengths

    def _place(self) -> tuple[int, int]:
        """Processes, and which of them this is."""
        if self.num_replicas is not None:
            return self.num_replicas, self.rank or 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0
