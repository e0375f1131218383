"""The examples run; transformers.Trainer resumes to the bit; accelerate and Fabric see what a plain loop sees."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forking import forked
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_efficient import EfficientTrainerCallback, attach, export, save_exported

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS: dict[str, dict[str, Any]] = {
    "sigma_reparam": {"init": "one"},
    "magnitude_pruning": {"amount": 0.5, "start": 1, "length": 3, "every": 1},
}
BATCHES = [(torch.randn(8, 16), torch.arange(8) % 4) for _ in range(6)]


@pytest.mark.parametrize("name", ["accelerate_loop", "fabric_loop", "plain_loop", "transformers_trainer"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2 if name == "plain_loop" else 1):  # the second time it resumes
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def plain(steps: int = 6) -> tuple[nn.Module, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    driver = attach(model, optimizer, METHODS, total_steps=6)
    for inputs, labels in BATCHES[:steps]:
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    return model, driver


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_fabric() -> None:
    fabric, bare = Fabric(accelerator="cpu"), net()
    model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), 1e-2))
    driver = attach(model, optimizer, METHODS, total_steps=6)
    for inputs, labels in BATCHES:
        fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    assert driver.finish() is bare
    assert equal(bare, plain()[0])


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator, bare = accelerate.Accelerator(cpu=True), net()
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), 1e-2))
    driver = attach(model, optimizer, METHODS, total_steps=6)
    accelerator.register_for_checkpointing(driver)
    for step, (inputs, labels) in enumerate(BATCHES):
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
        if step == 2:
            accelerator.save_state(str(tmp_path / "state"))
    assert equal(bare, whole := plain()[0])
    accelerator.load_state(str(tmp_path / "state"))
    assert driver.steps == 3
    for inputs, labels in BATCHES[3:]:
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    assert equal(driver.finish(), whole)


UNITS = {"hesso_pruning": {"target": 0.4, "start": 1, "duration": 3, "periods": 2}}
IMAGES = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(5)]


def smaller(door: str, folder: Path) -> nn.Module:
    """A network with running statistics, residual sums and grouped widths; interrupted and gone on with, where that
    is the door's business."""
    torch.manual_seed(0)
    bare = timm.create_model("test_resnet", num_classes=4)
    model: Any = bare
    optimizer: Any = torch.optim.AdamW(bare.parameters(), 1e-2)
    backward: Any = Tensor.backward
    if door == "fabric":
        fabric = Fabric(accelerator="cpu")
        model, optimizer = fabric.setup(bare, optimizer)
        backward = fabric.backward
    elif door == "accelerate":
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(bare, optimizer)
        backward = accelerator.backward
    driver = attach(model, optimizer, UNITS, total_steps=5, example=IMAGES[0][0][:2])
    if door == "accelerate":
        accelerator.register_for_checkpointing(driver)

    def train(batches: list[tuple[Tensor, Tensor]]) -> None:
        for inputs, labels in batches:
            backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
            driver.step()

    train(IMAGES[:3])
    if door == "accelerate":
        accelerator.save_state(str(folder / "state"))
        train(IMAGES[3:])
        accelerator.load_state(str(folder / "state"))
    train(IMAGES[3:])
    assert driver.finish() is bare
    return bare


@pytest.mark.parametrize("door", ["fabric", "accelerate"])
def test_units_go_as_in_a_plain_loop(door: str, tmp_path: Path) -> None:
    small, reference = smaller(door, tmp_path), smaller("plain", tmp_path)
    states = [model.state_dict() for model in (small, reference)]
    assert sum(p.numel() for p in small.parameters()) < 0.7 * 373_076
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "buffers, too"
    inputs = IMAGES[0][0]
    plain = export(small, inputs)
    save_exported(plain, inputs, tmp_path / "small.pt2")
    program = torch.export.load(tmp_path / "small.pt2").module()
    torch.testing.assert_close(program(inputs), small.eval()(inputs))


