"""Qwen3: Llama with norms of query and key a head (arXiv 2505.09388)."""

from typing import Any

from rlhf_jax.models.families import llama, qwen2
from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.families.table import norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURE = "Qwen3"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (
    *llama.WEIGHTS,
    *norm("model.layers.{}.self_attn.q_norm", "layers/attention/query_norm"),
    *norm("model.layers.{}.self_attn.k_norm", "layers/attention/key_norm"),
)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  qwen2.refuse_windows(hf)
  return {
      **llama.shape(hf),
      "attention_bias": "all" if hf["attention_bias"] else "none",
      "qk_norm": "head",
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **llama.their_shape(cfg),
      "attention_bias": cfg.attention_bias == "all",
      "use_sliding_window": False,
  }
