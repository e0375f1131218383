"""Distillation: what is added to the loss, where the teacher comes from, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forking import forked
from lightning.pytorch import LightningModule, Trainer
from sigma_runs import Do, differing, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import Classifier, Cnn, Manual, loader

import lightning_efficient.functional as LF
from lightning_efficient import (
    CollapseGuard,
    Distillation,
    HESSOPruning,
    MagnitudePruning,
    PRepBN,
    RecipeError,
    SigmaReparam,
)
from lightning_efficient.lifecycle.methods import build_callback
from lightning_efficient.testing.case import Case, ResumableLoader
from lightning_efficient.testing.checks import assert_resume_exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*training ended at step"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Student(LightningModule):
    """Dropout and batch norm; what its step returns can be chosen."""

    def __init__(self, width: int = 16, returns: str = "loss", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(width, 4),
            )
        self.returns, self.seen = returns, []

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.seen.append(loss.item())
        return {"loss": loss, "kept": y} if self.returns == "dict" else None if self.returns == "none" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def fit(root: Path, module: Any, *callbacks: Any, steps: int = 6, batches: int = 12, **kwargs: Any) -> Trainer:
    t = trainer(root, *callbacks, max_steps=steps, **kwargs)
    torch.manual_seed(0)
    t.fit(module, loader(batches))
    return t


def by_hand(module: Any, teacher: nn.Module, alpha: float, temperature: float, accumulate: int, steps: int) -> None:
    """The same training, as a loop, with torch's own divergence."""
    torch.manual_seed(0)
    optimizer, teacher = module.configure_optimizers(), teacher.eval()
    module.train()
    data = iter(loader(12))
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x, y = next(data)
            logits = module.net(x)
            with torch.no_grad():
                taught = teacher(x)
            kl = F.kl_div(
                (logits / temperature).log_softmax(1), (taught / temperature).softmax(1), reduction="batchmean"
            )
            loss = (1 - alpha) * F.cross_entropy(logits, y) + alpha * temperature**2 * kl
            (loss / accumulate).backward()
        optimizer.step()


# -- the loss --------------------------------------------------------------------------------------------------------


