"""Commands as one calls them: version, completion, export of models with ids and masks, checks before an ablation."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from token_models import Callable, TokenData

import lightning_efficient
from lightning_efficient import MagnitudePruning, SigmaReparam, TempScale
from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.files import read_json
from lightning_efficient.ablation.job import Job, run_job
from lightning_efficient.ablation.program import Program, check_variants
from lightning_efficient.ablation.variants import read_variants
from lightning_efficient.cli import build_parser, main
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.registry import METHODS
from lightning_efficient.deploy.export import save_exported


def run(*args: object) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.split() == ["lightning-efficient", lightning_efficient.__version__]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["exp"], ["export"]),
        (["export", "--dyn"], ["--dynamic-batch", "--dynamic-axes"]),
        (["fit", "--norm_swap.tr"], ["--norm_swap.transition"]),
        (["ablate", "--time"], ["--time-limit"]),
        (["targets", "--inp"], ["--input"]),
        (["compare", "x"], []),
        (["completion", "z"], ["zsh"]),
        (["tune-temperature", "--resam"], ["--resamples"]),
    ],
)
def test_completion_in_bash(line: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", "bash") == 0
    script = capsys.readouterr().out
    words = " ".join(["lightning-efficient", *line])
    asked = f"COMP_WORDS=({words}); COMP_CWORD={len(line)}; _lightning_efficient; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(expected)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells_names_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("tune-temperature", "targets", "norm_swap.target", "output-names"))
    if found := shutil.which(shell):
        subprocess.run([found, "-n", "-c", script], check=True)


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Callable(), TokenData())
    path = str(tmp_path_factory.mktemp("run") / "last.ckpt")
    trainer.save_checkpoint(path)
    return path


INPUTS: dict[str, list[str]] = {
    "data": ["--data=token_models.TokenData"],
    "names": ["--input=input_ids=2,6:int", "--input=attention_mask=2,6:mask"],
    "places": ["--input", "2,6:int", "--input", "2,6:mask"],
}


@pytest.mark.parametrize("given", INPUTS)
def test_models_with_ids_and_masks_become_programs(
    checkpoint: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model [b].pt2"
    axes = ["--dynamic-axes=input_ids=0,1", "--dynamic-axes=attention_mask=0,1"]
    command = ["export", checkpoint, "--model=token_models.Callable", f"--out={out}", *INPUTS[given], *axes]
    assert run(*command) == 0
    assert capsys.readouterr().out.startswith(f"{out}  0.1 MiB  (read back: max abs difference ")
    program = torch.export.load(out).module()
    model = Callable.load_from_checkpoint(checkpoint).eval()
    ids, mask = torch.randint(0, 12, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    names = {} if given == "places" else {"input_ids": ids, "attention_mask": mask}
    found = program(**names) if names else program(ids, mask)
    torch.testing.assert_close(found, model(ids, mask), rtol=1e-4, atol=1e-5)


def test_onnx_with_opset_and_names(checkpoint: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "model.onnx"
    command = ["export", checkpoint, "--model=token_models.Callable", f"--out={out}", *INPUTS["names"]]
    assert run(*command, "--opset=20", "--output-names", "logits", "--dynamic-batch") == 0
    graph = onnx.load(out)
    assert [node.name for node in graph.graph.input] == ["input_ids", "attention_mask"]
    assert [node.name for node in graph.graph.output] == ["logits"]
    assert [opset.version for opset in graph.opset_import if not opset.domain] == [20]


@pytest.mark.filterwarnings("ignore")  # of torch.onnx, about the version
def test_onnx_that_is_not_as_asked_for_is_refused(tmp_path: Path) -> None:
    """Versions that torch.onnx does not convert to, and more names than outputs, which it leaves aside."""
    pytest.importorskip("onnxscript")
    net, inputs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).eval(), torch.randn(2, 3)
    with pytest.raises(ExportError, match=r"`output_names` are \['y', 'z'\], but the model has 1 output"):
        save_exported(net, inputs, tmp_path / "a.onnx", output_names=["y", "z"])
    with pytest.raises(ExportError, match=r"`opset`=5 cannot be had: torch.onnx made opset"):
        save_exported(net, inputs, tmp_path / "a.onnx", opset=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pt2"])
def test_files_have_the_rights_of_any_other_and_errors_name_them(suffix: str, tmp_path: Path) -> None:
    net, inputs = torch.nn.Linear(3, 4), torch.randn(2, 3)
    save_exported(net, inputs, tmp_path / f"a{suffix}")
    (tmp_path / "other").write_text("")
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(OSError, match=rf"cannot write '{tmp_path}/other/a{suffix}'"):
        save_exported(net, inputs, tmp_path / "other" / f"a{suffix}")


REFUSED: dict[str, tuple[list[str], str]] = {
    "suffix": (["--out=model.onx"], "'model.onx'; expected a suffix among"),
    "opset": (["--out=a.pt2", "--opset=18"], "`opset`=18 is for .onnx files"),
    "output names": (["--out=a.safetensors", "--output-names", "y"], "`output_names`=['y'] is for .onnx files"),
    "both": (["--out=a.pt2", "--data=token_models.TokenData", "--input=1,2"], "give one of them"),
    "a shape": (["--out=a.pt2", "--input=1,b"], "'1,b' is not a shape"),
    "no data": (["--out=a.pt2", "--data=token_models.Encoder"], "expected a LightningDataModule class"),
    "axes": (["--out=a.pt2", "--dynamic-axes=ids"], "'ids' is no input and axes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_before_the_checkpoint_is_read(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = REFUSED[case]
    assert run("export", "no_such.ckpt", "--model=token_models.Callable", *arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "no_such.ckpt" not in shown


def test_inputs_that_nothing_tells_are_asked_for_by_their_option(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", checkpoint, "--model", "token_models.Callable", "--out", tmp_path / "x.onnx") == 2
    assert "give --input with the shape of each input, such as" in capsys.readouterr().err


def test_axes_that_are_not_there(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", checkpoint, "--model=token_models.Callable", f"--out={tmp_path / 'a.pt2'}", *INPUTS["names"]]
    assert run(*command, "--dynamic-axes=input_id=1") == 2
    assert "'input_id' (did you mean 'input_ids'?)" in capsys.readouterr().err
    assert run(*command, "--dynamic-axes=input_ids=2") == 2
    assert "which has 2 axes" in capsys.readouterr().err


def test_a_file_that_runs_code_needs_trust(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"] = {"own": Path("x")}  # an object of a class
    torch.save(content, tmp_path / "own.ckpt")
    command = ["export", tmp_path / "own.ckpt", "--model=token_models.Callable", f"--out={tmp_path / 'a.pt'}"]
    command += INPUTS["names"]
    assert run(*command) == 2
    assert "--trust" in capsys.readouterr().err
    assert run(*command, "--trust") == 0


# -- ablate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked() -> Iterator[Asked]:
    with Asked() as one:
        yield one


def program(**keys: dict[str, Any]) -> Program:
    """One that starts, whatever it is told."""
    config = {name: {"enabled": False} for name in METHODS.with_callback} | keys
    return Program(("-m", "this"), (), True, True, {"trainer": {}, **config})


def test_variants_are_checked_with_the_configuration_they_change(asked: Asked) -> None:
    base = program(linear_attention={"enabled": True}, magnitude_pruning={"enabled": False, "amount": 0.25})
    with pytest.raises(ValueError, match=r"variant 'a' with the configuration: .*linear attention has no softmax"):
        check_variants(read_variants({"a": {"TempScale": {"tau": 0.5}}}), base, asked)
    with pytest.raises(ValueError, match=r"variant 'b' with the configuration: .*more than a whole run"):
        check_variants(
            read_variants({"b": {"hesso_pruning": {"duration": 0.8}}}), program(hesso_pruning={"start": 0.5}), asked
        )


def test_options_that_the_program_refuses_stop_before_the_first_run(tmp_path: Path, asked: Asked) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys\nsys.exit('error: no --widht=3' if '--widht=3' in sys.argv else 0)")
    base = Program((str(script),), ("--lr=1",), True, True, program().config)
    twice = read_variants({"a": {"config": {"width": 3}}, "b": {"config": {"width": 4}}})
    assert check_variants(twice, base, asked) == []
    with pytest.raises(
        ValueError, match=r"variant 'c': `python .*train\.py fit --lr=1 --widht=3` .*\nerror: no --widht=3"
    ):
        check_variants(read_variants({"c": {"config": {"widht": 3}}}), base, asked)


def test_variants_that_change_nothing_are_named(asked: Asked) -> None:
    variants = {
        "still": {"temp_scale": {"tau": 1}}, "looks": {"sigma_reparam": {"monitor_only": True}},
        "none": {"magnitude_pruning": {"amount": 0.0}}, "moves": {"temp_scale": {"learnable": True}},
        "again": {"norm_swap": {"target": "dyt"}},
    }  # fmt: skip
    said = check_variants(read_variants(variants), program(norm_swap={"enabled": True, "target": "dyt"}), asked)
    assert [text.partition(":")[0].partition(" ")[0] for text in said] == ["still", "looks", "none", "again"]
    assert "TempScale changes nothing: tau=1" in said[0]
    assert "again trains exactly as baseline does" in said[3]


@pytest.mark.parametrize(
    ("callback", "nothing"),
    [
        (TempScale(), True), (TempScale(tau=[1.0, 1.0]), True), (TempScale(tau=[1.0, 0.9]), False),
        (TempScale(mode="log_n"), False), (MagnitudePruning(amount=0), True), (SigmaReparam(), False),
        (MagnitudePruning(amount=0, amounts={"head": 0.5}), False), (SigmaReparam(monitor_only=True), True),
    ],
)  # fmt: skip
def test_what_changes_nothing(callback: Any, nothing: bool) -> None:
    assert bool(callback.without_effect()) is nothing


def test_a_run_over_its_time_limit_is_ended_and_kept_as_failed(tmp_path: Path) -> None:
    job = Job(str(tmp_path), {"fit": ("-c", "import time; time.sleep(60)")}, {}, str(tmp_path), 30.0, time_limit=0.5)
    run_job(job)
    status = read_json(tmp_path / "status.json")
    assert status["state"] == "failed"
    assert "time limit of a run, 0.5 seconds" in status["error"]
    assert status["seconds"] < 20


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5h", 5400), ("2m", 120), ("10s", 10)])
def test_times(text: str, seconds: float) -> None:
    times = [f"--time-limit={text}", f"--checkpoint-every={text}"]
    options = build_parser().parse_args(["ablate", "--methods", "temp_scale", *times])
    assert options.time_limit == options.checkpoint_every == seconds


@pytest.mark.parametrize("text", ["0", "soon", "-3", "3d", ""])
def test_what_is_no_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ablate", "--methods", "temp_scale", f"--time-limit={text}") == 2
    assert "is no time" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_a_config_that_names_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a script with `LightningCLI(MyModel)` has it; the parser takes it for arguments of LightningModule."""
    (tmp_path / "base.yaml").write_text("model: {width: 16}\n")
    assert run("fit", "-c", str(tmp_path / "base.yaml")) == 2
    assert "No class is named: write `model: {class_path:" in capsys.readouterr().err
