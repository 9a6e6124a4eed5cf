"""Rotary positions and masked attention, as pure functions.

Keys and values come in *banks*: without a cache there is one, the tokens of
this call; with a cache there are two, the past and the tokens of this call.
One softmax runs over all banks. The cache is thus only read here, and the few
new entries are written once for all layers after the last of them, which costs
a decode step no copy of the cache.

Axes: B sequences, N query tokens, S keys of a bank, H query heads, J key-value
heads, G = H / J query heads that share one, K width of a head.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with nothing to attend to is uniform instead of NaN.
MASKED_SCORE = -1e30


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Position of each token within its own run of equal segment ids.

  Positions restart at 0 with each run; padding (id 0) has position 0. So a
  left-padded row and the same row without padding have the same positions.

  Example:
    segment_positions([[0, 1, 1, 2, 2, 2]]) == [[0, 0, 1, 0, 1, 2]]
  """
  index = jnp.broadcast_to(
      jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape
  )
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)
  run_start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return jnp.where(segment_ids > 0, index - run_start, 0)


def rotary_tables(
    positions: Int[Array, "B N"], head_dim: int, theta: float
) -> tuple[Float[Array, "B N half"], Float[Array, "B N half"]]:
  """(sin, cos) of position * theta^(-2i / head_dim) for i < head_dim / 2.

  Computed once a call and shared by all layers.
  Reference: Su et al., RoFormer, arXiv 2104.09864, section 3.4.2.
  """
  exponent = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim)
  frequency = jnp.asarray(theta, jnp.float32) ** -exponent
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
  return jnp.sin(angle), jnp.cos(angle)


def apply_rotary(
    x: Float[Array, "B N H K"],
    sin: Float[Array, "B N half"],
    cos: Float[Array, "B N half"],
) -> Float[Array, "B N H K"]:
  """Rotates dimension i together with dimension i + K/2.

  Differs: the paper pairs neighbouring dimensions; halves is the layout of
  Hugging Face's Llama. The two are a permutation of the kernel's columns apart.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None], cos[:, :, None]
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def causal_mask(segment_ids: Int[Array, "B N"]) -> Bool[Array, "B N N"]:
  """True where query n may see key m: m <= n and both of one segment.

  Padding sees padding, so that no row is empty and nothing of a real segment
  flows into padding.
  """
  n = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((n, n), jnp.bool_))
  return causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attend(
    query: Float[Array, "B H N K"],
    keys: Sequence[Float[Array, "B J _ K"]],
    values: Sequence[Float[Array, "B J _ K"]],
    masks: Sequence[Bool[Array, "B _ _"]],
) -> Float[Array, "B H N K"]:
  """Softmax attention over all banks together; scores and softmax in float32.

  Args:
    query: H = G * J heads; heads j * G ... j * G + G - 1 share key head j.
    keys, values: one array a bank, each with its own number of keys.
    masks: one a bank, [B, N or 1, S]; True where the query may see the key.
  """
  b, h, n, k = query.shape
  j = keys[0].shape[1]
  grouped = (query * jnp.asarray(k**-0.5, query.dtype)).reshape(
      b, j, h // j, n, k
  )
  scores = [
      jnp.where(mask[:, None, None], _scores(grouped, key), MASKED_SCORE)
      for key, mask in zip(keys, masks, strict=True)
  ]
  if len(scores) == 1:
    probs = [jax.nn.softmax(scores[0], axis=-1)]
  else:
    sizes = [s.shape[-1] for s in scores]
    splits = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    joint = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    probs = jnp.split(joint, splits, axis=-1)
  out = sum(
      jnp.einsum("bjgns,bjsk->bjgnk", p.astype(value.dtype), value)
      for p, value in zip(probs, values, strict=True)
  )
  return out.reshape(b, h, n, k)


def _scores(
    grouped: Float[Array, "B J G N K"], key: Float[Array, "B J S K"]
) -> Float[Array, "B J G N S"]:
  return jnp.einsum(
      "bjgnk,bjsk->bjgns", grouped, key, preferred_element_type=jnp.float32
  )
