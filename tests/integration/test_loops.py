"""The methods in a loop of one's own: the numbers of the callbacks, to the bit; saved, resumed, finished, refused."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import forked
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import vit

from lightning_efficient import Driver, attach, export
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import build_callback, callback_class
from lightning_efficient.loops.methods import PARTS, REFUSED

STEPS, ACCUMULATE = 12, 2
BATCHES = [
    (torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(i)), (torch.arange(6) + i) % 4)
    for i in range(STEPS * ACCUMULATE)
]
METHODS_HERE: dict[str, dict[str, dict[str, Any]]] = {
    "sigma_reparam": {"sigma_reparam": {"init": "one", "gain": "log", "gain_lr": 3.0}},
    "temp_scale": {"temp_scale": {"tau": 0.5, "transition": 0.5}},
    "temp_scale_learned": {"temp_scale": {"learnable": True, "per_head": True}},
    "magnitude_pruning": {"magnitude_pruning": {"amount": 0.6, "amounts": {"head": 0.2}}},
    "taylor": {"magnitude_pruning": {"criterion": "taylor", "schedule": "one_shot", "start": 3}},
    "norm_swap": {"norm_swap": {"hold": 2}},
    "norm_swap_affine": {"norm_swap": {"hold": 0.25, "transition": 0.5, "target": "affine", "shape": "cosine"}},
    "hesso": {"hesso_pruning": {"target": 0.4, "start": 2, "duration": 6, "periods": 3}},
    "hesso_macs": {
        "sigma_reparam": {"exclude": ["head"]},  # before the other, as their order says: it follows what is shrunk
        "hesso_pruning": {"target": 0.3, "unit": "macs", "uniform": True},
    },
    "chained": {
        "magnitude_pruning": {"amount": 0.5},
        "sigma_reparam": {"include": ["blocks"]},
        "norm_swap": {"hold": 2, "exclude": ["*.norm1"]},
    },
}


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = parts(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parts(net: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=STEPS)


def of_lightning(methods: dict[str, dict[str, Any]]) -> tuple[Lit, list[float]]:
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    seed_everything(0, verbose=False)
    module = Lit()
    callbacks = [build_callback(name, arguments) for name, arguments in methods.items()]
    trainer = Trainer(
        max_epochs=1, callbacks=[*callbacks, Losses()], accumulate_grad_batches=ACCUMULATE, gradient_clip_val=0.5,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))
    return module, losses


class Loop:
    """A loop as its author has it, and how it saves and resumes."""

    def __init__(self, methods: dict[str, dict[str, Any]], **options: Any) -> None:
        seed_everything(0, verbose=False)
        self.net = vit()
        self.optimizer, self.scheduler = parts(self.net)
        options = {"example": BATCHES[0][0][:2], "total_steps": STEPS, "schedulers": [self.scheduler]} | options
        self.driver = attach(self.net, self.optimizer, methods, **options)
        self.net.train()

    def run(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            for images, labels in BATCHES[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
                loss = nn.functional.cross_entropy(self.net(images), labels)
                (loss / ACCUMULATE).backward()
                losses.append(float(loss.detach() / ACCUMULATE))
            self.driver.before_step()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 0.5)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.driver.step()
        return losses

    def save(self) -> dict[str, Any]:
        parts = {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "driver": self.driver}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.driver.load_state_dict(state["driver"])


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    equal = [torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a]
    return a.keys() == b.keys() and all(equal)


@pytest.mark.parametrize("case", METHODS_HERE)
def test_numbers_are_those_of_the_callbacks(case: str) -> None:
    theirs, losses = of_lightning(METHODS_HERE[case])
    loop = Loop(METHODS_HERE[case])
    assert loop.run(0, STEPS) == losses
    units = "hesso_pruning" in METHODS_HERE[case]  # which a Trainer leaves to `export`, and a loop to `finish`
    assert same(export(theirs, BATCHES[0][0]).net if units else theirs.net, loop.driver.finish(BATCHES))


@pytest.mark.parametrize("case", METHODS_HERE)
@pytest.mark.filterwarnings("ignore:norm_swap keeps moving averages")
def test_resumed_is_uninterrupted(case: str) -> None:
    whole = Loop(METHODS_HERE[case])
    whole.run(0, 5)
    state = whole.save()
    losses = whole.run(5, STEPS)
    again = Loop(METHODS_HERE[case])
    again.load(state)
    assert again.run(5, STEPS) == losses
    assert same(whole.driver.finish(), again.driver.finish())


@pytest.mark.parametrize("bias", [True, False])
def test_resumed_with_a_factored_memory(bias: bool) -> None:
    """Adafactor remembers other things of a matrix than of its gain."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 12, bias=bias), nn.GELU(), nn.Linear(12, 4, bias=bias))
        optimizer = torch.optim.Adafactor(net.parameters(), 1e-2)
        return net, optimizer, attach(net, optimizer, {"sigma_reparam": True}, total_steps=6)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, driver: Any, steps: range) -> None:
        for step in steps:
            net(torch.full((2, 16), 1.0 + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.step()

    whole = make()
    train(*whole, range(3))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, range(3, 6))
    again = make()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(*again, range(3, 6))
    assert same(whole[0], again[0])


@pytest.mark.parametrize("pruned", ["magnitude_pruning", "hesso"])
def test_state_given_to_attach(pruned: str) -> None:
    """Where weights are loaded before the optimizer exists."""
    methods = METHODS_HERE["sigma_reparam"] | METHODS_HERE[pruned]
    whole = Loop(methods)
    whole.run(0, 5)
    state = whole.save()
    losses = whole.run(5, STEPS)
    again = Loop.__new__(Loop)
    again.net = vit()
    again.net.load_state_dict(state["model"])
    again.optimizer, again.scheduler = parts(again.net)
    again.optimizer.load_state_dict(state["optimizer"])
    again.scheduler.load_state_dict(state["scheduler"])
    again.driver = attach(again.net, again.optimizer, methods, state=state["driver"])
    assert again.driver.steps == 5
    assert again.run(5, STEPS) == losses


@pytest.mark.parametrize("case", METHODS_HERE)
def test_finished_exports(case: str) -> None:
    loop = Loop(METHODS_HERE[case])
    loop.run(0, STEPS)
    plain = export(loop.driver.finish(BATCHES), BATCHES[0][0])
    assert not [m for m in plain.modules() if type(m).__module__.startswith("lightning_efficient")]
    assert len(loop.optimizer.param_groups) == 1 + (case in ("norm_swap", "norm_swap_affine", "chained"))


def test_without_before_step() -> None:
    methods = METHODS_HERE["taylor"] | METHODS_HERE["sigma_reparam"]
    losses = []
    for clips in (True, False):
        loop, mine = Loop(methods), []
        for images, labels in BATCHES[:6]:
            loss = nn.functional.cross_entropy(loop.net(images), labels)
            loss.backward()
            if clips:
                loop.driver.before_step()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.driver.step()
            mine.append(float(loss.detach()))
        losses.append(mine)
    assert losses[0] == losses[1]


def test_masks_hold_after_the_end() -> None:
    loop = Loop(METHODS_HERE["magnitude_pruning"])
    loop.run(0, STEPS)
    net = loop.driver.finish()
    weights = [
        m.weight for m in net.modules() if isinstance(m, nn.Linear) and m is not net.head and m.weight.shape[0] > 1
    ]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros > 0.55  # less the convolution's, which competes with them


# -- what cannot work is said, and nothing has changed


class Sequence(nn.Module):
    """Batch norm would show the future of a causal model."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm, self.out = nn.GRU(4, 8, batch_first=True), nn.LayerNorm(8), nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.rnn(x)[0]))[0]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({}, {}, "maps keys of methods"),
        ({"sigma_reparm": {}}, {}, "did you mean 'sigma_reparam'"),
        ({"pagcp_pruning": {}}, {}, "pagcp_pruning does not run in a loop.*PAGCPPruning"),
        ({"SigmaReparam": {"qvk": "split"}}, {}, "no argument 'qvk' in a loop .did you mean 'qkv'"),
        ({"norm_swap": {"guard": "off"}}, {}, "no argument 'guard'"),
        ({"sigma_reparam": [1]}, {}, "should be true, false or a mapping"),
        ({"sigma_reparam": False, "norm_swap": {"enabled": False}}, {}, "are off"),
        ({"norm_swap": {}}, {}, "`hold`=0.05 is 0 steps"),
        ({"norm_swap": {"hold": 1}}, {"example": None}, "Pass `example`"),
        ({"norm_swap": {"hold": 1, "transition": 40}}, {}, "together end at step 41"),
        ({"norm_swap": {"hold": 1}, "temp_scale": {"tau": -1.0}}, {}, "tau"),
        ({"norm_swap": {"hold": 1}, "sigma_reparam": {"include": ["nothing"]}}, {}, "nothing"),
        ({"magnitude_pruning": {"criterion": "wanda"}}, {}, "`criterion`='wanda'"),
        ({"magnitude_pruning": {}}, {"total_steps": None}, "length is unknown"),
        ({"hesso_pruning": {"cric": True}}, {}, "undoes them.*cric=False"),
        ({"hesso_pruning": {"periods": 5}}, {}, "`duration`=0.2 is 3 step"),
        ({"hesso_pruning": {"target": 0.99}}, {}, "`target`=0.99 of the groups cannot be reached"),
        ({"hesso_pruning": {}}, {"example": None}, "Pass `example`"),
        ({"hesso_pruning": {}, "magnitude_pruning": {}}, {}, "mask that one in a second run"),
        ({"magnitude_pruning": {"amounts": {"nothing": 0.1}}}, {}, "nothing"),
        ({"temp_scale": {"mode": "ssmax"}}, {}, "forward adapters"),
        ({"sigma_reparam": {}}, {"total_steps": 0}, "`total_steps`"),
    ],
)  # fmt: skip
def test_refused_before_anything_changes(methods: dict[str, Any], options: dict[str, Any], message: str) -> None:
    net = vit()
    optimizer, scheduler = parts(net)
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    options = {"example": BATCHES[0][0][:2], "total_steps": STEPS, "schedulers": [scheduler]} | options
    with pytest.raises(ValueError, match=message):
        attach(net, optimizer, methods, **options)
    assert list(net.modules()) == modules
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert len(optimizer.param_groups) == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_a_causal_model_keeps_its_norms() -> None:
    net = Sequence()
    with pytest.raises(ValueError, match="causal"):
        attach(net, torch.optim.SGD(net.parameters(), 0.1), {"norm_swap": {"hold": 1}}, total_steps=9,
               example=torch.randn(2, 5, 4))  # fmt: skip
    assert isinstance(net.norm, nn.LayerNorm)


def test_weights_of_another_optimizer() -> None:
    net = vit()
    with pytest.raises(ValueError, match=r"none of its .* weights is in the optimizer"):
        attach(net, torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1), {"sigma_reparam": {}})
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer"):
        attach(net, [torch.optim.SGD(net.parameters(), 0.1)], {"sigma_reparam": {}})


def test_a_step_that_is_not_told() -> None:
    loop = Loop(METHODS_HERE["sigma_reparam"])
    nn.functional.cross_entropy(loop.net(BATCHES[0][0]), BATCHES[0][1]).backward()
    loop.optimizer.step()
    with pytest.raises(RuntimeError, match=r"driver\.step"):
        loop.optimizer.step()


def test_steps_that_the_optimizer_does_not_take() -> None:
    """Told at every batch, where gradients of three are accumulated."""
    net, batches = nn.Linear(16, 4), [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(6)]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    driver = attach(net, optimizer, {"magnitude_pruning": {"amount": 0.5}}, total_steps=2)

    def train() -> None:
        for number, (inputs, labels) in enumerate(batches, 1):
            nn.functional.cross_entropy(net(inputs), labels).backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            driver.step()

    with pytest.warns(UserWarning, match="more than total_steps=2 times, 2 times without a step of the optimizer"):
        train()


def broken(state: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inside = state
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return state


WEIGHT = ["methods", "magnitude_pruning", "weights", "blocks.0.attn.qkv.weight"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "version"),
        (["step"], -1, "step"),
        (["methods", "magnitude_pruning", "arguments"], {"amount": 0.7}, "`amount` was 0.7"),
        (["methods"], {}, "Resume with the same"),
        (["methods", "magnitude_pruning", "schedule"], [1], "schedule"),
        ([*WEIGHT, "mask"], torch.zeros(3, dtype=torch.uint8), "mask"),
        (WEIGHT[:-1], {}, "do not cover the same weights"),
    ],
)
def test_a_broken_state(path: list[Any], value: Any, message: str) -> None:
    loop = Loop({"magnitude_pruning": {"amount": 0.5}})
    loop.run(0, 3)
    before = copy.deepcopy(loop.save()["driver"])
    with pytest.raises(ValueError, match=message):
        loop.driver.load_state_dict(broken(before, path, value))
    after = loop.driver.state_dict()
    assert after["step"] == 3
    assert all(torch.equal(s["mask"], after["methods"]["magnitude_pruning"]["weights"][n]["mask"])
               for n, s in before["methods"]["magnitude_pruning"]["weights"].items())  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["hesso", "chosen"], 4, r"further than step 5"),
        (["hesso", "shrunk"], 6, r"further than step 5"),
        (["hesso", "status", "blocks.0.mlp.fc1"], torch.zeros(47, dtype=torch.int8), "shape"),
        (["hesso", "status", "blocks.0.mlp.fc1"], torch.zeros(48, dtype=torch.int8), "other units of .* are gone"),
        (["groups", "found", "blocks.0.mlp.fc1", "slices"], [], "should not be empty"),
        (["cost"], {"amounts": {}, "fixed": 0.0}, "goes with unit='macs'"),
        (["groups"], None, "groups"),
    ],
)
def test_a_broken_state_of_units(path: list[Any], value: Any, message: str) -> None:
    methods = METHODS_HERE["hesso"]
    loop = Loop(methods)
    loop.run(0, 5)
    state, before = loop.save(), copy.deepcopy(loop.net.state_dict())
    wrong = broken(state["driver"], ["methods", "hesso_pruning", "progress", *path], value)
    with pytest.raises(ValueError, match=message):
        loop.driver.load_state_dict(wrong)
    with pytest.raises(ValueError, match=message):  # before there is a driver, likewise
        attach(loop.net, loop.optimizer, methods, state=wrong)
    assert all(torch.equal(value, before[name]) for name, value in loop.net.state_dict().items())


def test_units_are_cut_out_of_the_optimizer_too() -> None:
    loop = Loop(METHODS_HERE["hesso"])
    loop.run(0, STEPS)
    net = loop.driver.finish()
    assert isinstance(net, nn.Module)
    assert net.blocks[0].mlp.fc1.out_features < 48  # type: ignore[union-attr, index]
    nn.functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
    loop.optimizer.step()  # training goes on with the smaller model
    assert all(s["exp_avg"].shape == p.shape for p, s in loop.optimizer.state.items())


def test_units_on_their_way_when_it_ends() -> None:
    loop = Loop(METHODS_HERE["hesso"])
    loop.run(0, 5)
    with pytest.warns(UserWarning, match=r"in period 2 of 3, and units that were shrinking stay"):
        loop.driver.finish()


@pytest.mark.filterwarnings("ignore:magnitude_pruning ends at step")
def test_a_driver_loaded_before_its_model_says_so() -> None:
    loop = Loop(METHODS_HERE["sigma_reparam"])
    loop.run(0, 3)
    state = loop.save()
    with pytest.warns(UserWarning, match="Load the model's state before"):
        Loop(METHODS_HERE["sigma_reparam"]).driver.load_state_dict(state["driver"])


def test_ended_too_soon() -> None:
    loop = Loop(METHODS_HERE["norm_swap"])
    loop.run(0, 4)
    with pytest.warns(UserWarning, match="lam ="):
        loop.driver.finish()


def test_every_method_is_there_or_refused_by_name() -> None:
    net = vit()
    for name in METHODS.with_callback:
        if name not in PARTS:
            with pytest.raises(ValueError, match=f"{name} does not run in a loop"):
                attach(net, torch.optim.SGD(net.parameters(), 0.1), {name: {}})
    assert not PARTS.keys() & REFUSED.keys()
    assert isinstance(attach(net, torch.optim.SGD(net.parameters(), 0.1), {"sigma_reparam": {}}), Driver)


# What a loop does not have: the callbacks' arguments that need a Trainer.
MISSING = {
    "sigma_reparam": {"remove_norms"},
    "temp_scale": {"length"},
    "magnitude_pruning": {"rewind_to"},
    "norm_swap": {"frozen", "eval_mode", "finished_metrics", "guard", "guard_factor", "guard_length"},
}


@pytest.mark.parametrize("name", MISSING)
def test_arguments_are_the_callbacks(name: str) -> None:
    theirs = dict(inspect.signature(callback_class(name)).parameters)
    mine = inspect.signature(PARTS[name]).parameters
    assert theirs.keys() - mine.keys() == MISSING[name] | {"enabled"}
    defaults = {name: parameter.default for name, parameter in mine.items()}
    assert {n: theirs[n].default for n in mine} | {"rewind": "none"} == defaults | {"rewind": "none"}


@pytest.mark.forks
def test_two_processes_equal_one() -> None:
    done = forked(Path(__file__).parent / "scripts" / "loop_ddp.py", processes=2)
    assert done.code == 0, done.output
    assert done.output.count("agreed on") == 2
