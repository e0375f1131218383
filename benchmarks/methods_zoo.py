"""Every method over families of models, a column for every question.

Tiny random-weight models of Hugging Face families in float64, written as they are by default, and ways of writing
attention by hand. Every error is against a reference of its own, in float64: the temperature against softmax(logits /
tau) from its definition, the monitor's entropy against the attention weights that the model itself returns, spectral
norms against a full SVD, folded norms against their formula put in their place by hand, cut units against the same
units set to zero, masks against a sort of all weights.

    python benchmarks/methods_zoo.py                 # goes on where it stopped
    python benchmarks/methods_zoo.py --only mixtral --redo
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from attention_definition import Definition
from common import RESULTS, machine, markdown, save
from tiny_transformers import FAMILIES
from tiny_transformers import build as build_tiny
from torch import Tensor, fx, nn

from lightning_efficient import export
from lightning_efficient.attention import AttentionProbe
from lightning_efficient.attention.linear import apply_linear_attention
from lightning_efficient.attention.temperature import (
    TempScaleConfig,
    apply_temp_scale,
    check_gradients,
    find_targets,
    remove_temp_scale,
)
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.running import Float64
from lightning_efficient.deploy.export import ExportError
from lightning_efficient.norms.blend import BlendNorm
from lightning_efficient.norms.causal import causal_norms
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.swap import apply_norm_swap
from lightning_efficient.pruning.selection import make_masks
from lightning_efficient.pruning.targets import find_targets as find_weights
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim
from lightning_efficient.weightspace import SpectralTransform
from lightning_efficient.weightspace import sigma_reparam as sigma

TAU = 0.7
COLUMNS = {
    "family": "family", "temperature": "temperature", "temperature_error": "error", "padded": "left padding, in fit",
    "save": "save_pretrained", "monitor": "monitor", "monitor_error": "error", "sigma": "sigmaReparam covers",
    "sigma_error": "error", "norms": "norm swap, folded at export", "norms_error": "error",
    "units": "units that can go", "units_error": "error", "masks": "masks cover", "masks_error": "error",
    "linear": "linear attention",
}  # fmt: skip
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
_TEXT = _SIZES | {"intermediate_size": 32}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_MOE = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LOCAL = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
_SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip

# Family -> (prefix of its classes, arguments of its configuration).
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", _GROUPED),
    "phi": ("Phi", _TEXT),
    "phi3": ("Phi3", _GROUPED | {"pad_token_id": 0}),
    "qwen2": ("Qwen2", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "cohere2": ("Cohere2", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED),
    "olmo": ("Olmo", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "granite": ("Granite", _GROUPED),
    "glm": ("Glm", _GROUPED | {"head_dim": 4, "pad_token_id": 0}),
    "gemma": ("Gemma", _GROUPED | {"head_dim": 4}),
    "falcon": ("Falcon", _SIZES),
    "falcon, alibi": ("Falcon", _SIZES | {"alibi": True}),
    "mpt": ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "max_seq_len": 32}),
    "gptj": ("GPTJ", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeo", {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 40, "window_size": 4,
                           "attention_types": [[["global", "local"], 1]]}),
    "gpt_bigcode": ("GPTBigCode", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "codegen": ("CodeGen", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "rotary_dim": 4}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", _MOE | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3Moe", _MOE | {"head_dim": 4}),
    "olmoe": ("Olmoe", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoe", _GROUPED | {"num_local_experts": 4}),
    "gpt_oss": ("GptOss", _GROUPED | {"head_dim": 4, "num_local_experts": 4}),
    "jetmoe": ("JetMoe", _GROUPED | {"num_local_experts": 4, "kv_channels": 4}),
    "longt5, local": ("LongT5Encoder", _LOCAL | {"local_radius": 3}),
    "longt5, global": (
        "LongT5Encoder",
        _LOCAL | {"local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 4},
    ),
    "longformer": ("Longformer", _TEXT | {"attention_window": [4, 4], "pad_token_id": 0}),
    "mamba": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}),
    "deberta": ("Deberta", _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "camembert": ("Camembert", _TEXT),
    "ernie": ("Ernie", _TEXT),
    "convbert": ("ConvBert", _TEXT | {"embedding_size": 16}),
    "squeezebert": ("SqueezeBert", _TEXT | {"embedding_size": 16}),
    "nystromformer": ("Nystromformer", _TEXT | {"num_landmarks": 4, "segment_means_seq_len": 8}),
    "fnet": ("FNet", {k: v for k, v in _TEXT.items() if "heads" not in k}),
    "marian": ("Marian", _SEQ | {"pad_token_id": 0}),
    "pegasus": ("Pegasus", _SEQ),
    "m2m_100": ("M2M100", _SEQ),
}  # fmt: skip
TOKENS = torch.randint(3, 39, (2, 8), generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Attention by hand, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.num_heads = way, 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        if way == "talking heads":
            self.mix = nn.Linear(4, 4)
        if way == "sink":
            self.sink = nn.Parameter(torch.randn(4, 1, 1))
        self.expert = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = WAYS[self.way](self, q, k, v)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return (torch.einsum("bti,eio->beto", x, self.expert).amax(1),)


def _masked(number: float) -> Callable[..., Tensor]:
    def attend(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(_late(q), number)
        return (q @ k.mT / 2 + mask).softmax(-1) @ v

    return attend


def _late(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


def _merged(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) / 2).softmax(-1), v).unflatten(0, (-1, 4))


def _sink(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT / 2, m.sink.expand(*q.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ v


def _talking(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = m.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    return m.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


def _windows(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (-1, 4)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).flatten(2, 3)


def _channels(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1) @ v.mT).mT


WAYS: dict[str, Callable[[Written, Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sdpa, causal": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "softmax @": lambda m, q, k, v: (q @ k.mT / 2).softmax(-1) @ v,
    "mask -inf": _masked(float("-inf")), "mask -1e9": _masked(-1e9), "mask -1e4": _masked(-1e4),
    "mask -100": _masked(-100.0), "mask finfo.min / 2": _masked(torch.finfo(torch.float32).min / 2),
    "masked_fill": lambda m, q, k, v: (q @ k.mT / 2).masked_fill(_late(q), -1e9).softmax(-1) @ v,
    "heads in the batch axis": _merged, "sink": _sink, "talking heads": _talking, "windows, five axes": _windows,
    "over channels": _channels,
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v
    ),
    "einsum ...": lambda m, q, k, v: torch.einsum(
        "...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v
    ),
    "soft cap": lambda m, q, k, v: (5 * (q @ k.mT / 10).tanh()).softmax(-1) @ v,
    "sigmoid": lambda m, q, k, v: torch.sigmoid(q @ k.mT / 2) @ v,
}  # fmt: skip


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A float64 model in which no parameter is zero, and the arguments of a call."""
    torch.manual_seed(0)
    if family.startswith("by hand: "):
        return Written(family[9:]).double().eval(), {"x": torch.randn(2, 8, 16, dtype=torch.float64)}
    if family in FAMILIES:
        model, arguments = build_tiny(family)
    else:
        prefix, sizes = MORE[family]
        config = getattr(hf, prefix.removesuffix("Encoder") + "Config")(**sizes)
        model = getattr(hf, prefix + "Model")(config)
        arguments = {"input_ids": TOKENS, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
        arguments |= {"decoder_input_ids": TOKENS[:, :5]} if sizes is _SEQ or "encoder_layers" in sizes else {}
        if family in ("mamba", "fnet"):
            del arguments["attention_mask"]
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model, {n: t.double() if t.is_floating_point() else t for n, t in arguments.items()}


def output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad(), Float64():
        made: Tensor = model(**arguments)[0]
    return made.clone()


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def temperature(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Verdict and error; and what ``save_pretrained`` does then."""
    original = copy.deepcopy(model)
    change = apply_temp_scale(model, TAU, arguments)
    modules = dict(original.named_modules())
    definition = Definition([modules["" if n == "(model)" else n] for n in change.targets], TAU)
    with definition.watching():
        expected = output(original, arguments)
    scaled = output(model, arguments)
    adapters = sum("adapter" in text for text in change.targets.values())
    verdict = f"exact, {f'{adapters} of {len(change.targets)} by an adapter' if adapters else 'weights'}"
    row = {"temperature": verdict, "temperature_error": gap(expected, scaled), "save": "no such method"}
    if hasattr(model, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder)
                again = type(model).from_pretrained(folder, dtype=torch.float64).eval()
                row["save"] = "kept" if gap(scaled, output(again, arguments)) < 1e-9 else "LOST"
            except RuntimeError as why:
                row["save"] = "refused by name" if "load_from_checkpoint" in str(why) else f"FAILS: {why}"
    remove_temp_scale(model)
    return row


def padded(model: nn.Module, arguments: dict[str, Any]) -> str:
    """A batch that is padded on the left, adapters everywhere, forward and gradient."""
    if "attention_mask" not in arguments:
        return "no padding"
    mask = torch.ones_like(arguments["attention_mask"])
    mask[1, :3] = 0
    arguments = {**arguments, "attention_mask": mask}
    targets = find_targets(model, arguments, TempScaleConfig(TAU, "log_n"))
    check_gradients(copy.deepcopy(model).train(), arguments, targets)
    return "exact"


def monitor(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the probe reads, against the attention that the model returns where it does."""
    # What padded queries return is every model's own.
    arguments = {n: torch.ones_like(t) if n == "attention_mask" else t for n, t in arguments.items()}
    with AttentionProbe(model) as probe:
        output(model, arguments)
    row: dict[str, Any] = {"monitor": f"{len(probe.calls)} read"}
    if probe.report:
        row["monitor"] = (f"{len(probe.calls)} read, rest named" if probe.calls else "named") + f": {probe.report[:60]}"
    eager = copy.deepcopy(model)
    if not hasattr(eager, "set_attn_implementation"):
        return row
    try:
        eager.set_attn_implementation("eager")
        with AttentionProbe(eager) as probe, torch.no_grad(), Float64():
            out = eager(**arguments, output_attentions=True)
    except Exception:  # some families return none
        return row
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    expected = [w for name in names for w in getattr(out, name, None) or () if w is not None]
    if not expected or not all(torch.allclose(w.sum(-1), torch.ones_like(w.sum(-1)), atol=1e-5) for w in expected):
        return row  # none, or no weights: scores, or weights without those of sinks
    mean = sorted(float(c.rows.entropy.nanmean()) for c in probe.calls)
    reference = sorted(float(torch.special.entr(w.double()).sum(-1).mean()) for w in expected)
    if len(mean) == len(reference):
        row["monitor_error"] = max(abs(a - b) for a, b in zip(mean, reference, strict=True))
    return row


def spectral(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Coverage, and the worst relative error of the first spectral norms."""
    model = copy.deepcopy(model).requires_grad_(True)
    uses = sigma.find_uses(model, lambda: output(model, arguments))
    found = sigma.find_targets(model, uses=uses)
    worst = 0.0
    for parameter, blocks in found.matched.values():
        transform = SpectralTransform(blocks)
        transform.start(parameter.detach())
        exact = [torch.linalg.matrix_norm(m, 2) for m in transform._matrices(parameter.detach())]
        worst = max(worst, float((transform.sigma / torch.stack(exact) - 1).abs().max()))
    return {"sigma": found.coverage.replace(" trained parameters", ""), "sigma_error": worst}


class Formula(nn.Module):
    """A finished RepBN, or fixed affine map, written down once more."""

    def __init__(self, norm: BlendNorm) -> None:
        super().__init__()
        target = norm.target
        if isinstance(target, RepBN):
            bn = target.bn
            self.weight = bn.weight / (bn.running_var.double() + bn.eps).sqrt()
            self.bias = bn.bias - self.weight * bn.running_mean.double()
            self.weight = self.weight + target.eta
        else:
            self.weight, self.bias = target.affine()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def norms(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Swapped, two training forwards, finished, exported; batch statistics only where the model is not causal."""
    untouched, original, kind = copy.deepcopy(model), output(model, arguments), "repbn"
    change = apply_norm_swap(model)
    worst = gap(original, output(model, arguments))
    with Float64():
        causal = causal_norms(model, lambda given: model(**given), arguments)
    if causal:
        model, kind = untouched, "affine, as batch statistics are refused by name (causal)"
        change = apply_norm_swap(model, {"target": "affine"})
    model.train()
    for _ in range(2):
        output(model, arguments)
    model.eval()
    for norm in model.modules():
        if isinstance(norm, BlendNorm):
            norm.finish()
    reference = copy.deepcopy(model)
    for name in change.targets:
        parent, _, child = name.rpartition(".")
        setattr(reference.get_submodule(parent), child, Formula(reference.get_submodule(name)))  # type: ignore[arg-type]
    with Float64():
        plain = export(model, arguments)
    left = sum(isinstance(m, fx.GraphModule) for m in plain.modules())
    worst = max(worst, gap(output(reference, arguments), output(plain, arguments)))
    return {"norms": f"{kind}: {len(change.targets) - left} of {len(change.targets)} folded", "norms_error": worst}


def units(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every other unit set to zero, and cut out."""
    try:
        groups = find_groups(model, arguments)
    except NoMatchError as why:
        return {"units": f"none: {str(why).replace('|', '/')[:110]}"}
    keep = {}
    for name, group in groups.found.items():
        stay = max(group.units // 2 // group.divisor, 1) * group.divisor
        keep[name] = sorted([*range(0, group.units, 2), *range(1, group.units, 2)][:stay])
    zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
    for name, stay in keep.items():
        gone = set(range(groups.found[name].units)) - set(stay)
        groups.found[name].zero(dict(zeroed.named_parameters()), gone)
    apply_slim(slim, keep, groups)
    heads = sum(group.heads for group in groups.found.values())
    return {
        "units": f"{groups.share:.0%}; heads in {heads}",
        "units_error": gap(output(zeroed, arguments), output(slim, arguments)),
    }


def masks(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Half of all weights by magnitude, against a sort."""
    found = find_weights(model).matched
    scores = {name: target.param.detach().abs() for name, target in found.items()}
    made = make_masks(scores, 0.5)
    every = torch.cat([s.flatten() for s in scores.values()])
    threshold = every.sort().values[every.numel() // 2]
    wrong = sum(int((made[name] != (score >= threshold)).sum()) for name, score in scores.items())
    share = every.numel() / sum(p.numel() for p in model.parameters())
    return {"masks": f"{share:.0%}", "masks_error": wrong / every.numel()}


def linear(model: nn.Module, arguments: dict[str, Any]) -> str:
    """Square grids of tokens in timm's attention; else there is nothing to do."""
    return f"{len(apply_linear_attention(model).targets)} swapped"


QUESTIONS: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "temperature": temperature, "padded": padded, "monitor": monitor, "sigma": spectral, "norms": norms,
    "units": units, "masks": masks, "linear": linear,
}  # fmt: skip


def row_of(family: str) -> dict[str, Any]:
    """One row; what a method refuses is quoted."""
    model, arguments = build(family)
    row: dict[str, Any] = {}
    for key, ask in QUESTIONS.items():
        try:
            answer = ask(copy.deepcopy(model), arguments)
            row |= answer if isinstance(answer, dict) else {key: answer}
        except (ExportError, ValueError) as why:
            nothing = isinstance(why, NoMatchError) or "no attention was seen" in str(why)
            row[key] = "nothing to do" if nothing else f"refused by name: {str(why).replace('|', '/')[:110]}"
    return row


def families() -> list[str]:
    return [*FAMILIES, *MORE, *(f"by hand: {way}" for way in WAYS)]


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON and the table."""
    save("methods_zoo", rows)
    shown = [
        {k: f"{v:.0e}" if isinstance(v, float) and k.endswith("error") else v for k, v in row.items()} for row in rows
    ]
    count = Counter(row.get("temperature", "not run").partition(",")[0].partition(":")[0] for row in rows)
    worst = {k: max((row[k] for row in rows if k in row), default=0.0) for k in COLUMNS if k.endswith("error")}
    head = (
        "# Every method over families of models\n\n"
        f"{len(rows)} families, tau = {TAU}. Temperature: {', '.join(f'{n} {v}' for v, n in count.most_common())}. "
        + "Worst errors: " + ", ".join(f"{k.partition('_')[0]} {v:.1e}" for k, v in worst.items())
        + f".\n\n`{machine()}`\n\n"
    )  # fmt: skip
    (RESULTS / "methods_zoo.md").write_text(head + markdown(shown, COLUMNS) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families, by the beginning of their names")
    parser.add_argument("--redo", action="store_true", help="also those that are done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "methods_zoo.json"
    done = {row["family"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for family in families():
        if (args.only and not any(family.startswith(o) for o in args.only)) or (family in done and not args.redo):
            continue
        start = time.perf_counter()
        try:
            row = row_of(family)
        except Exception as why:  # the table says so, and the next family is not concerned
            row = {
                "temperature": f"not run: {type(why).__name__}: {str(why)[:80]}".replace("|", "/").replace("\n", " ")
            }
        done[family] = {"family": family, **row, "seconds": round(time.perf_counter() - start, 1)}
        print(family, {k: v for k, v in done[family].items() if k != "family"}, flush=True)
        write([done[key] for key in families() if key in done])


if __name__ == "__main__":
    main()
