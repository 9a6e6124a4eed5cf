"""The attention of a layer: projections around `attention.attend`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models import attention
from rlhf_jax.models.layers import Norm, Projection
from rlhf_jax.models.transformer_config import TransformerConfig


class Attention(nn.Module):
  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x, sight, past):
    """Returns (output, this call's keys and values [B, J, N, K]).

    sight: this layer's masks and rotations, see `transformer.py`.
    past: None without a cache, () with an empty one, else its (k, v).
    """
    cfg = self.config
    kv_shape = (cfg.width, cfg.num_kv_heads, cfg.head_dim)
    query_shape = (cfg.width, cfg.num_heads, cfg.head_dim)
    has_bias = cfg.attention_bias != "none"
    query = Projection(cfg, query_shape, has_bias, name="query")(x)
    key = Projection(cfg, kv_shape, has_bias, name="key")(x)
    value = Projection(cfg, kv_shape, has_bias, name="value")(x)
    if cfg.qk_norm != "none":
      query = self._norm(query, "query_norm")
      key = self._norm(key, "key_norm")
    if cfg.position == "rotary":
      query = attention.apply_rotary(query, *sight["rotary"])
      key = attention.apply_rotary(key, *sight["rotary"])
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (query, key, value))
    keys, values, masks = [key], [value], [sight["mask"]]
    if past:
      keys.append(past[0])
      values.append(past[1])
      masks.append(sight["past_mask"])
    out = attention.attend(
        query, keys, values, masks, cfg.query_scale, cfg.attention_softcap
    )
    out = Projection(
        cfg,
        (cfg.num_heads, cfg.head_dim, cfg.width),
        cfg.attention_bias == "all",
        num_in=2,
        stddev=self.residual_stddev,
        name="out",
    )(jnp.swapaxes(out, 1, 2))
    return out, (key, value)

  def _norm(self, x: Float[Array, "B N H K"], name: str):
    norm = Norm(self.config, name=name)
    if self.config.qk_norm == "head":
      return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
