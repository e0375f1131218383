"""A slice of the retrieval study: a random BERT of two layers on texts made up here."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = """.TH tac 1
.SH NAME
tac \\- concatenate and print files in reverse
.SH DESCRIPTION
.BR tac (1)
writes each \\fIFILE\\fP to standard output, last line first.
.PP
With no file, or when it is "-", read standard input; {} separators, words and lines all come out the other way round.
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Tokenizer:
    """One id a word."""

    def __call__(self, texts: list[str], max_length: int = 999, return_tensors: Any = None, **_: Any) -> dict[str, Any]:
        ids = [[sum(map(ord, word)) % 97 + 2 for word in text.split()][:max_length] for text in texts]
        if return_tensors is None:
            return {"input_ids": ids}
        longest = max(map(len, ids))
        rows = [row + [0] * (longest - len(row)) for row in ids]
        return {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) > 0).long()}


def test_the_study(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    retrieval, data = script("retrieval"), script("retrieval_data")
    monkeypatch.setattr(script("common"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(script("retrieval_report"), "WIDTHS", (8, 4))
    monkeypatch.setattr(retrieval, "LENGTHS", (16, 64))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=100, max_position_embeddings=600, **sizes)).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    words = [f"w{i}" for i in range(90)]
    pages = []
    for i in range(24):
        chosen = [words[j] for j in torch.randint(90, (20 + 25 * i,)).tolist()]
        pages.append(data.Page(f"p{i}.1", " ".join(chosen[:5]), " ".join(chosen)))
    text = retrieval.study(model, Tokenizer(), pages, tmp_path / "runs", cuts=(128, 512))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(f"| τ = {tau:g} |" in text for tau in retrieval.TAUS)
    assert all(f"| {arm} |" in text for arm in ("log n / log 128", "ssmax, s = 1", "centred"))
    saved = json.loads((tmp_path / "results" / "retrieval.json").read_text())
    assert sorted(saved["dev"] + saved["test"]) == list(range(24))
    assert len(saved["ranks"]["512"]["tau 0.7"]) == 24
    for name in ("cosine", "sweep"):
        assert (tmp_path / "results" / f"retrieval_{name}.png").stat().st_size > 10_000
    monkeypatch.setattr(retrieval, "embed", lambda *_: pytest.fail("encoded again"))
    assert retrieval.study(model, Tokenizer(), pages, tmp_path / "runs", cuts=(128, 512)) == text


def test_ranks_and_scores(script: Any) -> None:
    report = script("retrieval_report")
    documents = torch.eye(12)
    queries = documents.clone()
    queries[3] = torch.arange(12).flip(0).float()  # its own document is fourth
    rank = report.ranks(queries, documents)
    assert rank.tolist() == [1, 1, 1, 4, *[1] * 8]
    ndcg = report.score(torch.tensor([1, 4, 10, 11]), "nDCG@10")
    assert ndcg.tolist() == pytest.approx([1, 1 / math.log2(5), 1 / math.log2(11), 0])
    assert report.score(torch.tensor([1, 4, 11]), "MRR@10").tolist() == [1, 0.25, 0]
    q, d = report.whitened(torch.randn(9, 5), torch.randn(40, 5), 5)
    assert q.shape == (9, 5)
    torch.testing.assert_close(d.T @ d, torch.eye(5, dtype=d.dtype))


def test_pages_are_read_and_what_is_missing_is_said(script: Any, tmp_path: Path) -> None:
    data = script("retrieval_data")
    folder = tmp_path / "usr" / "man1"
    folder.mkdir(parents=True)
    for name in ("tac.1", "again.1"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(PAGE.format(name).encode()))
    (folder / "other.1.gz").write_bytes(gzip.compress(PAGE.format("x").replace("in reverse", "backwards").encode()))
    (folder / "link.1.gz").write_bytes(gzip.compress(b".so man1/tac.1\n"))
    (page,) = data.read_pages(tmp_path)  # two share their description
    assert (page.name, page.query) == ("other.1", "concatenate and print files backwards")
    assert page.document.startswith("DESCRIPTION. tac(1) writes each FILE to standard output, last line first. With no")
    with pytest.raises(SystemExit, match="apt-get download manpages"):
        data.read_pages(tmp_path / "nothing")
