"""Steps of TRL's SFT, reward and DPO trainers, in their own loops."""

from typing import Any

import datasets
import trl

from experiments.harness.peers import torch_models, trl_data
from experiments.harness.peers.trl_data import WaitAtStep
from experiments.harness.peers.turns import Loop


def make(argument: str, job: dict[str, Any]) -> Loop:
  """'sft', 'reward' or 'dpo': one optimizer step a turn."""
  makers = {"sft": _sft, "reward": _reward, "dpo": _dpo}
  trainer = makers[argument](job)
  loop = Loop(argument, trainer.train, torch_models.wait)
  trainer.add_callback(WaitAtStep(loop.wait))
  return loop


def _num_steps(job: dict[str, Any]) -> int:
  # The loop waits at the beginning of the step after the last.
  return job["warmups"] + job["repeats"] + 2


def _length(job: dict[str, Any]) -> int:
  return job["prompt_length"] + job["completion_length"]


def _sft(job: dict[str, Any]) -> trl.SFTTrainer:
  steps = _num_steps(job)
  rows = trl_data.rows(job, job["batch_size"] * steps, _length(job))
  return trl.SFTTrainer(
      model=torch_models.language_model(job, "float32"),
      args=trl.SFTConfig(
          **trl_data.arguments(job, job["batch_size"]),
          max_steps=steps,
          max_length=_length(job),
      ),
      train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
      processing_class=trl_data.tokenizer(job),
  )


def _reward(job: dict[str, Any]) -> trl.RewardTrainer:
  steps, num = _num_steps(job), job["num_pairs"]
  rows = trl_data.rows(job, 2 * num * steps, _length(job))
  return trl.RewardTrainer(
      model=torch_models.scalar_model(job, "float32"),
      args=trl.RewardConfig(
          **trl_data.arguments(job, num),
          max_steps=steps,
          max_length=_length(job),
      ),
      train_dataset=datasets.Dataset.from_dict(
          {"chosen_ids": rows[::2], "rejected_ids": rows[1::2]}
      ),
      processing_class=trl_data.tokenizer(job),
  )


def _dpo(job: dict[str, Any]) -> trl.DPOTrainer:
  steps, num = _num_steps(job), job["num_pairs"]
  prompts = trl_data.rows(job, num * steps, job["prompt_length"])
  # The trainer puts the end token behind.
  answers = trl_data.rows(
      job, 2 * num * steps, job["completion_length"] - 1
  )
  end = " " + str(job["model"]["vocab_size"] - 2)
  text = lambda rows: [" " + trl_data.words(x) + end for x in rows]
  return trl.DPOTrainer(
      model=torch_models.language_model(job, "float32"),
      ref_model=torch_models.language_model(job),
      args=trl.DPOConfig(
          **trl_data.arguments(job, num),
          max_steps=steps,
          max_length=_length(job),
      ),
      train_dataset=datasets.Dataset.from_dict({
          "prompt": [trl_data.words(x) for x in prompts],
          "chosen": text(answers[::2]),
          "rejected": text(answers[1::2]),
      }),
      processing_class=trl_data.tokenizer(job),
  )
