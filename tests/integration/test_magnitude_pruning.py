"""MagnitudePruning inside a Trainer: the schedule, what it decides on, going back, averages, bad input."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from sigma_runs import Do, adamw, messages, trainer, weights, with_optimizers
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from zoo import Classifier, loader

from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.common.schedule import Schedule
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.pruning import criteria
from lightning_efficient.pruning.selection import make_masks
from lightning_efficient.pruning.targets import find_targets
from lightning_efficient.testing import assert_method_contract
from lightning_efficient.testing.case import Case
from lightning_efficient.testing.checks import assert_resume_exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

TARGETS = ["net.stem.weight", "net.conv.weight", "net.head.weight"]


def zeros(module: nn.Module, names: list[str] = TARGETS) -> dict[str, int]:
    params = dict(module.named_parameters())
    return {name: int((params[name] == 0).sum()) for name in names}


def share(module: nn.Module) -> float:
    params = dict(module.named_parameters())
    return sum(zeros(module).values()) / sum(params[name].numel() for name in TARGETS)


def fit(root: Path, *callbacks: Any, net: Any = "cnn", batches: int = 8, **kwargs: Any) -> Classifier:
    module = Classifier(net) if isinstance(net, str) else net
    trainer(root, *callbacks, **kwargs).fit(module, loader(batches))
    return module


# -- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:MagnitudePruning pruned 1 weight")
@pytest.mark.parametrize(
    "arguments",
    [
        {"schedule": "cubic", "amount": 0.9},
        {"schedule": "cubic", "start": 2, "length": 8, "every": 3},
        {"schedule": "one_shot", "start": 0.25},
        {"schedule": "constant"},
        {"schedule": "iterative", "rounds": 3, "rewind": "none"},
        {"schedule": "cubic", "criterion": "taylor"},
        {"schedule": "cubic", "criterion": "wanda"},
        {"schedule": "cubic", "criterion": "random"},
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_the_schedule_is_followed(tmp_path: Path, arguments: dict[str, Any]) -> None:
    amount = arguments.get("amount", 0.5)
    plain = Schedule(
        *(
            arguments.get(k, d)
            for k, d in {"schedule": "cubic", "start": None, "length": None, "every": 0.01, "rounds": 5}.items()
        )
    )
    size = sum(p.numel() for n, p in Classifier("cnn").named_parameters() if n in TARGETS)
    seen: dict[int, int] = {}
    probe = Do(on_train_batch_end=lambda t, m: seen.update({t.global_step: sum(zeros(m).values())}))
    module = fit(tmp_path, MagnitudePruning(**arguments), probe, max_steps=12)
    assert seen == {s + 1: int(plain.share(s, plain.steps(12), amount) * size + 1e-9) for s in range(12)}
    untouched = {n: p for n, p in module.named_parameters() if n not in TARGETS}
    assert not [n for n, p in untouched.items() if bool((p == 0).any()) and "bias" not in n], "norms are left alone"
    assert {"net.bn.weight", "net.bn.bias", "net.conv.bias", "net.head.bias"} == set(untouched)
    assert bool((untouched["net.head.bias"] != 0).all())


@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_scopes(tmp_path: Path, scope: Any) -> None:
    module = fit(tmp_path, MagnitudePruning(scope=scope, schedule="one_shot"))
    for name, param in module.named_parameters():
        if name in TARGETS and scope == "layer":
            assert int((param == 0).sum()) == param.numel() // 2
        elif name in TARGETS:
            assert set((param.flatten(1) == 0).sum(1).tolist()) == {param[0].numel() // 2}


def test_amounts_by_name(tmp_path: Path) -> None:
    callback = MagnitudePruning(amount=0.25, amounts={"net.conv": 0.75, "net.h*": 0.0}, schedule="one_shot")
    module = fit(tmp_path, callback)
    sizes = {name: dict(module.named_parameters())[name].numel() for name in TARGETS}
    assert zeros(module) == {
        "net.stem.weight": sizes["net.stem.weight"] // 4,
        "net.conv.weight": sizes["net.conv.weight"] * 3 // 4,
        "net.head.weight": 0,
    }


@pytest.mark.parametrize("granularity", ["row", "channel", "2:4", "4x1"])
def test_granularities(tmp_path: Path, granularity: str) -> None:
    callback = MagnitudePruning(granularity=granularity, scope="layer", include=["net.conv", "net.head"])
    module = fit(tmp_path, callback)
    assert zeros(module, TARGETS[1:]) == {"net.conv.weight": 8 * 4 * 9 // 2, "net.head.weight": 4 * 8 // 2}
    weight = dict(module.named_parameters())["net.head.weight"].detach()
    cut = {
        "row": weight.abs().amax(1),
        "channel": weight.abs().amax(0),
        "2:4": weight.reshape(-1, 4).abs().topk(3).values[:, 2],
        "4x1": weight.abs().amax(0),
    }
    assert bool((cut["2:4"] == 0).all()) if granularity == "2:4" else int((cut[granularity] == 0).sum()) > 0


def test_whole_heads(tmp_path: Path) -> None:
    module = fit(tmp_path, MagnitudePruning(granularity="head", scope="layer", schedule="one_shot"), net="timm_vit")
    for block in module.net.blocks:
        by_head = block.attn.proj.weight.detach().reshape(24, 2, 12).abs().amax((0, 2))
        assert sorted(bool(v == 0) for v in by_head) == [False, True]


# -- what it decides on ----------------------------------------------------------------------------------------------


def first_masks(root: Path, criterion: Any, *others: Any, first: bool = True, **kwargs: Any) -> dict[str, Tensor]:
    """Masks after the one step in which an untrained model is pruned by half, layer by layer."""
    ours = MagnitudePruning(criterion=criterion, schedule="one_shot", start=0, scope="layer")
    listed = (ours, *others) if first else (*others, ours)
    fit(root, *listed, max_steps=1, **kwargs)
    return ours.masks


def test_taylor_masks(tmp_path: Path) -> None:
    module = Classifier("cnn")
    x, y = next(iter(loader(8)))
    module.train()
    F.cross_entropy(module(x), y).backward()
    params = {name: dict(module.named_parameters())[name] for name in TARGETS}
    expected = make_masks(
        {n: criteria.taylor(p, p.grad) for n, p in params.items() if p.grad is not None}, 0.5, scope="layer"
    )
    found = first_masks(tmp_path, "taylor")
    assert all(torch.equal(found[n], expected[n]) for n in TARGETS)
    # sigmaReparam's pulled-back gradients must not matter, whoever comes first.
    for first in (True, False):
        found = first_masks(tmp_path, "taylor", SigmaReparam(), first=first)
        assert all(torch.equal(found[n], expected[n]) for n in TARGETS)
    clipped = first_masks(tmp_path, "taylor", gradient_clip_val=1e-3)
    assert all(torch.equal(clipped[n], expected[n]) for n in TARGETS)


def test_wanda_masks(tmp_path: Path) -> None:
    module = Classifier("cnn")
    seen: dict[str, Tensor] = {}
    found = find_targets(module)
    for name, target in found.matched.items():
        hook = lambda m, args, name=name: seen.update({name: args[0].detach()})  # noqa: E731
        target.module.register_forward_pre_hook(hook)
    module.train()
    module(next(iter(loader(8)))[0])
    scores = {}
    for name, target in found.matched.items():
        x = seen[name].double()
        norm = (x.square().sum(0) if x.ndim == 2 else x.square().sum((0, 2, 3))).sqrt()
        groups = getattr(target.module, "groups", 1)
        scores[name] = criteria.wanda(target.param.double(), norm, groups)
    expected = make_masks(scores, 0.5, scope="layer")
    found_masks = first_masks(tmp_path, "wanda")
    assert all(torch.equal(found_masks[n], expected[n]) for n in TARGETS)


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_accumulation_decides_on_all_micro_batches(tmp_path: Path, criterion: str) -> None:
    kwargs = {"precision": "64-true"}
    masks = []
    for size, accumulate in ((2, 4), (8, 1)):
        ours = MagnitudePruning(
            criterion=criterion, schedule="one_shot", start=0, include=["net.head", "net.*up", "net.q"]
        )  # type: ignore[arg-type]
        exclude_tied = Classifier("decoder").double()
        t = trainer(tmp_path, ours, max_steps=1, accumulate_grad_batches=accumulate, **kwargs)
        t.fit(exclude_tied, loader(accumulate, size, dtype=torch.float64))
        masks.append(ours.masks)
    assert masks[0].keys() == {"net.up.weight", "net.q.weight"}
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


def test_checkpointed_forwards_count_once(tmp_path: Path) -> None:
    masks = []
    for checkpointing in (False, True):
        ours = MagnitudePruning(criterion="wanda", schedule="one_shot", start=0, exclude=["net.encoder.*.self_attn"])
        fit(tmp_path, ours, max_steps=1, net=Classifier("encoder", checkpointing=checkpointing))
        masks.append(ours.masks)
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.mark.forks
@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_two_processes_decide_as_one(criterion: Any) -> None:
    """On both halves of every batch; the equality of the weights afterwards is the battery's, in float64."""
    make = partial(MagnitudePruning, criterion=criterion, scope="layer", start=1, length=3, every=1)
    table = assert_method_contract(
        make, {"plain": partial(Classifier, "cnn")}, lambda b, s, d: loader(b, s, dtype=d), scenarios=["ddp"]
    )
    assert table == {"ddp": "passed"}


