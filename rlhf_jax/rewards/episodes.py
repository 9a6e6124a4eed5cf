"""What scores a completion: one signature for reward models, rules and people.

    RewardFn: Episodes -> score [B], float32

A reward function gets tokens and text alike, so that a rule reads the text, a
reward model with the policy's tokenizer reads the tokens, and one with another
tokenizer reads the text again. With several processes each scores its share of
the text, and all get all scores.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax import device_mesh
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
    """The rollout as numpy arrays, all rows."""
    return device_mesh.to_host(self.rollout)

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

  def share(self) -> "Episodes":
    """Those that this process is to read; see `gather`."""
    rollout = self.host_rollout
    rows = _share(rollout.ended.shape[0])
    return Episodes(jax.tree.map(lambda x: x[rows], rollout), self.tokenizer)


def _share(num: int) -> np.ndarray:
  """As many rows for every process; the last may have some of the first."""
  size = -(-num // jax.process_count())
  first = size * jax.process_index()
  return np.arange(first, first + size) % num


def gather(share: np.ndarray, num: int) -> np.ndarray:
  """[num] values, of which each process has those of its `share`."""
  if jax.process_count() == 1:
    return share
  return multihost_utils.process_allgather(share, tiled=True)[:num]


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
    scores, mine = [], episodes.share()
    for prompt, completion in zip(mine.prompts, mine.completions):
      score = rule(prompt, completion)
      if not _is_number(score):
        raise RuleError(
            f"the reward rule gave {score!r} for the completion "
            f"{completion[:200]!r} of the prompt {prompt[:200]!r}; it must "
            "give a finite number"
        )
      scores.append(score)
    num = episodes.host_rollout.ended.shape[0]
    return gather(np.asarray(scores, np.float32), num)

  return reward


def _is_number(score: Any) -> bool:
  """Whether float32 can hold it: NaN, None, text and 1e300 are none."""
  try:
    return bool(abs(score) <= float(np.finfo(np.float32).max))
  except (TypeError, ValueError):
    return False
