"""The YAML switches and the console script, in process, on the demo's real data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_efficient.demo
from lightning_efficient import EfficientCLI, SigmaReparam
from lightning_efficient.cli import main
from lightning_efficient.common.names import VARIABLE
from lightning_efficient.common.registry import METHODS
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.lifecycle.base import EfficientCallback

BASELINE = Path(lightning_efficient.demo.__file__).parent / "baseline.yaml"
SMALL = ["--model.depth=1", "--model.embed_dim=16", "--model.num_heads=2"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]
SHORT += ["--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the console script in this process; the exit code."""

    def run(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-efficient", *map(str, args)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CLI that makes everything and runs nothing."""

    def make(kind: type[LightningCLI], *args: object) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args), "--trainer.logger=false"])
        return kind(DigitsViT, subclass_mode_model=True, run=False)

    return make


def file(name: str, text: str) -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def ours(trainer: pl.Trainer) -> dict[str, Any]:
    found = [cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback)]
    assert len({cb.method for cb in found}) == len(found)
    return {cb.method: cb for cb in found}


# -- YAML


def test_stock_lightning_cli_with_a_class_path(cli: Any) -> None:
    config = yaml.safe_load(BASELINE.read_text(encoding="utf-8"))
    del config["collapse_monitor"]
    init_args = {"init": "one", "exclude": ["net.head"]}
    config["trainer"]["callbacks"] = [{"class_path": "lightning_efficient.SigmaReparam", "init_args": init_args}]
    made = cli(LightningCLI, "-c", file("stock.yaml", yaml.safe_dump(config)), *SMALL, *SHORT)
    assert ours(made.trainer)["sigma_reparam"].config() == SigmaReparam(**init_args).config()

    def spectral_norms() -> list[float]:
        weights = (made.model.net.blocks[0].attn.qkv.weight, made.model.net.head.weight)
        return [torch.linalg.matrix_norm(weight.detach(), 2).item() for weight in weights]

    before = spectral_norms()
    made.trainer.fit(made.model, datamodule=made.datamodule)
    # init="one" lifts every targeted norm to 1, and four steps move it by a few per cent; the head is excluded.
    assert max(before) < 0.5
    assert spectral_norms() == [pytest.approx(1.0, abs=0.1), pytest.approx(before[1], abs=0.1)]


def test_every_method_has_a_key_and_is_off(cli: Any) -> None:
    made = cli(EfficientCLI, "--model=DigitsViT")
    assert {name: cb.enabled for name, cb in ours(made.trainer).items()} == dict.fromkeys(METHODS.with_callback, False)


@pytest.mark.parametrize(("last", "enabled"), [([], False), (["--sigma_reparam.enabled=true"], True)])
def test_files_merge_key_by_key(cli: Any, last: list[str], enabled: bool) -> None:
    on = file("on.yaml", "sigma_reparam: {enabled: true, qkv: split, exclude: [net.head]}")
    off = file("off.yaml", "sigma_reparam: {enabled: false}")
    made = cli(EfficientCLI, "-c", BASELINE, "-c", on, "-c", off, *last)
    assert (
        ours(made.trainer)["sigma_reparam"].config() == SigmaReparam(enabled, None, ["net.head"], qkv="split").config()
    )
    assert ours(made.trainer)["collapse_monitor"].every_n_steps == 60


class Evaluates(EfficientCLI):
    """Commands that are not quite Lightning's, and a look at which parsers are made."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = EfficientCLI.subcommands()
        return {**known, "validate": {*known["validate"], "verbose"}}

    def add_arguments_to_parser(self, parser: Any) -> None:
        self.made = getattr(self, "made", 0) + 1

    def before_instantiate_classes(self) -> None:
        raise StopIteration(self)


@pytest.mark.parametrize(
    ("words", "kwargs", "parsers"),
    [
        (["validate"], {}, 1),
        (["validate"], {"parser_kwargs": {"test": {"description": "none"}, "validate": {"description": "own"}}}, 1),
        (["-c", "both.yaml", "validate"], {}, 4),
        (["validate"], {"parser_kwargs": {"default_config_files": ["both.yaml"]}}, 4),
    ],
)
def test_the_parser_of_the_command_alone_is_made(
    words: list[str], kwargs: Any, parsers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless sections for others may come from somewhere."""
    one = yaml.safe_dump({"validate": {"trainer": {"limit_val_batches": 2}}, "test": {"trainer": {"max_steps": 3}}})
    file("both.yaml", one)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(StopIteration) as parsed:
        Evaluates(DigitsViT, **kwargs)
    assert parsed.value.value.made == parsers
    assert (parsed.value.value.config.validate.trainer.limit_val_batches == 2) == (parsers == 4)


