"""A plain PyTorch loop: norms that fold away and masks, saved, resumed, exported."""

from pathlib import Path

import torch
from torch import nn

from lightning_efficient import attach, export

STEPS, FILE = 40, Path("run.pt")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(96, 4))
batches = [(torch.randn(16, 6, 16), torch.randint(4, (16,))) for _ in range(STEPS)]

optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
driver = attach(
    model,
    optimizer,
    {"norm_swap": {"recalibrate": 10}, "magnitude_pruning": {"amount": 0.5}},
    total_steps=STEPS,
    schedulers=[scheduler],
    example=batches[0][0][:2],
)
print(driver)

parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "driver": driver}
if FILE.exists():
    state = torch.load(FILE, weights_only=True)
    for name, part in parts.items():  # the driver last
        part.load_state_dict(state[name])

model.train()
for inputs, labels in batches[driver.steps :]:
    nn.functional.cross_entropy(model(inputs), labels).backward()
    driver.before_step()  # optional: so that clipping sees the gradients that the step will see
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    driver.step()
    if driver.steps == STEPS // 2:
        torch.save({name: part.state_dict() for name, part in parts.items()}, FILE)

plain = export(driver.finish(batches), batches[0][0])  # torch alone, the norms folded into the weights around them
print(plain)
