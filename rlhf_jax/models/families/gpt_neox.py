"""GPT-NeoX and Pythia (Black et al., arXiv 2204.06745; arXiv 2304.01373)."""

from typing import Any

from rlhf_jax.models.families.hf_config import Fields, read_rope, write_rope
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("GPTNeoX",)
PREFIX = "gpt_neox."
HEAD = "embed_out"
BUFFERS = (
    r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",
    r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
)

_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  hf.require("is_decoder", False)
  width, heads = hf["hidden_size"], hf["num_attention_heads"]
  return {
      "vocab_size": hf["vocab_size"],
      "num_layers": hf["num_hidden_layers"],
      "width": width,
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": width // heads,
      "ff_dim": hf["intermediate_size"],
      "max_length": hf["max_position_embeddings"],
      "norm": "layernorm",
      "activation": hf.choose("hidden_act", _ACTIVATIONS),
      "attention_bias": "all" if hf["attention_bias"] else "none",
      "feed_forward_bias": True,
      "norm_bias": True,
      "parallel_residual": hf["use_parallel_residual"],
      "norm_epsilon": hf["layer_norm_eps"],
      "tie_head": hf["tie_word_embeddings"],
      **read_rope(hf),
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  rope = write_rope(cfg)
  return {
      "vocab_size": cfg.vocab_size,
      "num_hidden_layers": cfg.num_layers,
      "hidden_size": cfg.width,
      "num_attention_heads": cfg.num_heads,
      "intermediate_size": cfg.ff_dim,
      "max_position_embeddings": cfg.max_length,
      "hidden_act": activations.get(cfg.activation),
      "attention_bias": cfg.attention_bias == "all",
      "use_parallel_residual": cfg.parallel_residual,
      "layer_norm_eps": cfg.norm_epsilon,
      "tie_word_embeddings": cfg.tie_head,
      # This family's own, older names.
      "rotary_emb_base": rope.pop("rope_theta"),
      "rotary_pct": cfg.rotary_fraction,
      **rope,
  }


WEIGHTS: tuple[Tensor, ...] = (
    *embedding("gpt_neox.embed_in", "token_embedding"),
    *norm("gpt_neox.layers.{}.input_layernorm", "layers/attention_norm"),
    *linear(
        "gpt_neox.layers.{}.attention.query_key_value",
        "layers/attention/query",
        "layers/attention/key",
        "layers/attention/value",
        interleaved=True,
    ),
    *linear("gpt_neox.layers.{}.attention.dense", "layers/attention/out"),
    *norm(
        "gpt_neox.layers.{}.post_attention_layernorm",
        "layers/feed_forward_norm",
    ),
    *linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "layers/feed_forward/up"),
    *linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
)
