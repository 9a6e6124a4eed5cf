"""Stages on real input: a pretrained story model made to write happier stories.

The stages of `configs/rlhf.py:stories`; see there for what it does. The
environment variable RLHF_JAX_DATA names the folder with stories260K/,
tinystories_fragment/ and sentence_polarity/.

    python -m experiments.rlhf --config=configs/rlhf.py:stories \
        --workdir=runs/stories
"""

from ml_collections import ConfigDict

from configs import common, evaluate, ppo, reward, sft

DATA = "${RLHF_JAX_DATA}"
BASE = (
    f"llama2c:{DATA}/stories260K/stories260K.bin"
    f":{DATA}/stories260K/tok512.model"
)
STORIES = f"stories:{DATA}/tinystories_fragment/tiny_stories.txt"
POLARITY = f"polarity:{DATA}/sentence_polarity/sentence_polarity.zip"


def samples() -> ConfigDict:
  """An opening sentence and its continuation, cut at the first full stop after
  16 tokens (Ziegler et al., arXiv 1909.08593, section 3.1)."""
  return common.samples(
      max_prompt_length=96,
      max_completion_length=48,
      temperature=0.7,
      stop_tokens=(".",),
      stop_after=16,
      too_long="drop",
  )


def sft_config() -> ConfigDict:
  """A pass over the stories' text."""
  config = sft.get_config()
  config.init_from = BASE
  config.demonstrations = common.source(STORIES)
  config.heldout_demonstrations = common.source(STORIES)
  config.train.batch_size = 8
  config.train.seq_len = 512
  config.train.optimizer = common.optimizer(
      3e-4, schedule="cosine", warmup_steps=5
  )
  config.train.loop = common.loop(
      60, best_metric="eval/loss", best_mode="min"
  )
  config.train.samples = samples()
  config.train.sample_prompts = common.source(STORIES, 12)
  return config


def reward_config(init_from: str, half: int) -> ConfigDict:
  """Positive film sentences over negative ones; one half of the sentences."""
  config = reward.get_config()
  config.seed = half
  config.init_from = init_from
  config.ref_policy = "runs/first/sft"
  config.comparisons = common.source(f"{POLARITY}:{half}")
  config.heldout = common.source(f"{POLARITY}:{half}")
  config.max_prompt_length = 1  # the start token
  config.max_completion_length = 160
  config.batch_size = 32
  config.optimizer = common.optimizer(
      1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1
  )
  config.loop = common.loop(200, best_metric="eval/accuracy")
  config.normalize_on = common.source(STORIES, 256)
  config.samples = samples()
  return config


def ppo_config() -> ConfigDict:
  """Continuations judged by a classifier that training never sees."""
  config = ppo.get_config()
  config.prompts = common.source(STORIES)
  config.heldout_prompts = common.source(STORIES, 100)
  config.optimizer = common.optimizer(1e-4, schedule="linear", epsilon=1e-5)
  config.ppo.temperature = 0.7
  config.loop = common.loop(
      50,
      log_every=1,
      eval_every=10,
      checkpoint_every=20,
      best_metric="eval/score",
  )
  config.samples = samples()
  config.judge = "reward_model:runs/first/judge"
  return config


def evaluate_config() -> ConfigDict:
  """The pretrained model, the fine-tuned one and the happier one."""
  config = evaluate.get_config()
  config.policies = (
      f"base={BASE}",
      "sft=runs/first/sft",
      "ppo=runs/first/ppo",
  )
  config.judge = "reward_model:runs/first/judge"
  config.prompts = common.source(STORIES, 100)
  config.samples = samples()
  config.batch_size = 100
  return config


def get_config(arg: str = common.FULL) -> ConfigDict:
  """Every stage, in runs/first."""
  common.check_arg(arg, common.FULL)
  return ConfigDict(
      dict(
          pretrain=None,
          sft=sft_config(),
          preferences=None,
          reward=reward_config("runs/first/sft", half=0),
          judge=reward_config(BASE, half=1),
          ppo=ppo_config(),
          evaluate=evaluate_config(),
      )
  )
