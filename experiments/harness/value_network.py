"""What PPO trains at its start: the policy and its value network.

    separate    a ScalarModel of its own, from the reward model, the policy, or
                the policy under a head of zeros
    shared      a scalar head on the policy's trunk

With an adapter, both are adapters (and a head) on the policy's own weights.
"""

from typing import Any, Protocol

import jax

from experiments.harness import adapters, models
from experiments.harness.config import ConfigError
from experiments.harness.fingerprint import fingerprint
from rlhf_jax.models import heads, lora
from rlhf_jax.models.transformer import TransformerConfig


class StartConfig(Protocol):
  """The fields of PPO's config that say where it starts."""

  init_from: str
  reward_model: str
  value_network: str
  value_init: str
  lora: lora.LoraConfig


def init_params(
    config: StartConfig,
    policy: models.Policy,
    reward_model: models.RewardModel | None,
    rng: jax.Array,
) -> tuple[TransformerConfig | None, dict[str, Any], dict[str, Any]]:
  """(the value network's shape, what is trained, what is frozen beside it).

  Raises:
    ConfigError: see `init_value`, and if the value network is to start from a
      reward model that has no adapter on the policy's own weights.
  """
  if not config.lora.rank:
    value_config, value = init_value(config, policy, reward_model, rng)
    return value_config, {"policy": policy.params, "value": value}, {}
  rng_head, rng_policy, rng_value = jax.random.split(rng, 3)
  value_config, value = init_value(config, policy, reward_model, rng_head)
  if config.value_init == "reward_model":
    value = {**_adapter_of_reward_model(config, policy), "head": value["head"]}
  elif value_config is not None:
    adapter = adapters.init(config.lora, policy.params, rng_value)
    value = {**adapter, "head": value["head"]}
  adapter = adapters.init(config.lora, policy.params, rng_policy)
  frozen = adapters.freeze(config.lora, policy.params)
  return value_config, {"policy": adapter, "value": value}, frozen


def _adapter_of_reward_model(
    config: StartConfig, policy: models.Policy
) -> dict[str, Any]:
  try:
    found = adapters.load(models.expand(config.reward_model))
    same = found.base == fingerprint(policy.params["trunk"])
  except FileNotFoundError:
    same = False
  if not same:
    raise ConfigError(
        f"value_init='reward_model' with lora.rank={config.lora.rank}: "
        f"{config.reward_model} has no adapter on the weights of "
        f"{config.init_from}, which the value network is to share. Train it "
        "with lora from there, or take 'policy' or 'zero'"
    )
  # Its own alpha and rank may be others; there is one scale here.
  factor = found.config.scale / config.lora.scale
  return {"adapter": lora.rescale(found.params, factor)}


def init_value(
    config: StartConfig,
    policy: models.Policy,
    reward_model: models.RewardModel | None,
    rng: jax.Array,
) -> tuple[TransformerConfig | None, Any]:
  """The value network's shape (None: shares the policy's trunk) and params.

  Raises:
    ConfigError: if it is to start from a reward model with another tokenizer,
      which cannot read the policy's tokens.
  """
  zero_head = config.value_init == "zero"
  if config.value_network == "shared":
    width = policy.config.width
    return None, heads.scalar_head_init(rng, width, zero_head)
  if config.value_init != "reward_model":
    return policy.config, heads.scalar_from_language_model(
        policy.params, rng, policy.config, zero_head=zero_head
    )
  if reward_model.tokenizer.fingerprint != policy.tokenizer.fingerprint:
    raise ConfigError(
        "value_init='reward_model': the reward model has another tokenizer "
        "than the policy; take 'policy' or 'zero'"
    )
  # Values are predictions of normalised scores: the normalisation goes into
  # the head.
  gain, bias = reward_model.normalization.gain, reward_model.normalization.bias
  head = reward_model.params["head"]
  return reward_model.config, {
      "trunk": reward_model.params["trunk"],
      "head": {
          "kernel": head["kernel"] * gain,
          "bias": head["bias"] * gain + bias[None],
      },
  }
