"""Reads what the stages of a run left behind, whatever state it is in.

A report is most wanted of a run that died half-way, so nothing here raises for
a missing, cut or odd file: what cannot be read is left out and named in
`RunData.problems`, by file and line. Only a run folder that is not there is an
error.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np

from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.evaluation.tolerant_json import TolerantReader, finite, number

# In the order in which they run. Another folder is none of the run's: what
# somebody tried beside it has no part in its curves and its time.
STAGES = (
    "pretrain",
    "sft",
    "preferences",
    "reward",
    "judge",
    "ppo",
    "evaluate",
)
_LABELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}


@dataclasses.dataclass(frozen=True)
class Curve:
  """One metric over training: steps [N] ascending, values [N], all finite."""

  steps: np.ndarray
  values: np.ndarray


def policy_label(name: str) -> str:
  """How people write the name of a policy."""
  return _LABELS.get(name, name)


@dataclasses.dataclass(frozen=True)
class Policy:
  """The evaluation of one policy; quantities that were not measured absent."""

  name: str
  quantities: dict[str, Interval]
  families: dict[str, Interval]
  parts: dict[str, float]

  @property
  def label(self) -> str:
    return policy_label(self.name)


@dataclasses.dataclass(frozen=True)
class Paired:
  """Two policies on the same prompts, by true reward; None: not there.

  interval: of win + tie / 2.
  length_controlled: what is left of the difference at equal lengths.
  """

  policy: str
  baseline: str
  win: float
  tie: float
  loss: float
  interval: Interval | None
  difference: Interval | None
  length_controlled: Interval | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  judge: str
  num_prompts: int | None
  kl_target: float | None
  policies: tuple[Policy, ...]
  paired: tuple[Paired, ...]

  def policy(self, name: str) -> Policy | None:
    return next((p for p in self.policies if p.name == name), None)

  def difference(self, policy: str, baseline: str) -> Interval | None:
    """How far the true reward of `policy` is above that of `baseline`."""
    return next(
        (
            p.difference
            for p in self.paired
            if (p.policy, p.baseline) == (policy, baseline)
        ),
        None,
    )


@dataclasses.dataclass(frozen=True)
class Calibration:
  """bins: (predicted, observed, count) each."""

  bins: tuple[tuple[float, float, int], ...]
  accuracy: Interval | None
  ceiling: float | None
  agreement: float | None
  expected_calibration_error: float | None
  num_pairs: int | None


@dataclasses.dataclass(frozen=True)
class RunData:
  """Everything that a report is made from; None or empty: not there.

  curves: by stage, then by metric name.
  seconds: wall-clock time by stage.
  completions: rows as they are in the file, prompt and policy checked.
  problems: what could not be read or was not finite, one sentence each.
  """

  name: str
  config: dict[str, Any] | None
  versions: dict[str, Any] | None
  curves: dict[str, dict[str, Curve]]
  seconds: dict[str, float]
  calibration: Calibration | None
  evaluation: Evaluation | None
  completions: tuple[dict[str, Any], ...]
  problems: tuple[str, ...]

  def curve(self, stage: str, name: str) -> Curve | None:
    return self.curves.get(stage, {}).get(name)


def read_run(run_dir: str | os.PathLike) -> RunData:
  """Reads a run folder.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  root = pathlib.Path(run_dir)
  if not root.is_dir():
    raise FileNotFoundError(f"{root}: no such run folder")
  reader = _Reader(root)
  curves = {s: reader.curves(f"{s}/metrics.jsonl") for s in STAGES}
  seconds = {s: reader.seconds(f"{s}/timing.jsonl") for s in STAGES}
  return RunData(
      name=root.resolve().name,
      config=reader.config(),
      versions=reader.json_object("versions.json"),
      curves={s: each for s, each in curves.items() if each},
      seconds={s: each for s, each in seconds.items() if each is not None},
      calibration=reader.calibration("reward/calibration.json"),
      evaluation=reader.evaluation("evaluate/evaluation.json"),
      completions=reader.completions("evaluate/completions.jsonl"),
      problems=tuple(reader.problems),
  )


def _interval(value: Any) -> Interval | None:
  """{"mean", "low", "high"} or a bare number; limits may be missing or NaN."""
  if not isinstance(value, Mapping):
    value = {"mean": value}
  mean = finite(value.get("mean"))
  if mean is None:
    return None
  low, high = (finite(value.get(side)) for side in ("low", "high"))
  if low is None or high is None:
    low = high = math.nan
  return Interval(mean, low, high)


def _intervals(value: Any) -> dict[str, Interval]:
  if not isinstance(value, Mapping):
    return {}
  parsed = {str(name): _interval(each) for name, each in value.items()}
  return {name: each for name, each in parsed.items() if each is not None}


