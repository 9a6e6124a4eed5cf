"""Compares policies on the same held-out prompts.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=DIR

Every policy completes every prompt with the same random numbers. Written:

    DIR/evaluation.json     means, win rates, paired differences of the judge's
                            verdict; 95% intervals
    DIR/completions.jsonl   every completion with what was said of it
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from absl import logging
import jax
import numpy as np

from experiments.harness import (
    checks,
    cli,
    evaluator,
    models,
    sources,
    stage,
)
from experiments.harness.config import ConfigError
from experiments.harness.reference import Reference
from rlhf_jax.data import chat
from rlhf_jax.evaluation import intervals, text, win_rate
from rlhf_jax.types import PromptBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """policies: 'name=place' each, in the order in which they are shown.

  ref_policy: the name of the one that KL is measured from, or ''.
  reward_model: a place, for the proxy score, or ''.
  judge: says what is true, see `harness/evaluator.py`, or ''.
  prompts: of a file, the held-out tenth, or every one with use='all'.
  kl_target: is shown beside the KL; 0 if there was none.
  """

  seed: int
  policies: tuple[str, ...]
  ref_policy: str
  reward_model: str
  judge: str
  prompts: sources.SourceConfig
  samples: evaluator.SampleConfig
  batch_size: int
  kl_target: float

  def __post_init__(self):
    for item in self.policies:
      if "=" not in item:
        raise ValueError(f"policies: {item!r} is not 'name=place'")
    if not self.policies or len(self.places) < len(self.policies):
      raise ValueError(
          "policies: give at least one, and each a name of its own: "
          f"{', '.join(self.policies)}"
      )
    evaluator.check_judge(self.judge)
    checks.check_ranges(self, "", {"batch_size": ">= 1", "seed": "seed"})
    if self.ref_policy and self.ref_policy not in self.places:
      raise ValueError(
          f"ref_policy={self.ref_policy!r} is none of the policies "
          f"{', '.join(self.places)}"
      )

  @property
  def places(self) -> dict[str, str]:
    """name -> place."""
    return dict(item.split("=", 1) for item in self.policies)


def run(config: Config, workdir: str) -> None:
  """Runs the stage."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  rows = complete(config, sources.Reader(config.seed, out.dir / "skipped"))
  stage.write_jsonl(
      out.dir / "completions.jsonl",
      [
          {**row, "policy": name}
          for name, mine in rows.items()
          for row in mine
      ],
  )
  evaluation = summarise(config, rows)
  stage.write_json(out.dir / "evaluation.json", evaluation)
  for name, numbers in evaluation["policies"].items():
    logging.info(
        "evaluate: %s: %s",
        name,
        ", ".join(
            f"{k} {v['mean']:z.3f}" for k, v in numbers.items() if "mean" in v
        ),
    )
  out.finish({"num_prompts": evaluation["num_prompts"]})