def test_a_criterion_that_sees_nothing_says_so(tmp_path: Path) -> None:
    class Functional(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.net.bn(self.net.stem(x)))
            return F.linear((h + self.net.conv(h)).mean((2, 3)), self.net.head.weight, self.net.head.bias)

    with pytest.warns(UserWarning, match=r"could not prune as scheduled.*criterion='wanda' had no finite score"):
        module = fit(tmp_path, MagnitudePruning(criterion="wanda"), net=Functional("cnn"))
    assert share(module) == 0
    assert not [m for m in module.modules() if m._forward_pre_hooks], "a hook was left behind"


def test_no_hook_stays_after_an_exception(tmp_path: Path) -> None:
    def stop(t: Trainer, m: LightningModule) -> None:
        assert any(child._forward_pre_hooks for child in m.modules())
        raise RuntimeError("stop here")

    module = Classifier("cnn")
    with pytest.raises(RuntimeError, match="stop here"):
        fit(
            tmp_path,
            MagnitudePruning(criterion="wanda", schedule="one_shot", start=0),
            Do(on_before_backward=stop),
            net=module,
        )
    assert not [m for m in module.modules() if m._forward_pre_hooks]


# -- going back ------------------------------------------------------------------------------------------------------


def state_of(t: Trainer, m: LightningModule) -> dict[str, Any]:
    return {
        "model": weights(m),
        "optimizer": copy.deepcopy(t.optimizers[0].state_dict()),
        "scheduler": copy.deepcopy(t.lr_scheduler_configs[0].scheduler.state_dict()),
    }


