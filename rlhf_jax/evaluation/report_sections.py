"""What the report says, section by section, before it is a page."""

from collections.abc import Sequence
import dataclasses

from markupsafe import Markup
from matplotlib.figure import Figure

from rlhf_jax.evaluation import figure_style as look
from rlhf_jax.evaluation import report_figures as figures
from rlhf_jax.evaluation import report_headline as headline
from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.evaluation.report_curves import (
  LEARNING_CURVES,
  LENGTH_CURVES,
  PanelSpec,
  shown_metrics,
)
from rlhf_jax.evaluation.report_data import Calibration, Evaluation, RunData


@dataclasses.dataclass(frozen=True)
class Panel:
  title: str
  svg: Markup


@dataclasses.dataclass(frozen=True)
class Section:
  """anchor: its id in the page. missing: what to say if it has no panels."""

  anchor: str
  title: str
  text: str
  panels: list[Panel]
  missing: str


def _panel(name: str, title: str, figure: Figure) -> Panel:
  svg = look.to_svg(figure, name)
  # svg and title are safe: matplotlib escapes text, titles are ours.
  svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
  return Panel(title, Markup(svg))


def _absent(file: str, stage: str) -> str:
  return f"{file} is not there: the {stage} stage writes it."


# -- headline -----------------------------------------------------------------


def headline_panels(run: RunData) -> list[Panel]:
  """True reward of each policy, whole and by family."""
  policies = run.evaluation.policies if run.evaluation else ()
  panels = []
  if any("true_reward" in p.quantities for p in policies):
    panels.append(
        _panel(
            "headline",
            "True reward (mean, 95% interval)",
            figures.policy_bars(policies, "true_reward", "true reward"),
        )
    )
  if any(p.families for p in policies):
    panels.append(
        _panel(
            "families",
            "True reward by family (mean, 95% interval)",
            figures.family_dots(policies, "true reward"),
        )
    )
  return panels


def parts_table(
    evaluation: Evaluation | None,
) -> dict[str, list[float | None]]:
  """{part of the true reward: its mean for each policy}."""
  policies = evaluation.policies if evaluation else ()
  names = dict.fromkeys(name for p in policies for name in p.parts)
  return {name: [p.parts.get(name) for p in policies] for name in names}


# -- sections of figures ------------------------------------------------------


def sections(run: RunData) -> list[Section]:
  return [
      _overoptimisation(run),
      _frontier(run),
      _reward_model(run),
      _length(run),
      _learning_curves(run),
  ]


def missing_for_overoptimisation(run: RunData) -> str:
  """The metrics that the plot lacks, or ''."""
  missing = []
  if not (run.curve("ppo", "eval/score") or run.curve("ppo", "ppo/score")):
    missing.append("eval/score")
  if not run.curve("ppo", "eval/true_reward"):
    missing.append("eval/true_reward")
  return " and ".join(missing)


def _overoptimisation(run: RunData) -> Section:
  panels = []
  if not missing_for_overoptimisation(run):
    panels.append(
        _panel(
            "overoptimisation",
            "Score and true reward over PPO",
            figures.overoptimisation(run, headline.find_overoptimisation(run)),
        )
    )
  return Section(
      "overoptimisation",
      "Is the score still the truth?",
      "PPO sees only the score. When the score rises and the true reward "
      "falls, the policy exploits what the reward model gets wrong. The two "
      "axes have different units: compare the shapes, not the heights.",
      panels,
      "ppo/metrics.jsonl holds no eval/true_reward and score: the ppo stage "
      "writes them where a judge is known.",
  )


def _frontier(run: RunData) -> Section:
  kl = run.curve("ppo", "eval/kl")
  target = run.evaluation.kl_target if run.evaluation else None
  panels = []
  for quantity, label in (("true_reward", "true reward"), ("score", "score")):
    reward = run.curve("ppo", f"eval/{quantity}")
    if kl is None or reward is None or not set(kl.steps) & set(reward.steps):
      continue
    figure = figures.frontier(
        kl, reward, label, final=_final(run, quantity), kl_target=target
    )
    panels.append(
        _panel(
            f"frontier-{quantity}", f"{label.capitalize()} against KL", figure
        )
    )
  return Section(
      "frontier",
      "What did each nat of KL buy?",
      "Each dot is an evaluation on held-out prompts during PPO, from faint "
      "(early) to full (late); the diamond is the finished policy with its 95% "
      "intervals. Up and to the left is better.",
      panels,
      "ppo/metrics.jsonl holds no eval/kl and reward: the ppo stage writes "
      "them.",
  )


