"""What a run showed, in words and in a small table of plain text."""

from collections.abc import Sequence
import dataclasses
import math
import textwrap

import numpy as np

from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.evaluation.report_data import Curve, Evaluation, Policy, RunData

# quantity: (column title, unit, number format); the order of the columns.
QUANTITIES = {
    "true_reward": ("True reward", "", "z.3f"),
    "score": ("Score", "", "z.2f"),
    "kl": ("KL from SFT", "nats", "z.2f"),
    "completion_length": ("Length", "tokens", "z.1f"),
    "ended": ("Ended", "share", "z.2f"),
    "repetition": ("Repeats", "share of 3-grams", "z.2f"),
    "distinct_2": ("Distinct", "share of 2-grams", "z.2f"),
    "flattery": ("Flattery", "phrases", "z.2f"),
}

# A fall of the true reward (which lies in [0, 1]) that is worth a warning.
NOTABLE_FALL = 0.05
_SMOOTHED_OVER = 3  # evaluations


@dataclasses.dataclass(frozen=True)
class OverOptimisation:
  """How true reward and score moved from the peak of the true reward on.

  Values are averages over three evaluations, so that one lucky evaluation is
  no peak. is_notable: the true reward fell by more than NOTABLE_FALL while the
  score did not fall.
  """

  peak_step: int
  peak_reward: float
  final_reward: float
  peak_score: float
  final_score: float

  @property
  def is_notable(self) -> bool:
    fell = self.peak_reward - self.final_reward > NOTABLE_FALL
    return fell and self.final_score >= self.peak_score


