"""Which models are causal, by what they do: a table of models that are and models that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_models import CAUSAL, OTHERS, Maker
from torch import nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.causal import causal_norms
from lightning_efficient.norms.swap import apply_norm_swap


def swapped(make: Maker) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs = make()
    apply_norm_swap(model)
    return model, inputs, lambda given: model(**given) if isinstance(given, dict) else model(*given)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_found(name: str) -> None:
    model, inputs, run = swapped(CAUSAL[name])
    found = causal_norms(model, run, inputs)
    expected = [n for n in blend_norms(model) if "encoder" not in n or name != "T5"]
    assert expected
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_not(name: str) -> None:
    model, inputs, run = swapped(OTHERS[name])
    assert causal_norms(model, run, inputs) == {}


@pytest.mark.parametrize("real", [[9, 7], [16, 3], [5, 5], [31, 40], [63, 62], [57, 60]])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_in_the_later_half_hides_nothing(real: list[int], causal: bool) -> None:
    """Short texts in batches padded to a fixed length: an encoder is none the more causal, a decoder none the less."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "net": net, "head": nn.Linear(16, 3)})
    apply_norm_swap(model)
    mask = torch.arange(64) >= torch.tensor(real).unsqueeze(1)
    future = nn.Transformer.generate_square_subsequent_mask(64) < 0 if causal else None

    def run(given: Any) -> torch.Tensor:
        ids, padded = given
        hidden = model["net"](model["embed"](ids), mask=future, src_key_padding_mask=padded)
        out: torch.Tensor = model["head"](hidden)
        return out

    found = causal_norms(model, run, (torch.randint(1, 20, (2, 64)), mask))
    assert bool(found) == causal


