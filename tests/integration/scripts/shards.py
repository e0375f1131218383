"""Checks of sharded runs, many in one set of processes.

Usage: ``shards.py FOLDER CHECK...``, started as torchrun does; FOLDER has what one process got: ``test_sharded.py``.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from shard_models import (
    EVALUATED,
    IMAGES,
    IN_INIT,
    LABELS,
    PRUNING,
    How,
    Module,
    Ragged,
    SaveAt,
    loader,
    share_out,
    trainer,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_efficient import CollapseMonitor, HESSOPruning, MagnitudePruning, SigmaReparam
from lightning_efficient.common.nests import tensors_in
from lightning_efficient.common.shards import local, whole
from lightning_efficient.functional import apply_sigma_reparam
from lightning_efficient.lifecycle.cuts import cut
from lightning_efficient.lifecycle.recipe import read
from lightning_efficient.lifecycle.weights import WeightSpaceCallback
from lightning_efficient.weightspace.mask import unpack_mask

ROOT = Path(sys.argv[1])


def fit(module: Module, *callbacks: Any, steps: int = 6, distributed: bool = False, tp: int = 1, **options: Any) -> Any:
    """In all processes: by DDP, if the network is to stay whole."""
    world = int(os.environ["WORLD_SIZE"])
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if module.how != "whole":
        strategy = ModelParallelStrategy(
            world // tp, tp, save_distributed_checkpoint=distributed, process_group_backend="gloo"
        )
    ckpt = options.pop("ckpt_path", None)
    t = trainer(ROOT, *callbacks, steps=steps, devices=world, strategy=strategy, **options)
    t.fit(module, loader(), loader(1), ckpt_path=ckpt)
    return t


def state(t: Any) -> dict[str, Any]:
    """What a full file of this run says of its weights and of the methods; losses of the global batch."""
    t.save_checkpoint(ROOT / "now.ckpt", weights_only=True)
    dist.barrier()
    file = torch.load(ROOT / "now.ckpt", weights_only=True)
    entries = {e.method: e.tensors for e in read(file)}
    losses = torch.stack(t.lightning_module.losses)
    dist.all_reduce(losses)
    return {"weights": file["state_dict"], "entries": entries, "losses": losses[-3:] / dist.get_world_size()}


def compare(found: dict[str, Any], name: str, bound: float = 1e-12) -> None:
    expected = torch.load(ROOT / f"{name}.pt", weights_only=True)
    worst = difference(found, expected)
    print(f"{name}: {worst:.1e}")
    assert worst <= bound, f"{name}: {worst:.1e}"


def difference(found: Any, expected: Any) -> float:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        return max((difference(found[key], value) for key, value in expected.items()), default=0.0)
    if isinstance(expected, float):
        return abs(found - expected)
    assert found.shape == expected.shape
    if expected.dtype == torch.uint8 or not expected.numel():
        return float(not torch.equal(found, expected))
    return float((found.double() - expected.double()).abs().max())


class Calls(Callback):
    """Counts our all-reduces from step to step."""

    def __init__(self) -> None:
        self.now, self.a_step = 0, []

    def on_train_start(self, *_: Any) -> None:
        real = dist.all_reduce

        def count(*args: Any, **kwargs: Any) -> Any:
            self.now += 1
            return real(*args, **kwargs)

        self.patch = patch("lightning_efficient.weightspace.sums.dist.all_reduce", count)
        self.patch.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.a_step.append(self.now)
        self.now = 0

    def on_train_end(self, *_: Any) -> None:
        self.patch.stop()


def sigma() -> None:
    """Fused; the two all-reduces of a step."""
    calls = Calls()
    t = fit(Module("fsdp", options={"foreach": True}), SigmaReparam(), calls, gradient_clip_val=0.3)
    assert calls.a_step == [2] * 6, calls.a_step
    compare(state(t), "sigma")


def split() -> None:
    t = fit(Module("fsdp", options={"fused": True}), SigmaReparam(qkv="split", init="one"), accumulate_grad_batches=2)
    compare(state(t), "split")


def tensor_parallel() -> None:
    t = fit(Module("tp"), SigmaReparam(), tp=dist.get_world_size())
    compare(state(t), "sigma_free")


def many(how: How, tp: int = 1) -> None:
    compare(state(fit(Module(how), SigmaReparam(), tp=tp)), "sigma_free")


def masks(name: str, how: How = "fsdp", tp: int = 1) -> None:
    """Nothing is asked of other processes but when masks change."""
    calls = Calls()
    t = fit(Module(how), *PRUNING[name](), calls, tp=tp, **EVALUATED.get(name, {}))
    compare(state(t), name)
    if name == "masks" and how == "fsdp":
        assert calls.a_step == [0, 0, 8, 8, 8, 0], calls.a_step  # float64: six digits


def monitor() -> None:
    t = fit(Module("fsdp"), CollapseMonitor(every_n_steps=4))
    # Minima over heads are those of a process's own samples, as under DDP.
    expected = torch.load(ROOT / "monitor.pt", weights_only=True)
    for name in ("entropy_mean", "logit_norm_max", "spectral_norm_max"):
        name = f"efficient/collapse_monitor/{name}"
        assert abs(float(t.callback_metrics[name] - expected[name])) < 1e-5, name


def in_init(target: str, how: How = "fsdp", tp: int = 1) -> None:
    """Made in ``__init__``, sharded in ``configure_model``: parameters of new norms, too, are in the optimizer."""
    t = fit(Module(how, inside=False), *IN_INIT[target](), tp=tp)
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in t.lightning_module.parameters() if p.requires_grad}
    compare(state(t), target)


def hesso() -> None:
    """Processes are asked where units are chosen, once, and not while they shrink; files say what can be cut out."""
    calls, path = Calls(), ROOT / "pruned.ckpt"
    t = fit(Module("fsdp", inside=False), *IN_INIT["hesso"](), calls, distributed=True)
    assert calls.a_step == [0, 1, 0, 1, 0, 0], calls.a_step
    t.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"Module is sharded over processes.*`load_from_checkpoint` and cut that"):
        cut(t.lightning_module, t.callbacks[0].keep, t.callbacks[0].groups)
    t.strategy._save_distributed_checkpoint = False
    compare(state(t), "hesso")


def ragged() -> None:
    """What hides tokens is found on the copy, and statistics are of the tokens that count in all processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        t = fit(Module("fsdp", inside=False, net=Ragged), *IN_INIT["repbn"]())
    compare(state(t), "ragged")
    said = r"PRepBN: each process takes the statistics of its own samples.*sync_batchnorm=True"
    with nullcontext() if dist.get_rank() else pytest.warns(UserWarning, match=said):  # under DDP
        fit(Module(inside=False, net=Ragged), *IN_INIT["repbn"]())


