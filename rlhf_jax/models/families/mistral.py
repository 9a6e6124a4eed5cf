"""Mistral: Llama with a sliding window (Jiang et al., arXiv 2310.06825)."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.families.hf_config import Fields, read_rope, write_rope
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Mistral",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = llama.WEIGHTS


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {
      **llama.shape(hf),
      **read_rope(hf),
      "sliding_window": hf.get("sliding_window", 0),
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **llama.their_shape(cfg),
      **write_rope(cfg),
      "sliding_window": cfg.sliding_window or None,
  }
