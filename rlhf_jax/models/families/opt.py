"""OPT (Zhang et al., arXiv 2205.01068), but for its 350 M model.

Positions are counted from 2 in its table; the first two rows stand for nothing.
"""

from typing import Any

from rlhf_jax.models.families import gpt2
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
_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "ff_dim": "ffn_dim",
    "max_length": "max_position_embeddings",
    "tie_head": "tie_word_embeddings",
}


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  for name, value in _FIXED.items():
    hf.require(name, value)
  hf.ignore("init_std")
  hf.require("word_embed_proj_dim", hf["hidden_size"])
  return {
      **gpt2.shape(hf, _NAMES, activation="activation_function"),
      "position": "learned",
      "attention_bias": "all",
      "norm_epsilon": _NORM_EPSILON,
  }


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {
      **_FIXED,
      **gpt2.their_shape(cfg, _NAMES, activation="activation_function"),
      "word_embed_proj_dim": cfg.width,
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
