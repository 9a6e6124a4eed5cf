"""Reward-model training from comparisons and rankings.

Ouyang et al., "Training language models to follow instructions with human
feedback" (arXiv 2203.02155, equation 1), and Stiennon et al., "Learning to
summarize from human feedback" (arXiv 2009.01325, section 3.4): a scalar head on
the language model's trunk, trained so that the completion that people preferred
scores higher.

  1. The score is read at the last real token, found by index from the mask, so
     neither the side nor the amount of padding changes it.
  2. Pairs: -log sigmoid(chosen - rejected - margin), times the record's weight.
     The margin is Touvron et al., arXiv 2307.09288, equation 2.
  3. Rankings of K: the mean over all strictly ordered pairs of a prompt, all in
     one row of the batch, so that a prompt weighs one whatever its K (arXiv
     2203.02155, section 3.5: shuffled apart, several epochs of them overfit;
     within one epoch they do not repeat). `ranking_loss` may instead be the
     whole ranking's (Plackett-Luce) or that of the best one alone (arXiv
     1909.08593, equation 1).
  4. center_coef pulls the two scores' sum to 0 (Eisenstein et al., arXiv
     2312.09244, section 3): the loss alone leaves their level undetermined.
  5. Afterwards a gain and a bias are fitted so that the reference policy's
     completions score mean 0 and standard deviation 1 (Ziegler et al., arXiv
     1909.08593, section 2.1). Differs: they also do so before training, which
     for a fresh head only rescales its initial noise.

tokens -> score_BR at the last real token -> Bradley-Terry -> weighted mean
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

from rlhf_jax import collectives
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.losses import preference
from rlhf_jax.metrics import Metrics
from rlhf_jax.train_state import TrainState
from rlhf_jax.types import (
  PreferenceBatch,
  RankingBatch,
  ScoreNormalization,
  pytree_dataclass,
  static,
)
from rlhf_jax.updates import gradient

# (params, tokens [N, T], attention_mask [N, T]) -> score [N]
ScoreFn = Callable[
    [Any, Int[Array, "N T"], Int[Array, "N T"]], Float[Array, "N"]
]


@pytree_dataclass
class RewardConfig:
  """center_coef: weight of the squared sum of a pair's scores (0: off).

  ranking_loss: what a ranking costs; pairs know no other than Bradley-Terry's.
  num_microbatches: memory only.
  """

  center_coef: float = 0.0
  ranking_loss: Literal["pairwise", "plackett_luce", "best_of_k"] = static(
      "pairwise"
  )
  num_microbatches: int = static(1)


def score_rows(
    params: Any, batch: PreferenceBatch | RankingBatch, score_fn: ScoreFn
) -> Float[Array, "B K"]:
  """Scores of all sequences of every row: [B, K] (K = 2 for pairs)."""
  B, K, T = batch.tokens.shape
  score_N = score_fn(
      params,
      batch.tokens.reshape(B * K, T),
      batch.attention_mask.reshape(B * K, T),
  )
  return score_N.reshape(B, K)


def reward_objective(
    params: Any,
    batch: PreferenceBatch,
    score_fn: ScoreFn,
    cfg: RewardConfig,
    total_weight: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
  """The batch's share of the weighted mean over pairs."""
  chosen_B, rejected_B = score_rows(params, batch, score_fn).T
  loss_B = preference.bradley_terry_loss(
      chosen_B, rejected_B, margin=batch.margin
  )
  center_B = cfg.center_coef * jnp.square(chosen_B + rejected_B)
  counted_B = batch.weight > 0
  metrics = {
      "reward/loss": metrics_lib.Metric(
          total=(batch.weight * loss_B).sum(), count=batch.weight.sum()
      ),
      "reward/accuracy": metrics_lib.average(chosen_B > rejected_B, counted_B),
      "reward/score_chosen": metrics_lib.average(chosen_B, counted_B),
      "reward/score_rejected": metrics_lib.average(rejected_B, counted_B),
  }
  return (batch.weight * (loss_B + center_B)).sum() / total_weight, metrics