def test_losses_against_closed_forms() -> None:
    torch.manual_seed(0)
    s, t = (torch.randn(5, 7, 11, dtype=torch.float64) * 2 for _ in range(2))
    s.requires_grad_(True)
    for T in (0.7, 2.0, 5.0):
        p, q = (t / T).softmax(-1), (s / T).softmax(-1)
        expected = T**2 * (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(LF.distillation_kl(s, t, T), expected)
        assert LF.distillation_kl(s, t, T).item() > 0
    centred = (s - t) - (s - t).mean(-1, keepdim=True)
    torch.testing.assert_close(
        LF.distillation_kl(s, t, 1e4), centred.square().sum(-1).mean() / (2 * 11), rtol=1e-3, atol=0
    )
    same = LF.distillation_kl(s, s.detach(), 3.0)
    (gradient,) = torch.autograd.grad(same, s)
    assert same.item() == 0
    assert float(gradient.abs().max()) < 1e-15
    mask = torch.rand(5, 7) > 0.4
    for f in (LF.distillation_kl, LF.distillation_mse, LF.distillation_cosine):
        torch.testing.assert_close(f(s, t, mask=mask), f(s[mask], t[mask]))
        assert f(s, t, mask=torch.zeros(5, 7)).item() == 0
        with pytest.raises(ValueError, match=r"shape \(5, 7, 11\) and the teacher's \(5, 7, 3\)"):
            f(s, t[..., :3])
    torch.testing.assert_close(LF.distillation_mse(s, t), F.mse_loss(s, t))
    torch.testing.assert_close(LF.distillation_cosine(s, 3 * s.detach()), torch.zeros((), dtype=torch.float64))
    maps = [h.square().mean(-1) / h.square().mean(-1).norm(dim=1, keepdim=True) for h in (s, t)]
    torch.testing.assert_close(LF.attention_transfer(s, t), (maps[0] - maps[1]).square().sum(1).mean())
    with pytest.raises(ValueError, match="more than one"):
        LF.attention_transfer(s[:, :1], t[:, :1])
    excluded = t.masked_fill(torch.arange(11) > 8, -math.inf)
    value = LF.distillation_kl(s.masked_fill(torch.arange(11) > 8, -math.inf), excluded)
    torch.testing.assert_close(value, LF.distillation_kl(s[..., :9], t[..., :9]))
    assert bool(torch.autograd.grad(value, s)[0].isfinite().all())


def test_alpha_zero_is_the_run_without_to_the_bit(tmp_path: Path) -> None:
    found = []
    for listed in ((), (Distillation(alpha=0.0),)):
        module = Student()
        fit(tmp_path, module, *listed)
        found.append(weights(module) | {"seen": torch.tensor(module.seen), "rng": torch.get_rng_state()})
        assert "training_step" not in vars(module)
    assert differing(*found) == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_against_an_explicit_loop(accumulate: int, tmp_path: Path) -> None:
    teacher = Student(width=32, seed=3).net
    before = weights(teacher)
    ours, theirs = Student(), Student()
    fit(tmp_path, ours, Distillation(teacher=teacher, alpha=0.7, temperature=3.0), accumulate_grad_batches=accumulate)
    by_hand(theirs, copy.deepcopy(teacher), 0.7, 3.0, accumulate, 6)
    assert (
        max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        < 2e-7
    )
    assert differing(before, weights(teacher)) == []
    assert teacher.training
    assert ours.state_dict().keys() == Student().state_dict().keys()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's, once a process
@pytest.mark.parametrize("returns", ["loss", "dict", "none"])
def test_what_steps_return(returns: str, tmp_path: Path) -> None:
    outputs: list[Any] = []

    class Look(Do):
        def on_train_batch_end(self, t: Any, m: Any, out: Any, *_: Any) -> None:
            outputs.append(out)

    module = Student(returns=returns)
    callback = Distillation(teacher=Student(seed=5).net, alpha=0.9)
    if returns == "none":
        fit(tmp_path, module, callback, Look())
        assert differing(weights(module.net[1]), weights(Student().net[1])) == []
        return
    fit(tmp_path, module, callback, Look())
    assert sorted(outputs[0]) == (["kept", "loss"] if returns == "dict" else ["loss"])
    assert abs(float(outputs[0]["loss"]) - module.seen[0]) > 1e-3  # what Lightning has is the whole loss


def test_the_distance_to_the_initial_network_is_zero_at_first(tmp_path: Path) -> None:
    module = Classifier("encoder")
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    t = fit(tmp_path, module, Distillation(temperature=3.0), look)
    assert logged[0] == pytest.approx(0.0, abs=1e-6)  # evaluation has kernels of its own
    assert logged[-1] > 1e-5
    assert float(t.callback_metrics["efficient/distillation/weight"]) == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_weight_goes_down(schedule: Any, tmp_path: Path) -> None:
    found: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: found.append(float(t.callback_metrics["efficient/distillation/weight"])))
    fit(
        tmp_path, Student(), Distillation(teacher=Student(seed=2), schedule=schedule, hold=1, length=4, alpha=0.8), look
    )
    shape = (
        [1, 1, 0.75, 0.5, 0.25]
        if schedule == "linear"
        else [(1 + math.cos(math.pi * i / 4)) / 2 for i in (0, 0, 1, 2, 3)]
    )
    assert found[:5] == pytest.approx([0.8 * share for share in shape])


# -- which network ---------------------------------------------------------------------------------------------------


class Twice(Student):
    """Two views of each sample, a forward without gradients, and one in an auxiliary network of its own."""

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        with torch.no_grad():
            self.net(10 * x)
        return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(x.flip(-1)), y)


