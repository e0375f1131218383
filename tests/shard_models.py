"""A small network in all the ways in which it can be shared out over processes, and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_efficient import HESSOPruning, MagnitudePruning, PRepBN, SAPPruning, SigmaReparam, TempScale

How = Literal["whole", "fsdp", "tp", "2d", "hsdp"]
BATCH, CLASSES = 8, 7
_DATA = torch.Generator().manual_seed(3)
IMAGES = torch.randn(64, 2, 12, 12, generator=_DATA, dtype=torch.float64)
LABELS = torch.randint(CLASSES, (64,), generator=_DATA)


class Mixer(nn.Module):
    """Attention with a fused projection whose thirds straddle the shards, and two layers around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 26), nn.Linear(26, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Odd sizes throughout; ``gate`` has one row, so that all processes but one have nothing of it, or of its mask."""

    def __init__(self, width: int = 15, heads: int = 3, blocks: int = 1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 4, 4)
        self.blocks = nn.ModuleList(Mixer(width, heads) for _ in range(blocks))
        self.gate, self.head = nn.Linear(width, 1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head((x * self.gate(x).sigmoid()).mean(1))
        return out


class Hiding(nn.Module):
    """Mixes the tokens of a sample that count, and norms all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        n = self.norm(x)
        seen = torch.where(keep[..., None], n, 0).sum(1, keepdim=True) / keep.sum(1)[:, None, None]
        return x + torch.tanh(self.lin(n + seen))


class Ragged(nn.Module):
    """Samples of one to nine tokens; what is behind them is noise."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 4, 4)
        self.blocks = nn.ModuleList([Hiding(width)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(9) < (x[:, 0, 0, 0].abs() * 5).long().clamp(max=8)[:, None] + 1
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, keep)
        out: Tensor = self.head(torch.where(keep[..., None], x, 0).sum(1) / keep.sum(1)[:, None])
        return out


class Module(LightningModule):
    """The batch is a function of the step, whole or this process's part of it.

    Args:
        how: The network is shared out.
        inside: The network is made in ``configure_model``, not in ``__init__``.
        dtype: Of the parameters.
        options: Of AdamW.
        groups: Matrices in one group, the rest in another.
        mp_policy: Of FSDP.
        net: What is made.
    """

    def __init__(
        self,
        how: How = "whole",
        inside: bool = True,
        dtype: torch.dtype = torch.float64,
        options: dict[str, Any] | None = None,
        mp_policy: Any = None,
        groups: bool = True,
        net: Callable[[], nn.Module] = Net,
    ) -> None:
        super().__init__()
        self.groups, self.kind = groups, net
        self.how, self.dtype_, self.options, self.mp_policy = how, dtype, options or {}, mp_policy
        self.net: nn.Module | None = None
        self.losses: list[Tensor] = []
        self.batches = 0
        if not inside:
            self.make()

    def make(self) -> None:
        """The same weights each time, and no number of the user's drawn."""
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.net = self.kind().to(self.dtype_)

    def configure_model(self) -> None:
        if self.net is None:
            self.make()
        if self.how == "whole" or isinstance(next(self.parameters()), DTensor):
            return
        share_out(self.net, self.how, self.device_mesh, self.mp_policy)

    @property
    def ranks(self) -> tuple[int, int]:
        """Which part of a batch is this process's, and of how many."""
        if self.how in ("whole", "tp"):
            return (0, 1) if self.how == "tp" or not dist.is_initialized() else (dist.get_rank(), dist.get_world_size())
        if self.how == "hsdp":
            return dist.get_rank(), dist.get_world_size()
        mesh = self.device_mesh["data_parallel"]
        return mesh.get_local_rank(), mesh.size()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        first, step = self.ranks
        k = self.trainer.fit_loop.total_batch_idx % 8
        mine = slice(BATCH * k + first, BATCH * (k + 1), step)
        loss = F.cross_entropy(self(IMAGES[mine].to(self.dtype_)), LABELS[mine])
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.cross_entropy(self(IMAGES[:8].to(self.dtype_)), LABELS[:8]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.groups:
            return torch.optim.AdamW(self.parameters(), lr=3e-3, **self.options)
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=3e-3, **self.options)


def share_out(net: nn.Module, how: How, mesh: Any, mp_policy: Any = None) -> None:
    """Cut the parameters of a :class:`Net`."""
    if how in ("tp", "2d"):
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in net.blocks:
            parallelize_module(block, mesh["tensor_parallel"], plan)
    if how == "tp":
        return
    data = mesh["data_parallel"]
    if how == "hsdp":
        data = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    more = {} if mp_policy is None else {"mp_policy": mp_policy}
    for block in net.blocks:
        fully_shard(block, mesh=data, **more)
    fully_shard(net, mesh=data, **more)


def coarse(module: Any) -> None:
    """Weights of a few values only, many of them equal."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(((p * 8).floor() + 0.5) / 8)


class SaveAt(Callback):
    """Saves after a step, as a run that is killed there has done."""

    def __init__(self, path: Any, step: int = 3) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Coarse(Callback):
    """Before training begins, so that the first masks meet equal magnitudes."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        coarse(pl_module)


_CUBIC: dict[str, Any] = {"amount": 0.6, "start": 1, "length": 3, "every": 1}
PRUNING: dict[str, Callable[[], list[Any]]] = {
    "masks": lambda: [MagnitudePruning(**_CUBIC)],
    "both": lambda: [SigmaReparam(init="one"), MagnitudePruning(amount=0.5, schedule="one_shot", start=2)],
    "everything": lambda: [SigmaReparam(qkv="split", init="one"), MagnitudePruning(**_CUBIC)],
    "layer": lambda: [MagnitudePruning(scope="layer", criterion="random", **_CUBIC)],
    "rows": lambda: [MagnitudePruning(granularity="row", scope="layer", exclude=["*.gate"], **_CUBIC)],
    "neurons": lambda: [MagnitudePruning(scope="neuron", criterion="taylor", **_CUBIC)],
    "runs": lambda: [
        MagnitudePruning(amount=1 / 3, granularity="2:3", schedule="one_shot", start=1, include=["*.qkv", "*.up"])
    ],
    "channels": lambda: [MagnitudePruning(granularity="channel", include=["*.blocks"], **_CUBIC | {"amount": 0.3})],
    "heads": lambda: [MagnitudePruning(granularity="head", scope="layer", schedule="one_shot", start=1, amount=0.4)],
    "blocks": lambda: [MagnitudePruning(granularity="13x5", include=["*.up"], **_CUBIC)],
    "wanda": lambda: [MagnitudePruning(criterion="wanda", scope="neuron", **_CUBIC)],
    "gate": lambda: [MagnitudePruning(amount=0.5, schedule="one_shot", start=1, include=["*.gate"])],
    "tied": lambda: [Coarse(), MagnitudePruning(amount=0.5, schedule="constant")],
    "ticket": lambda: [SigmaReparam(), MagnitudePruning(schedule="iterative", rounds=2, rewind_to=1)],
    "rates": lambda: [MagnitudePruning(schedule="iterative", rounds=2, rewind="learning_rate", criterion="taylor")],
    "sap": lambda: [SigmaReparam(init="one"), SAPPruning(iterations=2)],
    "sap_layer": lambda: [SAPPruning(p=1.0, q=2.0, scope="layer", iterations=2, monitor="val", select="best")],
    "sap_neuron": lambda: [SAPPruning(p=1.0, q=2.0, scope="neuron", iterations=2, gamma=0.5, include=["*.qkv"])],
}
# Options of the Trainer: what is written between two steps follows an evaluation, which leaves the root gathered.
EVALUATED: dict[str, dict[str, Any]] = {"sap_layer": {"limit_val_batches": 1, "val_check_interval": 1}}

# For networks that are made in `__init__`.
IN_INIT: dict[str, Callable[[], list[Any]]] = {
    "dyt": lambda: [PRepBN(target="dyt", transition=3, hold=1)],
    "rms": lambda: [PRepBN(target="rms", transition=3, hold=1)],
    "repbn": lambda: [PRepBN(transition=3, hold=1, recalibrate=3)],
    "un": lambda: [PRepBN(target="un", transition=2, hold=1, warmup=2, window=2, filtration=False, recalibrate=0)],
    "affine": lambda: [PRepBN(target="affine", transition=3, hold=1)],
    "tau": lambda: [TempScale(tau=0.7, learnable=True, per_head=True)],
    "hesso": lambda: [HESSOPruning(start=1, duration=4, periods=2)],
    "hesso_norms": lambda: [
        SigmaReparam(init="one"),
        HESSOPruning(start=0, duration=4, periods=2, unit="macs", target=0.3),
    ],
    "tau_way": lambda: [SigmaReparam(qkv="split"), TempScale(tau=0.5, transition=4)],
}


def trainer(root: Any, *callbacks: Any, steps: int = 6, **options: Any) -> Trainer:
    """A quiet one on CPU."""
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
        "default_root_dir": root, "max_steps": steps, "limit_val_batches": 0,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **(quiet | options))


def loader(batches: int = 64) -> DataLoader[Any]:
    """So many batches; what is in them does not matter."""
    return DataLoader(torch.zeros(batches, 1), 1)
