"""From logits to a token: pure functions, applied in this order.

temperature, then top-k, then top-p (Hugging Face's order), then a draw. All
return float32 logits in which a token that may not be drawn is -inf.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


def apply_temperature(
    logits: Float[Array, "*B V"], temperature: Float[Array, ""] | float
) -> Float[Array, "*B V"]:
  """logits / temperature. Temperature must be positive; greedy is argmax."""
  return logits.astype(jnp.float32) / temperature


def apply_top_k(
    logits: Float[Array, "*B V"], top_k: int
) -> Float[Array, "*B V"]:
  """Keeps the top_k largest logits; ties with the smallest kept stay too.

  top_k is static; 0, or the vocabulary's size or more, keeps everything.
  """
  if top_k <= 0 or top_k >= logits.shape[-1]:
    return logits
  threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def apply_top_p(
    logits: Float[Array, "*B V"], top_p: Float[Array, ""] | float
) -> Float[Array, "*B V"]:
  """Keeps the smallest set of likeliest tokens whose mass reaches top_p.

  The likeliest token always stays; so do ties with the least likely kept one.

  Reference: Holtzman et al., arXiv 1904.09751, section 3.1.
  """
  descending = -jnp.sort(-logits.astype(jnp.float32), axis=-1)
  probs = jax.nn.softmax(descending, axis=-1)
  mass_before = jnp.cumsum(probs, axis=-1) - probs
  kept = jnp.where(mass_before < top_p, descending, jnp.inf)
  # With top_p = 0 nothing would be kept; the first in line always is.
  threshold = jnp.minimum(jnp.min(kept, axis=-1), descending[..., 0])[..., None]
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    rng: Key[Array, ""] | UInt32[Array, "2"], logits: Float[Array, "*B V"]
) -> Int[Array, "*B"]:
  """One draw from softmax(logits) along the last axis (Gumbel-max)."""
  return jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)
