"""Callback states and recipes of real checkpoints with one value spoilt: a resumed run refuses, or goes on the same.

Other mutations: ``FUZZ_SEED=x FUZZ_COUNT=100 pytest tests/integration/test_fuzz_states.py``.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from mutations import at, mutation, replaced
from test_fuzz_files import CAPPED, METHODS, VIT, Save
from torch import Tensor
from zoo import loader

from lightning_efficient import (
    HESSOPruning,
    MagnitudePruning,
    PRepBN,
    RecipeError,
    SAPPruning,
    TempScale,
    load_from_checkpoint,
)
from lightning_efficient.lifecycle.recipe import KEY
from lightning_efficient.testing.case import ResumableLoader

SEED, COUNT = os.environ.get("FUZZ_SEED", ""), int(os.environ.get("FUZZ_COUNT", "10"))
CASES = {name: (module, make) for name, (module, make, _) in METHODS.items() if make is not None} | {
    "norm_swap, guarded": (VIT, partial(PRepBN, hold=0, transition=6, guard="rollback", allow_causal=True)),
    "temp_scale, on its way": (VIT, partial(TempScale, tau=0.5, transition=5)),
    "temp_scale, learned": (CAPPED, partial(TempScale, tau=0.6, learnable=True)),
    "hesso_pruning, cric": (VIT, partial(HESSOPruning, cric=True, start=0, duration=5, periods=1, unit="macs")),
    "magnitude_pruning, rewound": (VIT, partial(MagnitudePruning, schedule="iterative", rounds=2, rewind_to=1)),
    "sap_pruning, best": (
        VIT,
        partial(SAPPruning, p=1.0, q=2.0, iterations=2, monitor="val_loss", select="best", stop_at="collapse"),
    ),
}
assert len(CASES) * 27 >= 500
# What was measured, or is the user's as much as the weights in the file are: any value of the right kind is as good as
# any other. A training state to go back to, statistics, costs and scores.
DATA = re.compile(
    r"/(snapshot|best|keep/snapshot)/(model|transforms|optimizers|schedulers)|/guard/past|/cost/|/sums/"
    r"|/cycles/(state/(scores|probes|samples)|forwards|undone|bytes)|/history/\d+/(?!iteration|step)|/score$"
    r"|/tensors/[^/]+/optimizer[.]"
)
CHANGED = "changed since the state of"  # said of a state that the weights do not fit; it is derived from them anew
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:PAGCPPruning pruned nothing"),
    pytest.mark.filterwarnings("ignore:SAPPruning has stalled"),
]


class Begin(Callback):
    """The weights with which training begins; None: it did not."""

    weights: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.weights is None:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def run(
    case: str, root: Path, path: Path | None = None, first: Callback | None = None, last: Callback | None = None
) -> dict[str, Any]:
    """Train, from a file or from the start, with a callback before ours or after it; what a file holds at the end."""
    (cls, net), make = CASES[case]
    torch.manual_seed(0)
    module: LightningModule = cls(net)  # type: ignore[call-arg]
    callback = make()
    trainer = Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, num_sanity_val_steps=0,
        callbacks=[other for other in (first, callback, last) if other is not None],
        val_check_interval=2 if getattr(callback, "monitor", None) else 1.0,
    )  # fmt: skip
    trainer.fit(module, ResumableLoader(loader(6)), loader(1), ckpt_path=path, weights_only=True)
    trainer.save_checkpoint(root / "end.ckpt")
    return torch.load(root / "end.ckpt", weights_only=True)


def fault(case: str, root: Path, path: Path, expected: dict[str, Any]) -> str:
    """What is wrong with how a spoilt file is treated; empty: nothing."""
    begin = Begin()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", f".*{CHANGED}")
            found = run(case, root, path, begin)["state_dict"]
    except ValueError as error:
        named = re.search(r"recipe|checkpoint|state", str(error)) and len(str(error)) < 2000
        if begin.weights is not None:
            return f"refused in the middle of training: {str(error)[:200]}"
        return "" if named else f"refused without a name: {str(error)[:200]}"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:200]}"
    tensors = {name: t for name, t in expected["state_dict"].items() if isinstance(t, Tensor)}
    if all(torch.equal(found[name], t) for name, t in tensors.items()):
        return ""
    if not any(CHANGED in str(warning.message) for warning in caught):
        return "accepted, with another continuation"
    file = torch.load(path, weights_only=True)["state_dict"]
    same = begin.weights is not None and all(torch.equal(file[n], w) for n, w in begin.weights.items() if n in file)
    return "" if same else "said that the state does not fit, and changed the function"


def alike(one: Any, two: Any) -> bool:
    """Whether two values are data of one kind; of lists and states of optimizers some may be missing."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and one.shape == two.shape
    if isinstance(one, dict):
        return isinstance(two, dict) and all(key in one and alike(one[key], value) for key, value in two.items())
    if isinstance(one, (list, tuple)):
        numbers = all(type(item) in (int, float) for item in one)
        shorter = isinstance(two, (list, tuple)) and len(two) <= len(one)
        return shorter and (numbers or len(two) == len(one)) and all(map(alike, one, two))
    return type(one) in (int, float) and type(two) in (int, float)