def iterations(root: Path, rewind: str, back: int | float = 0) -> tuple[dict[int, dict[str, Any]], MagnitudePruning]:
    """States right before each batch, after everything that happens then, of 12 steps with prunings at 4 and 8."""
    seen: dict[int, dict[str, Any]] = {}
    ours = MagnitudePruning(schedule="iterative", rounds=2, amount=0.75, rewind=rewind, rewind_to=back)  # type: ignore[arg-type]
    fit(
        root,
        ours,
        Do(on_train_batch_start=lambda t, m: seen.update({t.global_step: state_of(t, m)})),
        max_steps=12,
        batches=4,
    )
    return seen, ours


@pytest.mark.parametrize("back", [0, 2, 0.25])
def test_lottery_ticket(tmp_path: Path, back: int | float) -> None:
    """Weights, batch norm's buffers, optimizer and scheduler are exactly those of the step that was gone back to."""
    seen, ours = iterations(tmp_path, "weights", back)
    early = seen[back if isinstance(back, int) else 3]
    kept = {name: early["model"][name] != 0 for name in TARGETS}
    for boundary, amount in ((4, 0.5), (8, 0.75)):
        now = seen[boundary]
        total = sum(v.numel() for n, v in now["model"].items() if n in TARGETS)
        assert sum(int((now["model"][n] == 0).sum()) for n in TARGETS) == int(total * amount)
        for name, value in now["model"].items():
            if name in TARGETS:
                mask = value != 0
                assert not bool((mask & ~kept[name]).any()), "a pruned weight came back"
                kept[name] = mask
                assert torch.equal(value, early["model"][name] * mask)
            else:
                assert torch.equal(value, early["model"][name]), name
        assert now["scheduler"] == early["scheduler"]
        assert now["optimizer"]["param_groups"] == early["optimizer"]["param_groups"]
        for index, entry in early["optimizer"]["state"].items():
            for key, value in entry.items():
                found = now["optimizer"]["state"][index][key]
                assert torch.equal(found[found != 0], value[found != 0])
        assert now["optimizer"]["state"].keys() == early["optimizer"]["state"].keys()
    assert (
        seen[7]["model"]["net.bn.num_batches_tracked"] == (0 if back == 0 else back if isinstance(back, int) else 3) + 3
    )
    assert sum(int((~m).sum()) for m in ours.masks.values()) == int(0.75 * total)


