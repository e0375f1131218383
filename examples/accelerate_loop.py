"""Hugging Face accelerate: attach after `prepare`, step where gradients are complete."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import attach, export

STEPS = 20
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
data = DataLoader(TensorDataset(torch.randn(32 * STEPS, 16), torch.randint(4, (32 * STEPS,))), 16)
optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
model, optimizer, data, scheduler = accelerator.prepare(net, optimizer, data, scheduler)
driver = attach(
    model, optimizer, {"sigma_reparam": {}, "magnitude_pruning": {"schedule": "one_shot"}}, total_steps=STEPS
)
accelerator.register_for_checkpointing(driver)  # in `save_state`; `load_state` reads it after model and optimizer

model.train()
for inputs, labels in data:
    with accelerator.accumulate(model):
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        if accelerator.sync_gradients:
            driver.before_step()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if accelerator.sync_gradients:
            driver.step()
            if driver.steps == STEPS // 2:
                accelerator.save_state("run", safe_serialization=False)

accelerator.load_state("run")  # half way again, to show it
assert driver.steps == STEPS // 2
plain = export(net, torch.randn(2, 16))
print(plain)
