"""GPT-NeoX and Pythia (Black et al., arXiv 2204.06745; arXiv 2304.01373)."""

from typing import Any

from rlhf_jax.models.families import gpt2, llama
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

_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "ff_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "parallel_residual": "use_parallel_residual",
    "norm_epsilon": "layer_norm_eps",
    "tie_head": "tie_word_embeddings",
}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  hf.require("is_decoder", False)
  return {
      **gpt2.shape(hf, _NAMES, activation="hidden_act"),
      **llama.attention_bias(hf),
      **read_rope(hf),
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  rope = write_rope(cfg)
  return {
      **gpt2.their_shape(cfg, _NAMES, activation="hidden_act"),
      "attention_bias": cfg.attention_bias == "all",
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
