"""transformers.Trainer: one callback; checkpoints, resuming and the best model are the Trainer's."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_efficient import EfficientTrainerCallback

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=32, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 32, (64, 8))]


def train(steps: int, resume: bool = False) -> LlamaForCausalLM:
    """A run of so many optimizer steps; `resume`: from its last checkpoint."""
    torch.manual_seed(0)
    methods = EfficientTrainerCallback(
        {"sigma_reparam": {}, "magnitude_pruning": {"amount": 0.5, "start": 2, "length": 6, "every": 1}}
    )
    arguments = TrainingArguments(
        "run", max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        lr_scheduler_type="constant", save_steps=6, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, callbacks=[methods])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


if __name__ == "__main__":
    model = train(12)
    model.save_pretrained("model")  # plain: `from_pretrained` reads it anywhere
    same = LlamaForCausalLM.from_pretrained("model")
    weight = same.model.layers[0].mlp.up_proj.weight
    print(f"{float((weight == 0).float().mean()):.0%} of a weight is zero")
