"""The layers that every part of the decoder is made of."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models import lora, partitioning, quantization
from rlhf_jax.models.transformer_config import TransformerConfig

INIT_STDDEV = 0.02


class Norm(nn.Module):
  """Over the last axis, in float32."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    cfg = self.config
    x = x.astype(jnp.float32)
    if cfg.norm == "layernorm":
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + cfg.norm_epsilon)
    width = x.shape[-1:]
    lead = (None,) * (x.ndim - 1)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    init = zeros if cfg.norm_from_one else ones
    scale = self.param("scale", init, width, cfg.param_dtype)
    scale = scale.astype(jnp.float32)
    if cfg.norm_from_one:
      scale = 1.0 + scale
    x = x * scale[lead]
    if cfg.norm == "layernorm" and cfg.norm_bias:
      bias = self.param("bias", zeros, width, cfg.param_dtype)
      x = x + bias.astype(jnp.float32)[lead]
    return x.astype(cfg.dtype)


class Projection(nn.Module):
  """x times a kernel of any rank, the `num_in` leading kernel axes contracted.

  It runs as one product of matrices: XLA's CPU backend otherwise lays out
  transposed copies of the activations for each kernel's gradient.
  """

  config: TransformerConfig
  shape: tuple[int, ...]
  use_bias: bool
  num_in: int = 1
  stddev: float = INIT_STDDEV

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    cfg = self.config
    init = nn.initializers.normal(self.stddev)
    kernel = self.param("kernel", init, self.shape, cfg.param_dtype)
    out_shape = self.shape[self.num_in :]
    lead = x.shape[: x.ndim - self.num_in]
    size_in = math.prod(self.shape[: self.num_in])
    kernel = kernel.astype(cfg.dtype).reshape(size_in, -1)
    x = x.reshape(*lead, size_in)
    # Rows and positions that are both split cannot be one dimension.
    flat = x if partitioning.splits_sequence(x) else x.reshape(-1, size_in)
    if quantization.SCALES in self.variables:
      scale = self.variables[quantization.SCALES]["scale"]
      out = quantization.product(flat, kernel, scale)
    else:
      out = flat @ kernel
    out = out.reshape(*lead, *out_shape)
    if "adapter" in self.variables:
      added = lora.product(x, self.variables["adapter"])
      out = out + added.reshape(out.shape)
    if not self.use_bias:
      return out
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, out_shape, cfg.param_dtype)
    return out + bias.astype(cfg.dtype)[None, None]
