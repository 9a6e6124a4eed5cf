"""Small models with parameters large enough for differences to show."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import TransformerConfig

LLAMA = {}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "use_bias": True,
    "num_kv_heads": 4,
}
VARIANTS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "tie_head": False},
    "layernorm_without_bias": {"norm": "layernorm", "tie_head": False},
    "rotary_with_bias": {"use_bias": True, "num_kv_heads": 1},
    "gelu_rmsnorm": {"activation": "gelu", "rope_theta": 100.0},
}


def small_config(**changes) -> TransformerConfig:
  shape = {
      "vocab_size": 19,
      "num_layers": 2,
      "width": 12,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 6,
      "ff_dim": 20,
      "max_length": 24,
  }
  return TransformerConfig(**{**shape, **changes})


def random_params(model, seed=0):
  """Every leaf random, norm scales around 1, so that no term is idle."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    offset = 1.0 if path[-1].key == "scale" else 0.0
    values = offset + 0.3 * rng.standard_normal(leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def small_language_model(seed=0, **changes):
  """(model, params)."""
  model = LanguageModel(small_config(**changes))
  return model, random_params(model, seed)


def random_tokens(seed, *shape, vocab_size=19):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, vocab_size, shape), jnp.int32)
