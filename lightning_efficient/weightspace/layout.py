"""Which part of a parameter is here: shapes, where it begins, and the processes that hold the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_efficient.common.shards import local, whole
from lightning_efficient.weightspace.block import Block

# A cut is undone by summing over each of them, one after the other.
Groups: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """How a parameter is cut over processes.

    Args:
        shape: Of the whole.
        local: Of the part that is here; an axis may have length 0.
        offset: Where that part begins in the whole.
        groups: Axis → the process groups over which it is cut; empty where the parameter is whole.
        of: The parameter, if it is cut.
    """

    shape: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    offset: tuple[int, ...] = ()
    groups: Mapping[int, Groups] = field(default_factory=dict)
    of: DTensor | None = None

    @classmethod
    def find(cls, name: str, param: Tensor) -> Layout:
        """The layout of a parameter.

        Args:
            name: Of the parameter, for the error.
            param: The parameter. Meshes over which it is only repeated (HSDP) do not count.

        Raises:
            ValueError: It holds a part of a sum that is still to be made.
        """
        if not isinstance(param, DTensor):
            return cls(tuple(param.shape), tuple(param.shape), (0,) * param.ndim)
        groups: dict[int, Groups] = {}
        for axis, placement in enumerate(param.placements):
            if placement.is_partial():
                raise ValueError(f"{name!r} is placed as {placement}, which is no parameter's placement: exclude it.")
            if placement.is_replicate() or param.device_mesh.size(axis) == 1:
                continue
            # A `Shard`, or where FSDP cuts an axis that tensor parallel has cut, a `_StridedShard`: of which the part
            # that is here is in one piece all the same.
            dim = cast(Shard, placement).dim
            groups[dim] = (*groups.get(dim, ()), param.device_mesh.get_group(axis))
        local, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        return cls(tuple(param.shape), tuple(local), tuple(offset), groups, param)

    def __deepcopy__(self, memo: object) -> Layout:
        return self  # process groups cannot be copied

    def transposed(self) -> Layout:
        """That of the transposed matrix."""
        groups = {1 - dim: groups for dim, groups in self.groups.items()}
        return Layout(self.shape[::-1], self.local[::-1], self.offset[::-1], groups)

    @property
    def everyone(self) -> Groups:
        """All process groups that hold parts."""
        return tuple(dict.fromkeys(group for groups in self.groups.values() for group in groups))

    def block(self, block: Block) -> Block:
        """What is here of a block, in positions of the local part; its length may be 0."""
        low = max(block.start, self.offset[block.dim])
        high = min(block.start + block.length, self.offset[block.dim] + self.local[block.dim])
        start, length = (low - self.offset[block.dim], high - low) if high > low else (0, 0)
        return replace(block, start=start, length=length)

    def within(self, block: Block, dim: int) -> tuple[int, int]:
        """What is here of an axis of a block: (where it begins in the block, length)."""
        if dim != block.dim:
            return self.offset[dim], self.local[dim]
        here = self.block(block)
        return (self.offset[dim] + here.start - block.start, here.length) if here.length else (0, 0)

    def part(self, tensor: Tensor) -> Tensor:
        """What is here of a tensor of the whole's shape, a view."""
        for dim in self.groups:
            start = self.offset[dim] if self.local[dim] else 0
            tensor = tensor.narrow(dim, start, self.local[dim])
        return tensor

    def along(self, dim: int, values: Tensor) -> Tensor:
        """What is here of values of an axis of the whole, ``(length of the axis, ...)``, a view."""
        if dim not in self.groups:
            return values
        return values.narrow(0, self.offset[dim] if self.local[dim] else 0, self.local[dim])

    def positions(self, dim: int, where: Tensor) -> Tensor:
        """Positions on an axis of the whole, of which those that are here stay, as positions of the part."""
        if dim not in self.groups:
            return where
        where = where - self.offset[dim]
        return where[(where >= 0) & (where < self.local[dim])]

    def here(self, tensor: Tensor) -> Tensor:
        """What is here of a tensor of the whole's shape, which is cut like it or not at all; a view."""
        return local(tensor) if isinstance(tensor, DTensor) else self.part(tensor)

    def placed(self, part: Tensor) -> Tensor:
        """What each process has here as one tensor that is cut like the parameter."""
        if self.of is None:
            return part
        mesh, placements = self.of.device_mesh, self.of.placements
        shape, stride = self.of.shape, self.of.stride()
        made: Tensor = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
        return made

    def gather(self, part: Tensor) -> Tensor:
        """The whole from what each process has here."""
        return whole(self.placed(part))

    def repeated(self, values: Tensor) -> Tensor:
        """Values that are the same everywhere, as an optimizer takes them beside this parameter; shares the memory."""
        if self.of is None:
            return values
        mesh = self.of.device_mesh
        made: Tensor = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return made