_RANKING_LOSSES = {
    "pairwise": preference.pairwise_ranking_loss,
    "plackett_luce": preference.plackett_luce_loss,
    "best_of_k": preference.best_of_k_loss,
}


def ranking_loss(
    score: Float[Array, "B K"], batch: RankingBatch, cfg: RewardConfig
) -> Float[Array, "B"]:
  """What each ranking costs, unreduced."""
  loss = _RANKING_LOSSES[cfg.ranking_loss]
  return loss(score, batch.ranks, batch.completion_valid)


def ranking_objective(
    params: Any,
    batch: RankingBatch,
    score_fn: ScoreFn,
    cfg: RewardConfig,
    total_weight: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
  """The batch's share of the weighted mean over prompts of `ranking_loss`."""
  score_BK = score_rows(params, batch, score_fn)
  loss_B = ranking_loss(score_BK, batch, cfg)
  valid_BK = batch.completion_valid.astype(jnp.float32)
  mean_B = (score_BK * valid_BK).sum(-1) / jnp.maximum(valid_BK.sum(-1), 1)
  # For K = 2 this is the pairs' squared sum, (chosen + rejected)^2.
  center_B = cfg.center_coef * jnp.square(2 * mean_B)
  ordered_BKK = (
      (batch.ranks[:, :, None] < batch.ranks[:, None, :])
      & batch.completion_valid[:, :, None]
      & batch.completion_valid[:, None, :]
      & (batch.weight > 0)[:, None, None]
  )
  right_BKK = score_BK[:, :, None] > score_BK[:, None, :]
  metrics = {
      "reward/loss": metrics_lib.Metric(
          total=(batch.weight * loss_B).sum(), count=batch.weight.sum()
      ),
      "reward/accuracy": metrics_lib.average(right_BKK, ordered_BKK),
  }
  return (batch.weight * (loss_B + center_B)).sum() / total_weight, metrics


def make_reward_update(
    score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns update(state, batch, cfg, frozen=None), also for rankings.

  frozen: what the model takes beside the params that are trained, a base under
    an adapter (`models/lora.py`).
  """

  def update(state, batch, cfg, frozen=None):
    frozen = {} if frozen is None else frozen
    total_weight = collectives.sum_over_devices(batch.weight.sum())
    total_weight = jnp.maximum(total_weight, jnp.float32(1e-6))
    is_ranking = isinstance(batch, RankingBatch)
    objective_fn = ranking_objective if is_ranking else reward_objective

    rngs_BK = gradient.dropout_rngs(frozen, state, batch.tokens.shape[:2])

    def objective(params, part):
      microbatch, rngs_BK = part
      rngs_N = jax.tree.map(lambda x: x.reshape(-1), rngs_BK)
      return objective_fn(
          frozen | params | rngs_N, microbatch, score_fn, cfg, total_weight
      )

    grads, metrics = gradient.accumulate_gradients(
        objective, state.params, (batch, rngs_BK), cfg.num_microbatches
    )
    return gradient.apply_gradients(state, grads, metrics, tx)

  return update


def fit_score_normalization(score: Float[Array, "N"]) -> ScoreNormalization:
  """The gain and bias that give these raw scores mean 0 and std 1.

  Args:
    score: raw scores of the reference policy's completions, N of at least 2.

  Raises:
    ValueError: if the scores are not finite or all equal, which means that the
      reward model did not train.
  """
  # In float64: the rounding of a float32 mean looks like a deviation.
  values = np.asarray(score, np.float64)
  mean, std = (
      (float(values.mean()), float(values.std()))
      if np.isfinite(values).all() and values.size
      else (float("nan"), float("nan"))
  )
  if not std > 1e-6:
    raise ValueError(
        "the reward model gives the reference policy's completions scores of "
        f"mean {mean} and standard deviation {std}: it has not learnt to tell "
        "them apart, so there is nothing to normalise"
    )
  return ScoreNormalization(
      gain=jnp.float32(1 / std), bias=jnp.float32(-mean / std)
  )
