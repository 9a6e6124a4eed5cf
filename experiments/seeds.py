"""Sums up runs that differ in their seed alone.

    python -m experiments.seeds --runs='runs/seed*' --plot=seeds.png

Prints a table in Markdown, each mean over runs with its 95% interval (Student's
t over seeds), and draws score and true reward over PPO's iterations. A run is a
workdir of experiments.rlhf; it is one observation, however many prompts it was
evaluated on. Runs whose configs differ in more than seeds are refused.
"""

import glob
import json
import pathlib
from typing import Any

from absl import app, flags
import numpy as np

from experiments.harness import cli, metric_writer
from rlhf_jax import checkpoint
from rlhf_jax.evaluation import intervals

_RUNS = flags.DEFINE_string("runs", None, "Glob of the runs' workdirs.")
_PLOT = flags.DEFINE_string("plot", "", "Where to draw the curves, if at all.")
flags.mark_flag_as_required("runs")

_QUANTITIES = ("true_reward", "score", "kl", "completion_length", "flattery")


def main(argv):
  del argv
  with cli.told_errors():
    runs = find_runs(_RUNS.value)
    print("\n".join(make_table(runs)))
    if _PLOT.value:
      plot(runs, _PLOT.value)
      print(f"\nplot: {_PLOT.value}")


def find_runs(pattern: str) -> list[pathlib.Path]:
  """The finished runs among the folders that `pattern` names."""
  folders = sorted(pathlib.Path(x) for x in glob.glob(pattern))
  runs = [x for x in folders if (x / "evaluate/evaluation.json").exists()]
  for folder in folders:
    if folder not in runs:
      print(f"passed over, not evaluated: {folder}")
  if len(runs) < 2:
    raise cli.UserError(
        f"{pattern!r} names {len(runs)} finished runs; an interval over seeds "
        "takes two or more"
    )
  _check_same_config(runs)
  return runs


_MAX_SHOWN = 5


def _check_same_config(runs: list[pathlib.Path]) -> None:
  first, *rest = [_comparable(run) for run in runs]
  for run, config in zip(runs[1:], rest, strict=True):
    differences = checkpoint.config_differences(first, config)
    if not differences:
      continue
    more = len(differences) - _MAX_SHOWN
    raise cli.UserError(
        f"{run} (given) and {runs[0]} (saved) differ in more than their "
        "seeds:\n  "
        + "\n  ".join(differences[:_MAX_SHOWN])
        + (f"\n  and {more} more" if more > 0 else "")
    )


def _comparable(run: pathlib.Path) -> Any:
  """The run's config without seeds and without its own folder's name."""
  path = run / "config.json"
  if not path.exists():
    raise cli.UserError(f"{run} holds no config.json: it is no run's workdir")
  # The longer first: the one may end in the other.
  folders = (f"{run.resolve()}/", f"{run}/")

  def blank(value: Any) -> Any:
    if isinstance(value, dict):
      return {k: blank(v) for k, v in value.items() if k != "seed"}
    if isinstance(value, list):
      return [blank(item) for item in value]
    if isinstance(value, str):
      for folder in folders:
        value = value.replace(folder, "@run/")
    return value

  return blank(_read(path))


def make_table(runs: list[pathlib.Path]) -> list[str]:
  """Lines of Markdown: one quantity a row, one policy a column."""
  evaluations = [_read(run / "evaluate/evaluation.json") for run in runs]
  names = list(evaluations[0]["policies"])
  quantity = lambda name, key: [
      e["policies"][name].get(key, {}).get("mean") for e in evaluations
  ]
  lines = [
      f"| {len(runs)} seeds | " + " | ".join(names) + " |",
      "|---|" + "---|" * len(names),
  ]
  for key in _QUANTITIES:
    cells = [_cell(quantity(name, key)) for name in names]
    if any(cells):
      lines.append(f"| {key} | " + " | ".join(cells) + " |")
  lines.append("")
  for before, after in zip(names, names[1:]):
    pair = (quantity(after, "true_reward"), quantity(before, "true_reward"))
    if None not in pair[0] + pair[1]:
      gain = _cell(np.subtract(*pair))
      lines.append(f"true reward, {after} - {before} of the same seed: {gain}")
  calibrations = [
      _read(run / "reward/calibration.json")
      for run in runs
      if (run / "reward/calibration.json").exists()
  ]
  lines += _reward_model_lines(calibrations)
  return lines


def _reward_model_lines(calibrations: list[dict[str, Any]]) -> list[str]:
  if len(calibrations) < 2:
    return []
  accuracy = [x["accuracy"]["mean"] for x in calibrations]
  lines = [f"held-out reward-model accuracy: {_cell(accuracy)}"]
  for key in ("ceiling", "agreement"):
    values = [x[key] for x in calibrations]
    if None not in values:
      lines.append(f"annotators' {key}: {_cell(values)}")
  return lines


def plot(runs: list[pathlib.Path], path: str) -> None:
  """Score (left axis) and true reward (right axis) over iterations."""
  import matplotlib  # pylint: disable=g-import-not-at-top

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top

  fig, left = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
  right = left.twinx()
  for axis, key, colour, label in (
      (left, "eval/score", "#0072B2", "score (reward model)"),
      (right, "eval/true_reward", "#D55E00", "true reward"),
  ):
    steps, curves = _curves(runs, key)
    for curve in curves:
      axis.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
    axis.plot(steps, curves.mean(axis=0), color=colour, linewidth=2.5)
    axis.set_ylabel(label, color=colour)
    axis.tick_params(axis="y", labelcolor=colour)
  left.set_xlabel("PPO iteration")
  left.set_title(
      f"Held-out score and true reward, {len(runs)} seeds (thick: mean)"
  )
  fig.savefig(path, dpi=130)
  plt.close(fig)


def _curves(runs, key: str) -> tuple[np.ndarray, np.ndarray]:
  by_run = []
  for run in runs:
    rows = metric_writer.read_metrics(run / "ppo/metrics.jsonl")
    by_run.append({row["step"]: row[key] for row in rows if key in row})
  steps = sorted(set.intersection(*(set(x) for x in by_run)))
  if not steps:
    raise cli.UserError(f"the runs have no {key} at the same iterations")
  return np.asarray(steps), np.asarray(
      [[x[step] for step in steps] for x in by_run]
  )


def _cell(values) -> str:
  if any(x is None for x in values):
    return ""
  return f"{intervals.mean_interval(np.asarray(values, float)):z.3f}"


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
