"""TensorBoard's own table over several runs, as its plugin answers: the user's metrics first, the keys of all runs."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context

from lightning_efficient import read_runs
from lightning_efficient.ablation.board import BOARD, board
from lightning_efficient.trainer.tensorboard import write_hparams

RUNS = {
    "baseline/seed_0": {"lr": 0.1, "deep": True, "efficient": {"norm_swap": False}, "mixed": 3},
    "baseline/seed_1": {"lr": 0.2, "deep": True, "efficient": {"norm_swap": False}, "mixed": "auto"},
    "swap/seed_0": {"lr": 0.1, "deep": True, "efficient": {"norm_swap": True}, "mixed": 3, "only here": "x"},
}
LOGGED = ["val_acc", "efficient/run_cost/step_ms", "Acc@[1]", "zeta", "val\x1b[1mf1", "wörd\u202e ✓", "tab\tloss\n"]


def experiment(logs: Path):
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 100})
    multiplexer.AddRunsFromDirectory(str(logs))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logs))
    hparams, request = Context(TBContext(data_provider=provider, logdir=str(logs))), RequestContext()
    return hparams.experiment_from_metadata(request, "", True, hparams.hparams_metadata(request, ""), [])


def columns(found) -> list[tuple[object, ...]]:
    return [(i.name, i.type, i.differs, str(i.domain_interval), sorted(map(str, i.domain_discrete)))
            for i in found.hparam_infos]  # fmt: skip


def test_the_users_metrics_come_first_and_no_key_is_lost(tmp_path: Path) -> None:
    for run, hparams in RUNS.items():
        variant, seed = run.split("/")
        logger = TensorBoardLogger(tmp_path, variant, seed)
        write_hparams(logger, hparams)
        logger.log_metrics(dict.fromkeys(LOGGED, 1.0) | ({"efficient/norm_swap/lambda": 0.5} if "swap" in run else {}))
        logger.finalize("success")
    before = experiment(tmp_path)
    assert before.metric_infos[1].name.tag.startswith("efficient/"), "as TensorBoard sorts them"

    runs = read_runs([tmp_path])
    record = board([tmp_path / run for run in RUNS], {tag for run in runs for tag in run.tags})
    (tmp_path / "baseline" / "seed_1" / BOARD).write_bytes(record)
    after = experiment(tmp_path)
    tags = [metric.name.tag for metric in after.metric_infos]
    users, ours = sorted(name for name in LOGGED if "efficient" not in name), tags[-2:]
    assert tags == [*users, *ours]
    assert ours == ["efficient/norm_swap/lambda", "efficient/run_cost/step_ms"]
    assert sorted(tags) == sorted(metric.name.tag for metric in before.metric_infos), "no column is empty"
    assert columns(after) == columns(before)
    assert {run.variant: run.series.keys() for run in read_runs([tmp_path])} == {
        run.variant: run.series.keys() for run in runs
    }, "it is no run"
