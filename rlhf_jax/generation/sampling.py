"""From logits to a token: pure functions, applied in this order.

temperature, then top-k, then top-p (Hugging Face's order), then a draw. All
return float32 logits in which a token that may not be drawn is -inf.
"""

import math

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
    rng: Key[Array, ""] | UInt32[Array, "2"], logits: Float[Array, "V"]
) -> Int[Array, ""]:
  """One draw from softmax(logits), by inverting its distribution function.

  A uniform number chooses a block of about sqrt(V) tokens by the blocks'
  masses, a second one a token of that block by the tokens' own: the product is
  the token's probability. Two random numbers instead of the V of Gumbel-max,
  and no array of V but the weights, which a log-probability computes as well.

  Exact within float32: a uniform number has 23 bits, of a block and again of a
  token in it. A token of weight 0 is never drawn.

  Args:
    logits: float32, -inf where nothing may be drawn; at least one is finite.
  """
  size = logits.shape[-1]
  block = 1 << math.ceil(math.log2(size) / 2)
  missing = -size % block
  weights = jnp.exp(logits - jnp.max(logits))
  blocks = jnp.pad(weights, (0, missing)).reshape(-1, block)
  uniform_block, uniform_token = jax.random.uniform(rng, (2,))
  chosen = _invert(jnp.sum(blocks, axis=1), uniform_block)
  token = _invert(blocks[chosen], uniform_token)
  # Of logits that are NaN none exceeds anything: still a token, not past all.
  return jnp.minimum(chosen * block + token, size - 1)


def _invert(
    weights: Float[Array, "N"], uniform: Float[Array, ""]
) -> Int[Array, ""]:
  """The first entry at which the sum so far exceeds uniform * the whole."""
  total = jnp.cumsum(weights)
  # A sum in parallel may fall by a rounding error where nothing was added.
  exceeds = (total > uniform * total[-1]) & (weights > 0)
  first = jnp.argmax(exceeds)
  last_real = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
  return jnp.where(jnp.any(exceeds), first, last_real).astype(jnp.int32)