def spoilt(case: str, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was done, and the file with it done, again and again."""
    rng = random.Random(case + SEED)
    kind = type(CASES[case][1]()).__name__
    states = {key: state for key, state in content["callbacks"].items() if key.startswith(kind)}
    while True:
        if KEY in content and (not states or rng.random() < 0.5):
            known = content[KEY]["methods"]
            path, what, methods = mutation(known, rng, swaps=False)
            place = "/".join(map(str, path))
            if not (DATA.search(place) and alike(at(known, path), at(methods, path))):
                yield f"{place}: {what}", content | {KEY: content[KEY] | {"methods": methods}}
            continue
        path, what, changed = mutation(states, rng)
        place = "/".join(map(str, path))
        if not (DATA.search(place) and alike(at(states, path), at(changed, path))):
            yield f"{place}: {what}", content | {"callbacks": content["callbacks"] | changed}


# Found by other seeds, or by hand: path in the recipe's methods, or (first "state") in the callback's state → value.
Change = Callable[[Any], Any]
KNOWN: dict[str, dict[tuple[Any, ...], Change]] = {
    "norm_swap, guarded": {
        ("state",): lambda state: None,
        ("state", "standing", "schedule"): lambda steps: steps[::-1],
        ("state", "standing", "start"): lambda start: 10**12,
        ("state", "clock", "time"): lambda time: -5,
    },
    "sigma_reparam": {
        (0, "tensors", "net.head.weight", "sigma"): lambda sigma: sigma.long(),
        (0, "tensors", "net.head.weight", "right.0"): lambda right: right.to(torch.complex64),
        (0, "tensors", "net.head.weight", "log_gain"): lambda log: log + 9.0,
        (0, "tensors", "net.head.weight"): lambda state: state | {"sigma": torch.zeros(1)},
        (0, "tensors"): lambda tensors: {},
        ("state",): lambda state: {},
    },
    "temp_scale": {
        (0, "tensors", "net.blocks.0.attn.qkv.bias", "log_tau"): torch.zeros_like,
        (0, "config", "layout", "net.blocks.0.attn", "knobs", 0, 1): lambda blocks: [],
    },
    "temp_scale, on its way": {(0, "config", "steps"): lambda steps: steps + 1},
    "temp_scale, learned": {(0, "tensors", "net.plain.in_proj_bias", "log_tau"): lambda tau: tau + 0.1},
    "magnitude_pruning": {(0, "tensors", "net.blocks.0.mlp.fc1.weight", "mask"): torch.zeros_like},
    "hesso_pruning": {
        ("state", "hesso", "status", "net.blocks.0.mlp.fc1"): torch.zeros_like,
        ("state", "groups", "found", "net.blocks.0.mlp.fc1", "slices", 1, "index"): torch.zeros_like,
        ("state", "groups", "found", "net.blocks.0.mlp.fc1", "divisor"): lambda divisor: 10**12,
    },
    "pagcp_pruning": {
        ("state", "gone", "net.blocks.0.mlp.fc1"): lambda gone: ~gone,
        ("state", "groups", "found", "net.blocks.0.mlp.fc1", "slices", 0, "dim"): lambda dim: 10**12,
    },
    "sap_pruning": {
        ("state", "snapshot", "optimizers", 0, "param_groups", 0, "params", 0): lambda place: {"x": None},
        ("state", "snapshot", "optimizers", 0, "param_groups", 0, "betas"): lambda betas: betas[:1],
        ("state", "snapshot", "schedulers", 0, "lr_lambdas", 0): lambda function: 3,
        ("state", "snapshot", "model"): lambda model: dict(list(model.items())[1:]),
        ("state", "snapshot"): lambda snapshot: None,
    },
    "hesso_pruning, cric": {("state", "cycles", "snapshot"): lambda snapshot: None},
}


def known(case: str, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mutations of :data:`KNOWN`."""
    key = next((key for key in content["callbacks"] if key.startswith(type(CASES[case][1]()).__name__)), "")
    for path, change in KNOWN.get(case, {}).items():
        place = ("callbacks", key, *path[1:]) if path[0] == "state" else (KEY, "methods", *path)
        yield str(path), replaced(content, place, change)


@pytest.fixture(scope="module", params=CASES)
def halfway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case, a folder, a file of its first half, and what the whole run comes to when it goes on from there."""
    root = tmp_path_factory.mktemp("fuzz")
    whole = run(request.param, root, last=Save(root / "half.ckpt", 3))
    content = torch.load(root / "half.ckpt", weights_only=True)
    resumed = run(request.param, root, root / "half.ckpt")
    assert all(
        torch.equal(resumed["state_dict"][n], t) for n, t in whole["state_dict"].items() if isinstance(t, Tensor)
    )
    return request.param, root, content, resumed


def test_a_spoilt_state_is_refused_or_has_no_effect(halfway: Any) -> None:
    case, root, content, expected = halfway
    faults = []
    for what, changed in [*known(case, content), *islice(spoilt(case, content), COUNT)]:
        torch.save(changed, root / "spoilt.ckpt")
        if wrong := fault(case, root, root / "spoilt.ckpt", expected):
            faults.append(f"{what} -> {wrong}")
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("case", "weight", "name", "change", "said"),
    [
        (
            "sigma_reparam",
            "net.head.weight",
            "right.0",
            lambda v: v.to(torch.complex64),
            "floating .*finite.*complex64",
        ),
        ("sigma_reparam", "net.head.weight", "sigma", lambda v: -v, "no 'sigma' below 0"),
        ("magnitude_pruning", "net.blocks.0.mlp.fc1.weight", "mask", torch.zeros_like, "the weight is zero"),
        ("magnitude_pruning", "net.blocks.0.mlp.fc1.weight", "mask", lambda v: v[:-1], r"uint8 .*shape \(144,\)"),
        ("hesso_pruning", "net.blocks.0.mlp.fc1.weight", "axis0", torch.zeros_like, "the weight is zero"),
        ("temp_scale", "net.blocks.0.attn.qkv.bias", "log_tau", torch.zeros_like, r"that of .*\[-0.35.*got \[0.0\]"),
    ],
)
def test_the_states_of_weights_are_checked_when_a_model_is_loaded(
    case: str, weight: str, name: str, change: Change, said: str, tmp_path: Path
) -> None:
    run(case, tmp_path)
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    numbers = (i for i, entry in enumerate(content[KEY]["methods"]) if weight in entry["tensors"])
    place = (KEY, "methods", next(numbers), "tensors", weight, name)
    torch.save(replaced(content, place, change), tmp_path / "spoilt.ckpt")
    with pytest.raises(RecipeError, match=f"{case} in the checkpoint's recipe.*{weight}.*{said}"):
        load_from_checkpoint(CASES[case][0][0], tmp_path / "spoilt.ckpt")
