"""Qwen2 and 2.5: Llama with biases on query, key, value (arXiv 2407.10671)."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURE = "Qwen2"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = llama.WEIGHTS


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  refuse_windows(hf)
  return {**llama.shape(hf), "attention_bias": "qkv"}


def refuse_windows(hf: Fields) -> None:
  """Some layers with a window and others without are not implemented."""
  hf.require("use_sliding_window", False)
  hf.require("use_mrope", False)
  hf.ignore("sliding_window", "max_window_layers", "layer_types")


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {**llama.their_shape(cfg), "use_sliding_window": False}
