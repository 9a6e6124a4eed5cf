"""PPO's parts before the loop: where its value network starts."""

import dataclasses
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ppo as ppo_config
from experiments import ppo
from experiments.harness import (
    models,
    ppo_iteration,
    ppo_programs,
    value_network,
)
from experiments.harness.config import ConfigError, from_config
from rlhf_jax import device_mesh, optim
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.generation import engine
from rlhf_jax.models import functions
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.types import PromptBatch, ScoreNormalization
from rlhf_jax.updates.ppo import create_ppo_state
from tests.models.small import random_params, small_config
from tests.reference import transformer as reference

LENGTH = 7
POLICY_CONFIG = small_config(vocab_size=262)
# A reward model of another shape: a value network takes its own.
REWARD_CONFIG = small_config(vocab_size=262, num_layers=1, width=8)
TOKENIZER = Tokenizer.train_byte_level_bpe(["abc abc abd"] * 4, 262)
POLICY = models.Policy(
    config=POLICY_CONFIG,
    params=random_params(LanguageModel(POLICY_CONFIG)),
    tokenizer=TOKENIZER,
)
REWARD_MODEL = models.RewardModel(
    config=REWARD_CONFIG,
    params=random_params(ScalarModel(REWARD_CONFIG)),
    normalization=ScoreNormalization(
        gain=jnp.float32(2), bias=jnp.float32(-3)
    ),
    tokenizer=TOKENIZER,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 262, (1, LENGTH)))


def start(reward_model=REWARD_MODEL, **changes):
  """The value network's config and params, as `run` would make them."""
  settings = ppo_config.get_config("smoke")
  settings.update(changes)
  config = from_config(ppo.Config, settings)
  return value_network.init_value(
      config, POLICY, reward_model, jax.random.key(0)
  )


def values_of(value_config, params) -> np.ndarray:
  """The values of every position of TOKENS, as an update computes them."""
  model = functions.make_policy_value(POLICY_CONFIG, value_config)
  both = {"policy": POLICY.params, "value": params}
  tokens = TOKENS.astype(jnp.int32)
  _, values = model.hidden_and_values(
      both, tokens, jnp.ones_like(tokens), LENGTH
  )
  return np.asarray(values[0])


def hidden_of(config, trunk) -> np.ndarray:
  """Float64 hidden states of TOKENS, read off by an identity for a head."""
  config = dataclasses.replace(config, tie_head=False)
  params = {"trunk": trunk, "head": {"kernel": np.eye(config.width)}}
  return reference.forward(params, config, TOKENS[0])


def assert_same_trunk(params, wanted):
  jax.tree.map(np.testing.assert_array_equal, params["trunk"], wanted["trunk"])


def test_value_network_from_the_reward_model_starts_as_its_normalised_score():
  config, params = start(value_init="reward_model")
  assert config == REWARD_CONFIG
  assert_same_trunk(params, REWARD_MODEL.params)
  head = REWARD_MODEL.params["head"]
  raw = hidden_of(config, params["trunk"]) @ np.asarray(head["kernel"])
  raw = raw[:, 0] + float(head["bias"][0])
  np.testing.assert_allclose(
      values_of(config, params), 2 * raw - 3, atol=1e-4
  )


def test_value_network_from_the_policy_has_its_trunk_and_a_fresh_head():
  config, params = start(value_init="policy")
  assert config == POLICY_CONFIG
  assert_same_trunk(params, POLICY.params)
  assert np.std(params["head"]["kernel"]) > 0
  hidden = hidden_of(config, params["trunk"])
  np.testing.assert_allclose(
      values_of(config, params),
      (hidden @ np.asarray(params["head"]["kernel"]))[:, 0],
      atol=1e-4,
  )


def test_value_network_from_zero_says_zero_of_everything():
  config, params = start(value_init="zero")
  assert config == POLICY_CONFIG
  assert_same_trunk(params, POLICY.params)
  np.testing.assert_array_equal(values_of(config, params), np.zeros(LENGTH))


@pytest.mark.parametrize("value_init", ["policy", "zero"])
def test_shared_value_network_is_a_head_on_the_policys_own_trunk(value_init):
  config, params = start(value_network="shared", value_init=value_init)
  assert config is None
  assert params.keys() == {"kernel", "bias"}
  values = values_of(config, params)
  if value_init == "zero":
    np.testing.assert_array_equal(values, np.zeros(LENGTH))
  hidden = hidden_of(POLICY_CONFIG, POLICY.params["trunk"])
  np.testing.assert_allclose(
      values, (hidden @ np.asarray(params["kernel"]))[:, 0], atol=1e-4
  )


def test_value_network_cannot_start_from_a_model_that_reads_other_tokens():
  other = Tokenizer.train_byte_level_bpe(["the sum of 2 and 3"] * 4, 262)
  reward_model = dataclasses.replace(REWARD_MODEL, tokenizer=other)
  with pytest.raises(ConfigError, match="has another tokenizer"):
    start(reward_model, value_init="reward_model")
  assert start(reward_model, value_init="policy")[0] == POLICY_CONFIG


def test_slots_change_no_rollout():
  """Of one iteration: what the others train on is the same."""
  rollouts = []
  for num_slots in (0, 3):
    settings = ppo_config.get_config("smoke")
    settings.update(rollout_batch_size=8)
    settings.samples.update(
        max_prompt_length=LENGTH,
        max_completion_length=6,
        num_slots=num_slots,
        stop_tokens=tuple(string.ascii_letters + string.punctuation),
    )
    config = from_config(ppo.Config, settings)
    generate = config.samples.make_generate(POLICY_CONFIG)
    assert (generate.__module__ == engine.__name__) == (num_slots > 0)
    mesh = device_mesh.make_mesh(config.mesh)
    tx = optim.make_optimizer(config.optimizer, config.num_updates)
    state = create_ppo_state(
        {"policy": POLICY.params, "value": REWARD_MODEL.params},
        tx,
        jax.random.key(0),
        config.ppo,
    )
    programs = ppo_programs.make_programs(
        POLICY_CONFIG,
        POLICY_CONFIG,
        REWARD_CONFIG,
        tx,
        state,
        mesh,
        config.sharding,
        config.parallelism,
        generate,
    )
    tokens = np.random.default_rng(1).integers(0, 262, (8, LENGTH))
    prompts = PromptBatch(
        prompts=tokens.astype(np.int32),
        prompt_mask=np.ones((8, LENGTH), np.int32),
        index=np.arange(8, dtype=np.int32),
    )
    rollouts.append(
        programs.rollout(
            state,
            device_mesh.shard_rows(prompts, mesh),
            ppo_iteration.rollout_sampling(config, TOKENIZER),
            {},
        )
    )
  whole, by_slots = rollouts
  lengths = np.sum(whole.completion_mask, axis=1)
  assert lengths.min() < lengths.max()
  for name in ("prompts", "completions", "completion_mask", "ended"):
    np.testing.assert_array_equal(
        getattr(by_slots, name), getattr(whole, name)
    )
  np.testing.assert_allclose(by_slots.logprobs, whole.logprobs, atol=1e-4)
