"""Which units of a model can be cut, and why others cannot; the model itself is never touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim


class Residual(nn.Module):
    """Two convolutions with a shortcut, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.head(nn.functional.adaptive_avg_pool2d((x + y).relu(), 2).flatten(1))


def _names(groups: Groups, group: str) -> dict[str, tuple[int, ...]]:
    return {f"{s.name}:{s.dim}:{s.role[0]}": tuple(s.index.shape) for s in groups.found[group].slices}


def test_a_residual_network_is_read_as_its_author_would() -> None:
    groups = find_groups(Residual(), torch.randn(2, 3, 8, 8))
    assert list(groups.found) == ["stem", "conv1"]
    assert _names(groups, "conv1") == {
        "conv1.weight:0:p": (6, 1),
        "norm1.weight:0:p": (6, 1),
        "norm1.bias:0:p": (6, 1),
        "norm1.running_mean:0:p": (6, 1),
        "norm1.running_var:0:p": (6, 1),
        "conv2.weight:1:c": (6, 1),
    }
    stem = _names(groups, "stem")
    assert stem["head.weight:1:c"] == (8, 4)  # flattened: four entries a channel
    assert {"stem.weight:0:p", "stem.bias:0:p", "conv2.weight:0:p", "norm2.bias:0:p", "conv1.weight:1:c"} <= set(stem)
    flat = next(s for s in groups.found["stem"].slices if s.name == "head.weight")
    assert flat.index[2].tolist() == [8, 9, 10, 11]
    assert groups.refused["head"] == "an output of the model: its shape would change"


def test_nothing_of_the_model_changes() -> None:
    model = Residual().train()
    model.norm1.eval()
    model.conv2.weight.requires_grad_(True)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    find_groups(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class Measured(nn.Module):
    """A metric among the children, as every LightningModule has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.accuracy = MulticlassAccuracy(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_metric_hides_no_layer() -> None:
    pytest.importorskip("transformers.pytorch_utils")  # its layer is looked for once it has been imported
    assert list(find_groups(Measured(), torch.randn(2, 4)).found) == ["net.0"]


def test_globs_choose_by_what_makes_the_units() -> None:
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    assert list(find_groups(model, x, include=["conv1"]).found) == ["conv1"]
    only = find_groups(model, x, exclude=["conv2"])  # conv2 writes into the stem's width
    assert list(only.found) == ["conv1"]
    assert only.refused["stem"] == "excluded by 'conv2'"
    with pytest.raises(NoMatchError, match=r"'conv9' matches no module name \(did you mean 'conv2'"):
        find_groups(model, x, include=["conv9"])
    with pytest.raises(TypeError, match="write a list"):
        find_groups(model, x, include="conv1")


def test_only_an_output_layer_is_nothing_to_cut() -> None:
    with pytest.raises(NoMatchError, match=r"nothing of Linear can be cut.*an output of the model"):
        find_groups(nn.Linear(4, 3), torch.randn(2, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner: Any = nn.Linear(4, 8)
        self.rnn: Any = kind(8, 6, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.rnn(self.inner(x))[0])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_lose_hidden_units_in_all_gates(kind: type[nn.Module]) -> None:
    groups = find_groups(model := Recurrent(kind), x := torch.randn(2, 5, 4))
    assert list(groups.found) == ["inner", "rnn", "mlp.0"]
    zeroed = copy.deepcopy(model)
    groups.found["rnn"].zero(dict(zeroed.named_parameters()), [0, 1, 3, 4, 5])
    apply_slim(model, {"rnn": [2]}, groups)
    torch.testing.assert_close(model(x), zeroed(x))
    assert model.rnn.hidden_size == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(self.embed(tokens)).relu()))


def test_tied_weights_keep_their_width() -> None:
    groups = find_groups(Tied(), torch.randint(0, 11, (2, 5)))
    assert list(groups.found) == ["fc1"]
    assert "tied" in groups.refused["embed"]


def test_parametrized_and_frozen_weights_keep_their_width() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    model[0].weight.requires_grad_(False)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    groups = find_groups(model, torch.randn(3, 4))
    assert list(groups.found) == ["4"]
    assert "parametri" in groups.refused["2"]
    assert "frozen" in groups.refused["0"] or "parametri" in groups.refused["0"]


class Branching(nn.Module):
    """Which layer reads the first depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 9)
        self.left, self.right = nn.Linear(9, 5), nn.Linear(9, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last((self.left(y) if x.sum() > 0 else self.right(y)).relu())


def test_a_branch_that_did_not_run_protects_what_it_may_read() -> None:
    with pytest.raises(NoMatchError, match="'right' did not run on the example and may read it"):
        find_groups(Branching(), torch.ones(2, 4))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 9), nn.Linear(9, 2)

    @torch.no_grad()
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) * scale


def test_what_autograd_does_not_see_is_found() -> None:
    assert list(find_groups(Detached(), (torch.randn(2, 4), torch.ones(()))).found) == ["first"]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 9), nn.Linear(9, 2)

    def forward(self, *, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.first(x).relu()
        return {"logits": self.last(y if mask is None else y * mask[:, None])}


def test_keyword_inputs_and_dictionaries_of_outputs() -> None:
    groups = find_groups(Keywords(), {"x": torch.randn(2, 4), "mask": torch.ones(2)})
    assert list(groups.found) == ["first"]
    assert list(find_groups(model := Keywords(), lambda: model(x=torch.randn(2, 4))).found) == ["first"]
    with pytest.raises(ValueError, match="does not run"):
        find_groups(Keywords(), torch.randn(2, 4))


def test_widths_that_zeros_do_not_remove_are_offered_on_request_only() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with pytest.raises(NoMatchError, match="zeroing its units is not removing them"):
        find_groups(model, x)
    groups = find_groups(model, x, inexact=True)
    assert list(groups.found) == ["0", "2"]
    assert not groups.found["0"].exact
    assert "f(0)" in groups.found["0"].note
    assert "LayerNorm '3'" in groups.found["2"].note