def _mappings(value: Any) -> list[Mapping]:
  """The objects of a JSON list; of anything else, none."""
  if not isinstance(value, Sequence) or isinstance(value, str):
    return []
  return [each for each in value if isinstance(each, Mapping)]


class _Reader(TolerantReader):
  """What the files mean."""

  def config(self) -> dict[str, Any] | None:
    """Of the whole run, or of its stages if they were run one by one."""
    config = self.json_object("config.json")
    if config is None:
      each = {s: self.json_object(f"{s}/config.json") for s in STAGES}
      config = {s: value for s, value in each.items() if value} or None
    return config

  def curves(self, name: str) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for row in self.rows(name):
      step = finite(row.get("step"))
      if step is None:
        continue
      for metric, value in row.items():
        value = number(value)
        if metric != "step" and value is not None:
          # A step written twice (by a resumed run): the last one counts.
          points.setdefault(metric, {})[int(step)] = value
    curves = {}
    for metric, values in points.items():
      steps = np.array(sorted(values), np.int64)
      array = np.array([values[int(s)] for s in steps], np.float64)
      good = np.isfinite(array)
      if not good.all():
        first = int(steps[~good][0])
        self.problems.append(
            f"{name}: {metric} is NaN or infinite at {(~good).sum()} of "
            f"{good.size} steps, first at step {first}."
        )
      if good.any():
        curves[metric] = Curve(steps[good], array[good])
    return curves

  def seconds(self, name: str) -> float | None:
    """Total time of a stage: of `seconds`, or `seconds_per_step` x steps."""
    total, previous, found = 0.0, 0.0, False
    for row in self.rows(name):
      step = finite(row.get("step"))
      seconds = finite(row.get("seconds"))
      rate = finite(row.get("seconds_per_step"))
      if seconds is None and rate is not None and step is not None:
        seconds = rate * max(step - previous, 0.0)
      if step is not None:
        previous = step
      if seconds is not None:
        total, found = total + seconds, True
    return total if found else None

  def calibration(self, name: str) -> Calibration | None:
    value = self.json_object(name)
    if value is None:
      return None
    bins = []
    for each in _mappings(value.get("bins")):
      parts = [finite(each.get(k)) for k in ("predicted", "observed", "count")]
      if None not in parts and parts[2] >= 1:
        bins.append((parts[0], parts[1], int(parts[2])))
    num_pairs = finite(value.get("num_pairs"))
    return Calibration(
        bins=tuple(bins),
        accuracy=_interval(value.get("accuracy")),
        ceiling=finite(value.get("ceiling")),
        agreement=finite(value.get("agreement")),
        expected_calibration_error=finite(
            value.get("expected_calibration_error")
        ),
        num_pairs=None if num_pairs is None else int(num_pairs),
    )

  def evaluation(self, name: str) -> Evaluation | None:
    value = self.json_object(name)
    if value is None:
      return None
    policies = value.get("policies")
    if not isinstance(policies, Mapping) or not policies:
      self.problems.append(f"{name}: no `policies`; it was left out.")
      return None
    num_prompts = finite(value.get("num_prompts"))
    judge = value.get("judge")
    return Evaluation(
        judge=judge if isinstance(judge, str) else "",
        num_prompts=None if num_prompts is None else int(num_prompts),
        kl_target=finite(value.get("kl_target")),
        policies=tuple(
            _policy(str(policy), each)
            for policy, each in policies.items()
            if isinstance(each, Mapping)
        ),
        paired=tuple(_paired(value.get("paired"))),
    )

  def completions(self, name: str) -> tuple[dict[str, Any], ...]:
    wanted = ("prompt", "policy", "completion")
    rows = self.rows(name)
    good = [r for r in rows if all(isinstance(r.get(k), str) for k in wanted)]
    if len(good) < len(rows):
      self.problems.append(
          f"{name}: {len(rows) - len(good)} rows without a text for each of "
          f"{', '.join(wanted)}; they were left out."
      )
    return tuple(good)


def _policy(name: str, value: Mapping) -> Policy:
  parts = value.get("parts")
  parts = parts if isinstance(parts, Mapping) else {}
  return Policy(
      name=name,
      quantities=_intervals(
          {k: v for k, v in value.items() if k not in ("families", "parts")}
      ),
      families=_intervals(value.get("families")),
      parts={
          str(k): finite(v) for k, v in parts.items() if finite(v) is not None
      },
  )


def _paired(value: Any) -> list[Paired]:
  found = []
  for row in _mappings(value):
    shares = [finite(row.get(k)) for k in ("win", "tie", "loss")]
    if None in shares:
      continue
    found.append(
        Paired(
            str(row.get("policy")),
            str(row.get("baseline")),
            *shares,
            *(
                _interval(row.get(k))
                for k in ("interval", "difference", "length_controlled")
            ),
        )
    )
  return found
