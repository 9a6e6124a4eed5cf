"""What scores a completion: one signature for reward models, rules and people.

    RewardFn: Episodes -> score [B], float32

A reward function gets tokens and text alike, so that a rule reads the text, a
reward model with the policy's tokenizer reads the tokens, and one with another
tokenizer reads the text again.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import Rollout


class RuleError(ValueError):
  """What was given as a reward rule is none, or gave no score."""


class Episodes:
  """A rollout and, only if someone asks, its text.

  rollout: as sampled.
  tokenizer: the policy's.
  """

  def __init__(self, rollout: Rollout, tokenizer: Tokenizer):
    self.rollout = rollout
    self.tokenizer = tokenizer

  @functools.cached_property
  def host_rollout(self) -> Rollout:
    """The rollout as numpy arrays."""
    return jax.device_get(self.rollout)

  @functools.cached_property
  def prompts(self) -> list[str]:
    """The prompts' text, without padding and special tokens."""
    rollout = self.host_rollout
    return self.tokenizer.decode_batch(rollout.prompts, rollout.prompt_mask)

  @functools.cached_property
  def completions(self) -> list[str]:
    """The completions' text, up to where each ended."""
    rollout = self.host_rollout
    return self.tokenizer.decode_batch(
        rollout.completions, rollout.completion_mask, continues=True,
        drop_unknown=True,
    )


RewardFn = Callable[[Episodes], np.ndarray]


def make_rule_reward(rule: Callable[[str, str], float]) -> RewardFn:
  """A reward function from any function of (prompt, completion) texts.

  Raises:
    RuleError: if it is no function; and, when called, if it gives something
      that is not a finite number, with the completion that it was given.
  """

  if not callable(rule):
    raise RuleError(
        "a reward rule is a function of the texts (prompt, completion), and "
        f"{rule!r} is none"
    )

  def reward(episodes: Episodes) -> np.ndarray:
    scores = []
    for prompt, completion in zip(episodes.prompts, episodes.completions):
      score = rule(prompt, completion)
      if not _is_number(score):
        raise RuleError(
            f"the reward rule gave {score!r} for the completion "
            f"{completion[:200]!r} of the prompt {prompt[:200]!r}; it must "
            "give a finite number"
        )
      scores.append(score)
    return np.asarray(scores, np.float32)

  return reward


def _is_number(score: Any) -> bool:
  """Whether float32 can hold it: NaN, None, text and 1e300 are none."""
  try:
    return bool(abs(score) <= float(np.finfo(np.float32).max))
  except (TypeError, ValueError):
    return False
