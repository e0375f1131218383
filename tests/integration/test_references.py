"""Networks that nothing trains, beside the one that is trained; networks that train in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from zoo import EncoderClassifier, loader, vit

from lightning_efficient import (
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PRepBN,
    SAPPruning,
    SigmaReparam,
    SimplifiedLinearAttention,
    TempScale,
)
from lightning_efficient.common.match import NoMatchError, references
from lightning_efficient.norms.blend import blend_norms

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")


class Distilled(pl.LightningModule):
    """Learns from a frozen teacher, which lies where ``path`` says. Args: make: a network of images (1, 8, 8)."""

    def __init__(self, make: Callable[[], nn.Module], path: str = "teacher") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, teacher = make(), make().eval().requires_grad_(False)
        self.path = path
        if path == "teacher":
            self.teacher = teacher
        else:
            self.others = nn.ModuleDict({"teacher": teacher, "projection": nn.Linear(4, 4)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            goal = self.get_submodule(self.path)(x)
        out = self.student(x)
        return F.mse_loss(out if self.path == "teacher" else self.others["projection"](out), goal)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.student(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, **quiet, **kwargs})


METHODS: dict[str, Callable[[], Callback]] = {
    "prepbn": lambda: PRepBN(transition=3, hold=1),
    "temp_scale": lambda: TempScale(tau=3.0),
    "sigma_reparam": SigmaReparam,
    "linear_attention": SimplifiedLinearAttention,
    "magnitude": lambda: MagnitudePruning(amount=0.8),
    "sap": lambda: SAPPruning(),
    "hesso": lambda: HESSOPruning(target=0.3),
    "pagcp": lambda: PAGCPPruning(budgets={"val_loss": 0.5}),
}


def patches() -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=4, class_token=False,
        global_pool="avg",
    )  # fmt: skip


@pytest.mark.parametrize("path", ["teacher", "others.teacher"])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_teacher_stays_as_it_is(tmp_path: Any, method: str, path: str) -> None:
    module = Distilled(patches, path)
    x = next(iter(loader()))[0]
    before = module.get_submodule(path)(x)
    callback = METHODS[method]()
    trainer(tmp_path, callback).fit(module, loader(batches=8), loader(1))
    after = module.get_submodule(path)
    assert not after.training
    assert torch.equal(after(x), before)
    keys = set(after.state_dict())
    assert keys == set(patches().state_dict())


def test_what_is_left_alone_is_reported(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(Distilled(vit), loader(batches=8), loader(1))
    assert "skipped, frozen and kept in evaluation mode: a reference, left alone: 5 (teacher.blocks" in caplog.text


def test_what_a_reference_is() -> None:
    model = nn.ModuleDict({"student": EncoderClassifier(), "teacher": EncoderClassifier()})
    model["teacher"].requires_grad_(False)
    assert references(model) == set(), "in training mode"
    model["teacher"].eval()
    assert "teacher.encoder.layers.0.norm1" in references(model)
    assert not any(name.startswith("student") for name in references(model))
    model.eval()
    model.train(False)
    model["student"].requires_grad_(False)
    assert references(model) == set(), "nothing is trained"
    lora = EncoderClassifier().requires_grad_(False).eval()
    lora.head.requires_grad_(True)
    holder = nn.ModuleDict({"net": lora})
    assert references(holder) == set(), "a network that is trained in part, and arrives in evaluation mode as a whole"


def test_only_a_reference_has_norms(tmp_path: Any) -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Distilled(vit)
    module.student = Student()
    with pytest.raises(NoMatchError, match=r"all 5 LayerNorm modules are frozen and kept in evaluation mode"):
        trainer(tmp_path, PRepBN(transition=3)).fit(module, loader(batches=8), loader(1))


def test_a_network_frozen_after_it_was_changed_is_refused(tmp_path: Any) -> None:
    class Late(Distilled):
        def __init__(self) -> None:
            super().__init__(vit)
            self.teacher.train().requires_grad_(True)

        def setup(self, stage: str) -> None:
            self.teacher.eval().requires_grad_(False)

    with pytest.raises(ValueError, match=r"norm_swap: 5 modules .*frozen and put into evaluation mode.*\['teacher'\]"):
        trainer(tmp_path, PRepBN(transition=3)).fit(Late(), loader(batches=8), loader(1))
    fine = trainer(tmp_path, PRepBN(transition=3, exclude=["teacher"]))
    fine.fit(Late(), loader(batches=8), loader(1))


# -- evaluation mode ---------------------------------------------------------------------------------------------------


class Pretrained(Distilled):
    """A network in evaluation mode, as ``from_pretrained`` returns it, with dropout."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Dropout(0.5), EncoderClassifier()).eval())
        self.teacher = nn.Identity()
        self.modes: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.modes.append(self.student[0].training)
        return F.cross_entropy(self.student(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{"target": "repbn"}, {"target": "affine"}, {"target": "un", "warmup": 4}])
def test_norms_that_train_in_evaluation_mode_are_refused(tmp_path: Any, options: Any) -> None:
    module = Pretrained()
    with pytest.raises(
        ValueError, match=r"4 of the norms .*evaluation mode .student.1.*`.train\(\)`.*eval_mode='train'"
    ):
        trainer(tmp_path, PRepBN(transition=3, hold=1, **options)).fit(module, loader(batches=8), loader(1))
    assert module.modes == [], "before the first step"


def test_norms_can_be_put_into_training_mode_alone(tmp_path: Any) -> None:
    module = Pretrained()
    trainer(tmp_path, PRepBN(transition=3, hold=1, eval_mode="train", recalibrate=0)).fit(
        module, loader(batches=8), loader(1)
    )
    assert module.modes == [False] * 8, "dropout stays off, as the user has it"
    for norm in blend_norms(module).values():
        assert int(norm.target.bn.num_batches_tracked) == 8


def test_targets_without_statistics_do_not_mind(tmp_path: Any) -> None:
    trainer(tmp_path, PRepBN(target="rms", transition=3)).fit(Pretrained(), loader(batches=8), loader(1))


def test_a_user_who_switches_to_training_mode_late_is_fine(tmp_path: Any) -> None:
    class Late(Pretrained):
        def on_train_start(self) -> None:
            self.student.train()

    trainer(tmp_path, PRepBN(transition=3)).fit(Late(), loader(batches=8), loader(1))


# -- norms that see one value a channel --------------------------------------------------------------------------------


class Pooled(Distilled):
    """A norm on pooled features, which sees one value a channel of a batch of one."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
        self.teacher = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.student(batch[0]), batch[1])


@pytest.mark.parametrize(
    "options", [{"hold": 2}, {"hold": 0}, {"hold": 0, "recalibrate": 0}, {"target": "un", "hold": 2, "warmup": 5}]
)
def test_norms_without_statistics_do_not_take_over(tmp_path: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=r"1 norms \(student.2\) still have .* mean 0 .*one sample.*exclude="):
        trainer(tmp_path, PRepBN(transition=4, **options)).fit(Pooled(), loader(8, size=1), loader(1))
    trainer(tmp_path, PRepBN(transition=4, **options)).fit(Pooled(), loader(8, size=2), loader(1))


def test_frozen_statistics_need_recalibration(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="`frozen` they come from recalibration alone: set `recalibrate`"):
        trainer(tmp_path, PRepBN(transition=4, frozen=True, recalibrate=0)).fit(Pooled(), loader(8), loader(1))
