"""Mistral: Llama with a sliding window (Jiang et al., arXiv 2310.06825)."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURE = "Mistral"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = llama.WEIGHTS


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {**llama.shape(hf), "sliding_window": hf["sliding_window"] or 0}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **llama.their_shape(cfg),
      "sliding_window": cfg.sliding_window or None,
  }