@pytest.mark.parametrize("reads", ["first token", "mean", "flat"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("real", [[5, 14], [14, 5], [4, 5, 15, 16], [4, 16, 4, 16]])
def test_samples_of_other_lengths_are_no_positions(real: list[int], causal: bool, reads: str) -> None:
    """A short text in front of a long one: an output with a row a sample hears only the first half in its first row."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 16), nn.Linear(16, 3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.ModuleDict({"embed": embed, "net": nn.TransformerEncoder(layer, 1, nn.LayerNorm(16), False), "h": head})
    apply_norm_swap(model)
    padded = torch.arange(16) >= torch.tensor(real).unsqueeze(1)
    future = nn.Transformer.generate_square_subsequent_mask(16) < 0 if causal else None

    def run(ids: torch.Tensor) -> torch.Tensor:
        hidden = model["net"](model["embed"](ids), mask=future, src_key_padding_mask=padded)
        kept = (hidden * ~padded.unsqueeze(-1)).sum(1) / (~padded).sum(1, keepdim=True)
        rows = {"first token": hidden[:, -1 if causal else 0], "mean": kept, "flat": hidden.flatten(0, 1)}[reads]
        out: torch.Tensor = model["h"](rows)
        return out

    assert bool(causal_norms(model, run, torch.randint(1, 20, (len(real), 16)))) == causal


def test_an_encoder_that_hardly_hears_its_mask_is_none_the_more_causal() -> None:
    import transformers as hf

    torch.manual_seed(6)
    sizes = {"embedding_size": 32, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
    config = hf.RoFormerConfig(vocab_size=100, num_hidden_layers=2, num_attention_heads=4, **sizes)
    model = hf.RoFormerForSequenceClassification(config)
    apply_norm_swap(model)
    mask = (torch.arange(16) < torch.tensor([7, 14, 8, 13]).unsqueeze(1)).long()
    inputs = {"input_ids": torch.randint(4, 100, (4, 16)) * mask, "attention_mask": mask}
    assert causal_norms(model, lambda given: model(**given), inputs) == {}


def test_the_model_is_as_before() -> None:
    model, inputs, run = swapped(CAUSAL["zero-initialised branch"])
    model.blocks[0].mlp.eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    modes, state, given = [m.training for m in model.modules()], torch.get_rng_state(), inputs[0].clone()
    causal_norms(model, run, inputs)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs[0], given)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_batch_statistics_are_what_leaks() -> None:
    """The reason for it all: in training mode, the swapped model's earlier outputs do move."""
    model, (ids,), _ = swapped(CAUSAL["causal convolution"])
    other = ids.clone()
    other[:, -1] = ids[:, -1] % 12 + 1
    for norm in blend_norms(model).values():
        norm.finish()
    with torch.no_grad():
        leak = (model(other) - model(ids))[:, :-1].abs().max()
        model.eval()
        clean = (model(other) - model(ids))[:, :-1].abs().max()
    assert clean == 0 < leak


def test_indices_stay_in_the_vocabulary_and_inputs_that_cannot_vary_are_left() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(3, 8), nn.LSTM(8, 8, batch_first=True)
            self.norm = nn.LayerNorm(8)

        def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.norm(self.embed(ids)), lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    ids, lengths = torch.tensor([[0, 2, 0, 2, 2, 0], [2, 0, 2, 0, 0, 0]]), torch.tensor([6, 3])
    model, inputs, run = swapped(lambda: (Picky(), {"ids": ids, "lengths": lengths}))
    assert list(causal_norms(model, run, inputs)) == ["norm"]


def test_random_numbers_and_memory_do_not_hide_it() -> None:
    class Noisy(nn.Module):
        """Adds noise, and counts its calls."""

        def __init__(self) -> None:
            super().__init__()
            self.net = CAUSAL["LSTM"]()[0]
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(ids) + torch.rand(1) + self.calls

    model, inputs, run = swapped(lambda: (Noisy(), CAUSAL["LSTM"]()[1]))
    assert sorted(causal_norms(model, run, inputs)) == sorted(blend_norms(model))
    assert model.calls == 0


def test_an_output_that_is_another_in_every_run_hides_nothing() -> None:
    """What draws from a source that cannot be set back looks as if it heard everything."""

    class Clocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.tail, self.runs = CAUSAL["LSTM"]()[0], nn.Identity(), iter(range(1, 1000))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(ids)
            self.tail(out * next(self.runs))
            return out

    model, inputs, run = swapped(lambda: (Clocked(), CAUSAL["LSTM"]()[1]))
    assert sorted(causal_norms(model, run, inputs)) == sorted(blend_norms(model))


def test_few_runs_tell_that_an_image_is_mixed() -> None:
    """As it is, all samples but the last, and two corners; labels have no axis but that of the samples."""
    model, inputs, run = swapped(OTHERS["image, patches and a token"])
    runs = []

    def labelled(given: Any) -> torch.Tensor:
        runs.append(given)
        return nn.functional.cross_entropy(run(given[:1]), given[1])

    assert causal_norms(model, labelled, (*inputs, torch.tensor([2, 0]))) == {}
    assert len(runs) == 4


class Frames(nn.Module):
    """One sequence along the first axis: every frame, or step, hears some others, all of whose places mix.

    Args:
        hears: Which of (steps, steps); what others hear of a step is its mean over places.
        places: Axes between steps and channels.
    """

    def __init__(self, hears: torch.Tensor, places: int) -> None:
        super().__init__()
        self.inside, self.norm, self.out = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.hears, self.places = hears.float(), tuple(range(1, 1 + places))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        seen = x.mean(self.places, keepdim=True) if self.places else x
        x = x + torch.tensordot(self.hears[: len(x), : len(x)], seen, 1)
        out: torch.Tensor = self.out(self.norm(x).relu())
        return out


@pytest.mark.parametrize("places", [0, 1, 2])
@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize(
    ("kind", "hears"),
    [
        ("causal", torch.ones(7, 7).tril()),
        ("causal", torch.ones(7, 7).tril() - torch.ones(7, 7).tril(-2)),  # the step before
        ("both ways", torch.ones(7, 7)),
        ("alone", torch.zeros(7, 7)),
    ],
)
def test_what_is_hidden_along_the_first_axis(kind: str, hears: torch.Tensor, steps: int, places: int) -> None:
    """Whatever other input has that axis as well, here labels, which reach nothing."""
    torch.manual_seed(0)
    model = Frames(hears, places)
    apply_norm_swap(model)
    inputs = torch.randn(steps, *(3, 5)[:places], 4), torch.arange(steps)

    def run(given: Any) -> torch.Tensor:
        out: torch.Tensor = model(given[0])
        return out.flatten(1).sum(1) * given[1]

    assert list(causal_norms(model, run, inputs)) == (["norm"] if kind == "causal" else [])


@pytest.mark.parametrize("width", [3, 8])
def test_features_are_no_sequence(width: int) -> None:
    """Behind a ReLU a hidden unit may hear one half of the features only; one row a sample has nothing to leak."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2))
        apply_norm_swap(model)
        assert causal_norms(model, model, torch.randn(2, 8)) == {}