def test_several_forwards_count_alike(tmp_path: Path) -> None:
    teacher, module = Student(seed=4).net.eval(), Twice()
    module.net[4].p = 0.0
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    start = copy.deepcopy(module.net)
    fit(tmp_path, module, Distillation(teacher=teacher), look, steps=1)
    x, _ = next(iter(loader(12)))
    start.train()
    both = [LF.distillation_kl(start(v), teacher(v)) for v in (x, x.flip(-1))]
    assert logged == pytest.approx([float(sum(both).detach()) / 2], rel=1e-5)


class Parts(Student):
    """Encoder and head called one after the other."""

    def __init__(self, through_forward: bool) -> None:
        super().__init__()
        self.through_forward = through_forward
        self.encoder, self.head = self.net[:-1], self.net[-1]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self(x) if self.through_forward else self.head(self.encoder(x)), y)


def test_a_module_in_parts(tmp_path: Path) -> None:
    module = Parts(True)
    fit(tmp_path, module, Distillation())
    with pytest.raises(ValueError, match="calls encoder, head one after the other"):
        fit(tmp_path, Parts(False), Distillation())
    with pytest.raises(ValueError, match="the teacher would be shown what the student makes of the batch"):
        fit(tmp_path, Parts(False), Distillation(student="head"))
    module = Parts(False)
    with pytest.raises(ValueError, match=r"`student` 'heads' matches no module name .did you mean 'head'"):
        fit(tmp_path, module, Distillation(student="heads"))
    assert "training_step" not in vars(module)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fails(Student):
        def training_step(self, batch: Any) -> Any:
            if self.trainer.global_step == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch)

    module = Fails()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, module, Distillation())
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_copies_and_pickles_in_the_middle_have_the_original_step(tmp_path: Path) -> None:
    copies: list[Any] = []

    def look(t: Any, m: Any) -> None:
        if t.global_step == 2:
            copies.append(copy.deepcopy(m))
            m.seen, file = [], io.BytesIO()
            torch.save(m, file)
            copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))

    module = Student()
    fit(tmp_path, module, Distillation(teacher=Student(seed=2)), Do(on_train_batch_start=look))
    batch = next(iter(loader(1)))
    for twin in copies:
        twin.eval()
        assert twin.training_step(batch).item() == pytest.approx(F.cross_entropy(twin.net(batch[0]), batch[1]).item())
        assert twin.training_step.__self__ is twin


@pytest.mark.parametrize(
    ("kind", "hidden", "teacher"),
    [
        ("mse_logits", None, partial(Student, seed=2)), ("cosine_hidden", ["net.1", "net.3"], partial(Student, seed=2)),
        ("attention", ["net.conv", "net.bn"], lambda: Classifier("cnn")),
    ],
)  # fmt: skip
def test_other_kinds(kind: Any, hidden: Any, teacher: Any, tmp_path: Path) -> None:
    taught = teacher()
    for p in taught.parameters():
        p.data += 0.1 * torch.randn_like(p)
    module = Classifier("cnn") if kind == "attention" else Student()
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    fit(tmp_path, module, Distillation(teacher=taught, kind=kind, hidden=hidden, alpha=1.0), look, steps=40, batches=40)
    assert logged[0] > 0
    assert sum(logged[-5:]) < 0.7 * sum(logged[:5])


def test_hidden_states_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 16\) and the teacher's \(4, 32\).*kind='attention'"):
        fit(tmp_path, Student(), Distillation(teacher=Student(32), kind="cosine_hidden", hidden=["net.1"]))


# -- language models -------------------------------------------------------------------------------------------------


