"""Llama 2 and 3 (also TinyLlama, SmolLM and others of its shape).

Touvron et al., arXiv 2307.09288; Grattafiori et al., arXiv 2407.21783.
"""

from typing import Any

from rlhf_jax.models.families.hf_config import (
    Fields,
    read_names,
    read_rope,
    write_choice,
    write_names,
    write_rope,
)
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Llama",)
PREFIX = "model."
HEAD = "lm_head"
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "ff_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_head": "tie_word_embeddings",
}
_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  hf.require("pretraining_tp", 1)
  return {
      **shape(hf),
      **read_rope(hf),
      **attention_bias(hf),
      "feed_forward_bias": hf["mlp_bias"],
  }


def shape(hf: Fields, activation: str = "hidden_act") -> dict[str, Any]:
  """What all families of Llama's shape say alike, but for rotations.

  activation: how the family calls this field.
  """
  hf.require("rope_interleaved", False)
  heads = hf["num_attention_heads"]
  return {
      **read_names(hf, NAMES),
      "num_kv_heads": hf.get("num_key_value_heads", heads),
      "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
      "activation": hf.choose(activation, _ACTIVATIONS),
  }


def attention_bias(hf: Fields) -> dict[str, Any]:
  """Of families whose biases are on all of attention's projections or none."""
  return {"attention_bias": "all" if hf["attention_bias"] else "none"}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **their_shape(cfg),
      **write_rope(cfg),
      "attention_bias": cfg.attention_bias == "all",
      "mlp_bias": cfg.feed_forward_bias,
  }


def their_shape(
    cfg: TransformerConfig, activation: str = "hidden_act"
) -> dict[str, Any]:
  """The inverse of `shape`."""
  return {
      **write_names(cfg, NAMES),
      "num_key_value_heads": cfg.num_kv_heads,
      "head_dim": cfg.head_dim,
      activation: write_choice(cfg, "activation", _ACTIVATIONS),
  }


LAYER = "model.layers.{}"
EMBEDDING: tuple[Tensor, ...] = (
    *embedding("model.embed_tokens", "token_embedding"),
    *norm("model.norm", "final_norm"),
)
ATTENTION = (
    *linear(f"{LAYER}.self_attn.q_proj", "layers/attention/query"),
    *linear(f"{LAYER}.self_attn.k_proj", "layers/attention/key"),
    *linear(f"{LAYER}.self_attn.v_proj", "layers/attention/value"),
    *linear(f"{LAYER}.self_attn.o_proj", "layers/attention/out"),
)
QK_NORMS = (
    *norm(f"{LAYER}.self_attn.q_norm", "layers/attention/query_norm"),
    *norm(f"{LAYER}.self_attn.k_norm", "layers/attention/key_norm"),
)
FEED_FORWARD = (
    *linear(f"{LAYER}.mlp.gate_proj", "layers/feed_forward/gate"),
    *linear(f"{LAYER}.mlp.up_proj", "layers/feed_forward/up"),
    *linear(f"{LAYER}.mlp.down_proj", "layers/feed_forward/down"),
)
NORMS = (
    *norm(f"{LAYER}.input_layernorm", "layers/attention_norm"),
    *norm(f"{LAYER}.post_attention_layernorm", "layers/feed_forward_norm"),
)
WEIGHTS = (*EMBEDDING, *ATTENTION, *FEED_FORWARD, *NORMS)