def test_a_subclass_may_add_arguments_without_super(cli: Any) -> None:
    class Mine(EfficientCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_argument("--mine", type=int, default=3)

    made = cli(Mine, "--model=DigitsViT", "--sigma_reparam.enabled=true")
    assert made.config.mine == 3
    assert ours(made.trainer)["sigma_reparam"].enabled


def test_printed_configuration_reads_back(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", BASELINE, "--sigma_reparam.include=[net.blocks]", "--print_config") == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["sigma_reparam"]["include"] == ["net.blocks"]
    assert run("fit", "-c", file("printed.yaml", first), "--print_config") == 0
    assert capsys.readouterr().out == first


# -- one run, and what follows it


@pytest.fixture
def trained(run: Any, tmp_path: Path) -> Path:
    """Folder of a run by the console script."""
    override = file("sigma.yaml", "sigma_reparam: {enabled: true}")
    logger = f"--trainer.logger={json.dumps({'class_path': 'TensorBoardLogger', 'init_args': {'save_dir': 'logs'}})}"
    assert run("fit", "-c", BASELINE, "-c", override, *SMALL, *SHORT, logger) == 0
    return tmp_path / "logs/lightning_logs/version_0"


def test_fit_targets_export_compare(run: Any, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    off = dict.fromkeys(METHODS.with_callback, False)
    assert {name: saved[name]["enabled"] for name in off} == off | {
        "sigma_reparam": True,
        "collapse_monitor": True,
    }

    capsys.readouterr()
    assert run("targets", "-c", trained / "config.yaml", "--sigma_reparam.exclude=[net.head]") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "✓ net.blocks.0.attn.qkv.weight 48×16, 1 gain" in shown
    assert "5 matched, 1 left alone" in shown
    assert "excluded by 'net.head'" in shown
    assert "scaled_dot_product_attention, 2 heads" in shown

    (checkpoint,) = (trained / "checkpoints").glob("*.ckpt")
    model = "lightning_efficient.demo.model.DigitsViT"
    assert run("export", checkpoint, "--model", model, "--submodule=net", "--out=out/net.safetensors") == 0
    from safetensors.torch import load_file

    plain = DigitsViT.load_from_checkpoint(checkpoint).net.state_dict()
    written = load_file("out/net.safetensors")
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], plain[name]) for name in plain)

    assert run("compare", "logs", "--metrics", "train_loss", "--json=out/numbers.json", "--png=out/curves.png") == 0
    assert json.loads(Path("out/numbers.json").read_text(encoding="utf-8"))["metrics"] == ["train_loss"]
    assert Path("out/curves.png").stat().st_size > 10_000
    assert "train_loss" in capsys.readouterr().out


