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
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Rotary frequencies for texts longer than those of pretraining.

  kind: 'linear' divides positions by `factor` (Chen et al., arXiv 2306.15595);
    'llama3' divides the frequencies whose wavelength exceeds original_length /
    low_frequency_factor by `factor`, leaves those below original_length /
    high_frequency_factor, and goes from one to the other in between (Llama 3.1,
    arXiv 2407.21783; the formula is in the released code); 'yarn' does so by
    dimension, between those that turn high_frequency_factor and
    low_frequency_factor times in original_length, and scales queries and keys
    by the root of `attention_factor` each (Peng et al., arXiv 2309.00071);
    'dynamic' changes nothing up to the model's own max_length, which is as
    long as a row can be here.
  original_length and the two frequency factors are for 'llama3' and 'yarn'.
  """

  kind: Literal["linear", "llama3", "yarn", "dynamic"]
  factor: float
  original_length: int = 0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  attention_factor: float = 1.0

  def __post_init__(self):
    if self.kind not in ("linear", "llama3", "yarn", "dynamic"):
      raise ValueError(f"rope scaling {self.kind!r} is not implemented")
    if not 1 <= self.factor < math.inf:
      raise ValueError(f"factor={self.factor} must be at least 1")
    if self.kind in ("llama3", "yarn") and (
        self.original_length < 1
        or self.low_frequency_factor <= 0
        or self.high_frequency_factor <= self.low_frequency_factor
    ):
      raise ValueError(
          f"{self.kind} scaling needs original_length, and a "
          "high_frequency_factor above the low one"
      )


def rotary_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "half"]:
  """Radians a position, theta^(-2i / rotary_dim) unless scaled; float64."""
  index = np.arange(rotary_dim // 2)
  frequency = theta ** -(index * 2.0 / rotary_dim)
  if scaling is None or scaling.kind == "dynamic":
    return frequency
  if scaling.kind == "linear":
    return frequency / scaling.factor
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  if scaling.kind == "yarn":
    # The dimension that turns so often in the original length.
    dimension = lambda turns: (
        rotary_dim
        * math.log(scaling.original_length / (turns * 2 * math.pi))
        / (2 * math.log(theta))
    )
    first = max(math.floor(dimension(high)), 0)
    last = min(math.ceil(dimension(low)), rotary_dim - 1)
    kept = 1 - np.clip((index - first) / max(last - first, 1e-3), 0.0, 1.0)
  else:
    turns = scaling.original_length * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequency * (kept + (1 - kept) / scaling.factor)


def rotary_tables(
    positions: Int[Array, "B N"],
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "B N half"], Float[Array, "B N half"]]:
  """(sin, cos) of position * frequency, for rotary_dim / 2 frequencies.

  With 'yarn', times its attention factor.
  Computed once a call and shared by all layers.
  Reference: Su et al., RoFormer, arXiv 2104.09864, section 3.4.2.
  """
  frequency = rotary_frequencies(rotary_dim, theta, scaling)
  frequency = jnp.asarray(frequency, jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if scaling is None or scaling.attention_factor == 1.0:
    return sin, cos
  factor = jnp.float32(scaling.attention_factor)
  return sin * factor, cos * factor


def apply_rotary(
    x: Float[Array, "B N H K"],
    sin: Float[Array, "B N half"],
    cos: Float[Array, "B N half"],
) -> Float[Array, "B N H K"]:
  """Rotates dimension i with i + half, for i < half; leaves those from 2 half.

  Differs: the paper pairs neighbouring dimensions; halves is the layout of
  Hugging Face's Llama. The two are a permutation of the kernel's columns apart.
  """
  half = sin.shape[-1]
  rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
  first, second = jnp.split(rotary.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None], cos[:, :, None]
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)
  return jnp.concatenate([rotated, rest], axis=-1) if rest.size else rotated


def causal_mask(
    segment_ids: Int[Array, "B N"], window: int = 0
) -> Bool[Array, "B N N"]:
  """True where query n may see key m: m <= n and both of one segment.

  With a window, n - window < m too. Padding sees padding, so that no row is
  empty and nothing of a real segment flows into padding.
  """
  n = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((n, n), jnp.bool_))
  if window:
    # Segments have no gaps: distance in the row is distance in the text.
    causal &= ~jnp.tril(jnp.ones((n, n), jnp.bool_), -window)
  return causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cache_mask(
    slots: Int[Array, "B S"], positions: Int[Array, "B N"], window: int = 0
) -> Bool[Array, "B N S"]:
  """True where a query at `positions` may see a slot of the cache.

  slots: the position of what each holds, -1 where that is nothing.
  """
  slots, positions = slots[:, None], positions[:, :, None]
  mask = (slots >= 0) & (slots <= positions)
  return mask & (positions - slots < window) if window else mask


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
  """cap * tanh(x / cap), which stays within -cap..cap; x where cap is 0.

  Reference: Gemma 2, arXiv 2408.00118, section 2.
  """
  return cap * jnp.tanh(x / cap) if cap else x


def scaled(query: Float[Array, "B H N K"], scale: float):
  """query * scale, rounded once: a scale in bfloat16 would be off itself."""
  return (query.astype(jnp.float32) * jnp.float32(scale)).astype(query.dtype)


def attend(
    query: Float[Array, "B H N K"],
    keys: Sequence[Float[Array, "B J _ K"]],
    values: Sequence[Float[Array, "B J _ K"]],
    masks: Sequence[Bool[Array, "B _ _"]],
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "B H N K"]:
  """Softmax attention over all banks together; scores and softmax in float32.

  Args:
    query: H = G * J heads; heads j * G ... j * G + G - 1 share key head j.
    keys, values: one array a bank, each with its own number of keys.
    masks: one a bank, [B, N or 1, S]; True where the query may see the key.
    scale: of the queries.
    cap: of the scores, see `softcap`.
  """
  b, h, n, k = query.shape
  j = keys[0].shape[1]
  grouped = scaled(query, scale).reshape(b, j, h // j, n, k)
  scores = [
      jnp.where(
          mask[:, None, None], softcap(_scores(grouped, key), cap), MASKED_SCORE
      )
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
