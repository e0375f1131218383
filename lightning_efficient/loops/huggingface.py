"""The door to ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_efficient.common.match import parameters_by_name
from lightning_efficient.common.running import Inputs
from lightning_efficient.common.schema import Int, MapOf, Record, Text, check
from lightning_efficient.common.weights import trained_by
from lightning_efficient.loops.driver import Driver, attach
from lightning_efficient.loops.methods import PARTS, read_methods
from lightning_efficient.loops.state import STATE

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "EfficientTrainerCallback is for transformers.Trainer: pip install 'lightning-efficient[hf]'."
    ) from error

FILE = "efficient_methods.pt"
_CONTENT = Record({"driver": STATE, "weights": MapOf(Text(), Int())})
# Whole numbers of as many bytes, to sum bits without rounding.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EfficientTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """The methods in a ``transformers.Trainer``: ``Trainer(..., callbacks=[EfficientTrainerCallback({...})])``.

    Accumulation, schedulers, mixed precision, ``load_best_model_at_end`` and ``resume_from_checkpoint`` work as they
    do; a state of its own lies in each checkpoint folder, as ``efficient_methods.pt``. The model is plain at every
    moment, so ``save_pretrained`` writes what ``from_pretrained`` reads. This Trainer clips the gradients of the
    network's weights, before the methods see them. A run of ``Trainer.train()`` in one process, or with DDP.

    Args:
        methods: Key of a method → its arguments, as for :func:`lightning_efficient.attach`. Not ``norm_swap``: a model
            between two norms is no model that ``from_pretrained`` could read; use a loop of your own, or Lightning.
        example: A small batch as the model takes it, such as ``dict(input_ids=...)``; for ``temp_scale`` and
            ``hesso_pruning``.
        resume_from: Folder to go on from, where ``resume_from_checkpoint`` is not the Trainer's own
            ``<output_dir>/checkpoint-<step>``.

    Attributes:
        driver: Of the run that goes on, or of the last.

    Raises:
        ValueError: A method that does not work here, an argument that is wrong, or no ``example`` where one is needed.
    """

    def __init__(
        self,
        methods: Mapping[str, Mapping[str, Any] | bool | None],
        example: Inputs | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        read = read_methods(methods)
        if "norm_swap" in read:
            raise ValueError(
                "norm_swap does not work in a transformers.Trainer: its checkpoint folders hold what `from_pretrained` "
                "reads, and that knows no model between two norms. Use lightning_efficient.attach in a loop of your "
                "own (docs/without_lightning.md), or PRepBN in a Lightning Trainer."
            )
        for name, arguments in read.items():
            if (part := PARTS[name](**arguments)).example_for and example is None:
                raise ValueError(part.no_example())
        self.methods, self.example, self.resume_from = methods, example, resume_from
        self.driver: Driver | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, once the weights and the optimizer are those of the run."""
        for name in ("deepspeed", "fsdp"):
            if getattr(args, name, None):
                raise ValueError(f"EfficientTrainerCallback: `{name}` shards weights; leave it out.")
        model: nn.Module = kwargs["model"]
        previous, self.driver = self.driver, None  # it is over, broke off, or `auto_find_batch_size` begins anew
        saved = None
        if state.global_step > 0:
            if previous is not None:
                previous.detach()
            saved = _read(Path(self.resume_from or _folder(args, state.global_step)), model, kwargs["optimizer"])
        self.driver = attach(
            model,
            kwargs["optimizer"],
            self.methods,
            total_steps=state.max_steps,
            example=self.example,
            state=saved,
            previous=previous,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step is over, and that of the scheduler."""
        assert self.driver is not None
        self.driver.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the folder that was written just now."""
        assert self.driver is not None
        folder = _folder(args, state.global_step)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"EfficientTrainerCallback: no checkpoint folder {str(folder)!r}, where the Trainer writes one. (In "
                "`hyperparameter_search` folders lie elsewhere: save_strategy='no'.)"
            )
        driver = self.driver.state_dict()
        if state.is_world_process_zero:
            weights = _checksums(kwargs["model"], kwargs["optimizer"])
            torch.save({"driver": driver, "weights": weights}, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the methods; of the best model, if that has been loaded."""
        assert self.driver is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = _read(Path(state.best_model_checkpoint), kwargs["model"], kwargs["optimizer"])
            self.driver.load_state_dict(best)
        self.driver.finish()


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _read(folder: Path, model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    """The driver's state in a folder, of the weights that the model has now."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"EfficientTrainerCallback: {str(folder)!r} has no {FILE}, so the run cannot go on from it. Was it written "
            "without this callback? Then start a new run from its weights. Does it lie elsewhere? Then say where: "
            "`resume_from`."
        )
    content = torch.load(path, map_location="cpu", weights_only=True)
    check(content, _CONTENT, str(path))
    state: Mapping[str, Any] = content["driver"]
    now = _checksums(model, optimizer)
    if other := sorted(name for name, value in content["weights"].items() if now.get(name) != value):
        raise ValueError(
            f"EfficientTrainerCallback: {len(other)} of {len(now)} weights of the model ({other[:3]}) are not those "
            f"that {str(path)!r} was written with. Does the checkpoint lie elsewhere? Then say where: `resume_from`. "
            "Else the Trainer has not read them, as happens where weights have other names in files than in the model: "
            f"make the model with `{type(model).__name__}.from_pretrained({str(folder)!r})`, and go on as before."
        )
    return state


@torch.no_grad()
def _checksums(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Of the bits of the weights that train; the same on any device."""
    trained = trained_by(optimizer)
    parameters = {n: p.detach().contiguous() for n, p in parameters_by_name(model).items() if id(p) in trained}
    return {n: int(p.view(_WHOLE[p.element_size()]).sum(dtype=torch.int64)) for n, p in parameters.items()}
