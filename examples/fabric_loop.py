"""Lightning Fabric: attach after `fabric.setup`; precision, accumulation and clipping are Fabric's."""

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_efficient import attach, export

STEPS = 20
fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
fabric.seed_everything(0)
net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
batches = [(torch.randn(16, 16), torch.randint(4, (16,))) for _ in range(2 * STEPS)]
model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-3))
driver = attach(
    model, optimizer, {"sigma_reparam": {}, "magnitude_pruning": {"schedule": "one_shot"}}, total_steps=STEPS
)

model.train()
for index, (inputs, labels) in enumerate(batches):
    last = index % 2 == 1
    with fabric.no_backward_sync(model, enabled=not last):
        fabric.backward(nn.functional.cross_entropy(model(inputs), labels) / 2)
    if last:
        driver.before_step()
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
    if index == len(batches) // 2:
        fabric.save("run.ckpt", {"model": model, "optimizer": optimizer, "driver": driver})

plain = export(driver.finish(), batches[0][0])
print(plain)