class Language(LightningModule):
    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.lm = gpt(width, seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.lm(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


def gpt(width: int, seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=width, n_layer=1, n_head=2)).train()


def tokens(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(0, 13, (4, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(8) < torch.tensor([8, 5, 3, 8])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@pytest.mark.parametrize("given", ["module", "hf"])
def test_a_hugging_face_model_with_padding(given: str, tmp_path: Path) -> None:
    """The padded tokens change nothing, and the mean is over the others."""
    teacher, batch = gpt(16, 5), tokens()
    teacher.save_pretrained(tmp_path / "teacher")
    what = teacher if given == "module" else f"hf:{tmp_path / 'teacher'}"
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    model = Language()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        ours, theirs = model.lm(**batch).logits, teacher.eval()(**batch).logits
    expected = LF.distillation_kl(ours[batch["attention_mask"] == 1], theirs[batch["attention_mask"] == 1])
    trainer(tmp_path, Distillation(teacher=what), look, max_steps=1).fit(model, DataLoader([batch], None))  # type: ignore[arg-type]
    assert logged == pytest.approx([float(expected)], rel=1e-5)


def test_a_mask_that_does_not_fit(tmp_path: Path) -> None:
    batch = tokens()

    class Cropped(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.lm(batch["input_ids"][:, :4]).logits.square().mean()

    with pytest.raises(ValueError, match=r"`mask` is 'attention_mask', of shape \(4, 8\).*expected \(4, 4\)"):
        trainer(tmp_path, Distillation(teacher=gpt(8, 1)), max_steps=1).fit(Cropped(), DataLoader([batch], None))  # type: ignore[arg-type]


# -- teachers --------------------------------------------------------------------------------------------------------


def test_a_timm_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    made: list[Any] = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made.append((name, pretrained)) or Cnn())  # type: ignore[func-returns-value]
    fit(tmp_path, Classifier("cnn"), Distillation(teacher="timm:some_net"))
    assert made == [("some_net", True)]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"`teacher` is 'timm:resnet1t', and timm has no such .*mean 'resnet"):
        fit(tmp_path, Classifier("cnn"), Distillation(teacher="timm:resnet1t"))


@pytest.mark.parametrize("teacher", ["", "Initial", "gone.ckpt"])
def test_a_teacher_that_is_no_file(teacher: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"`teacher` is '{teacher}', and takes 'initial', the"):
        fit(tmp_path, Classifier("cnn"), Distillation(teacher=teacher))


def test_names_may_begin_inside_the_model(tmp_path: Path) -> None:
    """Those of the student's LightningModule and of a bare teacher are then the same."""
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    for names in (
        {"hidden": ["conv", "bn"]},
        {"hidden": ["net.conv", "net.bn"], "teacher_hidden": ["conv", "bn"], "student": "net"},
    ):
        torch.manual_seed(0)
        fit(tmp_path, Classifier("cnn"), Distillation(teacher=Cnn(), kind="attention", **names), look, steps=2)  # type: ignore[arg-type]
    assert logged[:2] == logged[2:]
    with pytest.raises(ValueError, match=r"Distillation: `student` 'nett' matches no module name .*mean 'net'"):
        fit(tmp_path, Classifier("cnn"), Distillation(student="nett"))


@pytest.mark.parametrize("saved", ["with hyper-parameters", "without"])
def test_a_checkpoint(saved: str, tmp_path: Path) -> None:
    class Bare(Student):
        def __init__(self, needed: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    make = partial(Classifier, "encoder") if saved.startswith("with ") else partial(Bare, None)
    teacher = make()
    t = fit(tmp_path, teacher)
    t.save_checkpoint(tmp_path / "teacher.ckpt")
    results = []
    for what in (str(tmp_path / "teacher.ckpt"), teacher):
        module = make()
        fit(tmp_path, module, Distillation(teacher=what))
        results.append(weights(module))
    assert differing(*results) == []
    with pytest.raises(FileNotFoundError, match="did you mean"):
        fit(tmp_path, make(), Distillation(teacher=str(tmp_path / "teachr.ckpt")))


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Logits need the same classes in the same order"):
        fit(tmp_path, Student(), Distillation(teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 7))))


METHODS: dict[str, tuple[str, Any]] = {
    "norm_swap": ("timm_vit", partial(PRepBN, transition=3, hold=1, recalibrate=0)),
    "sigma_one": ("encoder", partial(SigmaReparam, init="one")),
    "no_norms": ("timm_vit", partial(SigmaReparam, remove_norms=True, init="one")),
    "pruned_at_once": ("cnn", partial(MagnitudePruning, amount=0.8, schedule="constant", scope="layer")),
    "hesso": ("cnn", partial(HESSOPruning, start=1, duration=3, periods=2)),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_initial_network_is_that_before_any_other_method(method: str, tmp_path: Path) -> None:
    net, make = METHODS[method]
    original = Classifier(net).eval()
    x = next(iter(loader(1)))[0]
    with torch.no_grad():
        expected = original(x)
    found: list[Tensor] = []

    def look(t: Any, m: Any) -> None:
        teacher = callback._taught.network  # type: ignore[union-attr]
        with torch.no_grad():
            found.append(teacher(x))
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not any(part.training for part in teacher.modules())
        mine = {id(p) for p in teacher.parameters()}
        assert not mine & {id(p) for g in t.optimizers[0].param_groups for p in g["params"]}
        assert not mine & {id(p) for p in m.parameters()}

    callback, module = Distillation(), Classifier(net)
    t = fit(tmp_path, module, callback, make(), Do(on_train_batch_end=look))
    assert all(torch.equal(out, expected) for out in found)
    t.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert not any("teacher" in name for name in file["state_dict"])
    with pytest.raises(ValueError, match=rf"{type(make()).__name__} would change it first. List Distillation before"):
        fit(tmp_path, Classifier(net), make(), Distillation())


def test_a_second_fit_learns_from_what_the_first_one_left(tmp_path: Path) -> None:
    module, swap = Classifier("encoder"), partial(PRepBN, target="dyt", transition=3, hold=1)
    fit(tmp_path, module, swap())
    logged: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: logged.append(float(t.callback_metrics["efficient/distillation/loss"])))
    fit(tmp_path, module, Distillation(), swap(), look)
    assert logged[0] == pytest.approx(0.0, abs=1e-6)


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, METHODS["norm_swap"][1]])
@pytest.mark.parametrize("teacher", ["initial", "given"])
def test_a_resumed_run_has_the_same_teacher(teacher: str, method: Any, tmp_path: Path) -> None:
    given = Classifier("timm_vit")
    for p in given.parameters():
        p.data.mul_(1.1)

    def ours() -> tuple[Any, ...]:
        first = Distillation(teacher="initial" if teacher == "initial" else given, temperature=3.0)
        return (first,) if method is None else (first, method())

    case = Case(lambda: (), {"plain": partial(Classifier, "timm_vit")}, lambda b, s, d: loader(b, s, dtype=d), tmp_path)
    assert_resume_exact(case, callbacks=ours)