def complete(
    config: Config, reader: sources.Reader
) -> dict[str, list[dict[str, Any]]]:
  """Each policy's rows, in the order of the prompts that all can read."""
  policies = {
      name: models.load_policy(place) for name, place in config.places.items()
  }
  reward_model = (
      models.load_reward_model(config.reward_model)
      if config.reward_model
      else None
  )
  _check_fits(config, policies, reward_model)
  reader = _reading(config, policies, reader)
  prompts = _encode(config, policies, reader.prompts(config.prompts, "heldout"))
  judge = evaluator.make_judge(config.judge)
  reward_fn = reward_model and evaluator.make_reward_fn(reward_model)
  reference = None
  if config.ref_policy:
    reference = Reference(policies[config.ref_policy])
  rows = {}
  for name, policy in policies.items():
    sampler = evaluator.Evaluator(
        policy.config,
        policy.tokenizer,
        prompts[name],
        config.samples.sampling(policy.tokenizer),
        reference=reference,
        reward_fn=reward_fn,
        judge=judge,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    rows[name] = sampler.rows(policy.params)
  return rows


def _check_fits(
    config: Config,
    policies: dict[str, models.Policy],
    reward_model: models.RewardModel | None,
) -> None:
  ref_policy = policies.get(config.ref_policy)
  for name, policy in policies.items():
    checks.check_samples_fit(
        config.samples, {f"policy {name!r}": policy}, reward_model
    )
    if (
        ref_policy
        and policy.tokenizer.fingerprint != ref_policy.tokenizer.fingerprint
    ):
      raise ConfigError(
          f"policy {name!r} has another tokenizer than ref_policy="
          f"{config.ref_policy!r}: there is no KL between them; give "
          "ref_policy=''"
      )


def _reading(
    config: Config, policies: dict[str, models.Policy], reader: sources.Reader
) -> sources.Reader:
  """The reader with the policies' tokenizer.

  Raises:
    ConfigError: the policies would be asked in different ways.
  """
  tokenizers = [policy.tokenizer for policy in policies.values()]
  if config.prompts.chat_template == chat.OWN and (
      len({x.chat_template for x in tokenizers}) > 1
  ):
    raise ConfigError(
        f"prompts.chat_template={chat.OWN!r}: the policies' tokenizers have "
        "different chat templates; name one for all"
    )
  return dataclasses.replace(reader, tokenizer=tokenizers[0])


def _encode(
    config: Config, policies: dict[str, models.Policy], prompts: list
) -> dict[str, PromptBatch]:
  """The same prompts for each: a tokenizer may find too long what others don't.

  Raises:
    ConfigError: if no prompt is left.
  """
  encoded = {
      name: evaluator.encode_prompts(prompts, policy.tokenizer, config.samples)
      for name, policy in policies.items()
  }
  indices = [set(batch.index.tolist()) for batch in encoded.values()]
  shared = sorted(set.intersection(*indices))
  if not shared:
    raise ConfigError(
        "prompts: each is too long for one of the policies; raise "
        "samples.max_prompt_length"
    )
  if len(shared) < max(map(len, indices)):
    logging.info("evaluate: %d prompts are short for all", len(shared))
  return {
      name: jax.tree.map(lambda x: x[np.isin(batch.index, shared)], batch)
      for name, batch in encoded.items()
  }


def summarise(
    config: Config, rows: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
  """Means over completions and what pairs of policies differ by.

  Prompts can repeat: an interval is over the distinct ones.
  """
  names = list(rows)
  judged = "true_reward" in rows[names[0]][0]
  return {
      "judge": config.judge,
      "num_prompts": len(rows[names[0]]),
      "kl_target": config.kl_target or None,
      "policies": {
          name: _summary(mine, config.seed) for name, mine in rows.items()
      },
      "paired": [
          _paired(rows, policy, baseline, config.seed)
          for i, policy in enumerate(names)
          for baseline in names[:i]
          if judged
      ],
  }


def _summary(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
  summary = {
      name: _interval(rows, [row[name] for row in rows], seed)
      for name in evaluator.NUMBERS
      if name in rows[0]
  }
  texts = [row["completion"] for row in rows]
  summary["distinct_2"] = {"mean": text.distinct_n(texts, 2)}
  if "family" in rows[0]:
    families = sorted({row["family"] for row in rows})
    summary["families"] = {}
    for family in families:
      mine = [row for row in rows if row["family"] == family]
      summary["families"][family] = _interval(
          mine, [row["true_reward"] for row in mine], seed
      )
    parts = sorted({part for row in rows for part in row["parts"]})
    mean = lambda part: float(
        np.mean([row["parts"][part] for row in rows if part in row["parts"]])
    )
    summary["parts"] = {part: mean(part) for part in parts}
  return summary


def _interval(
    rows: list[dict[str, Any]], values: Sequence[float], seed: int
) -> dict[str, float]:
  """The mean of one value a row, with its interval."""
  return dataclasses.asdict(
      intervals.bootstrap_interval(
          np.asarray(values, float),
          seed=seed,
          groups=evaluator.prompt_groups([row["prompt"] for row in rows]),
      )
  )


def _paired(
    rows: dict[str, list[dict[str, Any]]],
    policy: str,
    baseline: str,
    seed: int,
) -> dict[str, Any]:
  numbers = lambda name, key: np.asarray([row[key] for row in rows[name]])
  scores = [numbers(name, "true_reward") for name in (policy, baseline)]
  lengths = [numbers(name, "completion_length") for name in (policy, baseline)]
  groups = evaluator.prompt_groups([row["prompt"] for row in rows[policy]])
  result = {
      **win_rate.win_rate(*scores, seed=seed, groups=groups),
      "difference": win_rate.paired_difference(
          *scores, seed=seed, groups=groups
      ),
      "length_controlled": win_rate.length_controlled_difference(
          *scores, *lengths, groups=groups
      ),
  }
  return {
      "policy": policy,
      "baseline": baseline,
      **{
          name: dataclasses.asdict(value)
          if isinstance(value, intervals.Interval)
          else value
          for name, value in result.items()
      },
  }


if __name__ == "__main__":
  cli.launch(Config, run)
