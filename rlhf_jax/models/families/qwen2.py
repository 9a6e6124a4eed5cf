"""Qwen2 and 2.5: Llama with biases on query, key, value (arXiv 2407.10671).

Its first layers may see everything where the others have a window.
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
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Qwen2",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = llama.WEIGHTS


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {**shape(hf), "attention_bias": "qkv"}


def shape(hf: Fields) -> dict[str, Any]:
  """What Qwen2 and Qwen3 say alike."""
  hf.require("use_mrope", False)
  # `layer_types` and `sliding_window` have taken these in.
  hf.ignore("use_sliding_window", "max_window_layers")
  return {**llama.shape(hf), **read_rope(hf), **read_layer_types(hf)}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  full = cfg.full_attention_layers if cfg.sliding_window else None
  return {
      **llama.their_shape(cfg),
      **write_rope(cfg),
      **write_layer_types(cfg),
      "use_sliding_window": cfg.sliding_window > 0,
      # For readers that do not know `layer_types`.
      "max_window_layers": cfg.num_layers if full is None else len(full),
  }
