"""GPT-2 (Radford et al., 2019). Its projections are stored [in, out]."""

from typing import Any

from rlhf_jax.models.families.hf_config import (
    Fields,
    read_names,
    write_choice,
    write_names,
)
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("GPT2",)
PREFIX = "transformer."
HEAD = "lm_head"
BUFFERS = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)

_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "max_length": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_head": "tie_word_embeddings",
}
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
  return {
      **shape(hf, _NAMES, activation="activation_function"),
      "ff_dim": hf.get("n_inner", 4 * hf["n_embd"]),
      "position": "learned",
      "attention_bias": "all",
  }


def shape(
    hf: Fields, names: dict[str, str], activation: str
) -> dict[str, Any]:
  """What GPT-2 and its kin say alike: layernorms, biases, as many key heads.

  names: ours -> theirs; activation: how the family calls this field.
  """
  ours = read_names(hf, names)
  return {
      **ours,
      "num_kv_heads": ours["num_heads"],
      "head_dim": ours["width"] // ours["num_heads"],
      "activation": hf.choose(activation, _ACTIVATIONS),
      "norm": "layernorm",
      "norm_bias": True,
      "feed_forward_bias": True,
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **_FIXED,
      **their_shape(cfg, _NAMES, activation="activation_function"),
      "n_inner": cfg.ff_dim,
  }


def their_shape(
    cfg: TransformerConfig, names: dict[str, str], activation: str
) -> dict[str, Any]:
  """The inverse of `shape`."""
  return {
      **write_names(cfg, names),
      activation: write_choice(cfg, "activation", _ACTIVATIONS),
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
