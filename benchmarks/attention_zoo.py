"""Attention temperature over timm and Hugging Face: exact in the weights, exact by an adapter, or refused, and why.

The smallest model of every timm family (weights random, no parameter zero), and tiny random-weight models of the
Hugging Face families, written as ``sdpa`` and as ``eager``. "error" is measured here and not taken from the method's
own check: the output in float64, against a forward in which every attention of a targeted module is computed from its
definition, softmax(logits / tau).

    python benchmarks/attention_zoo.py                  # all; goes on where it stopped
    python benchmarks/attention_zoo.py --only swin_transformer hf/t5 --redo
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch
from attention_definition import Definition
from attention_models import FAMILIES
from attention_models import build as build_hf
from common import RESULTS, machine, markdown, save
from fold_zoo import build as build_timm
from fold_zoo import families, smallest
from torch import Tensor, nn

from lightning_efficient.methods.temp_scale import TempScaleError, apply_temp_scale
from lightning_efficient.surgery.match import NoMatchError
from lightning_efficient.surgery.probes import Float64
from lightning_efficient.surgery.tags import mapped, tensors_behind

TAU = 0.7
TOLERANCE = 1e-9
COLUMNS = {
    "family": "family", "model": "model", "verdict": "verdict", "weights": "in weights", "adapters": "by adapter",
    "refused": "refused", "error": "error", "why": "why not in the weights",
}  # fmt: skip


def example_of(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A float64 model, and its arguments."""
    if name.startswith("hf/"):
        family, _, attention = name[3:].partition("/")
        model, kwargs = build_hf(family, attention)
        model = model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model, (), mapped(kwargs, lambda t: t.double() if t.is_floating_point() else t)
    with torch.no_grad():
        model, x = build_timm(name)
    return model, (x,), {}


def outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad(), Float64():
        return [t.clone() for t in tensors_behind(model(*args, **kwargs)) if t.is_floating_point()]


def scale_one(name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, args, kwargs = example_of(name)
    original, refused, why = copy.deepcopy(model), {}, Counter()
    example = args[0] if args else kwargs
    try:
        change = apply_temp_scale(model, TAU, example)
    except NoMatchError as error:
        return {"verdict": "no attention", "why": reason(str(error).split("ran.")[-1])}
    except TempScaleError as error:
        refused = dict(re.findall(r"'([^']+)' \(((?:[^()]|\([^()]*\))*)\)", str(error)))
        excluded = re.search(r"exclude=(\[.*\])", str(error))
        if not refused or excluded is None:
            return {"verdict": "refused", "why": reason(str(error))}
        names = re.findall(r"'([^']+)'", excluded[1])
        why.update(refused.values())
        row = {"refused": len(names)}
        try:
            change = apply_temp_scale(model, TAU, example, exclude=names)
        except NoMatchError:
            return row | {"verdict": "refused", "why": reason(listed(why))}
        except TempScaleError as error:
            return row | {"verdict": "refused", "why": reason(str(error))}
    modules = dict(original.named_modules())
    definition = Definition([modules["" if n == "(model)" else n] for n in change.targets], TAU)
    with definition.watching():
        expected = outputs(original, args, kwargs)
    error = max(gap(a, b) for a, b in zip(expected, outputs(model, args, kwargs), strict=True))
    adapters = sum("adapter" in text for text in change.targets.values())
    why.update(reason(text.partition("adapter (")[2]) for text in change.targets.values() if "adapter" in text)
    exact = "exact, adapter" if adapters else "exact, weights"
    verdict = "WRONG" if not error <= TOLERANCE else f"{exact} (rest refused)" if refused else exact
    return {
        "verdict": verdict, "weights": len(change.targets) - adapters, "adapters": adapters,
        "refused": len(names) if refused else 0, "error": error, "why": reason(listed(why)),
        "targets": change.targets, "skipped": change.skipped,
    }  # fmt: skip


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) if a.numel() else 0.0


def listed(why: Counter[str]) -> str:
    return "; ".join(f"{n} × {text}" for text, n in why.most_common() if text)


def reason(text: str) -> str:
    """Without the names of weights and modules."""
    text = re.sub(r"scaling .* is not", "scaling its knobs is not", re.sub(r"'[^']*'", "…", text))
    return re.sub(r"\[[^\[\]]*\]", "[…]", text).replace("|", "/")[:200].removesuffix(")")


def isolated(name: str, limit: float) -> dict[str, Any]:
    """``scale_one`` in a process of its own, ended after ``limit`` seconds."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work(connection: Connection) -> None:
        try:
            connection.send(scale_one(name))
        except Exception as why:  # the table says so, and the next model is not concerned
            text = str(why).strip().splitlines() or [""]
            connection.send({"verdict": "not run", "why": f"{type(why).__name__}: {text[0]}"[:200]})

    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    sender.close()
    row = {"verdict": "not run", "why": f"not done after {limit:.0f} s"}
    try:
        if receiver.poll(limit):
            row = receiver.recv()
    except EOFError:
        row = {"verdict": "not run", "why": "the process died (memory?)"}
    process.terminate()
    process.join()
    return row


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON and the table."""
    save("attention_zoo", rows)
    counts = Counter(row["verdict"] for row in rows)
    weights, adapters = (sum(row.get(key, 0) for row in rows) for key in ("weights", "adapters"))
    errors = [row["error"] for row in rows if "error" in row]
    head = (
        "# Attention temperature over timm and Hugging Face\n\n"
        "The smallest model of every timm family and tiny Hugging Face models, random weights, tau = "
        f"{TAU}; relative error of the output in float64 against softmax(logits / tau).\n\n"
        f"{len(rows)} models: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}. {weights} "
        f"attentions scaled in their weights, {adapters} by an adapter; largest error {max(errors, default=0.0):.1e}."
        f"\n\n`{machine()}`\n\n"
    )
    shown = [{**row, "error": f"{row['error']:.0e}" if "error" in row else ""} for row in rows]
    (RESULTS / "attention_zoo.md").write_text(head + markdown(shown, COLUMNS) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families; Hugging Face ones as hf/bert/sdpa")
    parser.add_argument("--redo", action="store_true", help="also those that are done")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a model may take")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "attention_zoo.json"
    done = {row["family"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    names = {f"hf/{family}/{kind}": "" for family in FAMILIES for kind in ("sdpa", "eager")} | families()
    for family, models in names.items():
        if (args.only and not any(family.startswith(only) for only in args.only)) or (family in done and not args.redo):
            continue
        start, name = time.perf_counter(), smallest(models) if models else family
        row = {"family": family, "model": name, **isolated(name, args.limit)}
        done[family] = row | {"seconds": round(time.perf_counter() - start, 1)}
        print(f"{family:28} {name:36} {row['verdict']:16} {row.get('why', '')[:150]}", flush=True)
        write([done[key] for key in sorted(done)])


if __name__ == "__main__":
    main()
