"""A trained reward model as a reward function."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from rlhf_jax.data import own_part
from rlhf_jax.data.encoding import LengthError
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.losses import masking
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.rewards.episodes import Episodes, RewardFn
from rlhf_jax.types import Rollout, ScoreNormalization


def make_score_program(config: TransformerConfig):
  """Jitted (params, normalization, tokens [N, T], mask [N, T]) -> score [N]."""
  score_fn = functions.make_score_fn(config)

  @jax.jit
  def score(params, normalization, tokens, mask):
    raw = score_fn(params, tokens, mask)
    return normalization.gain * raw + normalization.bias

  return score


def make_reward_model(
    config: TransformerConfig,
    params: Any,
    normalization: ScoreNormalization,
    tokenizer: Tokenizer,
) -> RewardFn:
  """Scores episodes by a reward model: gain * raw + bias at the last token.

  The last token of a completion that ended is an end token, as it was when the
  reward model was trained: where a stop token ended it, the end token is put
  behind. With the policy's tokenizer the rollout's own tokens are scored, and
  nothing leaves the device. With another, prompt and completion are encoded
  anew, after this tokenizer's start token if it has one.

  Raises (when called):
    LengthError: if an episode is longer than the reward model's max_length.
  """
  score = make_score_program(config)
  close = jax.jit(functools.partial(_closed, eos_ids=tokenizer.eos_ids))

  def reward(episodes: Episodes):
    if episodes.tokenizer.fingerprint == tokenizer.fingerprint:
      tokens, mask = close(episodes.rollout)
    else:
      tokens, mask = _encode_anew(episodes, tokenizer, config.max_length)
    if tokens.shape[1] > config.max_length:
      raise LengthError(
          f"an episode has {tokens.shape[1]} tokens, and the reward model "
          f"reads at most {config.max_length} (max_length)"
      )
    return score(params, normalization, tokens, mask)

  return reward


def _closed(
    rollout: Rollout, *, eos_ids: tuple[int, ...]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
  """Tokens and mask, T = P + C + 1, with the end token behind a stop token.

  The first of `eos_ids` is put there; a completion that ends with any of them
  has its end.
  """
  tokens, mask = functions.whole_sequence(rollout)
  last = masking.last_index(mask)[:, None]
  final = jnp.take_along_axis(tokens, last, axis=1)
  has_end = jnp.isin(final, jnp.asarray(eos_ids, tokens.dtype))
  stopped = rollout.ended[:, None] & ~has_end
  tokens, mask = (jnp.pad(x, ((0, 0), (0, 1))) for x in (tokens, mask))
  here = stopped & (jnp.arange(tokens.shape[1])[None] == last + 1)
  return jnp.where(here, eos_ids[0], tokens), jnp.where(here, 1, mask)


def _read_anew(episodes: Episodes, tokenizer: Tokenizer) -> list[list[int]]:
  """Ids of each whole episode, with the end token if it ended."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return [
      start + prompt + completion + ([tokenizer.eos_id] if ended else [])
      for prompt, completion, ended in zip(
          tokenizer.encode_batch(episodes.prompts),
          tokenizer.encode_batch(episodes.completions, continues=True),
          episodes.host_rollout.ended,
      )
  ]


# Few widths, so that few programs are compiled.
_WIDTH_STEP = 64


def _encode_anew(
    episodes: Episodes, tokenizer: Tokenizer, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """[B, T] right-padded tokens and mask under another tokenizer."""
  mine = episodes.share()
  parts = own_part.of_all(lambda: _read_anew(mine, tokenizer))
  rows = list(itertools.chain.from_iterable(parts))
  # The last process may have some of the first rows again.
  rows = rows[: episodes.host_rollout.ended.shape[0]]
  longest = max(len(row) for row in rows)
  width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
  # Rounding up must not make a row too long that is not.
  width = max(longest, min(width, max_length))
  tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    mask[i, : len(row)] = 1
  return tokens, mask
