"""A trained reward model as a reward function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.rewards.episodes import Episodes, RewardFn
from rlhf_jax.types import ScoreNormalization


def make_reward_model(
    config: TransformerConfig,
    params: Any,
    normalization: ScoreNormalization,
    tokenizer: Tokenizer,
) -> RewardFn:
  """Scores episodes by a reward model: gain * raw + bias at the last token.

  With the policy's tokenizer the rollout's own tokens are scored, and nothing
  leaves the device. With another, prompt and completion are encoded anew, after
  this tokenizer's start token if it has one, as the reward model was trained,
  and a completion that ended gets its end token.

  Raises (when called):
    ValueError: if an episode is longer than the reward model's max_length.
  """
  score_fn = functions.make_score_fn(config)

  @jax.jit
  def score(params, normalization, tokens, mask):
    raw = score_fn(params, tokens, mask)
    return normalization.gain * raw + normalization.bias

  def reward(episodes: Episodes):
    if episodes.tokenizer.fingerprint == tokenizer.fingerprint:
      rollout = episodes.rollout
      tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
      mask = jnp.concatenate(
          [rollout.prompt_mask, rollout.completion_mask], axis=1
      )
    else:
      tokens, mask = _encode_anew(episodes, tokenizer, config.max_length)
    if tokens.shape[1] > config.max_length:
      raise ValueError(
          f"an episode has {tokens.shape[1]} tokens, and the reward model "
          f"reads at most {config.max_length} (max_length)"
      )
    return score(params, normalization, tokens, mask)

  return reward


# Few widths, so that few programs are compiled.
_WIDTH_STEP = 64


def _encode_anew(
    episodes: Episodes, tokenizer: Tokenizer, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """[B, T] right-padded tokens and mask under another tokenizer."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  rows = [
      start + prompt + completion + ([tokenizer.eos_id] if ended else [])
      for prompt, completion, ended in zip(
          tokenizer.encode_batch(episodes.prompts),
          tokenizer.encode_batch(episodes.completions, continues=True),
          episodes.host_rollout.ended,
      )
  ]
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
