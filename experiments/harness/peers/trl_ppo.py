"""An iteration of TRL's PPO trainer, which its releases up to 1.12.0 have.

As many optimizer steps as ours: a minibatch is one of them, in one piece.
"""

import importlib
from typing import Any

import datasets
import trl

from experiments.harness.peers import torch_models, trl_data
from experiments.harness.peers.trl_data import WaitAtStep
from experiments.harness.peers.turns import Loop


def make(argument: str, job: dict[str, Any]) -> Loop:
  """'ppo': rollout, scores and all epochs a turn."""
  if argument != "ppo":
    raise ValueError(f"trl_ppo knows ppo, not {argument!r}")
  # It moved to `experimental` on its way out.
  home = trl
  if not hasattr(trl, "PPOTrainer"):
    home = importlib.import_module("trl.experimental.ppo")
  num_turns = job["warmups"] + job["repeats"] + 2
  num = job["num_prompts"]
  tokenizer = trl_data.tokenizer(job)
  rows = trl_data.rows(job, num, job["prompt_length"])
  trainer = home.PPOTrainer(
      args=home.PPOConfig(
          **trl_data.arguments(job, num),
          num_mini_batches=job["num_minibatches"],
          num_ppo_epochs=job["num_epochs"],
          total_episodes=num * num_turns,
          local_rollout_forward_batch_size=num,
          num_sample_generations=0,
          response_length=job["completion_length"],
          temperature=job["temperature"],
          kl_coef=job["kl_coef"],
      ),
      processing_class=tokenizer,
      model=torch_models.language_model(job, "float32"),
      ref_model=torch_models.language_model(job),
      reward_model=torch_models.scalar_model(job),
      value_model=torch_models.scalar_model(job, "float32"),
      train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
      eval_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
  )
  loop = Loop("ppo", trainer.train, torch_models.wait)
  # It tells no beginnings: the first turn is the second iteration.
  trainer.add_callback(WaitAtStep(loop.wait, at_end=True))
  return loop
