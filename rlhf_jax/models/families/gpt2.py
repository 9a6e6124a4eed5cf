"""GPT-2 (Radford et al., 2019). Its projections are stored [in, out]."""

from typing import Any

from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("GPT2",)
PREFIX = "transformer."
HEAD = "lm_head"
BUFFERS = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)

_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_ACTIVATIONS = {"gelu_new": "gelu", "gelu": "gelu_exact", "relu": "relu"}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  for name, value in _FIXED.items():
    hf.require(name, value)
  # How a float16 product is rounded; and of a head that is not this one's.
  hf.ignore("reorder_and_upcast_attn", "summary_type", "summary_use_proj")
  hf.ignore("summary_activation", "summary_proj_to_labels", "n_ctx")
  width, heads = hf["n_embd"], hf["n_head"]
  return {
      "vocab_size": hf["vocab_size"],
      "num_layers": hf["n_layer"],
      "width": width,
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": width // heads,
      "ff_dim": hf.get("n_inner", 4 * width),
      "max_length": hf["n_positions"],
      "position": "learned",
      "norm": "layernorm",
      "activation": hf.choose("activation_function", _ACTIVATIONS),
      "attention_bias": "all",
      "feed_forward_bias": True,
      "norm_bias": True,
      "norm_epsilon": hf["layer_norm_epsilon"],
      "tie_head": hf["tie_word_embeddings"],
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return {
      **_FIXED,
      "vocab_size": cfg.vocab_size,
      "n_layer": cfg.num_layers,
      "n_embd": cfg.width,
      "n_head": cfg.num_heads,
      "n_inner": cfg.ff_dim,
      "n_positions": cfg.max_length,
      "activation_function": activations.get(cfg.activation),
      "layer_norm_epsilon": cfg.norm_epsilon,
      "tie_word_embeddings": cfg.tie_head,
  }


def _conv1d(name: str, *paths: str) -> tuple[Tensor, ...]:
  return linear(name, *paths, transposed=False)


WEIGHTS: tuple[Tensor, ...] = (
    *embedding("transformer.wte", "token_embedding"),
    *embedding("transformer.wpe", "position_embedding"),
    *norm("transformer.h.{}.ln_1", "layers/attention_norm"),
    *_conv1d(
        "transformer.h.{}.attn.c_attn",
        "layers/attention/query",
        "layers/attention/key",
        "layers/attention/value",
    ),
    *_conv1d("transformer.h.{}.attn.c_proj", "layers/attention/out"),
    *norm("transformer.h.{}.ln_2", "layers/feed_forward_norm"),
    *_conv1d("transformer.h.{}.mlp.c_fc", "layers/feed_forward/up"),
    *_conv1d("transformer.h.{}.mlp.c_proj", "layers/feed_forward/down"),
    *norm("transformer.ln_f", "final_norm"),
)