def test_the_ticket_is_chosen_by_the_trained_weights(tmp_path: Path) -> None:
    dense: dict[str, Tensor] = {}
    fit(
        tmp_path,
        Do(on_train_batch_start=lambda t, m: dense.update(weights(m)) if t.global_step == 4 else None),
        max_steps=5,
        batches=4,
    )
    seen, _ = iterations(tmp_path, "weights")
    expected = make_masks({n: dense[n].abs() for n in TARGETS}, 0.5)
    assert all(torch.equal(seen[4]["model"][n] != 0, expected[n]) for n in TARGETS)


def test_learning_rate_rewinding(tmp_path: Path) -> None:
    seen, _ = iterations(tmp_path, "learning_rate")
    fine_tuned, _ = iterations(tmp_path, "none")
    for name in TARGETS:
        mask = seen[4]["model"][name] != 0
        assert torch.equal(seen[4]["model"][name], fine_tuned[4]["model"][name])
        assert bool(mask.any())
    assert seen[4]["model"]["net.bn.num_batches_tracked"] == 4
    assert seen[4]["scheduler"] == seen[0]["scheduler"]
    rate = lambda state: state["optimizer"]["param_groups"][0]["lr"]  # noqa: E731
    assert [rate(seen[s]) for s in (0, 4, 8)] == [rate(seen[0])] * 3
    assert rate(fine_tuned[4]) == rate(fine_tuned[8]) > rate(seen[0])
    moments = seen[4]["optimizer"]["state"]
    assert moments.keys() == fine_tuned[4]["optimizer"]["state"].keys() != {}


def test_the_average_begins_anew_after_going_back(tmp_path: Path) -> None:
    ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
    ours = MagnitudePruning(schedule="iterative", rounds=1)
    counts: list[int] = []
    probe = Do(on_train_batch_end=lambda t, m: counts.append(int(ema._average_model.n_averaged)))  # type: ignore[union-attr]
    fit(tmp_path, ours, ema, probe, max_steps=6)
    assert counts == [1, 2, 3, 1, 2, 3]


# -- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_as_sparse(tmp_path: Path, first: bool) -> None:
    ours, ema = MagnitudePruning(amount=0.8), WeightAveraging(avg_fn=get_ema_avg_fn(0.99))
    module = Classifier("cnn")
    t = trainer(tmp_path, *((ours, ema) if first else (ema, ours)), max_steps=10)
    t.fit(module, loader(5))
    t.save_checkpoint(tmp_path / "ema.ckpt")
    assert share(module) == pytest.approx(0.8, abs=0.01)
    stock = Classifier.load_from_checkpoint(tmp_path / "ema.ckpt")
    assert zeros(stock) == zeros(module)


def test_stochastic_averages_are_as_sparse(tmp_path: Path) -> None:
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
    with pytest.warns(UserWarning, match="Swapping scheduler|SWA is currently only supported"):
        module = fit(tmp_path, MagnitudePruning(amount=0.8, length=0.9), swa, max_steps=-1, max_epochs=4, batches=4)
    assert share(module) == pytest.approx(0.8, abs=0.01)


# -- resume ----------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "cubic": {"start": 1, "length": 4, "every": 1},
    "coarse": {"start": 1, "length": 5, "every": 3},
    "taylor": {"criterion": "taylor", "start": 1, "length": 4, "every": 1},
    "wanda": {"criterion": "wanda", "scope": "neuron", "start": 1, "length": 4, "every": 1},
    "random": {"criterion": "random", "start": 1, "length": 4, "every": 1},
    "at the cut": {"schedule": "one_shot", "start": 3},
    "before the cut": {"schedule": "one_shot", "start": 2, "criterion": "taylor"},
    "constant": {"schedule": "constant"},
    "ticket at the cut": {"schedule": "iterative", "rounds": 1},
    "ticket": {"schedule": "iterative", "rounds": 2},
    "late ticket": {"schedule": "iterative", "rounds": 1, "rewind_to": 1},
    "ticket by gradient": {"schedule": "iterative", "rounds": 2, "criterion": "taylor"},
    "learning rate": {"schedule": "iterative", "rounds": 2, "rewind": "learning_rate"},
}


