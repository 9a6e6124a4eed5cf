"""An iteration of TRL's GRPO trainer: no value network, as much of the rest.

Another algorithm than PPO, so it is told by its own name and compared with
nothing. One minibatch is one optimizer step, and a reward model scores.
"""

import tempfile
from typing import Any

import datasets
import trl

from experiments.harness.peers import torch_models, trl_data
from experiments.harness.peers.trl_data import WaitAtStep
from experiments.harness.peers.turns import Loop

_COMPLETIONS_A_PROMPT = 4


def make(argument: str, job: dict[str, Any]) -> Loop:
  """'grpo': rollout, scores and all epochs a turn."""
  if argument != "grpo":
    raise ValueError(f"trl_grpo knows grpo, not {argument!r}")
  num, minibatches = job["num_prompts"], job["num_minibatches"]
  steps = minibatches * job["num_epochs"]
  num_turns = job["warmups"] + job["repeats"] + 2
  tokenizer = trl_data.tokenizer(job)
  rows = trl_data.rows(job, num, job["prompt_length"])
  trainer = trl.GRPOTrainer(
      model=_saved(torch_models.language_model(job, "float32")),
      reward_funcs=torch_models.scalar_model(job),
      args=trl.GRPOConfig(
          **trl_data.arguments(job, num // minibatches),
          max_steps=steps * num_turns,
          num_generations=_COMPLETIONS_A_PROMPT,
          steps_per_generation=minibatches,
          num_iterations=job["num_epochs"],
          max_completion_length=job["completion_length"],
          temperature=job["temperature"],
          beta=job["kl_coef"],
      ),
      train_dataset=datasets.Dataset.from_dict(
          {"prompt": [trl_data.words(x) for x in rows]}
      ),
      processing_class=tokenizer,
      reward_processing_classes=tokenizer,
  )
  loop = Loop("grpo", trainer.train, torch_models.wait)
  trainer.add_callback(WaitAtStep(loop.wait, every=steps))
  return loop


def _saved(model: Any) -> Any:
  """The model as read from a folder: the reference is read from there too."""
  folder = tempfile.mkdtemp()
  model.save_pretrained(folder)
  return type(model).from_pretrained(folder, dtype=model.dtype)