def small() -> None:
    """What structural pruning has left is sharded like any other network."""
    net = torch.load(ROOT / "small_net.pt", weights_only=False)
    compare(state(fit(Module("fsdp", inside=False, net=lambda: net), SigmaReparam())), "small")


def refused() -> None:
    """By name, with what works, before anything has changed."""
    strides = MagnitudePruning(granularity="3x5", include=["*.qkv"])
    with pytest.raises(
        ValueError, match=r"into parts of 23, so that what granularity='3x5'.*'row', 'channel' or 'head'"
    ):
        fit(Module("fsdp"), strides)
    with pytest.raises(ValueError, match=r"'net.blocks.0.down.weight' is cut along its inputs.*scope='neuron'"):
        fit(Module("tp"), MagnitudePruning(scope="neuron", include=["*.down"]), tp=2)
    with pytest.raises(ValueError, match=r"criterion='wanda'\).*tensor parallel.*FSDP2 alone"):
        fit(Module("tp"), MagnitudePruning(criterion="wanda"), tp=2)
    with pytest.raises(ValueError, match=r"sharded in `configure_model` before any.*Build the network in `__init__`"):
        fit(Module("fsdp"), *IN_INIT["dyt"]())
    for name, who in (("tau", "TempScale"), ("hesso", "HESSOPruning")):
        with pytest.raises(ValueError, match=f"^{who}: Module was sharded before .*Build the network in `__init__`"):
            fit(Module("fsdp"), *IN_INIT[name]())
    with torch.device("meta"):
        empty = Module("fsdp", inside=False)
    with pytest.raises(
        ValueError, match=r"^HESSOPruning: Module was on the meta device when it was sharded.*with its weights"
    ):
        fit(empty, *IN_INIT["hesso"]())
    with pytest.raises(ValueError, match=r"cric=True\) does not support ModelParallelStrategy.*Use cric=False"):
        fit(Module("fsdp", inside=False), HESSOPruning(cric=True))


