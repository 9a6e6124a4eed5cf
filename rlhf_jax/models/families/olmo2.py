"""OLMo 2 (arXiv 2501.00656): norms after attention and feed-forward.

Queries and keys are normed too, all heads together.
"""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.families.hf_config import Fields, read_rope, write_rope
from rlhf_jax.models.families.table import norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Olmo2",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (
    *llama.EMBEDDING,
    *llama.ATTENTION,
    *llama.QK_NORMS,
    *llama.FEED_FORWARD,
    *norm(
        f"{llama.LAYER}.post_attention_layernorm", "layers/attention_post_norm"
    ),
    *norm(
        f"{llama.LAYER}.post_feedforward_layernorm",
        "layers/feed_forward_post_norm",
    ),
)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  return {
      **llama.shape(hf),
      **read_rope(hf),
      **llama.attention_bias(hf),
      "norm_placement": "post",
      "qk_norm": "whole",
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **llama.their_shape(cfg),
      **write_rope(cfg),
      "attention_bias": cfg.attention_bias == "all",
  }
