"""FSDP2, tensor parallel and both, in processes of their own: equal to one process, and files in all directions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import forked
from shard_models import EVALUATED, IMAGES, IN_INIT, PRUNING, Module, Ragged, SaveAt, loader, trainer

from lightning_efficient import CollapseMonitor, HESSOPruning, SigmaReparam, export, load_from_checkpoint
from lightning_efficient.lifecycle.files import UnsafeCheckpointError
from lightning_efficient.lifecycle.recipe import read
from lightning_efficient.lifecycle.state import attachment

GO_ON = ("everything", "ticket", "hesso_norms")
# On two processes always, in one go: starting them costs as much as four checks. The others on request.
RARE = ("both", "everything", "layer", "rms", "gate", "sap_neuron", "rates")
EQUAL = (
    "sigma", "split", "tensor_parallel", "stale", "loop", *PRUNING, "tied_inputs", "channels_tp", "monitor", *IN_INIT,
    "ragged",
)  # fmt: skip
FILES = ("resume_full", "resume_folder", "resume_ticket", "resume_sap", "resume_hesso")
FOREIGN = (*(f"{name}_from_one_process" for name in GO_ON), "exchange_everything")
SCRIPT = Path(__file__).parent / "scripts" / "shards.py"


def alone(root: Path, name: str, *callbacks: Any, module: Module | None = None, **options: Any) -> None:
    """One process on the whole batches; for the script to compare with."""
    module, path = module or Module(), options.pop("ckpt_path", None)
    t = trainer(root, *callbacks, **options)
    t.fit(module, loader(), loader(1), ckpt_path=path)
    t.save_checkpoint(root / "now.ckpt", weights_only=True)
    file = torch.load(root / "now.ckpt", weights_only=True)
    entries = {e.method: e.tensors for e in read(file)}
    result = {"weights": file["state_dict"], "entries": entries, "losses": torch.stack(module.losses)[-3:]}
    torch.save(result, root / f"{name}.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    alone(folder, "sigma", SigmaReparam(), gradient_clip_val=0.3)
    alone(folder, "sigma_free", SigmaReparam())
    alone(folder, "split", SigmaReparam(qkv="split", init="one"), accumulate_grad_batches=2)
    alone(folder, "ragged", *IN_INIT["repbn"](), module=Module(inside=False, net=Ragged))
    t = trainer(folder, CollapseMonitor(every_n_steps=4))
    t.fit(Module(), loader(), loader(1))
    torch.save({n: v for n, v in t.callback_metrics.items() if n.startswith("efficient/")}, folder / "monitor.pt")
    for name in GO_ON:
        half = SaveAt(folder / f"half_{name}.ckpt")
        alone(folder, f"half_{name}", *(PRUNING | IN_INIT)[name](), half, module=Module(groups=False))
    return folder


def passed(root: Path, processes: int, *checks: str, of: Collection[str] = ()) -> None:
    """The script, after what it compares with: the checks of these names, and ``of`` others."""
    for name in {*checks, *of} & {*PRUNING, *IN_INIT}:
        if not (root / f"{name}.pt").exists():
            alone(root, name, *(PRUNING | IN_INIT)[name](), module=Module(inside=False), **EVALUATED.get(name, {}))
    ended = forked(SCRIPT, root, *checks, processes=processes, seconds=60 * processes)
    assert (ended.code, ended.output.count("passed")) == (0, processes * len(checks)), ended.output


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_two_processes(root: Path) -> None:
    """Equal to one; to the bit after resuming; files go on in other runs and load in one process."""
    usual = [name for name in EQUAL if name not in RARE]
    passed(root, 2, *usual, "refused", "half_precision", *FILES, *FOREIGN, of=["both"])
    for name in GO_ON:
        expected = torch.load(root / f"half_{name}.pt", weights_only=True)["weights"]
        callbacks = (PRUNING | IN_INIT)[name]()
        alone(root, "back", *callbacks, module=Module(groups=False), ckpt_path=root / f"full_{name}.ckpt")
        back = torch.load(root / "back.pt", weights_only=True)["weights"]
        assert max(float((back[name] - value).abs().max()) for name, value in expected.items()) < 1e-12
    module = load_from_checkpoint(Module, root / "folder_everything.ckpt", weights_only=False)
    full = torch.load(root / "full_everything.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, full[name]) for name, value in module.state_dict().items())
    assert len(attachment(module).entries) == 2
    with pytest.raises(UnsafeCheckpointError, match=r"folder of shards.*weights_only=False"):
        load_from_checkpoint(Module, root / "folder_everything.ckpt")
    pruned = load_from_checkpoint(Module, root / "pruned.ckpt", weights_only=False)
    small = export(pruned, IMAGES[:2])
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in pruned.parameters())
    with torch.no_grad():
        assert float((small(IMAGES) - pruned(IMAGES)).abs().max()) < 1e-12


@pytest.mark.forks
@pytest.mark.exhaustive
def test_the_rest_in_two_processes(root: Path) -> None:
    more = ("hesso_tp", "rows_tp", "resume_tau", "exchange_hesso_norms")
    passed(root, 2, *(name for name in RARE if name != "both"), *more, of=["hesso_norms", "rows"])


@pytest.mark.forks
@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [4, 8])
def test_more_processes(root: Path, processes: int) -> None:
    """Of eight, one has no row of the head, and most none of the gate."""
    plain = ("fsdp", "masks", "tied", "repbn", "un", "tau", "hesso_norms", "wanda")
    more = ("masks_2d", "masks_hsdp", "ticket_2d", "sap_2d", "hesso_2d", "hesso_hsdp", "rows_2d", "channels_2d")
    passed(root, processes, "2d", "hsdp", *plain, *more, "heads_2d", of=["ticket", "sap", "rows", "channels", "heads"])


@pytest.mark.forks
@pytest.mark.exhaustive
def test_pruned_first(root: Path) -> None:
    """The order that the error of methods names that have to be first."""
    pruned = Module(inside=False)
    trainer(root, HESSOPruning(start=0.2, duration=0.6, periods=2)).fit(pruned, loader(), loader(1))
    net = export(pruned.net, (IMAGES[:2],)).train()
    assert sum(p.numel() for p in net.parameters()) < 0.9 * sum(p.numel() for p in pruned.parameters())
    torch.save(net, root / "small_net.pt")
    alone(root, "small", SigmaReparam(), module=Module(inside=False, net=lambda: net))
    passed(root, 2, "small")


@pytest.mark.forks
@pytest.mark.exhaustive
def test_another_number_of_processes(root: Path) -> None:
    passed(root, 4, "leave_full", "leave_folder")
    passed(root, 2, "go_on_full", "go_on_folder")


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # a linear layer's output is one
def test_the_example(tmp_path: Path) -> None:
    """As its docstring says, in two processes on the CPU, and resumed."""
    script = Path(__file__).parents[2] / "examples" / "sharded.py"
    first = forked(script, "--device", "cpu", "--steps", 10, "--folder", tmp_path, processes=2)
    assert (first.code, first.output.count("of them zero")) == (0, 1), first.output
    more = ("--steps", 12, "--resume", tmp_path / "step10.ckpt")
    again = forked(script, "--device", "cpu", "--folder", tmp_path, *more, processes=2)
    assert (again.code, again.output.count("of them zero")) == (0, 1), again.output
