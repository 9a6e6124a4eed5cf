"""OPT (Zhang et al., arXiv 2205.01068), but for its 350 M model.

Positions are counted from 2 in its table; the first two rows stand for nothing.
"""

from typing import Any

from rlhf_jax.models.families.hf_config import Fields
from rlhf_jax.models.families.table import Tensor, embedding, linear, norm
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("OPT",)
PREFIX = "model."
HEAD = "lm_head"
BUFFERS = ()

_FIXED = {
    # False in the 350 M model: it norms after each part.
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
_NORM_EPSILON = 1e-5  # torch's default; the config has no field for it
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu"}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  for name, value in _FIXED.items():
    hf.require(name, value)
  hf.ignore("init_std")
  width, heads = hf["hidden_size"], hf["num_attention_heads"]
  hf.require("word_embed_proj_dim", width)
  return {
      "vocab_size": hf["vocab_size"],
      "num_layers": hf["num_hidden_layers"],
      "width": width,
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": width // heads,
      "ff_dim": hf["ffn_dim"],
      "max_length": hf["max_position_embeddings"],
      "position": "learned",
      "norm": "layernorm",
      "activation": hf.choose("activation_function", _ACTIVATIONS),
      "attention_bias": "all",
      "feed_forward_bias": True,
      "norm_bias": True,
      "norm_epsilon": _NORM_EPSILON,
      "tie_head": hf["tie_word_embeddings"],
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return {
      **_FIXED,
      "vocab_size": cfg.vocab_size,
      "num_hidden_layers": cfg.num_layers,
      "hidden_size": cfg.width,
      "word_embed_proj_dim": cfg.width,
      "num_attention_heads": cfg.num_heads,
      "ffn_dim": cfg.ff_dim,
      "max_position_embeddings": cfg.max_length,
      "activation_function": activations.get(cfg.activation),
      "tie_word_embeddings": cfg.tie_head,
  }


_LAYER = "model.decoder.layers.{}"
WEIGHTS: tuple[Tensor, ...] = (
    *embedding("model.decoder.embed_tokens", "token_embedding"),
    *embedding(
        "model.decoder.embed_positions", "position_embedding", skip_rows=2
    ),
    *norm(f"{_LAYER}.self_attn_layer_norm", "layers/attention_norm"),
    *linear(f"{_LAYER}.self_attn.q_proj", "layers/attention/query"),
    *linear(f"{_LAYER}.self_attn.k_proj", "layers/attention/key"),
    *linear(f"{_LAYER}.self_attn.v_proj", "layers/attention/value"),
    *linear(f"{_LAYER}.self_attn.out_proj", "layers/attention/out"),
    *norm(f"{_LAYER}.final_layer_norm", "layers/feed_forward_norm"),
    *linear(f"{_LAYER}.fc1", "layers/feed_forward/up"),
    *linear(f"{_LAYER}.fc2", "layers/feed_forward/down"),
    *norm("model.decoder.final_layer_norm", "final_norm"),
)
