"""Llama 2 and 3 (also TinyLlama, SmolLM and others of its shape).

Touvron et al., arXiv 2307.09288; Grattafiori et al., arXiv 2407.21783.
"""

from typing import Any

from rlhf_jax.models.families.hf_config import Fields, read_rope, write_rope
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURE = "Llama"
PREFIX = "model."
HEAD = "lm_head"
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  hf.require("pretraining_tp", 1)
  return {
      **shape(hf),
      "attention_bias": "all" if hf["attention_bias"] else "none",
      "feed_forward_bias": hf["mlp_bias"],
  }


def shape(hf: Fields) -> dict[str, Any]:
  """What all families of Llama's shape say alike."""
  hf.require("hidden_act", "silu")
  hf.require("rope_interleaved", False)
  heads = hf["num_attention_heads"]
  return {
      "vocab_size": hf["vocab_size"],
      "num_layers": hf["num_hidden_layers"],
      "width": hf["hidden_size"],
      "num_heads": heads,
      "num_kv_heads": hf.get("num_key_value_heads", heads),
      "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
      "ff_dim": hf["intermediate_size"],
      "max_length": hf["max_position_embeddings"],
      "norm_epsilon": hf["rms_norm_eps"],
      "tie_head": hf["tie_word_embeddings"],
      **read_rope(hf),
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **their_shape(cfg),
      "attention_bias": cfg.attention_bias == "all",
      "mlp_bias": cfg.feed_forward_bias,
  }


def their_shape(cfg: TransformerConfig) -> dict[str, Any]:
  """The inverse of `shape`."""
  return {
      "hidden_act": "silu",
      "vocab_size": cfg.vocab_size,
      "num_hidden_layers": cfg.num_layers,
      "hidden_size": cfg.width,
      "num_attention_heads": cfg.num_heads,
      "num_key_value_heads": cfg.num_kv_heads,
      "head_dim": cfg.head_dim,
      "intermediate_size": cfg.ff_dim,
      "max_position_embeddings": cfg.max_length,
      "rms_norm_eps": cfg.norm_epsilon,
      "tie_word_embeddings": cfg.tie_head,
      **write_rope(cfg),
  }


WEIGHTS: tuple[Tensor, ...] = (
    *embedding("model.embed_tokens", "token_embedding"),
    *norm("model.layers.{}.input_layernorm", "layers/attention_norm"),
    *linear("model.layers.{}.self_attn.q_proj", "layers/attention/query"),
    *linear("model.layers.{}.self_attn.k_proj", "layers/attention/key"),
    *linear("model.layers.{}.self_attn.v_proj", "layers/attention/value"),
    *linear("model.layers.{}.self_attn.o_proj", "layers/attention/out"),
    *norm(
        "model.layers.{}.post_attention_layernorm", "layers/feed_forward_norm"
    ),
    *linear("model.layers.{}.mlp.gate_proj", "layers/feed_forward/gate"),
    *linear("model.layers.{}.mlp.up_proj", "layers/feed_forward/up"),
    *linear("model.layers.{}.mlp.down_proj", "layers/feed_forward/down"),
    *norm("model.norm", "final_norm"),
)