# -- wrong input: exit code 2 and a few lines


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "-c", "nope.yaml"], ["nope.yaml", "does not exist"]),
        (["fit", "-c", BASELINE, "-c", {"sigma_reparam": {"inti": "one"}}], ["did you mean 'sigma_reparam.init'"]),
        (["fit", "-c", BASELINE, "-c", {"sigma_reparam": {"init": "two"}}], ["sigma_reparam.init", "two", "'one'"]),
        (["fit", "-c", BASELINE, "--colapse_monitor.enabled=true"], ["did you mean 'collapse_monitor.enabled'"]),
        (["fit", "-c", BASELINE, "--collapse_monitor.every_n_steps=0"], ["`every_n_steps` is 0", "at least 1"]),
        (["fit", "--model=nope.Foo"], ["nope.Foo", "No module named 'nope'"]),
        (
            ["fit", "-c", BASELINE, "--trainer.callbacks+=lightning_efficient.SigmaReparam"],
            ["`trainer.callbacks`", "its own key `sigma_reparam`"],
        ),
        (["fit", "-c", BASELINE, "--temp_scale.celsius=1"], ["; temp_scale has enabled, include,"]),
        (["targets", "-c", BASELINE, "--sigma_reparam.embeddngs=true"], ["did you mean 'sigma_reparam.embeddings'"]),
        (["targets", "-c", BASELINE, "--sigma_reparam={enabled: true, include: [blks]}"], ["sigma_reparam", "refuse"]),
        (["targets", "--model=torch.nn.Identity"], ["Identity has no parameters"]),
        (["export", "a.ckpt", "--model=nope.Foo", "--out=a.pt2"], ["nope.Foo", "package.module.Class"]),
        (["export", "a.ckpt", "--model=torch.nn.Linear", "--out=a.pt2"], ["torch.nn.Linear", "LightningModule"]),
        (["export", "a.ckpt", "--model=lightning_efficient.demo.model.DigitsViT", "--out=a.pt2"], ["'a.ckpt'"]),
        (["export", "cut.ckpt", "--model=lightning_efficient.demo.model.DigitsViT", "--out=a.pt2"], ["cut short"]),
        (["export", "other.ckpt", "--model=lightning_efficient.demo.model.DigitsViT", "--out=a.pt2"], ["does not fit"]),
        (["export", "a.ckpt", "--model=lightning_efficient.demo.model.Nope", "--out=a.pt2"], ["has no 'Nope'"]),
        (["export", "a.ckpt", "--model=Nope", "--out=a.pt2"], ["package.module.Class"]),
        (["export", "a.ckpt", "--model=x.Y", "--out=a.pt2", "--weights-only=maybe"], ["'maybe'", "true nor false"]),
        (["fit", "-c", BASELINE, "--ckpt_path=cut.ckpt"], ["'cut.ckpt' is not a whole checkpoint"]),
        (["test", "-c", BASELINE, "--ckpt_path=cat.ckpt"], ["no checkpoint 'cat.ckpt' (did you mean ['cut.ckpt'"]),
        (["validate", "-c", BASELINE, "--ckpt_path=."], ["'.' is not a whole checkpoint", "a folder"]),
        (["tune-temperature", "-c", BASELINE, "--metric=val_acc", "--ckpt_path=cut.ckpt"], ["not a whole checkpoint"]),
        (["fit", "-c", "bad.yaml"], ["parsing config", "expected ',' or ']'"]),
        (["ablate", "--variants", "bad.yaml"], ["bad.yaml"]),
        (["compare", "logs", "--json=cut.ckpt/x.json"], ["logs"]),
        (["export", "a.ckpt", "--model=x.Y", "--out=a.pt2", "--input-shape=1,x"], ["'1,x'", "1,3,224,224"]),
        (["compare", "nowhere"], ["nowhere"]),
        (["frobnicate"], ["frobnicate", "targets"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_wrong_input(run: Any, args: list[Any], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = [file("over.yaml", yaml.safe_dump(arg)) if isinstance(arg, dict) else arg for arg in args]
    file("bad.yaml", "trainer: {max_epochs: [1")
    torch.save({"state_dict": {"w": torch.ones(3)}, "pytorch-lightning_version": pl.__version__}, "other.ckpt")
    Path("cut.ckpt").write_bytes(Path("other.ckpt").read_bytes()[:700])
    assert run(*args) == 2
    shown = capsys.readouterr().err
    assert [part for part in said if part not in shown] == []
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 14


def test_a_refusal_during_fit_is_short(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    no_match = "--sigma_reparam={enabled: true, include: [blks]}"
    assert run("fit", "-c", BASELINE, no_match, *SMALL, *SHORT, "--trainer.logger=false") == 2
    assert "'blks' matches no module name (did you mean 'net.blocks'?)" in capsys.readouterr().err


def test_an_error_of_the_users_keeps_its_traceback(run: Any) -> None:
    """And a module in the current folder is importable, as with ``python -m``."""
    code = "import lightning_efficient.demo.model as m\nclass Mine(m.DigitsViT):\n"
    code += "    def training_step(self, batch, batch_idx):\n        raise ValueError('mine')\n"
    file("my_own_model.py", code)
    with pytest.raises(ValueError, match="mine"):
        run("fit", "-c", BASELINE, "--model=my_own_model.Mine", *SMALL, *SHORT, "--trainer.logger=false")


def test_the_environment_switch_is_refused_here(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "m.yaml")
    assert run("fit", "-c", BASELINE) == 2
    assert f"{VARIABLE} is set" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, lightning_efficient.cli as c\ntry: c.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert [c for c in ("fit", "targets", "export", "compare", "demo") if f"\n    {c} " not in done.stdout] == []


@pytest.fixture(autouse=True)
def _a_seed_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when it has to choose one, unless an earlier test in the process left one behind."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
