"""Scenarios of the battery on shards of parameters: two processes (gloo) that each hold a part of every weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader

from lightning_efficient.common.shards import local
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.load import load_from_checkpoint
from lightning_efficient.testing.case import Case, Dealt, FixedStatistics
from lightning_efficient.testing.checks import assert_close, flat

_PROCESSES = 2


def fsdp2(case: Case) -> None:
    """FSDP2 over two processes leaves the file that one process on both batches does (float64), and it loads."""
    _sharded(case, "fsdp2", data=_PROCESSES, tensor=1)


def tp(case: Case) -> None:
    """The same for tensor parallel, where both processes see every sample."""
    _sharded(case, "tp", data=1, tensor=_PROCESSES)


def _sharded(case: Case, variant: str, data: int, tensor: int) -> None:
    cut, whole = case.root / "cut.ckpt", case.root / "whole.ckpt"
    # As torchrun's agent has it: the port is taken before anybody is told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        start_processes(  # type: ignore[no-untyped-call]
            _process, (case, variant, data, tensor, cut, store.port), nprocs=_PROCESSES, start_method="fork"
        )
    finally:  # a traceback would hold it, and a later fork wait for its thread, which it has not
        del store
    module = _fit(case, variant, 1, whole)
    files = [torch.load(path, weights_only=True) for path in (cut, whole)]
    found, expected = (
        flat({"weights": file["state_dict"], **{e.key: e.tensors for e in recipe.read(file)}}) for file in files
    )
    assert_close(found, expected, 1e-9)
    x = next(iter(case.data()))[0]
    with torch.no_grad():  # a module from a file is in float32
        outputs = [load_from_checkpoint(type(module), path).eval()(x) for path in (cut, whole)]
    assert_close({"outputs": outputs[0]}, {"outputs": outputs[1]}, 1e-5)


def _process(rank: int, case: Case, variant: str, data: int, tensor: int, path: Path, port: int) -> None:
    """One of several, which finds itself started as torchrun does it, so that Lightning starts none."""
    size = data * tensor
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"GROUP_RANK": "0"}
    os.environ |= {name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "battery", "TORCHELASTIC_RESTART_COUNT": "0"}
    strategy = ModelParallelStrategy(
        data, tensor, save_distributed_checkpoint=False, process_group_backend="gloo", timeout=timedelta(seconds=60)
    )
    _fit(case, variant, data, path, strategy=strategy, devices=size)


def _fit(case: Case, variant: str, parts: int, path: Path, **more: Any) -> LightningModule:
    """Train on batches of eight, of which each process gets its part, and save; what is refused changes nothing."""
    module = case.modules[variant]().double()
    before = _values(module)
    trainer = case.trainer(*case.ours(), FixedStatistics(module), use_distributed_sampler=False, **more)
    samples = case.data(size=8, dtype=torch.float64).dataset
    dealt = DataLoader(samples, 8 // parts, sampler=Dealt(8 * case.steps, parts) if parts > 1 else None)
    try:
        trainer.fit(module, dealt, dealt)
    except Exception as error:
        now = _values(module)
        if now.keys() != before.keys() or not all(torch.equal(now[name], value) for name, value in before.items()):
            raise AssertionError(f"failed when the model had changed already: {error}") from error
        raise
    trainer.save_checkpoint(path)
    return module


def _values(module: LightningModule) -> dict[str, Tensor]:
    return {name: local(parameter).clone() for name, parameter in module.named_parameters()}


SHARDED: dict[str, Callable[[Case], None]] = {f.__name__: f for f in (fsdp2, tp)}