def loop() -> None:
    """Without Lightning: gains beside parts of parameters, clipped together; equal to one process on all samples."""
    results = []
    for sharded in (True, False):
        module = Module(inside=False)
        first, step = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
        if sharded:
            share_out(module.net, "fsdp", {"data_parallel": init_device_mesh("cpu", (dist.get_world_size(),))})
        optimizer = torch.optim.AdamW(module.net.parameters(), 3e-3, foreach=True)
        _, boundary = apply_sigma_reparam(module.net, optimizer)
        for k in range(4):
            mine = slice(8 * k + first, 8 * (k + 1), step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(IMAGES[mine]), LABELS[mine]).backward()
            boundary.before_step(optimizer)
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.3)
            optimizer.step()
        results.append({name: whole(p) for name, p in module.named_parameters()})
    assert difference(*results) < 1e-12


def stale() -> None:
    """What is written after an evaluation, which leaves the root gathered, is seen by the next forward."""
    rows = {"num_sanity_val_steps": 1, "limit_val_batches": 1, "val_check_interval": 2}
    t = fit(Module("fsdp"), *PRUNING["both"](), **rows)
    compare(state(t), "both")


def exact(t: Any) -> dict[str, Tensor]:
    """All that is here of a run: weights, the optimizer's memory, the methods' states."""
    found = {name: local(p).clone() for name, p in t.lightning_module.named_parameters()}
    for i, memory in enumerate(t.optimizers[0].state.values()):
        found |= {f"{i}/{key}": local(value).clone() for key, value in memory.items()}
    for callback in t.callbacks:
        if isinstance(callback, WeightSpaceCallback):
            entry = callback.carried(t.lightning_module)
            found |= {f"{n}/{key}": value for n, state in entry.tensors.items() for key, value in state.items()}
    return found


class AsLoaded(Callback):
    """The weights with which training goes on are the file's: Lightning takes a step to read the optimizer's state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        file = torch.load(self.path, weights_only=True)["state_dict"]
        assert difference({name: whole(p) for name, p in pl_module.named_parameters()}, file) == 0


def resume(distributed: bool, name: str = "everything") -> None:
    """Killed and resumed equals uninterrupted, to the bit."""
    path = ROOT / f"{'folder' if distributed else 'full'}_{name}.ckpt"
    runs = []
    for more, start in (([SaveAt(path)], None), ([] if distributed else [AsLoaded(path)], path)):
        callbacks = [*(PRUNING | IN_INIT)[name](), *more]
        t = fit(Module("fsdp", groups=False, inside=False), *callbacks, distributed=distributed, ckpt_path=start)
        runs.append(exact(t))
    assert len(runs[0]) > 50
    assert difference(*runs) == 0
    assert any(key.endswith("optimizer.exp_avg") for key in runs[0])


def leave(distributed: bool) -> None:
    """Killed half way, for another number of processes to go on."""
    path = ROOT / ("left_folder.ckpt" if distributed else "left_full.ckpt")
    fit(Module("fsdp", groups=False), *PRUNING["everything"](), SaveAt(path), distributed=distributed)


def go_on(distributed: bool) -> None:
    path = ROOT / ("left_folder.ckpt" if distributed else "left_full.ckpt")
    t = fit(Module("fsdp", groups=False), *PRUNING["everything"](), distributed=distributed, ckpt_path=path)
    t.strategy._save_distributed_checkpoint = False
    compare(state(t), "half_everything")


def exchange(name: str) -> None:
    """A file of two DDP processes goes on under FSDP2, one of FSDP2 under DDP, each as the run that wrote it does."""
    ways: list[tuple[How, How]] = [("whole", "fsdp"), ("fsdp", "whole")]
    for here, there in ways:
        path, runs = ROOT / f"{here}_{name}.ckpt", []
        for how, more, start in ((here, [SaveAt(path)], None), (there, [], path)):
            callbacks = [*(PRUNING | IN_INIT)[name](), *more]
            runs.append(state(fit(Module(how, groups=False, inside=False), *callbacks, ckpt_path=start)))
        worst = difference(*({key: value for key, value in run.items() if key != "losses"} for run in runs))
        print(f"{name}, {here} to {there}: {worst:.1e}")
        assert worst < 1e-12


def half_precision() -> None:
    """Computed in bfloat16: weights, states and statistics stay in float32, and what each method promises holds."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    methods = [*PRUNING["everything"](), *IN_INIT["repbn"]()]
    module = Module("fsdp", inside=False, dtype=torch.float32, mp_policy=policy)
    found = state(fit(module, *methods))
    floating = [t for t in tensors_in([found["weights"], found["entries"]]) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in floating)
    for name, entry in found["entries"]["sigma_reparam"].items():
        weight = found["weights"][name].flatten(1)
        blocks = weight.split([len(u) for key, u in entry.items() if key.startswith("left")])
        for i, block in enumerate(blocks):
            value = entry[f"left.{i}"] @ block @ entry[f"right.{i}"]
            gain = entry["log_gain"][i].exp() if "log_gain" in entry else entry["gain"][i]
            assert abs(float(value / gain) - 1) < 1e-4, name
    for name, entry in found["entries"]["magnitude_pruning"].items():
        weight = found["weights"][name]
        assert not bool(weight[~unpack_mask(entry["mask"], weight.shape)].any()), name


