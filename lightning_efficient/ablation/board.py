"""The record that gives TensorBoard's HParams tab its order over a whole ablation.

Without one TensorBoard sorts metrics by name, so that ``efficient/...`` comes before ``val_...``. It takes the first
record that it finds for all there is, hyper-parameters too: no run can write one, because it knows only its own.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Any name with "tfevents" in it is an event file to TensorBoard; to `compare` this one is no log of a run.
BOARD = "hparams.tfevents"
_EVENTS = "events.out.tfevents.*"
_OURS = "efficient/"


def board(folders: Iterable[Path], metrics: Iterable[str]) -> bytes:
    """An event file, for the folder of any of the runs.

    Args:
        folders: Of the runs, whose hyper-parameters are read off their own event files.
        metrics: Names of scalars as in the logs; the user's come first, ``efficient/...`` after them.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    values: dict[str, list[Any]] = {}
    for folder in folders:
        for name, value in _hparams(folder).items():
            values.setdefault(name, []).append(value)
    ordered = sorted(set(metrics), key=lambda name: (name.startswith(_OURS), name))
    experiment = api_pb2.Experiment(
        hparam_infos=[_info(name, found) for name, found in values.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in ordered],
    )
    event = Event(wall_time=time.time())
    event.summary.value.add(
        tag=metadata.EXPERIMENT_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        tensor=metadata.NULL_TENSOR,
    )
    file = io.BytesIO()
    for each in (Event(wall_time=event.wall_time, file_version="brain.Event:2"), event):
        RecordWriter(file).write(each.SerializeToString())
    return file.getvalue()


def _hparams(folder: Path) -> dict[str, bool | float | str]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import metadata

    for file in sorted(folder.glob(_EVENTS)):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    content = value.metadata.plugin_data.content
                    start = metadata.parse_session_start_info_plugin_data(content)
                    return {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    return {}


def _info(name: str, values: list[bool | float | str]) -> Any:
    """As TensorBoard itself would sum up the values of a key."""
    from tensorboard.plugins.hparams import api_pb2

    info = api_pb2.HParamInfo(name=name, differs=len(set(values)) > 1)
    kinds = {type(value) for value in values}
    if kinds == {float}:
        info.type = api_pb2.DATA_TYPE_FLOAT64
        info.domain_interval.min_value, info.domain_interval.max_value = min(values), max(values)
    else:
        info.type = api_pb2.DATA_TYPE_BOOL if kinds == {bool} else api_pb2.DATA_TYPE_STRING
        distinct = set(values) if kinds == {bool} else {v if isinstance(v, str) else json.dumps(v) for v in values}
        info.domain_discrete.extend(sorted(distinct))
    return info
