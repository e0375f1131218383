"""``StateDriftMonitor``: whether a recurrent state keeps its scale past the training length, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_efficient.common.nests import tensors_behind
from lightning_efficient.lifecycle.monitor import MonitoredStage, SeenCall, StageMonitor
from lightning_efficient.metrics import StateDrift
from lightning_efficient.metrics.functional import state_variance
from lightning_efficient.metrics.functional.pooling import hidden_tokens, tensor_of
from lightning_efficient.trainer.showing import Picture

_SCALARS = ("ratio_max", "drifting")


class StateDriftMonitor(StageMonitor):
    """Watch recurrent states on sequences longer than those of training; changes nothing in the run.

    At the end of each epoch of the stage, under ``efficient/state_drift_monitor/``: ``ratio_max`` and ``drifting``, as
    :class:`lightning_efficient.metrics.StateDrift` defines them, and ``samples``. ``EarlyStopping`` and
    ``ModelCheckpoint`` can monitor them. TensorBoard also gets the variance of every head over the tokens, a picture.
    The stage's sequences have to be longer than ``train_length``; if none is, one warning says so.
    Losses, weights and random numbers are those of a run without the monitor, to the bit.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        module: Name of the module that returns the state.
        train_length: Tokens of the longest sequence in training.
        output: Which tensor, where the module returns several: ``"0"``, ``"states"``. ``None``: the first.
        time_axis: Axis of the tokens in it: 1, or 0 where they come first (torch's recurrent layers by default). The
            state is that after each token; several calls of a step go on where the last one ended. ``None``: a call
            returns one state, ``(samples, ...)``, as cells and scans by chunks do.
        call_tokens: Tokens that such a call takes in.
        heads: Split the features of a state into so many heads. ``None``: what is left of the axes is ``(heads, ...)``,
            or all one head if it is one axis.
        max_length: Longer sequences count into the last bucket. ``None``: 16 times ``train_length``.
        threshold: Ratio above which a head drifts.
        stage: Whose batches are read: ``"train"``, ``"val"`` or ``"test"``.
        max_samples: Sequences of an epoch that are read, from the first, over all processes.
        name: Set between the method and the quantity in logged names; needed where two of these monitors run.
        picture: Draw for TensorBoard.

    Raises:
        ValueError: ``module`` or ``train_length`` is not given, an argument is out of range, or the output has no such
            axes.
        NoMatchError: There is no such module.

    Source: see :class:`lightning_efficient.metrics.StateDrift`.
    """

    method = "state_drift_monitor"
    quantities = "drift"

    def __init__(
        self,
        enabled: bool = True,
        module: str | None = None,
        train_length: int | None = None,
        output: str | None = None,
        time_axis: Literal[0, 1] | None = 1,
        call_tokens: int = 1,
        heads: int | None = None,
        max_length: int | None = None,
        threshold: float = 2.0,
        stage: MonitoredStage = "val",
        max_samples: int = 25_600,
        name: str | None = None,
        picture: bool = True,
    ) -> None:
        super().__init__(enabled, stage, max_samples, name, picture)
        for argument, value in (("train_length", train_length), ("call_tokens", call_tokens), ("heads", heads)):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` is {value}; expected at least 1.")
        self.module, self.train_length, self.output = module, train_length, output
        self.time_axis, self.call_tokens, self.heads = time_axis, call_tokens, heads
        self.max_length, self.threshold = max_length, threshold
        self.forget()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = (
            "module", "train_length", "output", "time_axis", "call_tokens", "heads", "max_length", "threshold",
        )  # fmt: skip
        return super().config() | {name: getattr(self, name) for name in names}

    @property
    def state_key(self) -> str:
        """Tells two monitors of one Trainer apart."""
        return self._generate_state_key(module=self.module, stage=self.stage, name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for what nothing can find."""
        super().setup(trainer, pl_module, stage)
        if self.enabled and (self.module is None or self.train_length is None):
            raise ValueError(
                f"StateDriftMonitor: `module` is {self.module!r} and `train_length` {self.train_length!r}: name the "
                "module that returns the recurrent state, and give the length of the longest sequence in training."
            )

    def watched(self) -> dict[str, str]:
        """One module."""
        return {} if self.module is None else {"module": self.module}

    def forget(self) -> None:
        """Empty sums."""
        # Without a length there is nothing to measure yet, but its arguments are checked.
        self._metric = StateDrift(self.train_length or 1, self.max_length, threshold=self.threshold)
        self._drawn: dict[str, Tensor] = {}

    def take(self, calls: Mapping[str, list[SeenCall]], batch: Any, room: int) -> Tensor:
        """Add the states of every call of the step."""
        rows: list[Tensor] = []
        start, sizes = 0, {tensor.shape[0] for tensor in tensors_behind(batch) if tensor.dim()}
        for call in calls["module"]:
            try:
                # The last call is the step's own, whoever else has called the module since the batch began.
                states, mask = self._states(call, sizes if call is calls["module"][-1] else set())
                variance = state_variance(states[:room])
            except ValueError as error:
                raise ValueError(f"StateDriftMonitor: module={self.module!r} cannot be read: {error}") from None
            if mask is not None:
                mask = mask[:room].to(variance.device)
                variance = variance.masked_fill(~mask[..., None], 0.0)
            if rows and len(rows[-1]) == len(variance):
                rows[-1] = rows[-1] + variance.sum((1, 2))
            else:  # other sequences, from their beginning
                rows.append(variance.sum((1, 2)))
                start = 0
            start += 0 if self.time_axis is not None else self.call_tokens - 1
            if bool(variance.isfinite().all()):
                self._metric.to(variance.device).update_variance(variance, start, mask)
            start += states.shape[1]
        return torch.cat(rows)

    def _states(self, call: SeenCall, sizes: set[int]) -> tuple[Tensor, Tensor | None]:
        """``(samples, tokens, heads, ...)``, and which tokens count."""
        packed = call.output[0] if isinstance(call.output, tuple) else call.output
        mask = None
        if isinstance(packed, PackedSequence):
            tensor, lengths = pad_packed_sequence(packed, batch_first=True)
            mask = torch.arange(tensor.shape[1])[None] < lengths[:, None]
        else:
            tensor = tensor_of(call.output, self.output)
            needed = 2 if self.time_axis is None else 3
            if tensor.dim() < needed:
                raise ValueError(f"its output has shape {tuple(tensor.shape)}; expected at least {needed} axes.")
            if self.time_axis is None:
                tensor = tensor[:, None]
            else:
                tokens, samples = tensor.shape[self.time_axis], tensor.shape[1 - self.time_axis]
                if tokens in sizes and samples not in sizes:
                    raise ValueError(
                        f"its output has shape {tuple(tensor.shape)}, and the batch {tokens} samples: axis "
                        f"{self.time_axis} is not that of the tokens. Set time_axis={1 - self.time_axis}."
                    )
                tensor = tensor.movedim(self.time_axis, 1)
                mask = hidden_tokens(call.kwargs, tensor)
        if self.heads is not None and tensor.shape[2] % self.heads:
            raise ValueError(f"{tensor.shape[2]} features cannot be split into `heads`={self.heads}.")
        if self.heads is not None:
            tensor = tensor.reshape(*tensor.shape[:2], self.heads, -1)
        return (tensor[:, :, None] if tensor.dim() == 3 else tensor), mask

    def names(self) -> list[str]:
        """What is logged, where states are no numbers."""
        return list(_SCALARS)

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Over all samples of all processes."""
        values = self._metric.to(pl_module.device).compute()
        if bool(values["ratio_max"].isnan()):
            self.tell(
                f"no sequence of the {self.stage} stage was longer than train_length={self.train_length}: what is "
                "logged is NaN."
            )
        self._drawn = {name: value.cpu() for name, value in values.items()}
        return {name: float(values[name]) for name in _SCALARS}

    def draw(self, step: int) -> Mapping[str, Callable[[], Picture]]:
        """The variance of every head over the tokens."""
        return {"variance": self._picture}

    def _picture(self) -> Picture:
        from matplotlib.figure import Figure  # half a second that a run without a picture need not wait

        figure = Figure(figsize=(5.2, 3.4), layout="constrained", dpi=110)
        axes = figure.subplots()
        seen = ~self._drawn["curve"].isnan().all(1)
        axes.plot(self._drawn["tokens"][seen], self._drawn["curve"][seen], linewidth=1)
        axes.axvline(self._metric.train_length, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="variance, relative to training lengths")
        return figure
