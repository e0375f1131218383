"""Handwritten digits (UCI, through scikit-learn): 1,797 real images of 8×8 pixels, nothing to download."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

SPLIT_SEED = 2026


class Digits(pl.LightningDataModule):
    """Train, validation and test split of the digits; the same split in every run.

    Args:
        batch_size: Images per batch.
        data_seed: Seed of the order of the training images, apart from the model's randomness.
        val: Images for validation.
        test: Images for the final test.
    """

    def __init__(self, batch_size: int = 64, data_seed: int = 0, val: int = 250, test: int = 350) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.data_seed, self.val, self.test = batch_size, data_seed, val, test
        self.parts: list[Dataset[tuple[torch.Tensor, ...]]] = []

    def prepare_data(self) -> None:
        """Say what is missing before anything else happens."""
        _load()

    def setup(self, stage: str) -> None:
        """Split once; pixels are scaled to [-1, 1]."""
        if not self.parts:
            images, labels = _load()
            everything = TensorDataset(images / 8 - 1, labels)
            sizes = [len(everything) - self.val - self.test, self.val, self.test]
            self.parts = list(random_split(everything, sizes, torch.Generator().manual_seed(SPLIT_SEED)))

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Shuffled by a generator of its own: two runs with the same ``data_seed`` see the same batches."""
        order = torch.Generator().manual_seed(self.data_seed)
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """In order."""
        return DataLoader(self.parts[1], 512)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """In order."""
        return DataLoader(self.parts[2], 512)


def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 8, 8) with values 0 to 16, and labels (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo's data come with scikit-learn: pip install 'lightning-efficient[demo]'") from error
    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1), torch.from_numpy(digits.target)
