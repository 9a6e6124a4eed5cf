"""The figures of the report, one panel each.

Small panels, so that a phone shows them at full size; no titles inside, since
the page gives them. `figure_style.to_svg` makes them part of the page.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
import numpy as np

from rlhf_jax.evaluation import figure_style as look
from rlhf_jax.evaluation import intervals
from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.evaluation.report_data import Calibration, Curve, Policy, RunData
from rlhf_jax.evaluation.report_headline import OverOptimisation

_REFERENCE = {"color": look.INK, "linestyle": ":", "linewidth": 1.2}
_MAX_DOTS = 60  # of a frontier


@look.styled
def lines(
    drawn: Sequence[look.Line],
    ylabel: str,
    references: Mapping[str, float] | None = None,
) -> Figure:
  """Curves over training steps; `references`: named horizontal lines."""
  references = references or {}
  figure, axes = look.panel(
      "training step", ylabel, num_labels=len(drawn) + len(references)
  )
  handles = [
      look.draw_curve(axes, line, color, style)
      for line, (color, style) in zip(drawn, look.SERIES)
  ]
  for label, value in references.items():
    handles.append(axes.axhline(value, label=label, **_REFERENCE))
  look.legend(axes, handles)
  return figure


@look.styled
def policy_bars(
    policies: Sequence[Policy], quantity: str, ylabel: str
) -> Figure:
  """One bar a policy with its interval and number."""
  shown = [p for p in policies if quantity in p.quantities]
  values = [p.quantities[quantity] for p in shown]
  figure, axes = look.panel("", ylabel)
  for i, (value, (color, _)) in enumerate(
      zip(values, look.policy_styles(len(shown)))
  ):
    axes.bar(i, value.mean, width=0.55, color=color)
    look.whisker(axes, i, value, look.INK)
    axes.annotate(
        f"{value.mean:z.3f}", (i, max(look.upper(value), 0.0)), xytext=(0, 4),
        textcoords="offset points", ha="center", fontweight="bold",
    )
  axes.set_xticks(range(len(shown)), [look.shorten(p.label) for p in shown])
  axes.set_xlim(-0.6, len(shown) - 0.4)
  top = max(0.0, *map(look.upper, values), 0.0)
  bottom = min(0.0, *map(look.lower, values), 0.0)
  span = (top - bottom) or 1.0
  axes.set_ylim(bottom - 0.05 * span * (bottom < 0), top + 0.15 * span)
  axes.grid(axis="x", visible=False)
  return figure


@look.styled
def family_dots(policies: Sequence[Policy], xlabel: str) -> Figure:
  """A row a family, a dot with its interval a policy."""
  families = list(dict.fromkeys(f for p in policies for f in p.families))
  figure, axes = look.panel(
      xlabel, "", size=(look.SIZE[0], 0.8 + 0.31 * max(len(families), 5)),
      left=0.85, num_labels=len(policies),
  )
  offsets = np.linspace(-0.25, 0.25, len(policies)) * (len(policies) > 1)
  handles = []
  for policy, offset, (color, marker) in zip(
      policies, offsets, look.policy_styles(len(policies))
  ):
    for family, value in policy.families.items():
      axes.errorbar(
          [value.mean], [families.index(family) + offset],
          xerr=look.errors(value), color=color, marker=marker, markersize=4.5,
          linewidth=1.4,
      )
    handles.append(look.proxy(
        look.shorten(policy.label), color=color, marker=marker, linestyle=""
    ))
  axes.set_yticks(range(len(families)), [look.shorten(f, 11) for f in families])
  axes.set_ylim(len(families) - 0.5, -0.5)
  axes.grid(axis="y", visible=False)
  for row in range(1, len(families)):
    axes.axhline(row - 0.5, color=look.GRID, linewidth=0.6)
  look.legend(axes, handles)
  return figure


@look.styled
def overoptimisation(
    run: RunData, found: OverOptimisation | None, *, size=(4.6, 3.0)
) -> Figure:
  """Score and true reward over PPO, an axis each; marks a notable peak."""
  marked = found is not None and found.is_notable
  figure, axes = look.panel(
      "PPO iteration", "score (what PPO maximises)", size=size, right=0.75,
      num_labels=2 + marked,
  )
  twin = axes.twinx()
  twin.spines["right"].set_visible(True)
  twin.grid(False)
  twin.yaxis.set_major_formatter(FuncFormatter(look.tick))
  twin.set_ylabel("true reward (what is wanted)", color=look.VERMILLION)
  axes.yaxis.label.set_color(look.BLUE)
  score = run.curve("ppo", "eval/score") or run.curve("ppo", "ppo/score")
  truth = run.curve("ppo", "eval/true_reward")
  handles = [
      look.draw_curve(axes, look.Line("score (left)", score), look.BLUE, "-"),
      look.draw_curve(
          twin, look.Line("true reward (right)", truth), look.VERMILLION, "--",
          marker="s",
      ),
  ]
  if marked:
    axes.axvline(found.peak_step, **_REFERENCE)
    handles.append(look.proxy("its peak", **_REFERENCE))
  look.legend(axes, handles)
  return figure


@look.styled
def frontier(
    kl: Curve,
    reward: Curve,
    ylabel: str,
    *,
    final: tuple[Interval, Interval] | None = None,
    kl_target: float | None = None,
) -> Figure:
  """Reward against KL, one dot an evaluation, from faint to full.

  final: KL and reward of the finished policy, drawn with their intervals.
  """
  steps, at_kl, at_reward = np.intersect1d(
      kl.steps, reward.steps, return_indices=True
  )
  x, y = kl.values[at_kl], reward.values[at_reward]
  handles = [look.proxy(
      f"step {steps[0]:,} to {steps[-1]:,}", color=look.BLUE, marker="o"
  )]
  figure, axes = look.panel(
      "KL from the SFT policy (nats per completion)", ylabel,
      num_labels=1 + (final is not None) + (kl_target is not None),
  )
  axes.plot(x, y, color=look.BLUE, linewidth=1, alpha=0.5)
  kept = np.unique(
      np.linspace(0, x.size - 1, min(x.size, _MAX_DOTS)).round().astype(int)
  )
  axes.scatter(
      x[kept], y[kept], s=22, color=look.BLUE, linewidths=0,
      alpha=np.linspace(0.15, 1, kept.size),
  )
  if final is not None:
    handles.append(axes.errorbar(
        [final[0].mean], [final[1].mean], xerr=look.errors(final[0]),
        yerr=look.errors(final[1]), color=look.VERMILLION, marker="D",
        capsize=3, linewidth=1.3, label="finished",
    ))
  if kl_target is not None:
    axes.axvline(kl_target, **_REFERENCE)
    handles.append(look.proxy(f"target {kl_target:g}", **_REFERENCE))
  axes.set_xlim(left=min(0.0, float(x.min())) - 0.02 * float(np.ptp(x) or 1))
  look.legend(axes, handles)
  return figure


@look.styled
def calibration(measured: Calibration) -> Figure:
  """Stated against observed probability, with Wilson's interval a bin."""
  figure, axes = look.panel(
      "probability stated by the reward model", "share of pairs it got right",
      num_labels=2,
  )
  axes.plot([0.5, 1], [0.5, 1], **_REFERENCE)
  most = max(count for _, _, count in measured.bins)
  for predicted, observed, count in measured.bins:
    share = min(max(observed, 0.0), 1.0)
    value = intervals.proportion_interval(share * count, count)
    look.whisker(axes, predicted, value, look.BLUE)
    axes.scatter([predicted], [share], s=8 + 60 * count / most, color=look.BLUE)
  axes.set_xlim(min(0.48, *(p - 0.02 for p, _, _ in measured.bins), 0.48), 1.02)
  axes.set_ylim(top=1.04)
  look.legend(axes, [
      look.proxy("perfect", **_REFERENCE),
      look.proxy("pairs, 95% interval", marker="o", color=look.BLUE),
  ])
  return figure


@look.styled
def accuracy(measured: Calibration) -> Figure:
  """Accuracy with its interval, between chance and what is possible."""
  value = measured.accuracy
  rows = [
      ("best possible", measured.ceiling, look.MUTED, "D"),
      ("reward model", value.mean, look.BLUE, "o"),
      ("annotators agree", measured.agreement, look.MUTED, "s"),
      ("chance", 0.5, look.MUTED, "^"),
  ]
  rows = [row for row in rows if row[1] is not None]
  figure, axes = look.panel("share of held-out pairs", "", left=1.3, right=0.45)
  for y, (_, at, color, marker) in enumerate(rows):
    axes.plot([at], [y], color=color, marker=marker, markersize=6)
    shown = value if marker == "o" else Interval(at, at, at)
    axes.errorbar(
        [at], [y], xerr=look.errors(shown), color=color, capsize=4,
        linestyle="none",
    )
    axes.annotate(
        f"{at:.1%}", (look.upper(shown), y), xytext=(6, 0),
        textcoords="offset points", va="center",
        fontweight="bold" if marker == "o" else "normal",
    )
  axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.grid(axis="y", visible=False)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
  return figure