def find_overoptimisation(run: RunData) -> OverOptimisation | None:
  """None without three evaluations of both score and true reward."""
  reward = run.curve("ppo", "eval/true_reward")
  score = run.curve("ppo", "eval/score") or run.curve("ppo", "ppo/score")
  if reward is None or score is None or reward.steps.size < _SMOOTHED_OVER:
    return None
  score = Curve(
      reward.steps, np.interp(reward.steps, score.steps, score.values)
  )
  rewards, scores = _smooth(reward.values), _smooth(score.values)
  peak = int(rewards.argmax())
  return OverOptimisation(
      # The smoothed value i is centred on evaluation i + 1.
      peak_step=int(reward.steps[peak + _SMOOTHED_OVER // 2]),
      peak_reward=float(rewards[peak]),
      final_reward=float(rewards[-1]),
      peak_score=float(scores[peak]),
      final_score=float(scores[-1]),
  )


def _smooth(values: np.ndarray) -> np.ndarray:
  window = np.full(_SMOOTHED_OVER, 1 / _SMOOTHED_OVER)
  return np.convolve(values, window, mode="valid")


def sentences(run: RunData) -> list[str]:
  """The outcome, a sentence each; the first one is the headline."""
  said = _evaluation_sentences(run.evaluation)
  if run.calibration is not None and run.calibration.accuracy is not None:
    said.append(_reward_model_sentence(run))
  found = find_overoptimisation(run)
  if found is not None and found.is_notable:
    said.append(
        f"Over-optimisation: the true reward peaked at PPO iteration "
        f"{found.peak_step:,} ({found.peak_reward:z.3f}) and ended at "
        f"{found.final_reward:z.3f}, while the score rose from "
        f"{found.peak_score:z.2f} to {found.final_score:z.2f} (means of three "
        f"evaluations)."
    )
  return said


def _evaluation_sentences(evaluation: Evaluation | None) -> list[str]:
  if evaluation is None:
    return ["The policies have not been evaluated yet."]
  measured = [p for p in evaluation.policies if "true_reward" in p.quantities]
  prompts = ""
  if evaluation.num_prompts is not None:
    prompts = f" on {evaluation.num_prompts:,} held-out prompts"
  if not measured:
    scores = _path(evaluation.policies, "score")
    if not scores:
      return ["The evaluation measured no true reward."]
    return [
        f"The reward model's score{prompts}: {scores}.",
        "There was no judge: whether a higher score is better is not known.",
    ]
  said = [f"True reward{prompts}: {_path(measured, 'true_reward')}."]
  said += [
      _comparison(a, b, evaluation.difference(b.name, a.name)) + "."
      for a, b in zip(measured, measured[1:])
  ]
  final = measured[-1]
  if "kl" in final.quantities:
    said.append(_kl_sentence(final, evaluation.kl_target))
  return said


def _path(policies: Sequence[Policy], quantity: str) -> str:
  """'0.100 (Base) -> 0.500 (SFT)' of the policies that have the quantity."""
  return " \N{RIGHTWARDS ARROW} ".join(
      f"{p.quantities[quantity].mean:z.3f} ({p.label})"
      for p in policies
      if quantity in p.quantities
  )


def _comparison(
    before: Policy, after: Policy, difference: Interval | None
) -> str:
  names = f"{after.label} %s {before.label}"
  if difference is None or not math.isfinite(difference.low + difference.high):
    return names % "has no interval to compare with"
  if difference.low > 0:
    return names % "is above" + f" by {difference:z.3f}, paired by prompt"
  if difference.high < 0:
    below = Interval(-difference.mean, -difference.high, -difference.low)
    return names % "is BELOW" + f" by {below:z.3f}, paired by prompt"
  return names % "is not clearly apart from" + f": {difference:z.3f}"


def _kl_sentence(policy: Policy, target: float | None) -> str:
  kl = policy.quantities["kl"]
  said = f"KL of {policy.label} from SFT: {kl:z.2f} nats a completion"
  if target is None:
    return said + "."
  where = "within"
  if kl.mean > target:
    where = "ABOVE" if kl.low > target else "not clearly above"
  return f"{said}, {where} the target of {target:g}."


def _reward_model_sentence(run: RunData) -> str:
  measured = run.calibration
  said = (
      f"Reward model: right on {_percent(measured.accuracy)} of held-out pairs"
  )
  if measured.ceiling is not None:
    said += f"; the best possible predictor on {measured.ceiling:.1%}"
  if measured.agreement is not None:
    said += f"; annotators agree on {measured.agreement:.1%}"
  return said + "."


def _percent(value: Interval) -> str:
  return f"{value:.1%}"


def columns(evaluation: Evaluation) -> list[str]:
  """The quantities that at least one policy has, in display order."""
  return [
      q
      for q in QUANTITIES
      if any(q in p.quantities for p in evaluation.policies)
  ]


def summary_table(evaluation: Evaluation) -> list[str]:
  """Lines of aligned text: a row a policy, true reward with its interval."""
  names = columns(evaluation)
  rows = [[""] + [_title(q) for q in names]]
  for policy in evaluation.policies:
    cells = [_cell(policy.quantities.get(q), q) for q in names]
    rows.append([policy.label] + cells)
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
      "  ".join(
          [row[0].ljust(widths[0])]
          + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
      ).rstrip()
      for row in rows
  ]


def _title(quantity: str) -> str:
  return QUANTITIES[quantity][0].lower()


def _cell(value: Interval | None, quantity: str) -> str:
  if value is None:
    return "-"
  spec = QUANTITIES[quantity][2]
  return (
      f"{value:{spec}}"
      if quantity == "true_reward"
      else (f"{value.mean:{spec}}")
  )


def clock(seconds: float) -> str:
  """'1:02:03' or '2:03', rounded to seconds."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


def plain_text(run: RunData) -> list[str]:
  """Lines for a terminal."""
  first, *others = sentences(run)
  table = []
  if run.evaluation is not None:
    table = ["", *summary_table(run.evaluation), ""]
    if run.evaluation.judge:
      others.append(f"Judge: {run.evaluation.judge}")
  if run.seconds:
    total = clock(sum(run.seconds.values()))
    each = ", ".join(f"{s} {clock(t)}" for s, t in run.seconds.items())
    others.append(f"Training time {total} ({each}).")
  others += [f"Note: {problem}" for problem in run.problems]
  wrapped = [line for text in others for line in textwrap.wrap(text, 80)]
  return [first, *table, *wrapped]
