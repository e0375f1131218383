"""``tune_temperature``: its statistics against simulation, its words, its refusals, and a model left as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_efficient.functional as F
from lightning_efficient.tuning import TemperatureSweep, compare_paired
from lightning_efficient.tuning.scores import score_ranking

# -- the bootstrap


def test_intervals_of_one_variant_are_the_usual_ones() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.3, 2.0, 400)
    base = rng.normal(0, 50, 400)  # shared by both, so that only a paired interval is narrow
    found = compare_paired(np.stack([base, base + gaps]), resamples=4000)
    half = 1.96 * gaps.std() / math.sqrt(400)
    assert found.difference[1] == pytest.approx(gaps.mean())
    assert found.high[1] - found.low[1] == pytest.approx(2 * half, rel=0.05)
    assert (found.difference[0], found.low[0], found.high[0]) == (0, 0, 0)


def test_a_winner_among_equals_is_not_called_better() -> None:
    """Seven variants without any effect: all intervals hold at once in 95 % of the data sets; single ones do not."""
    rng = np.random.default_rng(1)
    sets, wrong, naive = 300, 0, 0
    for _ in range(sets):
        base = rng.normal(size=80)
        gaps = rng.normal(size=(7, 80))
        found = compare_paired(np.concatenate([base[None], base + gaps]), resamples=300)
        wrong += bool(((found.low > 0) | (found.high < 0)).any())
        naive += bool((np.abs(gaps.mean(1)) > 1.96 * gaps.std(1) / math.sqrt(80)).any())
    assert wrong / sets < 0.05 + 3 * math.sqrt(0.05 * 0.95 / sets)
    assert naive / sets > 0.2
    real = compare_paired(np.stack([base, base + 0.6 + rng.normal(size=80)]))
    assert real.low[1] > 0


def test_weights_and_constant_differences() -> None:
    scores = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 3.0], [1.5, 2.5, 4.5]])
    found = compare_paired(scores, weights=np.array([3.0, 1.0, 1.0]))
    assert found.difference == pytest.approx([0, (3 + 0 - 1) / 5, 0.5])
    assert (found.low[2], found.high[2]) == (0.5, 0.5)
    assert compare_paired(scores[:, :1]).low.tolist() == pytest.approx([math.nan] * 3, nan_ok=True)
    for arguments in ({"resamples": 10}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="`resamples` is"):
            compare_paired(scores, **arguments)


# -- the sweep


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.first = self.attend.in_proj_weight[0, 0].item()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.attend(x, x, x)[0].mean(1)))

    @property
    def tau(self) -> float:
        return self.first / self.attend.in_proj_weight[0, 0].item()


EXAMPLE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
TAUS = (0.5, 0.8)


def tune(of: Callable[[float], Any], taus: Any = TAUS, model: Model | None = None, **kwargs: Any) -> TemperatureSweep:
    """A sweep whose scores are a given function of the temperature that the model has."""
    return F.tune_temperature(
        model or Model(), lambda m: of(m.tau), EXAMPLE, taus, resamples=1000, metric="nDCG@10", unit="queries", **kwargs
    )


def noisy(gain: float, peak: float, units: int = 200, seed: int = 0) -> Callable[[float], Tensor]:
    """Scores that gain the most at the temperature ``peak``."""
    base, noise = torch.rand(2, units, generator=torch.Generator().manual_seed(seed))

    def of(tau: float) -> Tensor:
        return base + (noise - noise.mean()) * (1 - tau) * 0.3 + gain * (1 - abs(tau - peak) / (1 - peak))

    return of


def test_the_model_runs_at_every_temperature_and_is_left_as_it_was() -> None:
    model = Model()
    model.norm.eval()  # a mixture, as after freezing
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seen: list[tuple[float, bool]] = []

    def score(m: nn.Module) -> Tensor:
        seen.append((round(m.tau, 5), m.training))
        m(EXAMPLE)
        return torch.rand(3)

    state = torch.get_rng_state()
    found = F.tune_temperature(model, score, EXAMPLE, (0.5, 2.0, 0.5), resamples=100)
    assert seen == [(2.0, False), (1.0, False), (0.5, False)]
    assert [row.tau for row in found.rows] == [2.0, 1.0, 0.5]
    assert (found.scores[0] == found.scores[1]).all()  # the same random numbers each time
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert "_temp_scale" not in vars(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_is_left_as_it_was_when_scoring_fails(error: type[BaseException]) -> None:
    model = Model()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def fail(tau: float) -> Any:
        if tau < 0.9:
            raise error("out of memory")
        return [1.0]

    with pytest.raises(error, match="out of memory"):
        tune(fail, model=model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training
    assert len(tune(lambda tau: [tau, tau], model=model).rows) == 3


def test_a_gain_is_said_and_chosen() -> None:
    found = tune(noisy(0.1, 0.8), taus=(1.0, 0.9, 0.8, 0.5))
    assert found.tau == found.best.tau == 0.8
    assert "τ = 0.8 beats 1: nDCG@10" in found.verdict
    assert "over 200 queries" in found.verdict
    assert "measure the gain on others" in found.verdict
    assert "end of the sweep" not in found.verdict
    assert "end of the sweep: try τ beyond 0.8" in tune(noisy(0.1, 0.8), taus=(0.8,)).verdict


def test_noise_is_called_noise() -> None:
    found = tune(noisy(0.001, 0.8))
    assert found.best.tau == 0.8
    assert found.best.difference > 0
    assert found.tau == 1.0
    assert "No evidence that any τ beats 1: the best, τ = 0.8, changes nDCG@10 by +" in found.verdict
    assert "within noise" in found.verdict
    worse = tune(noisy(-0.2, 0.5), taus=(0.5, 0.7))
    assert worse.tau == worse.best.tau == 1.0
    assert "τ = 1, the model as it is, has the best nDCG@10" in worse.verdict
    assert "Worse than 1 beyond noise: τ = 0.7, 0.5." in worse.verdict
    assert "There are 9 queries only" in tune(noisy(0.0, 0.5, units=9)).verdict
    assert tune(lambda tau: [3.0, 4.0]).best.tau == 1.0  # a tie


def test_one_number_is_a_hint_at_most() -> None:
    found = tune(lambda tau: 1 - tau)
    assert found.tau == 1.0
    assert "one number per τ" in found.verdict
    assert "τ = 0.5 has the best nDCG@10, 0.5 against" in found.verdict
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["low"] is None


def test_a_loss_is_minimized() -> None:
    found = tune(lambda tau: noisy(-0.1, 0.8)(tau), maximize=False, taus=(0.8, 0.9))
    assert found.tau == 0.8
    assert found.best.difference == pytest.approx(0.1, abs=0.03)
    assert ", -0.1" in found.verdict
    assert found.plain.score == pytest.approx(float(noisy(-0.1, 0.8)(1.0).mean()))


def test_table_picture_and_data() -> None:
    found = tune(noisy(-0.2, 0.5), taus=(0.5, 0.9))
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[0] == ["1", "0.9", "0.5"]
    assert cells[3] == ["unchanged", "worse", "worse"]
    assert cells[2][1].startswith("-0.0")
    axes = found.figure().axes[0]
    assert "no evidence that any τ beats 1 (200 queries; higher is better)" in axes.get_title()
    data = json.loads(json.dumps(found.to_dict()))
    assert data["tau"] == 1.0
    assert np.allclose(data["scores"], found.scores)


@pytest.mark.parametrize(
    ("taus", "error", "says"),
    [
        ((), ValueError, "`taus` is empty"),
        ((0.5, 0.0), ValueError, "is 0.0; expected finite numbers above 0"),
        ((-1.0,), ValueError, "is -1.0"),
        ((0.5, math.nan), ValueError, "is nan"),
        ((0.5, "0.7"), ValueError, "is '0.7'"),
        ((True,), ValueError, "is True"),
        (0.5, TypeError, "expected several temperatures"),
        ("0.5", TypeError, "expected several temperatures"),
        (None, TypeError, "expected several temperatures"),
    ],
)
def test_bad_temperatures(taus: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tune(lambda tau: pytest.fail("scored"), taus=taus)


@pytest.mark.parametrize(
    ("of", "error", "says"),
    [
        (lambda tau: None, TypeError, "gave NoneType at τ = 1"),
        (lambda tau: "good", TypeError, "gave str"),
        (lambda tau: torch.ones(2, 2), ValueError, r"gave shape \(2, 2\)"),
        (lambda tau: [], ValueError, r"gave shape \(0,\)"),
        (
            lambda tau: [1.0, math.nan if tau < 0.6 else 1.0],
            ValueError,
            "1 of 2 numbers that are not finite at τ = 0.5",
        ),
        (lambda tau: [1.0] * (3 if tau < 0.6 else 2), ValueError, "3 numbers at τ = 0.5 and 2 at 1"),
    ],
)
def test_bad_scores(of: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tune(of)


def test_a_score_that_trains_and_a_model_without_attention() -> None:
    def trains(m: nn.Module) -> list[float]:
        m.attend.in_proj_weight.data.mul_(1.01)
        return [1.0]

    with pytest.raises(ValueError, match="has changed since TempScale was applied"):
        F.tune_temperature(Model(), trains, EXAMPLE, TAUS)
    with pytest.raises(ValueError, match="no attention"):
        F.tune_temperature(nn.Linear(8, 8), lambda m: pytest.fail("scored"), EXAMPLE)
    with pytest.raises(ValueError, match="matches no attention"):
        tune(lambda tau: pytest.fail("scored"), include=["atend"])
    model = Model()
    F.apply_temp_scale(model, 0.5, EXAMPLE)
    with pytest.raises(ValueError, match="was changed before"):
        tune(lambda tau: pytest.fail("scored"), model=model)


# -- scores


def test_ranking_scores_against_their_definition() -> None:
    similarity = torch.rand(30, 25, dtype=torch.float64)
    relevant = [[int(i) for i in torch.randperm(25)[: 1 + n % 3]] for n in range(30)]
    expected: dict[str, list[float]] = {"ndcg": [], "mrr": []}
    for row, answer in zip(similarity, relevant, strict=True):
        ranks = sorted(int((row > row[i]).sum()) + 1 for i in answer)
        gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
        expected["ndcg"].append(gain / sum(1 / math.log2(i + 2) for i in range(len(answer))))
        expected["mrr"].append(1 / ranks[0] if ranks[0] <= 10 else 0.0)
    for metric, values in expected.items():
        found = score_ranking(similarity, relevant, metric)
        torch.testing.assert_close(found.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)


def test_retrieval_of_a_model() -> None:
    def embed(m: nn.Module, items: Any) -> Tensor:
        return m(torch.stack(list(items)))

    texts = torch.randn(6, 5, 8)
    score = F.retrieval_scores(embed, texts, texts, list(range(6)))
    found = F.tune_temperature(Model(), score, EXAMPLE, [0.9], metric="nDCG@10", unit="queries", resamples=100)
    assert found.scores.tolist() == [[1.0] * 6] * 2  # each text finds itself
    assert found.tau == 1.0
    wrong = {"`embed` gave": lambda m, items: [1], r"`embed` gave \(6, 5, 8\)": lambda m, items: texts}
    for says, bad in wrong.items():
        with pytest.raises(ValueError, match=says):
            F.retrieval_scores(bad, texts, texts, list(range(6)))(Model())
    for relevant in ([0, 1], [6] * 6, [[]] * 6, [-1] * 6):
        with pytest.raises(ValueError, match="`relevant`"):
            F.retrieval_scores(embed, texts, texts, relevant)
    with pytest.raises(ValueError, match="expected 'ndcg' or 'mrr'"):
        F.retrieval_scores(embed, texts, texts, list(range(6)), metric="map")


def test_classification_of_a_model() -> None:
    model = Model().eval()
    batches = [(torch.randn(n, 5, 8), torch.randint(8, (n,))) for n in (4, 3)]
    logits = torch.cat([model(x) for x, _ in batches]).detach()
    labels = torch.cat([y for _, y in batches])
    right = F.classification_scores(batches)(model)
    assert right.tolist() == (logits.argmax(1) == labels).double().tolist()
    likely = F.classification_scores(batches, "log_likelihood", lambda m, x: m(x))(model)
    torch.testing.assert_close(likely, logits.double().log_softmax(1)[torch.arange(7), labels])
    with pytest.raises(ValueError, match="iterator"):
        F.classification_scores(iter(batches))
    with pytest.raises(ValueError, match="expected 'accuracy'"):
        F.classification_scores(batches, "f1")
    with pytest.raises(ValueError, match="do not fit"):
        F.classification_scores([(batches[0][0], batches[1][1])])(model)
    with pytest.raises(ValueError, match="gave nothing"):
        F.classification_scores([])(model)
