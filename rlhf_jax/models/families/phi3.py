"""Phi-3: Llama with fused projections (Abdin et al., arXiv 2404.14219)."""

from typing import Any

from rlhf_jax.models.families import llama, mistral
from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.families.table import linear
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Phi3",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (
    *llama.EMBEDDING,
    *linear(
        f"{llama.LAYER}.self_attn.qkv_proj",
        "layers/attention/query",
        "layers/attention/key",
        "layers/attention/value",
    ),
    *linear(f"{llama.LAYER}.self_attn.o_proj", "layers/attention/out"),
    *linear(
        f"{llama.LAYER}.mlp.gate_up_proj",
        "layers/feed_forward/gate",
        "layers/feed_forward/up",
    ),
    *linear(f"{llama.LAYER}.mlp.down_proj", "layers/feed_forward/down"),
    *llama.NORMS,
)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  # The first is of 'longrope' alone; `rope_parameters` has the second.
  hf.ignore("original_max_position_embeddings", "partial_rotary_factor")
  hf.ignore("auto_map")  # code of its first release, which nothing runs
  hf.require("attention_bias", False)
  return mistral.to_ours(hf)


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **mistral.to_theirs(cfg),
      "partial_rotary_factor": cfg.rotary_fraction,
  }
