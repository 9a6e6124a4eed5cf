"""PPO that stops and starts again: everything that it needs is in its state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, optim
from rlhf_jax.updates import ppo
from tests.updates import tables
from tests.updates.small import assert_trees_equal

TX = optim.make_optimizer(
    optim.OptimizerConfig(learning_rate=0.1, schedule="linear"), 100
)
CFG = ppo.PPOConfig(
    temperature=1.0,
    kl_controller="adaptive",
    kl_target=0.1,
    kl_horizon=20.0,
    num_minibatches=2,
)
SCORE = jnp.asarray([2.0, -1.0, 4.0, 0.5], jnp.float32)
_, REF_TABLE = tables.random_tables()

score_rollout = jax.jit(
    ppo.make_score_rollout(tables.MODEL, tables.REF_MODEL)
)
update = jax.jit(ppo.make_ppo_update(tables.MODEL, TX))


def _fresh(seed=0):
  params, _ = tables.random_tables(seed)
  return ppo.create_ppo_state(params, TX, jax.random.key(seed), CFG)


def _train(state, num_iterations=2):
  for _ in range(num_iterations):
    scored, _ = score_rollout(
        state.train.params,
        REF_TABLE,
        tables.make_rollout(int(state.iteration)),
        SCORE,
        state.kl_coef,
        CFG,
    )
    state, _ = update(state, scored, None, CFG)
  return state


def _with(state, part, source):
  """`state` with one part of it taken from another."""
  if part in ("kl_coef", "iteration"):
    return dataclasses.replace(state, **{part: getattr(source, part)})
  train = state.train
  if part in ("policy", "value"):
    params = train.params | {part: source.train.params[part]}
    train = dataclasses.replace(train, params=params)
  else:
    part_of_source = getattr(source.train, part)
    train = dataclasses.replace(train, **{part: part_of_source})
  return dataclasses.replace(state, train=train)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
  """(what a new process restores after two iterations, what it must become)."""
  folder = tmp_path_factory.mktemp("ppo")
  stopped = _train(_fresh())
  with checkpoint.Checkpointer(folder, keep_last=1, config={}) as saved:
    saved.save(2, stopped, {})
  with checkpoint.Checkpointer(folder, keep_last=1, config={}) as saved:
    step, restored, _ = saved.restore_latest(_fresh(seed=9))
  assert step == 2
  return restored, _train(stopped)


def _data(state):
  """The state with its key as numbers, which can be compared."""
  rng = jax.random.key_data(state.train.rng)
  train = dataclasses.replace(state.train, rng=rng)
  return dataclasses.replace(state, train=train)


def test_ppo_resumes_with_its_value_network_optimizer_and_controller(resumed):
  restored, expected = resumed
  assert_trees_equal(_data(_train(restored)), _data(expected))
  for name in ("policy", "value"):
    moved = expected.train.params[name] != restored.train.params[name]
    assert np.asarray(moved).any()


@pytest.mark.parametrize(
    "part", ["policy", "value", "opt_state", "rng", "kl_coef", "iteration"]
)
def test_ppo_that_lost_a_part_of_its_state_would_end_elsewhere(resumed, part):
  restored, expected = resumed
  found = _train(_with(restored, part, _fresh(seed=9)))
  same = [
      np.array_equal(x, y)
      for x, y in zip(
          jax.tree.leaves(found.train.params),
          jax.tree.leaves(expected.train.params),
          strict=True,
      )
  ]
  assert not all(same)