@pytest.mark.parametrize("arguments", RESUMED)
@pytest.mark.parametrize("company", ["alone", "sigma"])
def test_resume_is_exact(tmp_path: Path, arguments: str, company: str) -> None:
    def callbacks() -> tuple[Any, ...]:
        ours = MagnitudePruning(**RESUMED[arguments])
        return (ours, SigmaReparam()) if company == "sigma" else (ours,)

    case = Case(callbacks, {"plain": partial(Classifier, "cnn")}, lambda b, s, d: loader(b, s, dtype=d), tmp_path)
    assert_resume_exact(case)
    assert_resume_exact(case, max_epochs=1)


def test_resumed_epoch_stays_sparse(tmp_path: Path) -> None:
    """Where Lightning's ModelPruning falls from 75 % to 4 %."""
    make = partial(MagnitudePruning, amount=0.75, schedule="one_shot", start=2)
    t, module = trainer(tmp_path, make(), max_steps=4), Classifier("cnn")
    t.fit(module, loader(4))
    t.save_checkpoint(tmp_path / "pruned.ckpt")
    before = zeros(module)
    assert share(module) == 0.75
    resumed = Classifier("cnn", lr=0.1)
    trainer(tmp_path, make(), max_steps=8).fit(resumed, loader(4), ckpt_path=tmp_path / "pruned.ckpt")
    assert zeros(resumed) == before
    assert not torch.equal(weights(resumed)["net.stem.weight"], weights(module)["net.stem.weight"])


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    t = trainer(tmp_path, MagnitudePruning(), max_steps=6)
    t.fit(Classifier("cnn"), loader(8))
    t.save_checkpoint(tmp_path / "file.ckpt")
    return tmp_path / "file.ckpt"


