"""The attention of a layer: projections around `attention.attend`."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import attention, attention_kernels, partitioning
from rlhf_jax.models.layers import Norm, Projection
from rlhf_jax.models.transformer_config import TransformerConfig


class OwnCache(NamedTuple):
  """One layer's keys and values, and the slot that is written next.

  Written before it is read: XLA copies what is read and changed after.
  """

  key: Float[Array, "B J S K"]
  value: Float[Array, "B J S K"]
  index: Int[Array, ""]

  def written(self, key, value):
    return tuple(
        partitioning.constrain(
            jax.lax.dynamic_update_slice_in_dim(old, x, self.index, axis=2),
            "layer_cache",
        )
        for old, x in ((self.key, key), (self.value, value))
    )


class Attention(nn.Module):
  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x, sight, past, is_full):
    """Returns (output, keys and values [B, J, N, K] of this call).

    Of this call and the past together [B, J, S, K] with an `OwnCache`.

    sight: this layer's masks and rotations, see `transformer.py`.
    past: None without a cache, () with an empty one, else its (k, v); or the
      layer's `OwnCache`.
    is_full: None, or traced where layers differ: this one has no window.
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
    query = partitioning.constrain(query, "queries")
    key, value = (partitioning.constrain(a, "keys") for a in (key, value))
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (query, key, value))
    new = (key, value)
    if isinstance(past, OwnCache):
      new = past.written(key, value)
    if "cache_mask" not in sight:
      out = self._attend_to_itself(query, key, value, sight, is_full)
    else:
      banks = [(*new, sight["cache_mask"])]
      if not isinstance(past, OwnCache):
        banks = [(key, value, sight["mask"]), (*past, sight["cache_mask"])]
      out = attention.attend(
          query, *zip(*banks), cfg.query_scale, cfg.attention_softcap
      )
    out = Projection(
        cfg,
        (cfg.num_heads, cfg.head_dim, cfg.width),
        cfg.attention_bias == "all",
        num_in=2,
        stddev=self.residual_stddev,
        name="out",
    )(jnp.swapaxes(out, 1, 2))
    return out, new

  def _attend_to_itself(self, query, key, value, sight, is_full):
    cfg = self.config
    backend = attention_kernels.choose_backend(
        cfg.attention_backend,
        dtype=cfg.dtype,
        head_dim=cfg.head_dim,
        softcap=cfg.attention_softcap,
        platform=attention_kernels.platform_of(query),
    )
    scale, softcap = cfg.query_scale, cfg.attention_softcap
    if backend == "xla":
      return attention.attend(
          query, [key], [value], [sight["mask"]], scale, softcap
      )
    kernel = functools.partial(
        attention_kernels.attend,
        backend,
        query,
        key,
        value,
        sight["segment_ids"],
        scale=scale,
        softcap=softcap,
    )
    if is_full is None:
      return kernel(window=cfg.sliding_window)
    # A kernel is made for its window.
    return jax.lax.cond(
        is_full,
        lambda: kernel(window=0),
        lambda: kernel(window=cfg.sliding_window),
    )

  def _norm(self, x: Float[Array, "B N H K"], name: str):
    norm = Norm(self.config, name=name)
    if self.config.qk_norm == "head":
      return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