def _final(run: RunData, quantity: str) -> tuple[Interval, Interval] | None:
  """KL and `quantity` of the finished PPO policy, if both were measured."""
  policy = run.evaluation.policy("ppo") if run.evaluation else None
  if policy is None or not {"kl", quantity} <= policy.quantities.keys():
    return None
  return policy.quantities["kl"], policy.quantities[quantity]


def _reward_model(run: RunData) -> Section:
  measured, panels, text = run.calibration, [], ""
  if measured is not None:
    if measured.accuracy is not None:
      panels.append(
          _panel(
              "accuracy",
              "Accuracy on held-out pairs (95% interval)",
              figures.accuracy(measured),
          )
      )
    if measured.bins:
      panels.append(
          _panel(
              "calibration",
              "Calibration: stated against observed",
              figures.calibration(measured),
          )
      )
    text = _calibration_text(measured)
  return Section(
      "reward",
      "How good is the reward model?",
      text,
      panels,
      _absent("reward/calibration.json", "reward"),
  )


def _calibration_text(measured: Calibration) -> str:
  text = (
      "Dots on the dotted line: a stated 80% is right 80% of the time. Below "
      "it the model is too sure of itself. Larger dots hold more pairs."
  )
  if measured.num_pairs is not None:
    text += f" {measured.num_pairs:,} held-out pairs."
  if measured.expected_calibration_error is not None:
    error = measured.expected_calibration_error
    text += f" Expected calibration error {error:z.3f}."
  return text


def _curve_panels(
    run: RunData, stage: str, specs: Sequence[PanelSpec]
) -> list[Panel]:
  panels = []
  for title, unit, metrics in specs:
    drawn = [
        look.Line(name, run.curve(stage, metric))
        for metric, name in metrics.items()
        if run.curve(stage, metric) is not None
    ]
    if drawn:
      figure = figures.lines(drawn, unit, _references(run, title))
      panels.append(_panel(f"{stage}-{title}", title, figure))
  return panels


def _references(run: RunData, title: str) -> dict[str, float]:
  """The horizontal line that a panel is read against, if there is one."""
  if title.startswith("PPO: KL from") and run.evaluation is not None:
    found = {"target": run.evaluation.kl_target}
  elif title == "Reward model: accuracy" and run.calibration is not None:
    found = {"best possible": run.calibration.ceiling}
  else:
    found = {}
  return {name: value for name, value in found.items() if value is not None}


def _length(run: RunData) -> Section:
  return Section(
      "length",
      "Did it learn to ramble or to flatter?",
      "Length and flattery over PPO: what a reward model likes too much shows "
      "here first.",
      _curve_panels(run, "ppo", LENGTH_CURVES),
      _absent("ppo/metrics.jsonl", "ppo"),
  )


def _learning_curves(run: RunData) -> Section:
  panels = []
  for stage, specs in LEARNING_CURVES.items():
    panels += _curve_panels(run, stage, specs)
  absent = [s for s in LEARNING_CURVES if s not in run.curves]
  text = (
      "Faint lines are single measurements, bold ones their averages over "
      "stretches of steps."
  )
  if absent and panels:
    text += f" Without metrics: {', '.join(absent)}."
  return Section(
      "curves",
      "Learning curves",
      text,
      panels,
      "No stage has written its metrics.jsonl yet.",
  )


def other_metrics(run: RunData) -> dict[str, list[tuple[str, list[float]]]]:
  """{stage: [(metric, [first, last, least, most])]} of what no figure shows."""
  tables = {}
  for stage, curves in run.curves.items():
    rows = [
        (name, [float(v[0]), float(v[-1]), float(v.min()), float(v.max())])
        for name, v in sorted((n, c.values) for n, c in curves.items()
                              if n not in shown_metrics(stage))
    ]
    if rows:
      tables[stage] = rows
  return tables