def test_a_step_that_the_scaler_skips() -> None:
    """An infinite gradient: no step, no change, and the schedule goes on, as a Trainer's does."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    driver = attach(model, optimizer, METHODS, total_steps=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, (inputs, labels) in enumerate(BATCHES):
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
        if step == 4:
            next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        before = [p.clone() for p in model.parameters()]
        scaler.unscale_(optimizer)
        driver.before_step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 4:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        driver.step()
    assert driver.steps == 6
    assert all(bool(p.isfinite().all()) for p in driver.finish().parameters())


# -- transformers


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = torch.randint(3, 32, (48, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trained(folder: Path, steps: int, resume: bool | str = False, methods: Any = METHODS, **arguments: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ours = EfficientTrainerCallback(methods, example={"input_ids": Rows().rows[:2]})
    options: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_steps": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    trainer = hf.Trainer(
        hf.LlamaForCausalLM(config), hf.TrainingArguments(str(folder), **(options | arguments)),
        train_dataset=Rows(), eval_dataset=Rows(), callbacks=[ours],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, ours


HF = METHODS | {"temp_scale": {"tau": 0.8}}


@pytest.mark.filterwarnings("ignore:magnitude_pruning ends at step")
def test_transformers_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, ours = trained(tmp_path / "whole", 6, methods=HF)
    assert ours.driver.steps == 6
    weights = [m.weight for m in whole.model.modules() if isinstance(m, nn.Linear)]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share == pytest.approx(0.5, abs=1e-3)
    trained(tmp_path / "again", 4, methods=HF)
    again, ours = trained(tmp_path / "again", 6, resume=True, methods=HF)
    assert ours.driver.steps == 6
    assert equal(whole.model, again.model)


def test_transformers_saves_a_smaller_model(tmp_path: Path) -> None:
    """A run that was interrupted ends as the whole one; the smaller model is one that the library reads."""
    import transformers as hf

    units = {"hesso_pruning": {"target": 0.4, "start": 1, "duration": 4, "periods": 2}}
    whole, _ = trained(tmp_path, 6, methods=units)
    assert whole.model.model.layers[0].mlp.up_proj.out_features < 32
    again, _ = trained(tmp_path, 6, resume=str(tmp_path / "checkpoint-4"), methods=units)
    assert equal(whole.model, again.model)
    again.save_model(str(tmp_path / "small"))  # the one that was resumed: no file says how it is called
    small = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = Rows().rows[:2]
    torch.testing.assert_close(small(ids).logits, whole.model.eval()(ids).logits)


def test_transformers_ends_with_the_best_model(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    with pytest.warns(UserWarning, match="ends at step 2, before it has pruned all"):
        trainer, ours = trained(tmp_path, 6, metric_for_best_model="loss", learning_rate=1e-1, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert ours.driver.steps == 2


def test_transformers_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm_swap does not work in a transformers"):
        EfficientTrainerCallback({"prepbn": True})
    for wrong, message in {
        "sigma_reparm": "did you mean",
        "temp_scale": "Pass `example`",
        "distillation": "loop",
    }.items():
        with pytest.raises(ValueError, match=message):
            EfficientTrainerCallback({wrong: {}})
    trained(tmp_path, 4)
    with pytest.raises(ValueError, match="`amount` was 0"):
        trained(tmp_path, 6, resume=True, methods=METHODS | {"magnitude_pruning": {"amount": 0.6}})
    (tmp_path / "checkpoint-4" / "efficient_methods.pt").unlink()
    with pytest.raises(FileNotFoundError, match="resume_from"):
        trained(tmp_path, 6, resume=True)


TEMPERATURE = {"temp_scale": {"tau": 0.5}}


def queries(trainer: Any) -> Tensor:
    return trainer.model.model.layers[0].self_attn.q_proj.weight.detach().clone()


def test_transformers_trains_twice(tmp_path: Path) -> None:
    """A temperature is not given twice, and what was pruned stays so; unknown to a new callback, it is refused."""
    both = TEMPERATURE | {"magnitude_pruning": {"amount": 0.5, "schedule": "one_shot", "start": 3}}
    trainer, ours = trained(tmp_path, 4, methods=both, learning_rate=0.0)
    once = queries(trainer)
    assert float((once == 0).float().mean()) > 0.2
    trainer.train()
    torch.testing.assert_close(queries(trainer), once)
    assert ours.driver.steps == 4
    trainer.remove_callback(type(ours))
    trainer.add_callback(EfficientTrainerCallback(TEMPERATURE, example={"input_ids": Rows().rows[:2]}))
    with pytest.raises(ValueError, match=r"hold the temperature of an earlier run already.*Leave temp_scale out"):
        trainer.train()
    torch.testing.assert_close(queries(trainer), once)


def test_transformers_finds_its_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that did not fit into memory leaves no trace in the one that does."""
    import transformers as hf

    step = hf.Trainer.training_step

    def small(self: Any, model: nn.Module, inputs: Any, *more: Any) -> Tensor:
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
        return step(self, model, inputs, *more)

    monkeypatch.setattr(hf.Trainer, "training_step", small)
    options = {"methods": METHODS | TEMPERATURE, "auto_find_batch_size": True}
    found, ours = trained(tmp_path, 4, per_device_train_batch_size=5, **options)
    batch = found._train_batch_size
    assert batch <= 4
    whole, _ = trained(tmp_path, 4, per_device_train_batch_size=batch, **options)
    assert ours.driver.steps == 4
    assert equal(found.model, whole.model)


@pytest.mark.filterwarnings("ignore:magnitude_pruning ends at step")
def test_transformers_refuses_another_runs_state(tmp_path: Path) -> None:
    """Folders of one name in two places: the Trainer reads one, and the callback looked into the other."""
    trained(tmp_path / "mine", 4)
    trained(tmp_path / "other", 4, learning_rate=2e-2)
    with pytest.raises(ValueError, match=r"weights of the model .*\.weight.* are not those that .*mine.*resume_from"):
        trained(tmp_path / "mine", 6, resume=str(tmp_path / "other" / "checkpoint-4"))


@pytest.mark.forks
def test_transformers_on_two_processes(tmp_path: Path) -> None:
    """They end with what one has on the doubled batch."""
    script = Path(__file__).parent / "scripts" / "trainer_ddp.py"
    for processes in (1, 2):
        done = forked(script, tmp_path, processes=processes)
        assert done.code == 0, done.output
    whole, *halves = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert sum(int((value == 0).sum()) for value in whole.values()) > 500
    for half in halves:
        for name, value in whole.items():
            torch.testing.assert_close(half[name], value, rtol=0, atol=1e-12)
