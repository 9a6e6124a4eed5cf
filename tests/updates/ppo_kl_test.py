"""What PPO says its KL is, it is: never negative, whichever estimator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import metrics as metrics_lib
from rlhf_jax.generation import decode
from rlhf_jax.models import functions
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.updates import ppo
from tests.models.small import random_tokens
from tests.updates import small

ROWS = 2048
# A policy that training has moved: most log-ratios are small, some are not.
POLICY = small.language_model_params()
REFERENCE = jax.tree.map(
    lambda x, y: np.float32(0.9) * x + np.float32(0.1) * y,
    POLICY,
    small.language_model_params(seed=5),
)
SAMPLING = dict(
    max_new_tokens=small.C,
    temperature=small.TEMPERATURE,
    eos_id=3,
    stop_ids=(2, 5, 7),
    stop_after=1,
)


@functools.cache
def _scored(**sampling):
  """(scored rollout, metrics) of ROWS completions; kl is the exact one."""
  lengths = np.random.default_rng(0).integers(1, small.P + 1, ROWS)
  prompt_mask = np.arange(small.P)[None] >= small.P - lengths[:, None]
  rollout = jax.jit(decode.make_generate(LanguageModel(small.CONFIG)))(
      POLICY,
      random_tokens(0, ROWS, small.P, vocab_size=small.V),
      jnp.asarray(prompt_mask, jnp.int32),
      jax.random.key(0),
      decode.SamplingConfig(**SAMPLING | sampling),
  )
  score_rollout = jax.jit(
      ppo.make_score_rollout(
          functions.make_policy_value(small.CONFIG, small.CONFIG),
          small.MODEL,
      )
  )
  return score_rollout(
      {"policy": POLICY, "value": small.scalar_params()},
      REFERENCE,
      rollout,
      jnp.zeros((ROWS,), jnp.float32),
      jnp.float32(0.1),
      ppo.PPOConfig(temperature=small.TEMPERATURE, kl_estimator="exact"),
  )


def _estimates(scored) -> dict[str, np.ndarray]:
  """Each episode's KL under each estimator, in float64."""
  mask = np.asarray(scored.rollout.completion_mask)
  difference = np.where(
      mask == 1,
      np.asarray(scored.old_logprobs, np.float64)
      - np.asarray(scored.ref_logprobs, np.float64),
      0.0,
  )
  return {
      "ppo/kl_k1": difference.sum(axis=1),
      "ppo/kl_k2": (difference**2 / 2).sum(axis=1),
      "ppo/kl_k3": (np.exp(-difference) - 1 + difference).sum(axis=1),
      "ppo/kl_exact": np.asarray(scored.kl, np.float64).sum(axis=1),
  }


def _standard_errors_from_exact(estimates, name) -> float:
  error = estimates[name] - estimates["ppo/kl_exact"]
  return error.mean() / (error.std() / np.sqrt(len(error)))


def test_kl_of_sampled_completions_is_not_negative_and_estimators_agree():
  scored, metrics = _scored()
  assert np.asarray(scored.kl).min() > -1e-6
  estimates = _estimates(scored)
  numbers = metrics_lib.compute(metrics)
  for name, episodes in estimates.items():
    np.testing.assert_allclose(
        numbers[name], episodes.mean(), rtol=1e-3, err_msg=name
    )
  exact = estimates["ppo/kl_exact"].mean()
  assert 0.05 < exact < 1
  # Unbiased: within what chance allows, and not by being noise.
  for name in ("ppo/kl_k1", "ppo/kl_k3"):
    assert abs(_standard_errors_from_exact(estimates, name)) < 4, name
    np.testing.assert_allclose(estimates[name].mean(), exact, rtol=0.15)


def test_kl_would_be_wrong_if_something_else_than_the_policy_sampled():
  # Why nothing that trains may cut the distribution: the log-probs that count
  # are the policy's own, so that such completions look far too likely.
  estimates = _estimates(_scored(top_k=3)[0])
  assert _standard_errors_from_exact(estimates, "ppo/kl_k1") > 6
