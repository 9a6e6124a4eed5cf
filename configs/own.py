"""The whole pipeline on files of your own.

    python -m experiments.rlhf --config=configs/own.py:FOLDER \
        --workdir=runs/own

FOLDER holds

    text.txt               documents divided by blank lines: to pretrain on
    demonstrations.jsonl   {"prompt", "completion"} or {"messages"}
    comparisons.jsonl      {"prompt", "chosen", "rejected"}, or rankings

of which a tenth is held out. The model is that of configs/rlhf.py, 0.9 M
parameters with a tokenizer of its own, with 256 tokens of context; prompts are
those of the demonstrations. There is no judge: the report shows the reward
model's score, of which more is not always better.
"""

from ml_collections import ConfigDict

from configs import common, rlhf

MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH = 127, 64


def get_config(folder: str = "") -> ConfigDict:
  """Every stage; `folder` as above."""
  if not folder:
    raise ValueError("name the folder: --config=configs/own.py:FOLDER")
  text = common.source(f"text:{folder}/text.txt")
  demonstrations = common.source(f"{folder}/demonstrations.jsonl")
  comparisons = common.source(f"{folder}/comparisons.jsonl")
  some = common.source(f"{folder}/demonstrations.jsonl", limit=256)
  samples = common.samples(
      MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH, too_long="drop"
  )
  config = rlhf.get_config()
  with config.ignore_type():
    config.preferences = None

  config.pretrain.documents = config.pretrain.heldout_documents = text
  config.pretrain.model.max_length = 256
  config.sft.demonstrations = demonstrations
  config.sft.heldout_demonstrations = demonstrations
  for stage in (config.pretrain, config.sft):
    stage.train.sample_prompts = some
    stage.train.samples = samples
    stage.train.seq_len = 256
    stage.train.batch_size = 8

  config.reward.comparisons = config.reward.heldout = comparisons
  config.reward.max_prompt_length = MAX_PROMPT_LENGTH
  config.reward.max_completion_length = 128
  config.reward.too_long = "truncate_prompt_left"
  config.reward.normalize_on = some
  config.reward.samples = samples

  config.ppo.prompts = demonstrations
  config.ppo.heldout_prompts = some
  config.ppo.samples = samples
  config.ppo.judge = ""
  config.evaluate.prompts = some
  config.evaluate.samples = samples
  config.evaluate.judge = ""
  return config
