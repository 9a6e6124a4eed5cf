"""Proximal policy optimisation of a language model against a score.

Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347),
as Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv
1909.08593), first applied it to language models and Huang et al., "The N+
Implementation Details of RLHF with PPO" (arXiv 2403.17031), reproduced it. One
iteration samples completions, scores them once, and takes several clipped
policy-gradient steps on them.

Defaults follow the N+ recipe. Where they differ: `kl_controller` may be
adaptive, as in Ziegler et al.; minibatches divide by one token count, so that
microbatches and devices change nothing (N+ averages each device's mean).

   1. One log-probability, from one function, at the sampling temperature, in
      float32: rollout, old, ref and new (1909.08593 divides logits by T; N+
      detail "logits / temperature").
   2. old_logprobs are recomputed by the forward pass that is differentiated, so
      the first ratio is 1. What the sampler said is compared: metric
      'ppo/rollout_logprob_gap'. With old_logprobs='rollout' they are the
      sampler's own, which saves a separate policy's pass over the rollout, and
      the head of a shared one; then 'ppo/first_ratio_gap' is how far the two
      differ, and nothing that needs the policy's logits is reported.
      Dropout does not exist here.
   3. A completion that never ended gets `missing_eos_score` instead of its
      score (N+, "EOS trick"; 1909.08593 for its truncation at a stop token,
      which here is `SamplingConfig.stop_ids` and `stop_after`).
   4. rewards = -kl_coef * kl at every token, + score at the last real token,
      found by index (1909.08593, equation 2). `kl_estimator`: k1, k2, k3
      (Schulman, "Approximating KL divergence", 2020) or exact over the
      vocabulary. All are reported, whichever is used (exact: see 2).
   5. kl_coef is fixed, or adapts so that the KL of a completion, in nats, meets
      `kl_target` (1909.08593, section 2.2); it is part of the state.
   6. Rewards may be whitened keeping their mean; advantages are whitened; both
      over all real tokens of the rollout, with biased variance (1909.08593's
      code). Before minibatches are drawn, as N+ does.
   7. GAE (1506.02438), gamma 1 and lambda 0.95; the value after the last real
      token is 0.
   8. Clipped surrogate (1707.06347, equation 7) and clipped value loss
      (1909.08593's code), both averaged over the minibatch's real tokens.
   9. The value network is separate or shares the policy's trunk: the params are
      {'policy', 'value'} and `PolicyValueFns` knows which.
  10. Entropy bonus (off by default) and PTX: ptx_coef times the language-model
      loss on pretraining text (InstructGPT, 2203.02155, equation 2), one slice
      of `ptx` for every minibatch; every epoch sees the same slices again.
  11. num_epochs passes over the rollout, each over a new permutation in
      num_minibatches; microbatches accumulate exactly.
  12. Once a minibatch's KL from the old policy exceeds `max_update_kl`, the
      rest of the update is skipped (OpenAI Spinning Up, "early stopping"; there
      the minibatch that exceeds is not applied, here it still is).
  13. The head sees completion positions alone, some at a time; log-probs,
      entropy and exact KL come out of the same pass (`losses/chunking.py`).
  14. A rollout may be one iteration old, sampled while the one before it was
      scored. Then old_logprobs are not the sampler's: they bound the step, and
      the loss of each token is weighed by old over sampling probability, cut
      off at `importance_cap` (Hilton et al., 2110.00641, the decoupled
      objective, equation 3; cut off as in Espeholt et al., 1802.01561).
  15. Adam's epsilon 1e-5, its placement and the linear decay: `optim.py` (N+,
      "Adam's epsilon"; TensorFlow's placement is optional).

rollout -> score_rollout -> [epochs x minibatches: objective -> step] -> kl_coef
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from rlhf_jax import collectives
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.losses import (
  chunking,
  language_modeling,
  masking,
  policy_gradient,
  value,
)
from rlhf_jax.losses import kl as kl_lib
from rlhf_jax.losses import returns as returns_lib
from rlhf_jax.metrics import Metrics
from rlhf_jax.models import functions
from rlhf_jax.models.functions import LanguageModelFns, PolicyValueFns
from rlhf_jax.train_state import TrainState, create_train_state
from rlhf_jax.types import (
  LMBatch,
  Rollout,
  ScoredRollout,
  pytree_dataclass,
  static,
)
from rlhf_jax.updates import gradient


@pytree_dataclass
class PPOConfig:
  """Coefficients are data, the rest is structure (see `types.static`).

  temperature: of the sampling distribution and so of every log-prob.
  old_logprobs: see 2 above.
  kl_coef: beta; with the adaptive controller, where it starts.
  kl_target: nats a completion; kl_horizon: episodes (adaptive only).
  missing_eos_score: what a completion that never ended scores, if
    replace_missing_eos.
  max_update_kl: nats a token (k3, new policy from old), infinite is off.
  importance_correction: for rollouts of an older policy, see 14 above, or of
    weights rounded to int8; importance_cap: the largest weight of a token.
  num_microbatches: memory only, in scoring and in each minibatch.
  """

  temperature: float = 0.7
  old_logprobs: Literal["recompute", "rollout"] = static("recompute")
  kl_estimator: Literal["k1", "k2", "k3", "exact"] = static("k1")
  kl_controller: Literal["fixed", "adaptive"] = static("fixed")
  kl_coef: float = 0.05
  kl_target: float = 6.0
  kl_horizon: float = 10_000.0
  replace_missing_eos: bool = static(True)
  missing_eos_score: float = -1.0
  whiten_rewards: bool = static(False)
  whiten_advantages: bool = static(True)
  gamma: float = 1.0
  gae_lambda: float = 0.95
  cliprange: float = 0.2
  cliprange_value: float = 0.2
  vf_coef: float = 0.1
  entropy_coef: float = 0.0
  ptx_coef: float = 0.0
  max_update_kl: float = float("inf")
  importance_correction: bool = static(False)
  importance_cap: float = 2.0
  num_epochs: int = static(4)
  num_minibatches: int = static(1)
  num_microbatches: int = static(1)


@pytree_dataclass
class PPOState:
  """train.params is {'policy', 'value'}; iteration counts rollouts.

  Under adapters these are {'policy': {'adapter'}, 'value': {'adapter', 'head'}}
  and one frozen base serves both, and the reference policy without any.

  pending: the rollout that the next iteration is to train on, where one is
    sampled ahead; else None.
  """

  train: TrainState
  kl_coef: Float[Array, ""]
  iteration: Int[Array, ""]
  pending: Rollout | None = None


def create_ppo_state(
    params: dict[str, Any],
    tx: optax.GradientTransformation,
    rng: jax.Array,
    cfg: PPOConfig,
) -> PPOState:
  """The state before the first iteration."""
  return PPOState(
      train=create_train_state(params, tx, rng),
      kl_coef=jnp.asarray(cfg.kl_coef, jnp.float32),
      iteration=jnp.zeros((), jnp.int32),
  )


def iteration_rng(state: PPOState, ahead: int = 0) -> jax.Array:
  """An iteration's key: fold_in 0 is the rollout's, 1 the update's.

  Args:
    ahead: of the iteration that comes so many after this one.
  """
  return jax.random.fold_in(state.train.rng, state.iteration + ahead)


def hidden_and_values(
    model: PolicyValueFns, params: Any, rollout: Rollout
) -> tuple[Float[Array, "B C D"], Float[Array, "B C"]]:
  """Of the positions P-1 .. P+C-2, each before a completion token."""
  last = rollout.completions.shape[1] + 1
  hidden, values = model.hidden_and_values(
      params, *functions.whole_sequence(rollout), last
  )
  return hidden[:, :-1], values[:, :-1]


def measure_rollout(
    model: PolicyValueFns,
    ref_model: LanguageModelFns,
    params: Any,
    ref_params: Any,
    rollout: Rollout,
    ref_hidden: Float[Array, "B C D"] | None,
    cfg: PPOConfig,
) -> dict[str, Float[Array, "B C"]]:
  """What policy, value network and reference policy make of each token.

  logprobs, ref_logprobs, values, and the KL between the two, k1, k2 and k3;
  with the policy's logits at hand also the exact KL and the entropy.
  """
  hidden, values = hidden_and_values(model, params, rollout)
  if ref_hidden is None:
    ref_hidden = functions.completion_hidden(ref_model, ref_params, rollout)
  logits_of, ref_logits_of = model.head(params), ref_model.head(ref_params)
  at = dict(temperature=cfg.temperature)

  def measure_both(ids, ref_hidden, hidden):
    logits, ref_logits = logits_of(hidden), ref_logits_of(ref_hidden)
    return {
        "logprobs": language_modeling.selected_logprobs(logits, ids, **at),
        "ref_logprobs": language_modeling.selected_logprobs(
            ref_logits, ids, **at
        ),
        "exact": kl_lib.kl_exact(logits, ref_logits, **at),
        "entropy": language_modeling.entropy(logits, **at),
    }

  def measure_reference(ids, ref_hidden):
    ref_logits = ref_logits_of(ref_hidden)
    return {
        "ref_logprobs": language_modeling.selected_logprobs(
            ref_logits, ids, **at
        )
    }

  measured = {"logprobs": rollout.logprobs, "values": values}
  inputs = (rollout.completions, ref_hidden)
  recompute = cfg.old_logprobs == "recompute"
  # Without it nothing reads the policy's hidden states, and the compiler drops
  # what only they needed: a separate policy's whole pass.
  measured |= chunking.map_positions(
      measure_both if recompute else measure_reference,
      (*inputs, hidden) if recompute else inputs,
      rollout.completion_mask,
      chunk_size=model.chunk_size,
  )
  pair = measured["logprobs"], measured["ref_logprobs"]
  return measured | {
      "k1": kl_lib.kl_k1(*pair),
      "k2": kl_lib.kl_k2(*pair),
      "k3": kl_lib.kl_k3(*pair),
  }


def make_score_rollout(
    model: PolicyValueFns, ref_model: LanguageModelFns
) -> Callable[..., tuple[ScoredRollout, Metrics]]:
  """Returns score_rollout(params, ref_params, rollout, score, kl_coef, cfg).

  It takes `ref_hidden` too, the reference policy's `completion_hidden`, where
  that has run on devices of its own; ref_params is then its head alone.
  """

  def score_rollout(
      params, ref_params, rollout, score, kl_coef, cfg, ref_hidden=None
  ):
    mask = rollout.completion_mask
    measured = gradient.map_microbatches(
        lambda part: measure_rollout(
            model, ref_model, params, ref_params, *part, cfg
        ),
        (rollout, ref_hidden),
        cfg.num_microbatches,
    )
    logprobs, values = measured["logprobs"], measured["values"]
    raw_score = score
    if cfg.replace_missing_eos:
      score = jnp.where(
          rollout.ended, score, jnp.asarray(cfg.missing_eos_score, jnp.float32)
      )
    kl = jnp.where(mask == 1, measured[cfg.kl_estimator], jnp.float32(0))
    position = jnp.arange(mask.shape[1])[None]
    at_end = position == masking.last_index(mask)[:, None]
    rewards = -kl_coef * kl + jnp.where(at_end, score[:, None], jnp.float32(0))
    unwhitened = rewards
    if cfg.whiten_rewards:
      rewards = masking.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = returns_lib.generalized_advantage_estimation(
        rewards, values, mask, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda
    )
    residual = masking.masked_var(returns - values, mask)
    spread = jnp.maximum(masking.masked_var(returns, mask), jnp.float32(1e-8))
    if cfg.whiten_advantages:
      advantages = masking.masked_whiten(advantages, mask)
    per_episode = lambda x: metrics_lib.average(
        masking.masked_sum(x, mask, axis=1)
    )
    metrics = {
        "ppo/score": metrics_lib.average(raw_score),
        "ppo/score_after_eos_rule": metrics_lib.average(score),
        "ppo/reward_sum": per_episode(unwhitened),
        "ppo/kl": per_episode(kl),
        "ppo/kl_k1": per_episode(measured["k1"]),
        "ppo/kl_k2": per_episode(measured["k2"]),
        "ppo/kl_k3": per_episode(measured["k3"]),
        "ppo/completion_length": metrics_lib.average(mask.sum(axis=1)),
        "ppo/ended": metrics_lib.average(rollout.ended),
        "ppo/value": metrics_lib.average(values, mask),
    }
    if cfg.old_logprobs == "recompute":
      gap = jnp.abs(logprobs - rollout.logprobs)
      importance = policy_gradient.truncated_importance_weight(
          logprobs, rollout.logprobs, cap=cfg.importance_cap
      )
      metrics |= {
          "ppo/kl_exact": per_episode(measured["exact"]),
          "ppo/entropy": metrics_lib.average(measured["entropy"], mask),
          "ppo/rollout_logprob_gap": metrics_lib.average(gap, mask),
          "ppo/importance_weight": metrics_lib.average(importance, mask),
      }
    metrics = collectives.sum_over_devices(metrics) | {
        "ppo/kl_coef": metrics_lib.scalar(kl_coef),
        "ppo/explained_variance": metrics_lib.scalar(1 - residual / spread),
    }
    scored = ScoredRollout(
        rollout=rollout,
        score=score,
        old_logprobs=logprobs,
        ref_logprobs=measured["ref_logprobs"],
        values=values,
        kl=kl,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )
    return scored, metrics

  return score_rollout


def ppo_objective(
    params: Any,
    batch: ScoredRollout,
    model: PolicyValueFns,
    cfg: PPOConfig,
    num_tokens: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
  """The batch's share of the mean loss over the minibatch's `num_tokens`."""
  mask = batch.rollout.completion_mask
  hidden, values = hidden_and_values(model, params, batch.rollout)

  logits_of = model.head(params)

  def measure(hidden, ids):
    logits = logits_of(hidden)
    at = dict(temperature=cfg.temperature)
    return (
        language_modeling.selected_logprobs(logits, ids, **at),
        language_modeling.entropy(logits, **at),
    )

  logprobs, entropy = chunking.map_positions(
      measure,
      (hidden, batch.rollout.completions),
      mask,
      chunk_size=model.chunk_size,
  )
  policy_loss = policy_gradient.clipped_surrogate_loss(
      logprobs, batch.old_logprobs, batch.advantages, cliprange=cfg.cliprange
  )
  if cfg.importance_correction:
    policy_loss *= policy_gradient.truncated_importance_weight(
        batch.old_logprobs, batch.rollout.logprobs, cap=cfg.importance_cap
    )
  value_loss = value.clipped_value_loss(
      values,
      batch.values,
      batch.returns,
      cliprange_value=cfg.cliprange_value,
  )
  loss = policy_loss + cfg.vf_coef * value_loss - cfg.entropy_coef * entropy

  ratio = jnp.exp(jnp.where(mask == 1, logprobs - batch.old_logprobs, 0.0))
  clipped = jnp.abs(ratio - 1) > cfg.cliprange
  value_clipped = jnp.abs(values - batch.values) > cfg.cliprange_value
  mean = lambda x: metrics_lib.average(x, mask)
  metrics = {
      "ppo/policy_loss": mean(policy_loss),
      "ppo/value_loss": mean(value_loss),
      "ppo/clip_fraction": mean(clipped),
      "ppo/value_clip_fraction": mean(value_clipped),
      "ppo/ratio": mean(ratio),
      "ppo/ratio_gap": mean(jnp.abs(ratio - 1)),
      "ppo/update_kl": mean(kl_lib.kl_k3(batch.old_logprobs, logprobs)),
  }
  return masking.masked_sum(loss, mask) / num_tokens, metrics


def ptx_objective(
    params: Any,
    batch: LMBatch,
    model: PolicyValueFns,
    num_targets: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
  """The batch's share of the mean language-model loss over `num_targets`."""
  hidden, _ = model.hidden_and_values(
      params, batch.tokens, batch.segment_ids, batch.tokens.shape[1]
  )
  mask = batch.loss_mask[:, 1:]

  logits_of = model.head(params)

  def measure(hidden, ids):
    logits = logits_of(hidden)
    return -language_modeling.selected_logprobs(logits, ids)

  loss = chunking.map_positions(
      measure,
      language_modeling.predictions_and_targets(hidden, batch.tokens),
      mask,
      chunk_size=model.chunk_size,
  )
  metrics = {"ppo/ptx_loss": metrics_lib.average(loss, mask)}
  return masking.masked_sum(loss, mask) / num_targets, metrics


