"""Samples completions of a policy and has them compared by annotators.

    python -m experiments.preferences --config=configs/preferences.py \
        --workdir=DIR

  1. Samples K completions of every prompt.
  2. Simulated annotators, each with a taste and noise of their own, choose
     between two (kind 'comparison') or rank all K (kind 'ranking').
  3. Writes DIR/train_<kind>s.jsonl and DIR/heldout_<kind>s.jsonl, in the record
     format in which people's comparisons come, and the annotators' own ceiling
     of agreement.

Completions that are all the same cannot be compared, nor can what is no text:
they are counted and left out. People's comparisons need no such stage: name
their files in the reward stage's config.
"""

import collections
import dataclasses
import itertools
import random
from typing import Any, Literal

from absl import logging
import jax

from experiments.harness import (
    checks,
    cli,
    evaluator,
    models,
    sources,
    stage,
)
from rlhf_jax.data import records
from rlhf_jax.worlds import annotators


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """init_from: the policy whose completions are compared.

  num_completions: K a prompt. Of kind 'comparison', every two of them are
    compared, each time by another annotator drawn at random.
  """

  seed: int
  init_from: str
  prompts: sources.SourceConfig
  heldout_prompts: sources.SourceConfig
  annotators: Literal["world:assistant"]
  kind: Literal["comparison", "ranking"]
  num_completions: int
  samples: evaluator.SampleConfig
  batch_size: int

  def __post_init__(self):
    if self.num_completions < 2:
      raise ValueError(
          f"num_completions must be at least 2: {self.num_completions}"
      )
    if self.samples.greedy or self.samples.top_k == 1:
      raise ValueError(
          "samples.greedy=True or samples.top_k=1 makes all completions of a "
          "prompt the same: there is nothing to compare"
      )
    checks.check_ranges(self, "", {"seed": "seed", "batch_size": ">= 1"})
    num, slots = self.num_completions, self.samples.num_slots
    if self.batch_size < num or 0 < slots < num:
      raise ValueError(
          f"batch_size={self.batch_size} and, if not 0, samples.num_slots="
          f"{slots} must be at least num_completions={num}: the completions of "
          "a prompt start together"
      )


def run(config: Config, workdir: str) -> None:
  """Runs the stage."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  policy = models.load_policy(config.init_from)
  skipped_dir = out.dir / "skipped"
  reader = sources.Reader(config.seed, skipped_dir, policy.tokenizer)
  summary = {}
  for i, (split, source) in enumerate((
      ("train", config.prompts),
      ("heldout", config.heldout_prompts),
  )):
    prompts = reader.prompts(source, split)
    evaluator.check_world_prompts([x.prompt for x in prompts])
    groups = sample_groups(config, policy, prompts, seed=2 * config.seed + i)
    rng = random.Random(f"annotators-{config.seed}-{split}")
    rows, left_out = label(config, groups, rng)
    if not rows:
      why = ", ".join(f"{num} x {reason}" for reason, num in left_out.items())
      raise cli.UserError(
          f"{split}: of the completions of {len(groups)} prompts no "
          f"{config.kind} could be made ({why}): the policy "
          f"{config.init_from} has collapsed, or samples.temperature="
          f"{config.samples.temperature} is too low"
      )
    stage.write_jsonl(out.dir / f"{split}_{config.kind}s.jsonl", rows)
    by_annotator = collections.Counter(row["annotator"] for row in rows)
    summary[split] = {
        "num_records": len(rows),
        "num_left_out": dict(left_out),
        "by_annotator": dict(sorted(by_annotator.items())),
    }
    if config.kind == "comparison":
      summary[split]["ceiling"] = annotators.agreement_ceiling(rows)
      summary[split]["agreement"] = annotators.annotator_agreement(rows)
    logging.info("preferences: %s: %s", split, summary[split])
  out.finish(summary)


def sample_groups(
    config: Config, policy: models.Policy, prompts: list, seed: int
) -> list[tuple[str, list[str]]]:
  """(prompt, its K completions) for every prompt."""
  tokenizer = policy.tokenizer
  batch = evaluator.encode_prompts(prompts, tokenizer, config.samples)
  k = config.num_completions
  sample = evaluator.make_sampler(
      policy.config, tokenizer, config.samples, config.batch_size, k
  )
  rollout = sample(policy.params, batch, jax.random.key(seed))
  texts = tokenizer.decode_batch(
      rollout.completions, rollout.completion_mask, continues=True,
      drop_unknown=True,
  )
  return [
      (prompts[index].prompt, texts[i * k : (i + 1) * k])
      for i, index in enumerate(batch.index)
  ]


def label(
    config: Config, groups: list[tuple[str, list[str]]], rng: random.Random
) -> tuple[list[dict[str, Any]], collections.Counter]:
  """The annotators' records, and how many were left out for which reason."""
  rows, left_out = [], collections.Counter()
  for prompt, completions in groups:
    if config.kind == "ranking":
      choices = [list(dict.fromkeys(completions))]
    else:
      choices = list(itertools.combinations(completions, 2))
    for choice in choices:
      if len(set(choice)) < 2:
        left_out["all the same"] += 1
        continue
      if config.kind == "ranking":
        row = annotators.rank(prompt, choice, rng)
      else:
        row = annotators.compare(prompt, *choice, rng)
      try:
        records.validate_record(config.kind, row)
      except records.RecordError as error:
        # What a model samples may be no text: empty, or a NUL.
        left_out[error.reason.split(" at ")[0]] += 1
        continue
      rows.append(row)
  return rows, left_out


if __name__ == "__main__":
  cli.launch(Config, run)
