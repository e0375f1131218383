"""Tiny random-weight models of the Hugging Face families, and a padded example for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
_TEXT = _SIZES | {"vocab_size": 40, "max_position_embeddings": 32}
_GROUPED = _TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
_IMAGE = _SIZES | {"image_size": 16, "patch_size": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SEQ2SEQ = {
    "vocab_size": 40, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1,
}  # fmt: skip
_DISENTANGLED = _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}

# Family -> (model, configuration, its arguments).
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertModel, hf.BertConfig, _TEXT),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, _TEXT),
    "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig, _TEXT),
    "distilbert": (
        hf.DistilBertModel, hf.DistilBertConfig,
        {"vocab_size": 40, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 32, "max_position_embeddings": 32},
    ),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig, _TEXT),
    "electra": (hf.ElectraModel, hf.ElectraConfig, _TEXT | {"embedding_size": 16}),
    "albert": (hf.AlbertModel, hf.AlbertConfig, _TEXT | {"embedding_size": 16}),
    "deberta-v2": (
        hf.DebertaV2Model, hf.DebertaV2Config, _DISENTANGLED | {"share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2, own positions": (hf.DebertaV2Model, hf.DebertaV2Config, _DISENTANGLED | {"share_att_key": False}),
    "t5": (
        hf.T5Model, hf.T5Config,
        {"vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3,
         "decoder_start_token_id": 0},
    ),
    "bart": (hf.BartModel, hf.BartConfig, _SEQ2SEQ | {"max_position_embeddings": 32}),
    "gpt2": (
        hf.GPT2Model, hf.GPT2Config,
        _IDS | {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32},
    ),
    "opt": (
        hf.OPTModel, hf.OPTConfig,
        {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 32,
         "max_position_embeddings": 32, "word_embed_proj_dim": 24},
    ),
    "gpt_neox": (hf.GPTNeoXModel, hf.GPTNeoXConfig, _TEXT),
    "bloom": (hf.BloomModel, hf.BloomConfig, {"vocab_size": 40, "hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "llama": (hf.LlamaModel, hf.LlamaConfig, _GROUPED),
    "qwen3": (hf.Qwen3Model, hf.Qwen3Config, _GROUPED),
    "gemma2": (hf.Gemma2Model, hf.Gemma2Config, _GROUPED),
    "gemma3": (hf.Gemma3TextModel, hf.Gemma3TextConfig, _GROUPED),
    "modernbert": (
        hf.ModernBertModel, hf.ModernBertConfig,
        _TEXT | _IDS | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
    "vit": (hf.ViTModel, hf.ViTConfig, _IMAGE),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, _IMAGE),
    "clip": (
        hf.CLIPModel, hf.CLIPConfig, {"text_config": _TEXT | _IDS, "vision_config": _IMAGE, "projection_dim": 16},
    ),
    "whisper": (
        hf.WhisperModel, hf.WhisperConfig,
        _SEQ2SEQ | _IDS | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
}  # fmt: skip


def build(family: str, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, and an example in which the second of two texts is padded.

    Args:
        family: Key of ``FAMILIES``.
        attention: ``"sdpa"`` or ``"eager"``; families that have one implementation keep it.
    """
    torch.manual_seed(0)
    model_class, config_class, arguments = FAMILIES[family]
    config = config_class(**arguments)
    if attention == "eager":
        config._attn_implementation = "eager"
    model = model_class(config).eval()
    tokens = torch.randint(3, 39, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    images = torch.randn(2, 3, 16, 16)
    if family in ("vit", "dinov2"):
        return model, {"pixel_values": images}
    if family == "whisper":
        return model, {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens}
    text = {"input_ids": tokens, "attention_mask": mask}
    if family == "clip":
        return model, text | {"pixel_values": images}
    return model, text | ({"decoder_input_ids": tokens[:, :5]} if family in ("t5", "bart") else {})
