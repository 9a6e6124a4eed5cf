"""Qwen3: Llama with norms of query and key a head (arXiv 2505.09388)."""

from typing import Any

from rlhf_jax.models.families import llama, qwen2
from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Qwen3",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (*llama.WEIGHTS, *llama.QK_NORMS)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {**qwen2.shape(hf), **llama.attention_bias(hf), "qk_norm": "head"}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **qwen2.to_theirs(cfg),
      "attention_bias": cfg.attention_bias == "all",
  }