@pytest.mark.parametrize(
    ("arguments", "steps", "match"),
    [
        ({"amount": 0.6}, 6, r"`amount`: 0.5 then, 0.6 now. Resume with the saved values"),
        ({"schedule": "one_shot"}, 6, r"`schedule`: 'cubic' then, 'one_shot' now"),
        ({"start": 1}, 6, r"`start`: None then, 1 now"),
        ({"criterion": "random"}, 6, r"`criterion`: 'magnitude' then"),
        ({"amounts": {"net.head": 0.1}}, 6, r"`amounts`: None then"),
        ({"enabled": False}, 6, r"switches off"),
        ({"exclude": ["net.head"]}, 6, r"Resume with the same `include` and `exclude`"),
    ],
)
def test_resuming_with_another_schedule_is_refused(pruned: Path, arguments: Any, steps: int, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        trainer(pruned.parent, MagnitudePruning(**arguments), max_steps=steps).fit(
            Classifier("cnn"), loader(8), ckpt_path=pruned
        )


def test_steps_may_be_resumed_with_a_longer_run(tmp_path: Path) -> None:
    make = partial(MagnitudePruning, start=1, length=4, every=1)
    t, module = trainer(tmp_path, make(), max_steps=6), Classifier("cnn")
    t.fit(module, loader(8))
    t.save_checkpoint(tmp_path / "file.ckpt")
    again = Classifier("cnn")
    trainer(tmp_path, make(), max_steps=9).fit(again, loader(8), ckpt_path=tmp_path / "file.ckpt")
    assert zeros(again) == zeros(module)


def test_a_second_fit_keeps_the_masks(tmp_path: Path) -> None:
    ours, module = MagnitudePruning(), Classifier("cnn")
    fit(tmp_path, ours, net=module)
    before = zeros(module)
    assert share(module) == pytest.approx(0.5, abs=0.01)
    seen: list[float] = []
    fit(tmp_path, ours, Do(on_train_batch_end=lambda t, m: seen.append(share(m))), net=module)
    assert seen == [pytest.approx(0.5, abs=0.01)] * 4
    assert zeros(module) == before


# -- reports, logs, bad input ----------------------------------------------------------------------------------------


def test_the_report_is_plain_about_speed(tmp_path: Path) -> None:
    logged: dict[str, float] = {}
    probe = Do(on_train_end=lambda t, m: logged.update({k: float(v) for k, v in t.callback_metrics.items()}))
    with messages() as said:
        module = fit(tmp_path, MagnitudePruning(amount=0.75), probe)
    text = "\n".join(said)
    assert "make nothing faster or smaller" in text
    assert f"{sum(zeros(module).values())} of 392 weights in 3 tensors are zero (75.0%" in text
    assert logged["efficient/magnitude_pruning/sparsity"] == pytest.approx(share(module))


def test_a_layer_that_is_gone_is_reported(tmp_path: Path) -> None:
    class Faint(Classifier):
        def _make(self) -> nn.Module:
            net = super()._make()
            with torch.no_grad():
                net.head.weight.mul_(1e-6)
            return net

    faint = Faint("cnn", lr=1e-9)
    with pytest.warns(UserWarning, match=r"pruned 1 weight\(s\) altogether \(\['net.head.weight'\]\).*scope='layer'"):
        fit(tmp_path, MagnitudePruning(), net=faint)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"amount": 1.0}, r"`amount` is .*in \[0, 1\) such as 0.5; got 1.0"),
        ({"amount": -0.1}, "got -0.1"),
        ({"amounts": {"net": 1.5}}, r"`amounts\['net'\]` .*got 1.5"),
        ({"schedule": "linear"}, "`schedule` must be one of"),
        ({"criterion": "l2"}, "`criterion` must be one of .*got 'l2'"),
        ({"scope": "row"}, "`scope` must be one of"),
        ({"granularity": "3:2"}, "`granularity` must be one of"),
        ({"granularity": "1:4"}, r"granularity='1:4' prunes 0.75 of a weight; got amount=0.5"),
        ({"granularity": "row", "scope": "neuron"}, "ranks the entries of one output"),
        ({"rewind": "half"}, "`rewind` must be one of"),
        ({"schedule": "iterative", "start": 1}, "`start`=1 has no meaning"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MagnitudePruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"start": 3, "length": 4}, "end at step 7, but the run has 4"),
        ({"schedule": "one_shot", "start": 4}, "start at step 4 of a run of 4"),
        ({"schedule": "iterative", "rounds": 4}, "need more than 4 steps, but the run has 4"),
        ({"schedule": "iterative", "rounds": 1, "rewind_to": 2}, "`rewind_to`=2 is step 2, but the first .* at step 2"),
        ({"granularity": "2:4", "include": ["net.stem"]}, "'net.stem.weight' has 1 inputs, no multiple of 4"),
    ],
)  # fmt: skip
def test_schedules_that_do_not_fit_change_nothing(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    module = Classifier("cnn")
    before = weights(module)
    with pytest.raises(ValueError, match=match):
        fit(tmp_path, MagnitudePruning(**arguments), net=module)
    assert all(torch.equal(v, before[k]) for k, v in weights(module).items())


def test_all_zero_weights_are_left_alone_and_reported(tmp_path: Path) -> None:
    module = with_optimizers(adamw)
    nn.init.zeros_(module.net.head.weight)
    with pytest.warns(UserWarning, match=r"leaves 1 weight\(s\) alone: net.head.weight \(all zero: nothing to rank\)"):
        fit(tmp_path, MagnitudePruning(), net=module)
    assert bool((module.net.head.weight != 0).all())


def test_stock_cli_needs_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    (tmp_path / "config.yaml").write_text(
        """
        seed_everything: 1
        trainer:
          accelerator: cpu
          max_steps: 4
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: lightning_efficient.MagnitudePruning
              init_args:
                amount: 0.5
                schedule: iterative
                rounds: 1
                include: ["net.*"]
                exclude: ["net.head"]
                amounts: {"net.st*": 0.25}
        model: {net: cnn}
        """
    )

    class Batches(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    cli = LightningCLI(
        Classifier, Batches, args=["fit", "-c", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    sizes = {name: dict(cli.model.named_parameters())[name].numel() for name in TARGETS}
    assert zeros(cli.model) == {
        "net.stem.weight": sizes["net.stem.weight"] // 4,
        "net.conv.weight": sizes["net.conv.weight"] // 2,
        "net.head.weight": 0,
    }
