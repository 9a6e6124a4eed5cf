"""Containers of arrays that travel between the stages. Arrays, no behaviour.

Two conventions hold everywhere:

* Masks travel as arrays; nothing is inferred from `ids != pad`. Prompts are
  left-padded to P, completions right-padded to C, so the boundary between them
  is the static index P and the real tokens of a row are contiguous.
* `logprobs[:, i]` scores `completions[:, i]`; `values[:, i]` is the value of
  the state *before* that token. Both come from position P + i - 1.

Axes: B sequences, R the pair axis (0 chosen, 1 rejected), K ranked completions,
P prompt, C completion, T = P + C.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int


def static(default: Any = dataclasses.MISSING) -> Any:
  """A dataclass field that jax treats as structure, not as data.

  Counts, names and switches are static: changing one compiles a new program.
  Coefficients are plain fields: changing one does not.
  """
  return dataclasses.field(default=default, metadata={"static": True})


def pytree_dataclass(cls):
  """A frozen dataclass that is a pytree; `static()` fields are metadata."""
  return jax.tree_util.register_dataclass(
      dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  )


@pytree_dataclass
class LMBatch:
  """Token rows for language modelling, several documents packed in each.

  segment_ids: 0 is padding; tokens attend only within their own segment, and
    positions restart at each.
  loss_mask: 1 where the token is a target (it is predicted from the one before
    it); 0 on prompts, padding and each segment's first token.
  """

  tokens: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"]
  loss_mask: Float[Array, "B T"]


@pytree_dataclass
class PreferenceBatch:
  """Pairs of whole sequences (prompt and completion): R = 0 chosen, 1 rejected.

  attention_mask: 1 on real tokens, contiguous, padding on either side.
  margin: the annotator's stated strength of preference in score units, or 0.
  """

  tokens: Int[Array, "B R T"]
  attention_mask: Int[Array, "B R T"]
  weight: Float[Array, "B"]
  margin: Float[Array, "B"]


@pytree_dataclass
class RankingBatch:
  """K sequences a prompt with their ranks.

  ranks: smaller is better, equal is a tie.
  completion_valid: False for the rows that fill a shorter ranking up to K.
  """

  tokens: Int[Array, "B K T"]
  attention_mask: Int[Array, "B K T"]
  ranks: Int[Array, "B K"]
  completion_valid: Bool[Array, "B K"]
  weight: Float[Array, "B"]


@pytree_dataclass
class PromptBatch:
  """Left-padded prompts. `index` is each prompt's place in its source."""

  prompts: Int[Array, "B P"]
  prompt_mask: Int[Array, "B P"]
  index: Int[Array, "B"]


@pytree_dataclass
class Rollout:
  """Sampled completions and what the sampler knew about them.

  completion_mask: 1 up to and including the token that ended the completion.
  logprobs: log-probability of each sampled token under the sampling
    distribution at its temperature; 0 where the mask is 0.
  ended: True where a stop token ended the completion, False where it ran into
    the length limit.
  """

  prompts: Int[Array, "B P"]
  prompt_mask: Int[Array, "B P"]
  completions: Int[Array, "B C"]
  completion_mask: Int[Array, "B C"]
  logprobs: Float[Array, "B C"]
  ended: Bool[Array, "B"]


@pytree_dataclass
class ScoreNormalization:
  """score = gain * raw score + bias, fitted once on a reference policy."""

  gain: Float[Array, ""]
  bias: Float[Array, ""]


@pytree_dataclass
class ScoredRollout:
  """A rollout with everything that a policy update needs of it.

  score: what the reward model (or rule) said of each completion, once, after
    the rule for completions that never ended.
  old_logprobs: the policy's log-probs before the update, from the very forward
    pass that the update differentiates, so that the first ratio is 1.
  kl: per-token estimate of KL(policy || ref_policy) under the chosen estimator.
  rewards: per token, after the KL penalty.
  """

  rollout: Rollout
  score: Float[Array, "B"]
  old_logprobs: Float[Array, "B C"]
  ref_logprobs: Float[Array, "B C"]
  values: Float[Array, "B C"]
  kl: Float[Array, "B C"]
  rewards: Float[Array, "B C"]
  advantages: Float[Array, "B C"]
  returns: Float[Array, "B C"]
