"""Fine-tunes a policy on demonstrations.

    python -m experiments.sft --config=configs/sft.py --workdir=DIR

  1. Loads the policy of an earlier stage, or one from disk.
  2. Reads the demonstrations; the loss is on completions alone, unless
     train_on_prompt. What is too long is dropped and counted.
  3. Trains, evaluates on held-out demonstrations, samples completions.
  4. Leaves DIR/model and DIR/tokenizer for the next stage; with an adapter,
     merged, and DIR/adapter beside them.
"""

import dataclasses
from typing import Literal

from absl import logging

from experiments.harness import cli, language_model, models, sources, stage
from experiments.harness.compute import ComputeConfig
from rlhf_jax import device_mesh
from rlhf_jax.data import encoding
from rlhf_jax.models.lora import LoraConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """init_from: the place of the policy to start from.

  compute: how, see `harness/compute.py`.
  lora: an adapter to train on it instead, of rank 0 for none.
  """

  init_from: str
  demonstrations: sources.SourceConfig
  heldout_demonstrations: sources.SourceConfig
  train_on_prompt: bool
  too_long: Literal["drop", "truncate_prompt_left", "error"]
  compute: ComputeConfig
  lora: LoraConfig
  train: language_model.LanguageModelConfig


def run(config: Config, workdir: str) -> None:
  """Runs the stage, or what is left of it."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  mesh = device_mesh.make_mesh(config.train.mesh)
  policy = models.load_policy(
      config.init_from,
      config.compute,
      config.train.sharding.placing("policy", mesh),
  )
  skipped_dir = out.dir / "skipped"
  reader = sources.Reader(config.train.seed, skipped_dir, policy.tokenizer)
  examples, _ = make_examples(config, reader)
  language_model.train(
      "sft", out, config.train, policy, examples, config.lora
  )


def make_examples(config: Config, reader: sources.Reader):
  """What the stage learns from and is measured on.

  Args:
    reader: knows the tokenizer.

  Returns:
    By split, the examples to pack and their LengthReport.
  """
  examples, reports = {}, {}
  for split, source in (
      ("train", config.demonstrations),
      ("heldout", config.heldout_demonstrations),
  ):
    examples[split], reports[split] = encoding.encode_demonstrations(
        reader.demonstrations(source, split),
        reader.tokenizer,
        max_length=config.train.seq_len,
        policy=config.too_long,
        train_on_prompt=config.train_on_prompt,
    )
    logging.info("sft: %s demonstrations: %s", split, reports[split])
  return examples, reports


if __name__ == "__main__":
  cli.launch(Config, run)
