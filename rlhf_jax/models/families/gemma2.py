"""Gemma 2 (arXiv 2408.00118).

Embeddings are scaled, every other layer has a window, attention scores and
logits are capped, and norms, by 1 + their weight, stand before and after.
"""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.families.hf_config import (
    Fields,
    read_layer_types,
    read_rope,
    write_layer_types,
    write_rope,
)
from rlhf_jax.models.families.table import norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Gemma2",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (
    *llama.EMBEDDING,
    *llama.ATTENTION,
    *llama.FEED_FORWARD,
    *norm(f"{llama.LAYER}.input_layernorm", "layers/attention_norm"),
    *norm(
        f"{llama.LAYER}.post_attention_layernorm", "layers/attention_post_norm"
    ),
    *norm(
        f"{llama.LAYER}.pre_feedforward_layernorm", "layers/feed_forward_norm"
    ),
    *norm(
        f"{llama.LAYER}.post_feedforward_layernorm",
        "layers/feed_forward_post_norm",
    ),
)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {**shape(hf), **read_rope(hf)}


def shape(hf: Fields) -> dict[str, Any]:
  """What Gemma 2 and 3 say alike."""
  hf.require("use_bidirectional_attention", False, None)
  # Nothing reads them: `hidden_activation` and `sliding_window` are what holds.
  hf.ignore("hidden_act", "sliding_window_size", "cache_implementation")
  return {
      **llama.shape(hf, activation="hidden_activation"),
      **llama.attention_bias(hf),
      **read_layer_types(hf),
      "norm_placement": "pre_and_post",
      "norm_from_one": True,
      "scale_embedding": True,
      "query_scale_dim": hf["query_pre_attn_scalar"],
      "attention_softcap": hf.get("attn_logit_softcapping", 0.0),
      "logit_softcap": hf.get("final_logit_softcapping", 0.0),
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {**their_shape(cfg), **write_rope(cfg)}


def their_shape(cfg: TransformerConfig) -> dict[str, Any]:
  """The inverse of `shape`."""
  return {
      **llama.their_shape(cfg, activation="hidden_activation"),
      **write_layer_types(cfg),
      "attention_bias": cfg.attention_bias == "all",
      "query_pre_attn_scalar": cfg.query_scale_dim or cfg.head_dim,
      "attn_logit_softcapping": cfg.attention_softcap or None,
      "final_logit_softcapping": cfg.logit_softcap or None,
  }
