"""Small models with parameters large enough for differences to show."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import lora
from rlhf_jax.models.attention import RopeScaling
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import TransformerConfig

LLAMA = {}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "attention_bias": "all",
    "feed_forward_bias": True,
    "norm_bias": True,
    "num_kv_heads": 4,
}
NEOX = {
    **GPT2,
    "position": "rotary",
    "rotary_fraction": 0.34,
    "activation": "gelu_exact",
    "parallel_residual": True,
    "tie_head": False,
}
VARIANTS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "tie_head": False},
    "layernorm_without_bias": {"norm": "layernorm", "tie_head": False},
    "rotary_with_bias": {"attention_bias": "qkv", "num_kv_heads": 1},
    "neox": NEOX,
    "relu": {**GPT2, "activation": "relu"},
    "qk_norm": {"qk_norm": "head"},
    "window": {"sliding_window": 3},
    "linear_scaling": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "yarn_scaling": {
        "rope_theta": 5.0,
        "rope_scaling": RopeScaling(
            kind="yarn",
            factor=4.0,
            original_length=16,
            low_frequency_factor=0.4,
            high_frequency_factor=2.0,
            attention_factor=1.2,
        ),
    },
    "llama3_scaling": {
        "rope_theta": 5.0,
        "rope_scaling": RopeScaling(
            kind="llama3",
            factor=4.0,
            original_length=16,
            low_frequency_factor=1.0,
            high_frequency_factor=3.0,
        ),
    },
    "gemma": {
        "norm_placement": "pre_and_post",
        "norm_from_one": True,
        "activation": "geglu",
        "query_scale_dim": 9,
        "attention_softcap": 1.5,
        "logit_softcap": 2.0,
        "scale_embedding": True,
        "sliding_window": 3,
        "full_attention_layers": (1,),
    },
    "two_ropes": {
        "num_layers": 4,
        "sliding_window": 4,
        "full_attention_layers": (0, 3),
        "local_rope_theta": 40.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
    },
    "post_norm": {"norm_placement": "post", "qk_norm": "whole"},
    "experts": {"num_experts": 5, "experts_per_token": 2, "ff_dim": 8},
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


def with_adapter(params):
  """The params under an adapter that has moved: a fresh one changes nothing."""
  config = lora.LoraConfig(rank=2, alpha=4.0, targets=("all-linear",))
  adapter = lora.init(jax.random.key(1), config, params)
  return {
      "base": params,
      "adapter": jax.tree.map(
          lambda x: x + jnp.asarray(0.1, x.dtype), adapter
      ),
      "adapter_scale": jnp.float32(config.scale),
  }
