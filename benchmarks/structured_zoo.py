"""Does structured pruning work on my model? Zeroed against removed units over many networks; Torch-Pruning beside.

Weights are random and away from their initial values, biases and batch statistics too; nothing is downloaded. For every
network: which share of its parameters can go, exactly and with ``inexact=True``; heads; the largest relative difference
between zeroed and removed units over six kinds of subsets, in float64; a short training step after the cut; saving and
reading it again. Beside it what Torch-Pruning's own pruner cuts at half of all channels, and whether its result
computes what the network computes without those channels (its choice by magnitude, as its documentation shows).

Every network runs in a process of its own; rows are written as they come, and a run that is started again goes on.
Seconds and limits are processor time. A row says which state of ``lightning_efficient/structured`` made it.

    python benchmarks/structured_zoo.py            # rows that are missing
    python benchmarks/structured_zoo.py --older    # and those of other states of the code, the quickest first
    python benchmarks/structured_zoo.py --only "resnet" "vit" --again
"""

# ruff: noqa: E501  (tables of networks, one a line)

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, machine, markdown
from torch import Tensor, nn
from zoo_models import OWN, Build, Example, images, tokens
from zoo_strangers import STRANGERS
from zoo_styles import STYLES

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.nests import mapped, tensors_behind
from lightning_efficient.common.running import Float64
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.slim import apply_slim, plan_slim, replay_slim

