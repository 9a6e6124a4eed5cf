"""Keeps the router of a mixture of experts from using few of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from rlhf_jax.losses import masking


def load_balancing_loss(
    router_probs: Float[Array, "*tokens E"],
    mask: Shaped[Array, "*tokens"],
    *,
    experts_per_token: int,
) -> Float[Array, ""]:
  """How unevenly tokens are spread over the experts; least when evenly.

  E * sum_e f_e P_e

  f_e is the number of a token's best experts that are e, P_e the probability
  that the router gives e, both in the mean over real tokens. f has no gradient:
  the loss moves the router through P. It is a product of two means over tokens,
  so that it cannot be left unreduced.

  Args:
    router_probs: the router's probabilities over all E experts. Layers are
      tokens like others; `jax.vmap` over them gives a loss for each.
    mask: 1 on real tokens.
    experts_per_token: k, how many experts a token is sent to.

  Returns:
    A float32 scalar: k for an even router, up to E for one that sends all
    tokens to the same experts with certainty (k = 1).

  Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to
  6, without their coefficient alpha.

  Differs: k may be greater than 1, as in Mixtral; layers may be taken together.

  Example:
    >>> even = jnp.full((2, 4), 0.25)
    >>> float(load_balancing_loss(even, jnp.ones(2), experts_per_token=1))
    1.0
  """
  num_experts = router_probs.shape[-1]
  router_probs = router_probs.astype(jnp.float32)
  _, best = jax.lax.top_k(router_probs, experts_per_token)
  counts = jnp.sum(jax.nn.one_hot(best, num_experts), axis=-2)
  each = jnp.broadcast_to(mask[..., None], router_probs.shape)
  axes = tuple(range(router_probs.ndim - 1))
  share = masking.masked_mean(counts, each, axis=axes)
  probability = masking.masked_mean(router_probs, each, axis=axes)
  return num_experts * jnp.sum(share * probability)
