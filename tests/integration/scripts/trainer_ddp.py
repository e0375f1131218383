"""transformers.Trainer on two processes: they end with what one has on the doubled batch, in float64."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate.state import AcceleratorState

from lightning_efficient import EfficientTrainerCallback

METHODS: dict[str, dict[str, Any]] = {
    "sigma_reparam": {}, "magnitude_pruning": {"start": 1, "length": 4, "every": 1, "criterion": "taylor"},
}  # fmt: skip
IDS = torch.randint(3, 40, (48, 10), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": int(row[0] < 20)} for row in IDS]


class InOrder(hf.Trainer):
    """The same samples in the same steps."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(folder: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or accelerate sets it, with a warning
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork has that of the process that it came from
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = hf.XLMRobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    # The default multiplies a classifier's loss by the number of processes.
    arguments = hf.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8 // processes, learning_rate=1e-2, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", average_tokens_across_devices=False,
        **{"ddp_backend": "gloo"} if processes > 1 else {},
    )  # fmt: skip
    model = hf.XLMRobertaForSequenceClassification(config).double()
    InOrder(model, arguments, train_dataset=ROWS, callbacks=[EfficientTrainerCallback(METHODS)]).train()
    torch.save(model.state_dict(), folder / f"{processes}_{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