PATH = RESULTS / "structured_zoo.json"
CODE = "lightning_efficient/structured"
_THEIRS = ("theirs", "same", "gap")
LIMIT = {"ours": 300, "theirs": 120}
COLUMNS = {
    "model": "model", "exact": "can go, exactly", "inexact": "with `inexact`", "heads": "attentions with heads",
    "error": "largest error", "runs": "runs, trains, reloads", "seconds": "s", "half": "gone at half",
    "theirs": "Torch-Pruning at half", "same": "computes the same", "held": "what holds the rest", "code": "code",
}  # fmt: skip
SUBSETS: dict[str, Callable[[int], list[int]]] = {
    "one": lambda n: [n // 2],
    "all but one": lambda n: list(range(n - 1)),
    "first": lambda n: list(range(max(n // 3, 1))),
    "last": lambda n: list(range(n - max(n // 3, 1), n)),
    "every other": lambda n: list(range(0, n, 2)),
    "unbalanced": lambda n: sorted({*range(0, n // 2, 1), *range(n // 2, n, 3)}),
}


def _timm(name: str, size: int = 64, **kwargs: Any) -> tuple[Build, Example]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **kwargs)  # type: ignore[no-any-return]

    return build, images(size)


def _mixer(**kwargs: str) -> tuple[Build, Example]:
    def build() -> nn.Module:
        from timm.layers import GatedMlp
        from timm.models import mlp_mixer

        own = {name: GatedMlp if part == "GatedMlp" else getattr(mlp_mixer, part) for name, part in kwargs.items()}
        ratio = {"mlp_ratio": 4} if kwargs else {}
        return mlp_mixer.MlpMixer(  # type: ignore[no-any-return]
            num_classes=10, img_size=64, patch_size=16, num_blocks=2, embed_dim=48, **ratio, **own
        )

    return build, images(64)


def _volo() -> tuple[Build, Example]:
    def build() -> nn.Module:
        from timm.models.volo import VOLO

        return VOLO(  # type: ignore[no-any-return]
            layers=(1, 1, 1, 1), img_size=64, num_classes=10, embed_dims=(48, 96, 96, 96), num_heads=(2, 4, 4, 4),
            mlp_ratio=3.0, stem_hidden_dim=32,
        )  # fmt: skip

    return build, images(64)


def _vision(name: str, size: int = 64, **kwargs: Any) -> tuple[Build, Example]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **kwargs)  # type: ignore[no-any-return]

    return build, images(size)


def _hf(kind: str, head: str, example: Example | None = None, **kwargs: Any) -> tuple[Build, Example]:
    def build() -> nn.Module:
        import transformers

        sizes = {"vocab_size": 100, "use_cache": False, "pad_token_id": 0} | kwargs
        if example is not None:
            sizes = dict(kwargs)
        model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**sizes))
        return model  # type: ignore[no-any-return]

    return build, example or (lambda: {"input_ids": tokens(10)()})


_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_VIT: dict[str, Any] = _SMALL | {"image_size": 32, "patch_size": 8}
_PIXELS: Example = lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}  # noqa: E731
_UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, tuple[Build, Example]] = {
    **OWN,
    **STYLES,
    **STRANGERS,
    **{
        f"timm {name}": _timm(name, size)
        for name, size in {
            "resnet10t": 64, "resnet18": 64, "resnet26d": 64, "seresnet18": 64, "resnext26ts": 64, "ecaresnet26t": 64,
            "mobilenetv2_050": 64, "mobilenetv3_small_050": 64, "mobileone_s0": 64, "efficientnet_b0": 64,
            "tf_efficientnetv2_b0": 64, "ghostnet_050": 64, "mnasnet_small": 64, "regnetx_002": 64, "regnety_002": 64,
            "repvgg_a0": 64, "densenet121": 64, "vovnet39a": 64, "dla34": 64, "hrnet_w18_small": 64, "cspresnet50": 64,
            "darknet53": 64, "selecsls42": 64, "hardcorenas_a": 64, "tinynet_e": 64, "lcnet_050": 64, "fbnetc_100": 64,
            "convnext_atto": 64, "convnextv2_atto": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "poolformer_s12": 64,
            "levit_128s": 224, "efficientformer_l1": 224, "repvit_m0_9": 64, "fastvit_t8": 64, "mambaout_femto": 64,
            "test_byobnet": 160, "test_convnext": 160, "test_efficientnet": 160, "test_efficientnet_gn": 160,
            "test_efficientnet_ln": 160, "test_nfnet": 160, "test_vit": 160, "test_vit2": 160, "test_vit3": 160,
            "test_vit4": 160, "test_vit_relpos": 160, "test_maxvit": 160, "test_coatnet": 160, "starnet_s1": 64,
            "inception_next_atto": 64, "resnetv2_18": 64,
        }.items()
    },
    "timm vit_tiny": _timm("vit_tiny_patch16_224", 64, img_size=64, depth=3),
    "timm deit distilled": _timm("deit_tiny_distilled_patch16_224", 64, img_size=64, depth=3),
    "timm cait": _timm("cait_xxs24_224", 64, img_size=64, depth=2),
    "timm xcit": _timm("xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    "timm beit": _timm("beit_base_patch16_224", 64, img_size=64, embed_dim=48, depth=2, num_heads=4),
    "timm eva02": _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    "timm swin": _timm("swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=48, depths=(2, 2), num_heads=(3, 6)),
    "timm swinv2": _timm(
        "swinv2_tiny_window8_256", 64, img_size=64, embed_dim=48, depths=(2, 2), num_heads=(3, 6), window_size=4),
    "timm mixer": _mixer(),
    "timm gmlp": _mixer(block_layer="SpatialGatingBlock", mlp_layer="GatedMlp"),
    "timm resmlp": _mixer(block_layer="ResBlock", norm_layer="Affine"),
    "timm pvt_v2": _timm("pvt_v2_b0", 64),
    "timm twins": _timm("twins_svt_small", 64, img_size=64, depths=(1, 1, 2, 1)),
    "timm crossvit": _timm("crossvit_tiny_240", 240),
    "timm volo": _volo(),
    **{
        f"torchvision {name}": _vision(name, size, num_classes=10)
        for name, size in {
            "alexnet": 64, "vgg11_bn": 64, "resnet18": 64, "wide_resnet50_2": 64, "squeezenet1_1": 64, "densenet121": 64,
            "shufflenet_v2_x0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mnasnet0_5": 64,
            "efficientnet_b0": 64, "regnet_y_400mf": 64, "convnext_tiny": 64, "maxvit_t": 224, "swin_t": 64,
        }.items()
    },
    "torchvision googlenet": _vision("googlenet", 96, num_classes=10, init_weights=False),
    "torchvision fcn": _vision("fcn_resnet50", 64, num_classes=5, weights_backbone=None),
    "torchvision deeplabv3": _vision("deeplabv3_mobilenet_v3_large", 64, num_classes=5, weights_backbone=None),
    "torchvision lraspp": _vision("lraspp_mobilenet_v3_large", 64, num_classes=5, weights_backbone=None),
    "torchvision vit": (
        lambda: __import__("torchvision").models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10), images(32)),
    "HF BERT": _hf("Bert", "BertForSequenceClassification", **_SMALL),
    "HF RoBERTa": _hf("Roberta", "RobertaForSequenceClassification", **_SMALL),
    "HF DistilBERT": _hf("DistilBert", "DistilBertForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "HF ALBERT": _hf("Albert", "AlbertForSequenceClassification", embedding_size=16, **_SMALL),
    "HF ELECTRA": _hf("Electra", "ElectraForSequenceClassification", embedding_size=16, **_SMALL),
    "HF DeBERTa-v2": _hf("DebertaV2", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"], **_SMALL),
    "HF GPT-2": _hf("GPT2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "HF GPT-2, untied": _hf("GPT2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32, **_UNTIED),
    "HF GPT-NeoX": _hf("GPTNeoX", "GPTNeoXForCausalLM", **_SMALL),
    "HF OPT": _hf("OPT", "OPTForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, **_UNTIED),
    "HF LLaMA": _hf("Llama", "LlamaForCausalLM", num_key_value_heads=2, **_SMALL, **_UNTIED),
    "HF Mistral": _hf("Mistral", "MistralForCausalLM", num_key_value_heads=2, head_dim=8, **_SMALL, **_UNTIED),
    "HF Mixtral": _hf("Mixtral", "MixtralForCausalLM", num_key_value_heads=2, head_dim=8, num_local_experts=2, **_SMALL, **_UNTIED),
    "HF Qwen2": _hf("Qwen2", "Qwen2ForCausalLM", num_key_value_heads=2, **_SMALL, **_UNTIED),
    "HF Qwen3": _hf("Qwen3", "Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8, **_SMALL, **_UNTIED),
    "HF Gemma": _hf("Gemma", "GemmaForCausalLM", num_key_value_heads=1, head_dim=8, **_SMALL),
    "HF Gemma-2": _hf("Gemma2", "Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8, **_SMALL),
    "HF Phi": _hf("Phi", "PhiForCausalLM", **_SMALL, **_UNTIED),
    "HF Phi-3": _hf("Phi3", "Phi3ForCausalLM", num_key_value_heads=2, **_SMALL, **_UNTIED),
    "HF Falcon": _hf("Falcon", "FalconForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "HF BLOOM": _hf("Bloom", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4),
    "HF Mamba": _hf("Mamba", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4),
    "HF T5": _hf("T5", "T5EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "HF BART": _hf("Bart", "BartForSequenceClassification", lambda: {"input_ids": torch.cat([tokens(9)(), torch.full((2, 1), 2)], 1)},
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, use_cache=False),
    "HF ViT": _hf("ViT", "ViTForImageClassification", _PIXELS, **_VIT),
    "HF DeiT": _hf("DeiT", "DeiTForImageClassification", _PIXELS, **_VIT),
    "HF DINOv2": _hf("Dinov2", "Dinov2ForImageClassification", _PIXELS, mlp_ratio=2, **_VIT),
    "HF SigLIP": _hf("SiglipVision", "SiglipVisionModel", _PIXELS, **_VIT),
    "HF CLIP vision": _hf("CLIPVision", "CLIPVisionModel", _PIXELS, **_VIT),
    "HF SegFormer": _hf("Segformer", "SegformerForSemanticSegmentation", lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=32),
    "HF wav2vec2": _hf("Wav2Vec2", "Wav2Vec2ForSequenceClassification", lambda: {"input_values": torch.randn(2, 4000)},
        conv_dim=(24,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **_SMALL),
}  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """No weight, bias or statistic as it is initialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) - 0.5, alpha=0.1)
    return model


def half(groups: Groups) -> dict[str, list[int]]:
    """Half of the units of every group, at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randperm(group.units, generator=generator)[: _allowed(group, group.units // 2)].tolist()
        for name, group in groups.found.items()
    }


def _allowed(group: UnitGroup, count: int) -> int:
    return max(count // group.divisor, 1) * group.divisor


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    def fresh(value: Any) -> Any:
        value = value.clone() if isinstance(value, Tensor) else value
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(next(p for p in model.parameters() if p.is_floating_point()).dtype) if real else value

    example = mapped(example, fresh)
    named = example if isinstance(example, dict) else {}
    double = next(p for p in model.parameters() if p.is_floating_point()).dtype is torch.float64
    with Float64() if double else contextlib.nullcontext():
        out = model(**named) if named else model(*(example if isinstance(example, tuple) else (example,)))
    return [t for t in tensors_behind(out) if t.is_floating_point()]


def _error(one: list[Tensor], two: list[Tensor]) -> float:
    if len(one) != len(two) or any(a.shape != b.shape for a, b in zip(one, two, strict=True)):
        return float("inf")
    gaps = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(one, two, strict=True)]
    return max(gaps) if all(gap == gap for gap in gaps) else float("inf")


def ours(name: str) -> dict[str, Any]:
    """One network through ``find_groups`` and all that comes after."""
    build, make = CASES[name]
    torch.manual_seed(0)
    model, example = lively(build()).eval(), make()
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    started = time.process_time()
    try:
        loose = find_groups(model, example, inexact=True)
    except NoMatchError as error:
        return row | {"exact": 0.0, "inexact": 0.0, "seconds": time.process_time() - started, "why": str(error)}
    groups = Groups({n: g for n, g in loose.found.items() if g.exact}, loose.refused, loose.notes)
    why = loose.refused | {n: g.note for n, g in loose.found.items() if not g.exact}
    row |= {"seconds": time.process_time() - started, "exact": _share(model, groups), "inexact": loose.share}
    row |= {"groups": len(groups.found), "heads": sum(group.heads for group in groups.found.values()), "refused": why}
    most = sorted(loose.held.items(), key=lambda item: -item[1])[:2]
    row["held"] = "; ".join(f"{n} {share:.0%} ({why[n]})" for n, share in most if n in why)
    if not groups.found:
        return row
    double = copy.deepcopy(model).double()
    try:
        with torch.no_grad():
            _run(double, example)
        row["bound"] = 1e-9
    except RuntimeError:  # without kernels for it
        double, row["bound"] = copy.deepcopy(model), 1e-4
    errors = {}
    for kind, subset in SUBSETS.items():
        keep = {n: subset(g.units) for n, g in groups.found.items()}
        keep = {n: _multiple(stay, g) for (n, stay), g in zip(keep.items(), groups.found.values(), strict=True)}
        zeroed, slim = copy.deepcopy(double), copy.deepcopy(double)
        for n, stay in keep.items():
            groups.found[n].zero(dict(zeroed.named_parameters()), set(range(groups.found[n].units)) - set(stay))
        apply_slim(slim, keep, groups)
        with torch.no_grad():
            errors[kind] = _error(_run(zeroed, example), _run(slim, example))
    row |= {"errors": errors, "error": max(errors.values())}
    keep = half(groups)
    cuts = plan_slim(model, keep, groups)
    with torch.no_grad():  # or copies of scripted parts have a history
        slim, again = copy.deepcopy(model), lively(build())
    replay_slim(slim, cuts)
    replay_slim(again, cuts)
    again.load_state_dict(slim.state_dict())
    row["half"] = 1 - sum(p.numel() for p in slim.parameters()) / row["params"]
    with torch.no_grad():
        same = _error(_run(slim, example), _run(again.eval(), example)) == 0
    row["runs"] = "yes" if same else "reloads differently"
    try:
        model.train()
        _run(model, example)
    except Exception:  # wants targets or a larger batch, before any cut
        return row
    loss = sum((t.float().square().mean() for t in _run(slim.train(), example)), torch.zeros(()))
    loss.backward()
    torch.optim.SGD(slim.parameters(), 1e-3).step()
    return row


def _multiple(stay: list[int], group: UnitGroup) -> list[int]:
    """As many units as the divisor allows."""
    wanted = _allowed(group, len(stay))
    return sorted([*stay, *(u for u in range(group.units) if u not in stay)][:wanted])


def _share(model: nn.Module, groups: Groups) -> float:
    cost = Cost.parameters(model, groups.found)
    return 1 - cost({name: max(g.units - g.divisor, 0) for name, g in groups.found.items()}) / cost()


def theirs(name: str) -> dict[str, Any]:
    """Torch-Pruning's own pruner at half of all channels."""
    import torch_pruning as tp

    build, make = CASES[name]
    torch.manual_seed(0)
    model, example = lively(build()).eval(), make()
    before = sum(p.numel() for p in model.parameters())
    try:
        outs = find_groups(model, example, inexact=True).refused
    except NoMatchError:
        outs = {}
    modules = dict(model.named_modules())
    ignored = [modules[n] for n, why in outs.items() if n in modules and why.startswith("an output")]
    heads = {m: h for m in model.modules() for h in [getattr(m, "num_heads", None)] if isinstance(h, int)}
    owners = {c: h for m, h in heads.items() for c in m.children() if isinstance(c, nn.Linear) and "q" in _name(m, c)}
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=owners,
    )
    zeroed = copy.deepcopy(model)
    twins, names = dict(zeroed.named_modules()), {m: n for n, m in model.named_modules()}
    left: dict[str, list[int]] = {}
    out = pruner.DG.is_out_channel_pruning_fn
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            if dep.target.module in names and out(dep.handler):
                name = names[dep.target.module]
                # Indices count what is left after earlier groups.
                rows = left.setdefault(name, list(range(_rows(twins[name]))))
                gone = [rows[i] for i in idxs]
                left[name] = [row for row in rows if row not in set(gone)]
                _zero(twins[name], gone)
        group.prune()
    row = {"theirs": 1 - sum(p.numel() for p in model.parameters()) / before}
    for module, count in heads.items():
        qkv = next((c for c in owners if c in set(module.children())), None)
        if qkv in pruner.num_heads:
            module.num_heads = pruner.num_heads[qkv]
        del count
    with torch.no_grad():
        row["gap"] = _error(_run(zeroed.eval(), example), _run(model.eval(), example))
    return row | {"same": "yes" if row["gap"] < 1e-3 else f"no ({row['gap']:.1g})"}


def _name(parent: nn.Module, child: nn.Module) -> str:
    return next(n for n, c in parent.named_children() if c is child)


def _out_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose1d, nn.Embedding)) else 0


def _rows(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.shape[_out_axis(module)] if isinstance(weight, Tensor) else 1 << 16


def _zero(module: nn.Module, idxs: list[int]) -> None:
    axis = _out_axis(module)
    with torch.no_grad():
        if (weight := getattr(module, "weight", None)) is not None and weight.shape[axis] > max(idxs):
            weight.index_fill_(axis, torch.tensor(idxs), 0)
        if (bias := getattr(module, "bias", None)) is not None and len(bias) > max(idxs):
            bias[idxs] = 0


def state() -> str:
    """The last commit that touched the code under test; a plus where it has been changed since."""

    def git(*command: str) -> str:
        root = RESULTS.parents[1]
        return subprocess.run(
            ["git", *command, "--", CODE], cwd=root, check=True, capture_output=True, text=True
        ).stdout

    return git("log", "-1", "--format=%h").strip() + ("+" if git("status", "--porcelain") else "")


def _child(part: str, name: str) -> dict[str, Any]:
    """A part of a row, in a process of its own: a fork, so that libraries are read once."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        spent = int(time.process_time())  # before the fork
        resource.setrlimit(resource.RLIMIT_CPU, (spent + LIMIT[part],) * 2)
        try:
            with warnings.catch_warnings(action="ignore"):
                there.send({"ours": ours, "theirs": theirs}[part](name))
        except BaseException as error:
            there.send({"crash": f"{type(error).__name__}: {error}"[:200]})

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        row = here.recv()
    except EOFError:  # the system ended it: at the limit, or for its memory
        process.join()
        over = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row = {"crash": f"not after {LIMIT[part]} s" if over else f"its process died ({process.exitcode})"}
    process.join()
    if "crash" not in row:
        return dict(row)
    return {"theirs": "crashes", "same": row["crash"]} if part == "theirs" else {"why": row["crash"], "failed": True}


def read() -> dict[str, dict[str, Any]]:
    """Rows of earlier runs."""
    return {row["model"]: row for row in json.loads(PATH.read_text())["rows"]} if PATH.exists() else {}


def summary(rows: list[dict[str, Any]]) -> str:
    """What the table says, in four lines."""
    errors = [row["error"] for row in rows if isinstance(row.get("error"), float)]
    crashed = [row["model"] for row in rows if row.get("failed")]
    wrong = [
        row["model"] for row in rows if isinstance(row.get("error"), float) and row["error"] > row.get("bound", 1e-9)
    ]
    some = [row for row in rows if row.get("exact") or row.get("inexact")]
    right = [row for row in rows if row.get("same") == "yes"]
    behind = [
        row["model"] for row in right if row["theirs"] > max(row.get("half") or 0, (row.get("inexact") or 0) / 2) + 0.01
    ]
    broken = sum(isinstance(row.get("theirs"), str) for row in rows)
    different = sum(str(row.get("same", "")).startswith("no (") for row in rows)
    return (
        f"{len(rows)} networks: {len(some)} with something to prune, wrong {wrong or 'none'}, crashed {crashed or 'none'}, "
        f"largest error {max(errors, default=0):.1e}. Torch-Pruning crashes or does not end on {broken}, computes something "
        f"else on {different}, the same on {len(right)}; of those it cuts more on {behind or 'none'}."
    )


def main() -> None:
    """Run the cases that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--older", action="store_true", help="also rows of another state of the code")
    parser.add_argument("--skip", default="", help="`theirs`: without Torch-Pruning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, code = read(), state()

    def wanted(part: str, row: dict[str, Any]) -> bool:
        if part == "theirs":
            return "theirs" not in row and args.skip != "theirs"
        return args.again or "seconds" not in row or (args.older and row.get("code") != code)

    names = [name for name in CASES if any(part.lower() in name.lower() for part in args.only)]
    for part in ("ours", "theirs"):
        for name in sorted(names, key=lambda name: rows.get(name, {}).get("seconds", 0.0)):
            row = rows.get(name, {"model": name})
            if not wanted(part, row):
                continue
            if part == "ours":
                row = {"model": name, "code": code} | {k: row[k] for k in _THEIRS if k in row} | _child(part, name)
            else:
                row |= _child(part, name)
            rows[name] = row
            write(rows)
            shown = ("exact", "inexact", "heads", "error", "runs", "seconds", "theirs", "same", "why")
            print(name, {key: row.get(key) for key in shown}, flush=True)
    print(write(rows))


def write(rows: dict[str, dict[str, Any]]) -> str:
    """The results and their table; returns the summary."""
    RESULTS.mkdir(exist_ok=True)
    ordered = [rows[n] for n in CASES if n in rows]
    PATH.write_text(json.dumps({"machine": machine(), "summary": summary(ordered), "rows": ordered}, indent=1))
    PATH.with_suffix(".md").write_text(f"{summary(ordered)}\n\n{markdown(ordered, COLUMNS)}\n")
    return summary(ordered)


if __name__ == "__main__":
    for library in ("timm", "torchvision", "transformers", "torch_pruning"):
        importlib.import_module(library)  # before the forks
    main()
