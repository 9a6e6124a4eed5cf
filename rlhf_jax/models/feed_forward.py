"""The feed-forward of a layer: one, or several under a router."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models import partitioning, quantization
from rlhf_jax.models.layers import Projection
from rlhf_jax.models.transformer_config import TransformerConfig

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
_GATED = {"swiglu": jax.nn.silu, "geglu": _gelu_tanh}
_ACTIVATIONS = {
    "gelu": _gelu_tanh,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class FeedForward(nn.Module):
  """down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    cfg = self.config
    has_bias = cfg.feed_forward_bias
    wide = functools.partial(
        Projection, cfg, (cfg.width, cfg.ff_dim), has_bias
    )
    up = wide(name="up")(x)
    if cfg.activation in _GATED:
      up = _GATED[cfg.activation](wide(name="gate")(x)) * up
    else:
      up = _ACTIVATIONS[cfg.activation](up)
    up = partitioning.constrain(up, "wide")
    down_shape = (cfg.ff_dim, cfg.width)
    return Projection(
        cfg, down_shape, has_bias, stddev=self.residual_stddev, name="down"
    )(up)


class MixtureOfExperts(nn.Module):
  """The sum of a token's best experts, by the weights that a router gives them.

  Dense: every expert computes every token, which is exactly what sending tokens
  to their experts gives, at num_experts / experts_per_token times the cost.
  The router runs in float32. Its probabilities [B, N, E] are sown as
  `router_probs` for `losses.load_balancing`; `functions.make_router_fn` has
  them.

  Reference: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1.
  Differs: the softmax is over all experts and its best are made to sum to 1,
    which is equal to a softmax over the best.
  """

  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    cfg = self.config
    exact = dataclasses.replace(cfg, dtype="float32")
    router = Projection(
        exact, (cfg.width, cfg.num_experts), False, name="router"
    )
    probs = jax.nn.softmax(router(x.astype(jnp.float32)), axis=-1)
    self.sow("intermediates", "router_probs", probs)
    best, chosen = jax.lax.top_k(probs, cfg.experts_per_token)
    best = best / jnp.sum(best, axis=-1, keepdims=True)
    is_chosen = jax.nn.one_hot(chosen, cfg.num_experts)
    weights_BNE = jnp.einsum("bnk,bnke->bne", best, is_chosen)
    experts = nn.vmap(
        FeedForward,
        variable_axes={"params": 0, quantization.SCALES: 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=cfg.num_experts,
    )(cfg, self.residual_stddev, name="experts")
    out_EBND = experts(x).astype(jnp.float32)
    out = jnp.einsum("ebnd,bne->bnd", out_EBND, weights_BNE)
    return out.astype(cfg.dtype)
