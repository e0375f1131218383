"""Every public name, and a run with every callback, with heavy packages out of reach."""

import importlib.util
import sys

HEAVY = (
    "IPython", "jinja2", "matplotlib", "onnx", "onnxruntime", "pandas", "ray", "scipy", "sklearn", "tensorboard",
    "torch_pruning", "transformers", "peft", "accelerate", "mlxtend", "wandb", "mlflow", "safetensors",
)  # fmt: skip
HERE = str(importlib.util.find_spec("lightning_efficient").origin).removesuffix("__init__.py")  # type: ignore[union-attr]


class Blocked:
    """What a file of ours asks for is not there; what torchmetrics and others ask for is their business."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = frame is not None and frame.f_code.co_filename.startswith(HERE)
        if name.partition(".")[0] in HEAVY and ours:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# What these have imported already would not be asked for again.
import lightning.pytorch  # noqa: E402, F401
import timm  # noqa: E402, F401
import torchmetrics  # noqa: E402, F401

for module in [name for name in sys.modules if name.partition(".")[0] in HEAVY]:
    del sys.modules[module]
sys.meta_path.insert(0, Blocked())

import lightning_efficient as le  # noqa: E402


def main() -> None:
    for name in le.__all__:
        if name != "EfficientTrainerCallback":  # of transformers
            getattr(le, name)
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    import lightning_efficient.functional
    import lightning_efficient.metrics  # noqa: F401

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            self.net = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean(1)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self(batch).square().mean()

        def validation_step(self, batch: Tensor, _: int) -> None:
            self.log("val_loss", self(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    data = DataLoader([torch.randn(6, 16) for _ in range(32)], 4)
    for callback in (
        le.SigmaReparam(), le.PRepBN(), le.TempScale(tau=0.9), le.MagnitudePruning(), le.HESSOPruning(),
        le.PAGCPPruning(budgets={"val_loss": 0.5}), le.SAPPruning(iterations=2), le.CollapseMonitor(), le.RunCost(),
    ):  # fmt: skip
        module = Lit()
        Trainer(
            max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        ).fit(module, data, data)  # fmt: skip
        le.export(module, torch.randn(2, 6, 16))
        print(type(callback).__name__, "ok")


if __name__ == "__main__":
    main()