def from_one_process(name: str) -> None:
    callbacks = (PRUNING | IN_INIT)[name]()
    t = fit(Module("fsdp", groups=False, inside=False), *callbacks, ckpt_path=ROOT / f"half_{name}.ckpt")
    compare(state(t), f"half_{name}")


CHECKS: dict[str, Callable[[], None]] = {
    **{f.__name__: f for f in (sigma, split, tensor_parallel, stale, monitor, loop, ragged, half_precision, small)},
    **{f"{name}_from_one_process": partial(from_one_process, name) for name in ("everything", "ticket", "hesso_norms")},
    **{f"exchange_{name}": partial(exchange, name) for name in ("everything", "hesso_norms")},
    "resume_ticket": partial(resume, False, "ticket"),
    "resume_sap": partial(resume, True, "sap"),
    "leave_full": partial(leave, False),
    "leave_folder": partial(leave, True),
    "go_on_full": partial(go_on, False),
    "go_on_folder": partial(go_on, True),
    "resume_tau": partial(resume, True, "tau"),
    **{name: partial(masks, name) for name in PRUNING if name != "both"},
    **{name: partial(in_init, name) for name in IN_INIT},
    "hesso": hesso,
    "resume_hesso": partial(resume, False, "hesso_norms"),
    "hesso_tp": partial(in_init, "hesso_norms", "tp", 2),
    "hesso_2d": partial(in_init, "hesso_norms", "2d", 2),
    "hesso_hsdp": partial(in_init, "hesso_norms", "hsdp"),
    "refused": refused,
    "tied_inputs": partial(masks, "tied", "tp", 2),
    "masks_2d": partial(masks, "masks", "2d", 2),
    **{f"{name}_tp": partial(masks, name, "tp", 2) for name in ("rows", "channels")},
    **{f"{name}_2d": partial(masks, name, "2d", 2) for name in ("rows", "channels", "heads")},
    "ticket_2d": partial(masks, "ticket", "2d", 2),
    "sap_2d": partial(masks, "sap", "2d", 2),
    "masks_hsdp": partial(masks, "masks", "hsdp"),
    "resume_full": partial(resume, False),
    "resume_folder": partial(resume, True),
    "2d": partial(many, "2d", 2),
    "hsdp": partial(many, "hsdp"),
    "fsdp": partial(many, "fsdp"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(45 * int(os.environ["WORLD_SIZE"]), exit=True)  # where they wait for each other
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # batches go by the step
    warnings.filterwarnings("ignore", "DTensor random operators may not")  # Lightning fills what was on meta
    for check in sys.argv[2:]:
        CHECKS[check]()
        print("passed", check)
