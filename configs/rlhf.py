"""The whole pipeline on the embedded domain.

    python -m experiments.rlhf --config=configs/rlhf.py --workdir=runs/first

6 minutes and 1.5 GiB on 2 cores of an Intel Xeon. Expect a true reward of 0.07
(base), 0.52 (SFT) and 0.68 (PPO), means of five seeds whose intervals are in
the README, and a KL within the controller's target of 1.5 nats.

:smoke runs every stage in about a minute and learns nothing.

:hacking takes the KL penalty away and trains for longer, so that the policy
learns to please the reward model and not the truth. Expect the true reward 0.3
below that of SFT at a score of 1.3 (five seeds). 3 minutes more:

    python -m experiments.rlhf --config=configs/rlhf.py:hacking \
        --reuse=runs/first --workdir=runs/hacking

:stories is the same on real input, with RLHF_JAX_DATA set to the folder of the
data: a story model that was pretrained elsewhere, fine-tuned on stories; a
reward model from film sentences, positive preferred to negative; PPO that makes
continuations of stories happier; judged by a second reward model, trained from
the base model on other sentences, that PPO never sees.

:lora has adapters of rank 8 in SFT, reward model and PPO, at three times the
learning rates. Expect a true reward of 0.45 (SFT) and 0.63 (PPO), three seeds.

Each takes a seed: configs/rlhf.py:full,seed=3.
"""

from ml_collections import ConfigDict

from configs import (
    common,
    evaluate,
    ppo,
    preferences,
    pretrain,
    reward,
    sft,
    stories,
)


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, smoke, hacking, lora or stories; with a seed or 0."""
  arg, seed = common.parse_seed(arg)
  common.check_arg(
      arg, common.FULL, common.SMOKE, "hacking", "lora", "stories"
  )
  if arg == "stories":
    config = stories.get_config()
  else:
    size = common.SMOKE if arg == common.SMOKE else common.FULL
    config = ConfigDict(
        dict(
            pretrain=pretrain.get_config(size),
            sft=sft.get_config(size),
            preferences=preferences.get_config(size),
            reward=reward.get_config(size),
            judge=None,
            ppo=ppo.get_config("hacking" if arg == "hacking" else size),
            evaluate=evaluate.get_config(size),
        )
    )
    if arg == "hacking":
      config.evaluate.kl_target = 0.0
    if arg == "lora":
      _adapted(config)
  return ConfigDict(_in_run(_seeded(config.to_dict(), seed)))


def _adapted(config: ConfigDict) -> None:
  """Adapters where there were weights; they take larger steps."""
  for stage in (config.sft, config.reward, config.ppo):
    stage.lora = common.lora(rank=8)
  for optimizer in (
      config.sft.train.optimizer,
      config.reward.optimizer,
      config.ppo.optimizer,
  ):
    optimizer.learning_rate *= 3


def _seeded(value, seed: int):
  """Every stage's seed, moved by `seed`."""
  if not isinstance(value, dict):
    return value
  return {
      name: item + seed if name == "seed" else _seeded(item, seed)
      for name, item in value.items()
  }


def _in_run(value):
  """Places in runs/first, made into places in whichever run this is."""
  if isinstance(value, dict):
    return {name: _in_run(item) for name, item in value.items()}
  if isinstance(value, tuple):
    return tuple(_in_run(item) for item in value)
  if isinstance(value, str):
    return value.replace("runs/first/", "@run/")
  return value