def half(root: Path, *callbacks: Any) -> Path:
    save = Do(on_train_batch_end=lambda t, m: t.global_step == 3 and t.save_checkpoint(root / "half.ckpt"))
    trainer(root, *callbacks, save, max_steps=3).fit(Classifier("cnn"), ResumableLoader(loader(6)))
    return root / "half.ckpt"


def resumed(root: Path, path: Path, *callbacks: Any) -> None:
    trainer(root, *callbacks, max_steps=5).fit(
        Classifier("cnn"), ResumableLoader(loader(6)), ckpt_path=path, weights_only=True
    )


def test_resuming_without_the_teacher_is_refused(tmp_path: Path) -> None:
    path = half(tmp_path)
    with pytest.raises(RecipeError, match="the network with which its run began is not in it"):
        resumed(tmp_path, path, Distillation())
    other = Classifier("cnn")
    path = half(tmp_path, Distillation(teacher=other))
    resumed(tmp_path, path, Distillation(teacher=other))
    with pytest.raises(RecipeError, match="the network with which its run began is not in it"):
        resumed(tmp_path, path, Distillation())
    other.net.head.bias.data += 1
    with pytest.raises(RecipeError, match="is not the one with which the checkpoint was written"):
        resumed(tmp_path, path, Distillation(teacher=other))
    path = half(tmp_path, Distillation())
    with pytest.raises(RecipeError, match=r"teacher='Classifier'\) cannot resume.*whose run has teacher='initial'"):
        resumed(tmp_path, path, Distillation(teacher=other))
    content = torch.load(path, weights_only=True)
    teacher = content["callbacks"][Distillation().state_key]["teacher"]
    teacher["net.head.bias"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(RecipeError, match=r"field \['teacher'\].*net.head.bias"):
        resumed(tmp_path, path, Distillation())


# -- around it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: Any, tmp_path: Path) -> None:
    dtypes: list[Any] = []
    callback = Distillation(teacher=Student(seed=2))
    look = Do(on_train_batch_end=lambda t, m: dtypes.append({p.dtype for p in callback._taught.network.parameters()}))  # type: ignore[union-attr]
    module = Classifier("cnn")
    callback = Distillation(teacher=Classifier("encoder"))
    fit(tmp_path, module, callback, look, precision=precision)
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert dtypes[0] == {expected}
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        module = Classifier("encoder", checkpointing=checkpointing)
        fit(tmp_path, module, Distillation(teacher=Classifier("cnn"), alpha=0.8))
        found.append(weights(module))
    assert differing(*found) == []


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Manual optimizes manually"):
        fit(tmp_path, Manual("cnn"), Distillation())


def test_a_teacher_of_the_students_class_is_no_averaged_copy(tmp_path: Path) -> None:
    """Pruning writes zeros into the copies of the module that callbacks keep."""
    teacher = Classifier("cnn")
    fit(
        tmp_path,
        Classifier("cnn"),
        Distillation(teacher=teacher),
        MagnitudePruning(amount=0.8, schedule="constant", scope="layer"),
    )
    assert not any(bool((p == 0).all()) for p in teacher.parameters() if p.ndim > 1)
    assert float((teacher.net.head.weight == 0).float().mean()) == 0


def test_a_rollback_takes_the_weight_back_and_keeps_the_teacher(tmp_path: Path) -> None:
    found: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: found.append(float(t.callback_metrics["efficient/distillation/weight"])))
    values = iter([1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    guard = CollapseGuard(canary=lambda m: next(values), every_n_steps=2)
    with pytest.warns(UserWarning, match="training state of step 2 is back"):
        fit(tmp_path, Classifier("cnn"), Distillation(schedule="linear", length=6), guard, look, steps=8)
    assert found == pytest.approx([0.5 * (1 - i / 6) for i in (0, 1, 2, 3, 2, 3, 4, 5)])
    assert guard._kept is not None
    assert "teacher" not in guard._kept.methods[Distillation().state_key]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"alpha": 1.5}, "`alpha` must be a weight from 0 to 1; got 1.5"),
        ({"alpha": math.nan}, "`alpha` must be a finite number"),
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0"),
        ({"kind": "dark"}, "`kind` must be one of"),
        ({"kind": "cosine_hidden"}, "kind='cosine_hidden' needs `hidden`"),
        ({"hidden": ["net"]}, "kind='kl' needs `hidden`: None"),
        ({"kind": "attention", "hidden": ["a"], "teacher_hidden": []}, "`teacher_hidden` must name as many"),
        ({"teacher": 3}, "`teacher` takes 'initial', a path"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Distillation(**arguments)


def test_yaml() -> None:
    made = build_callback("distillation", {"teacher": "last.ckpt", "alpha": 0.3, "schedule": "cosine", "hold": 10})
    assert isinstance(made, Distillation)
    assert (made.teacher, made.alpha, made.schedule, made.hold) == ("last.ckpt", 0.3, "cosine", 10)
    with pytest.raises(ValueError, match="kind"):
        build_callback("distillation", {"kind": "dark"})


@pytest.mark.forks
def test_two_processes_are_one_with_both_batches(tmp_path: Path) -> None:
    ended = forked(Path(__file__).parent / "scripts" / "distillation_ddp.py", tmp_path, processes=2)
    assert ended.code == 0, ended.output
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = forked(Path(__file__).parent / "scripts" / "distillation_ddp.py", tmp_path, "alone")
    assert alone.code == 0, alone.output
    single = json.loads((tmp_path / "alone.json").read_text())
    assert one == two
    assert one["weights"] == pytest.approx(single["weights"], abs=1e-9)