def make_ppo_update(
    model: PolicyValueFns, tx: optax.GradientTransformation
) -> Callable[..., tuple[PPOState, Metrics]]:
  """Returns update(state, scored, ptx, cfg, frozen=None).

  ptx: an LMBatch or None.
  frozen: what the models take beside the params that are trained, a base under
    adapters (`models/lora.py`).

  Raises (when traced):
    ValueError: if the rollout does not divide into the minibatches or these
      into the microbatches; if `frozen` asks for dropout, under which
      log-probs are no function of the params.
  """

  def minibatch_step(train, minibatch, cfg, frozen):
    scored, ptx = minibatch
    num_tokens = collectives.sum_over_devices(
        scored.rollout.completion_mask.sum().astype(jnp.float32)
    )
    num_targets = None
    if ptx is not None:
      num_targets = collectives.sum_over_devices(ptx.loss_mask[:, 1:].sum())
      num_targets = jnp.maximum(num_targets, 1)

    def objective(params, microbatch):
      scored, ptx = microbatch
      params = frozen | params
      loss, metrics = ppo_objective(
          params, scored, model, cfg, num_tokens
      )
      if ptx is None:
        return loss, metrics
      ptx_loss, ptx_metrics = ptx_objective(
          params, ptx, model, num_targets
      )
      return loss + cfg.ptx_coef * ptx_loss, metrics | ptx_metrics

    grads, metrics = gradient.accumulate_gradients(
        objective, train.params, minibatch, cfg.num_microbatches
    )
    return gradient.apply_gradients(train, grads, metrics, tx)

  def update(state, scored, ptx, cfg, frozen=None):
    frozen = {} if frozen is None else frozen
    if "adapter_dropout" in frozen:
      raise ValueError("PPO takes no adapter_dropout: train it without")
    rng = jax.random.fold_in(iteration_rng(state), 1)
    # A device's own rows become those that the permutation gives it.
    scored = collectives.gather_rows(scored)
    num_rows = scored.score.shape[0]
    ptx_parts = gradient.split_rows(ptx, cfg.num_minibatches)

    def one_minibatch(carry, xs):
      train, stopped = carry
      run = lambda: minibatch_step(train, xs, cfg, frozen)
      nothing = lambda: (
          train,
          jax.tree.map(
              lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run)[1]
          ),
      )
      train, metrics = jax.lax.cond(stopped, nothing, run)
      update_kl = metrics["ppo/update_kl"]
      stopped |= update_kl.total > cfg.max_update_kl * update_kl.count
      return (train, stopped), metrics

    def one_epoch(carry, rng_epoch):
      order = collectives.own_rows(jax.random.permutation(rng_epoch, num_rows))
      shuffled = jax.tree.map(lambda x: x[order], scored)
      parts = gradient.split_rows(shuffled, cfg.num_minibatches)
      return jax.lax.scan(one_minibatch, carry, (parts, ptx_parts))

    (train, stopped), metrics = jax.lax.scan(
        one_epoch,
        (state.train, jnp.zeros((), bool)),
        jax.random.split(rng, cfg.num_epochs),
    )
    first = jax.tree.map(lambda x: x[0, 0], metrics["ppo/ratio_gap"])
    metrics = metrics_lib.combine(metrics_lib.combine(metrics))
    metrics["ppo/first_ratio_gap"] = first
    metrics["ppo/stopped_early"] = metrics_lib.scalar(stopped)

    kl_coef = state.kl_coef
    if cfg.kl_controller == "adaptive":
      mean_kl = scored.kl.sum(axis=1).mean()
      kl_coef = kl_lib.adaptive_kl_coef(
          kl_coef,
          # A rollout that is not finite must not break the controller too.
          jnp.where(jnp.isfinite(mean_kl), mean_kl, cfg.kl_target),
          target=cfg.kl_target,
          horizon=cfg.kl_horizon,
          num_episodes=num_rows,
      )
    new_state = PPOState(
        train=train,
        kl_coef=kl_coef,
        iteration=state.iteration + 1,
        pending=state.pending,
    )
    return new_state, metrics

  return update
