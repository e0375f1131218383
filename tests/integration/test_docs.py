"""The site builds without a warning, and the Python of the README and of every card runs, one block after the other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import build_callback, callback_class

ROOT = Path(__file__).parents[2]
# Those that need a model or a script of their own have tests of their own.
ELSEWHERE = ("linear_attention", "ablate")
CARDS = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem not in ELSEWHERE)]


class Module(LightningModule):
    """What a card's reader has: a model of their own, called `model`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(images).mean(1))
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Data(LightningDataModule):
    """And data of their own, called `data`."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(16, 6, 16), torch.arange(16) % 4), 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resumed run's log folder is a new one
@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_snippets_run(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card.read_text("utf-8"), re.DOTALL)
    with torch.random.fork_rng(), METHODS.preserved():
        seed_everything(0, verbose=False)
        names: dict[str, Any] = {"model": Module(), "data": Data(), "images": torch.randn(2, 6, 16)}
        for block in blocks:
            exec(compile(block, card.name, "exec"), names)


CARD_OF = {
    "magnitude_pruning": "pruning", "sap_pruning": "pruning", "hesso_pruning": "structured_pruning",
    "pagcp_pruning": "structured_pruning", "run_cost": "compare",
}  # fmt: skip


def test_the_cards_name_every_argument_and_no_other() -> None:
    arguments: dict[str, set[str]] = {}
    for method in METHODS.with_callback:
        names = set(inspect.signature(callback_class(method)).parameters) - {"enabled"}
        arguments.setdefault(CARD_OF.get(method, method), set()).update(names)
    for name, expected in arguments.items():
        card = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
        assert [a for a in sorted(expected) if not re.search(rf"`{a}[`=]", card)] == [], name
        tables = re.findall(r"^\| argument \|.*\n((?:\|.*\n)+)", card, re.MULTILINE)
        rows = [line.split("|")[1] for table in tables for line in table.splitlines()]
        assert set(re.findall(r"`(\w+)`", " ".join(rows))) <= expected, name


def test_the_cards_say_first_what_they_are_for() -> None:
    """The key with a recipe, the use, the price and the limits, before the first block of code."""
    for method in METHODS.with_callback:
        card = (ROOT / "docs" / f"{CARD_OF.get(method, method)}.md").read_text("utf-8")
        rows = re.findall(r"^\| (key|use it for|it costs|not for) \| (.+) \|$", card.partition("```")[0], re.MULTILINE)
        assert [name for name, _ in rows] == ["key", "use it for", "it costs", "not for"], method
        assert f"`{method}: " in rows[0][1], method
        for recipe in re.findall(r"`(\w+: [^`]+)`", rows[0][1]):
            ((name, arguments),) = yaml.safe_load(recipe).items()
            build_callback(name, arguments)


def test_the_readme_gives_every_callback_its_yaml_key() -> None:
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`\w+`(?:, )?)+) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    names = [re.findall(r"\w+", " ".join(column)) for column in zip(*rows, strict=True)]
    assert dict(zip(*names, strict=True)) == {callback_class(m).__name__: m for m in METHODS.with_callback}


def test_the_readme_quotes_the_committed_results() -> None:
    """Every measured number, with the decimals it is given with, is in the results that its paragraph or row links."""
    measured = (ROOT / "README.md").read_text("utf-8").partition("\n## Measured\n")[2].partition("\n## ")[0]
    rows, quoted = re.split(r"\n\n|\n(?=\|)", measured), 0
    for row in rows:
        links = re.findall(r"\((benchmarks/results/[\w.]+\.md)\)", row)
        results = "\n".join((ROOT / link).read_text("utf-8") for link in links).replace("−", "-")
        prose = re.sub(r"\(benchmarks/[^)]*\)|`[^`]*`", "", row).replace("−", "-")
        numbers = re.findall(r"[+-]?\d+\.\d+", prose)
        missing = [n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n.lstrip('+-'))}(?!\d)", results)]
        assert missing == [], row[:80]
        quoted += len(numbers)
    assert quoted > 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Python, by the site's generators; theirs about the site stop the build
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch in memory already: the API page imports what it names."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    page = (tmp_path / "site" / "api.html").read_text("utf-8")
    import lightning_efficient

    for name in lightning_efficient.__all__:
        assert f".{name}" in page
