"""NC1 to NC4 against definitions written out, closed forms and the sheet's oracles."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_efficient.functional import gof
from lightning_efficient.metrics import NeuralCollapse

F64 = torch.float64


def etf(k: int, d: int, radius: float = 1.0) -> Tensor:
    """A simplex, turned at random."""
    simplex = math.sqrt(k / (k - 1)) * (torch.eye(k, dtype=F64) - 1 / k) * radius
    return simplex @ torch.linalg.qr(torch.randn(d, d, dtype=F64))[0][:k]


def of(h: Tensor, y: Tensor, k: int, w: Tensor | None = None, b: Tensor | None = None, **kwargs) -> dict[str, float]:
    metric = NeuralCollapse(k, **kwargs)
    for rows in torch.arange(len(h)).split(37):
        metric.update(h[rows], y[rows], w, b)
    return {name: float(value) for name, value in metric.compute().items()}


def by_hand(h: Tensor, y: Tensor, k: int, w: Tensor, b: Tensor) -> dict[str, float]:
    """As the papers write it: full matrices, loops, two passes."""
    mu = torch.stack([h[y == c].mean(0) for c in range(k)])
    mc = mu - mu.mean(0)
    within = torch.einsum("ni,nj->ij", h - mu[y], h - mu[y]) / len(h)
    between = mc.t() @ mc / k
    var = [float((h[y == c] - mu[c]).square().sum(1).mean()) for c in range(k)]
    pairs = list(combinations(range(k), 2))
    cos = torch.nn.functional.cosine_similarity
    ideal = (torch.eye(k, dtype=F64) - 1 / k) / math.sqrt(k - 1)

    def part(rows: Tensor) -> tuple[float, float, float]:
        gram, norms = rows @ rows.t(), rows.norm(dim=1)
        angles = [abs(float(cos(rows[i], rows[j], 0)) + 1 / (k - 1)) for i, j in pairs]
        return float((gram / gram.norm() - ideal).norm()), float(norms.std() / norms.mean()), sum(angles) / len(angles)

    nc2, norms, angles = part(mc)
    weights, weight_norms, weight_angles = part(w)
    dual = w @ mc.t()
    counts = torch.bincount(y, minlength=k).double()
    return {
        "nc1": float(torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10))) / k,
        "nc1_quotient": float(torch.trace(within) / torch.trace(between)),
        "nc1_cdnv": sum((var[i] + var[j]) / 2 / float((mu[i] - mu[j]).square().sum()) for i, j in pairs) / len(pairs),
        "nc2": nc2, "nc2_norms": norms, "nc2_angles": angles,
        "nc2_weights": weights, "nc2_weight_norms": weight_norms, "nc2_weight_angles": weight_angles,
        "nc3": float((w / w.norm() - mc / mc.norm()).square().sum()),
        "nc3_etf": float((dual / dual.norm() - ideal).norm()),
        "nc4": float((torch.cdist(h, mu).argmin(1) != (h @ w.t() + b).argmax(1)).double().mean()),
        "gof_cosine": sum(abs(float(cos(mu[i], mu[j], 0))) for i, j in pairs) / len(pairs),
        "gof_length_count": float(torch.corrcoef(torch.stack([mu.norm(dim=1), counts]))[0, 1]),
        "classes": k,
    }  # fmt: skip


@pytest.mark.parametrize(("k", "d"), [(4, 9), (7, 5), (2, 3)])
def test_definitions(k: int, d: int) -> None:
    """More features than classes, and fewer."""
    y = torch.cat([torch.arange(k), torch.randint(0, k, (300,)), torch.zeros(60, dtype=torch.long)])
    h = torch.randn(k, d, dtype=F64)[y] + 0.5 * torch.randn(len(y), d, dtype=F64)
    w, b = torch.randn(k, d, dtype=F64), torch.randn(k, dtype=F64)
    assert of(h, y, k, w, b) == pytest.approx(by_hand(h, y, k, w, b), rel=1e-8)


def test_exact_simplex_has_collapsed() -> None:
    means = etf(5, 12, 3.0)
    y = torch.arange(100) % 5
    found = of(means[y], y, 5, 0.2 * means)
    assert {name for name in found if name.startswith("nc")} > {"nc1", "nc2", "nc3", "nc4"}
    zero = {name: value for name, value in found.items() if name.startswith("nc")}
    assert zero == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-13)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_simplex_with_noise(sigma: float) -> None:
    k, r, n = 5, 3.0, 20_000
    y = torch.arange(n) % k
    h = etf(k, 12, r)[y] + sigma * torch.randn(n, 12, dtype=F64)
    assert of(h, y, k)["nc1"] == pytest.approx(sigma**2 * (k - 1) ** 2 / (k * r**2), rel=0.03)
    assert set(of(h, y, k)).isdisjoint({"nc3", "nc4", "nc2_weights"})


def test_what_changes_nothing() -> None:
    k, d = 4, 8
    y = torch.randint(0, k, (200,))
    h = (etf(k, d, 2.0)[y] + torch.randn(200, d, dtype=F64)) * 1.0
    turn = torch.linalg.qr(torch.randn(d, d, dtype=F64))[0]
    centred = [name for name in of(h, y, k) if not name.startswith("gof")]
    base = {name: of(h, y, k)[name] for name in centred}
    for other, labels in ((h @ turn + 1000, y), (torch.cat([h, h]), torch.cat([y, y])), (h.flip(0), y.flip(0))):
        assert {name: of(other, labels, k)[name] for name in centred} == pytest.approx(base, rel=1e-7)
    single = of((h + 1000).float(), y, k)
    assert single["nc1_quotient"] == pytest.approx(base["nc1_quotient"], rel=1e-3)  # rounding of the features alone


def test_classes_without_samples_are_left_out() -> None:
    y = torch.tensor([0, 2, 4])[torch.arange(90) % 3]
    h, w = etf(3, 6)[torch.arange(90) % 3] + 0.1 * torch.randn(90, 6, dtype=F64), torch.randn(6, 6, dtype=F64)
    found = of(h, y, 6, w)
    same = of(h, torch.arange(90) % 3, 3, w[[0, 2, 4]])
    assert found["classes"] == 3
    same.pop("nc4"), found.pop("nc4")  # the classifier may name a class without samples
    assert found == pytest.approx(same, rel=1e-9, nan_ok=True)


def test_global_mean_of_samples_differs_where_classes_do() -> None:
    y = torch.cat([torch.zeros(90, dtype=torch.long), torch.arange(30) % 3])
    h = torch.randn(3, 5, dtype=F64)[y] + 0.1 * torch.randn(120, 5, dtype=F64)
    mu = torch.stack([h[y == c].mean(0) for c in range(3)]) - h.mean(0)
    norms = mu.norm(dim=1)
    assert of(h, y, 3, global_mean="samples")["nc2_norms"] == pytest.approx(float(norms.std() / norms.mean()), rel=1e-9)
    assert of(h, y, 3)["nc2_norms"] != pytest.approx(float(norms.std() / norms.mean()), rel=1e-3)


def test_nc4_of_the_first_samples() -> None:
    y = torch.arange(80) % 2
    h = torch.tensor([[1.0], [-1.0]], dtype=F64)[y]
    wrong = torch.where(torch.arange(80)[:, None] < 40, h, -h)  # the classifier is wrong on the second half
    metric = NeuralCollapse(2, nc4_samples=50)
    for rows in torch.arange(80).split(7):
        metric.update(h[rows], y[rows], logits=torch.cat([wrong, -wrong], 1)[rows])
    assert float(metric.compute()["nc4"]) == pytest.approx(10 / 50)


def test_refused() -> None:
    h, y = torch.randn(6, 3), torch.arange(6) % 2
    for bad, kwargs in (
        (r"`labels` holds torch.int64 from 0 to 1; expected integers from 0 below num_classes=", {"num_classes": 0}),
        ("`num_classes` is 1", {"num_classes": 1}), ("`global_mean` is 'x'", {"num_classes": 2, "global_mean": "x"}),
        ("`num_features` is 0", {"num_classes": 2, "num_features": 0}),
        ("`nc4_samples` is -1", {"num_classes": 2, "nc4_samples": -1}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`num_classes` is 0" if kwargs["num_classes"] == 0 else bad):
            NeuralCollapse(**kwargs)
    metric = NeuralCollapse(2)
    for bad, args in (
        (r"`labels` has shape \(5,\); expected \(6,\)", (h, y[:5])), ("from 2 to 3; expected integers", (h, y + 2)),
        ("torch.float32", (h, y.float())), (r"`weight` has shape \(2, 4\)", (h, y, torch.zeros(2, 4))),
        ("NaN or infinite", (h / 0, y)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=bad):
            metric.update(*args)
    metric.update(h[:2] * 0 + 1, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"samples of 1 were seen; expected at least 2"):
        metric.compute()


# -- imbalanced: the general orthogonal frame --------------------------------------------------------------------------

COUNTS = (200, 100, 50, 4)


@pytest.mark.parametrize(
    ("decays", "expected"),
    [
        (
            (5e-4, 5e-4),
            [[13.965136, 9.823, 6.894068, 1.823], [0.069826, 0.09823, 0.137881, 0.45575],
             [0.987484, 0.9823, 0.974968, 0.9115]],
        ),
        ((0.02, 0.01), [[6.46, 3.531068, 1.46, 0.0], None, [0.646, 0.499368, 0.292, 0.0]]),
    ],
)  # fmt: skip
def test_gof_oracles(decays: tuple[float, float], expected: list[list[float] | None]) -> None:
    found = gof(*decays, COUNTS)
    for value, numbers in zip(found, expected, strict=False):
        if numbers is not None:
            assert value.tolist() == pytest.approx(numbers, abs=1.1e-6)
    assert float(found.threshold) == pytest.approx(sum(COUNTS) ** 2 * decays[0] * decays[1])
    assert found.collapsed.tolist() == [n <= float(found.threshold) for n in COUNTS]


@pytest.mark.parametrize(
    ("layers", "decays", "expected"),
    [(2, (1e-3, 1e-3), [11.5960, 7.2679, 4.5413, 2.8236]), (3, (2e-3, 1e-3), [9.3447, 5.5105, 3.2306, 1.8746])],
)
def test_gof_of_several_layers(layers: int, decays: tuple[float, float], expected: list[float]) -> None:
    found = gof(*decays, (40, 20, 10, 5), layers)
    assert found.weight_squared.tolist() == pytest.approx(expected, abs=6e-5)
    edge = float(found.threshold)
    assert gof(*decays, (75 - 2, 1, 1), layers).collapsed.tolist() == [edge >= 73, edge >= 1, edge >= 1]


def test_gof_is_the_minimum_of_its_loss() -> None:
    """Gradient descent on free features, one class above and one below the threshold."""
    counts, lw, lh = (12, 6, 1), 0.05, 0.08
    total = sum(counts)
    y = torch.nn.functional.one_hot(torch.repeat_interleave(torch.arange(3), torch.tensor(counts))).double()
    w = torch.randn(3, 5, dtype=F64, requires_grad=True)
    h = torch.randn(total, 5, dtype=F64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w, h], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = (h @ w.t() - y).square().sum() / 2 / total + lw / 2 * w.square().sum() + lh / 2 * h.square().sum()
        value.backward()
        return value

    solver.step(loss)
    found = gof(lw, lh, counts)
    assert found.collapsed.tolist() == [False, False, True]
    assert w.detach().square().sum(1).tolist() == pytest.approx(found.weight_squared.tolist(), abs=1e-5)


def test_gof_refuses() -> None:
    for kwargs, match in (
        ({"weight_decay": 0.0}, "`weight_decay` is 0"),
        ({"counts": (3, 0)}, "`counts` is"),
        ({"layers": 0}, "`layers`"),
    ):
        with pytest.raises(ValueError, match=match):
            gof(**{"weight_decay": 0.1, "feature_decay": 0.1, "counts": (3, 2)} | kwargs)
