"""How the report's figures look, and what all of them are made of.

`to_svg` names colours by CSS variables instead of values: the page decides
them, for light and for dark. The colours are Okabe and Ito's (told apart by
colour-blind readers), and no line is told from another by colour alone.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import re
import warnings

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
import numpy as np

from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.evaluation.report_data import Curve

# colour here: CSS variable of the page
INK, MUTED, GRID = "#24292f", "#6b7178", "#d9dde2"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
CSS_COLORS = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BLUE: "blue",
    VERMILLION: "vermillion",
    GREEN: "green",
    PURPLE: "purple",
}
SERIES = ((BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"))
POLICY_STYLES = (
    (MUTED, "o"),
    (BLUE, "s"),
    (VERMILLION, "D"),
    (GREEN, "^"),
    (PURPLE, "v"),
)

SIZE = (4.0, 2.7)  # inches: about the width of a phone
LEGEND_COLUMNS = 3
_MANY_POINTS = 80  # from here on a curve is drawn as raw and averaged
_NUM_AVERAGES = 40
_MAX_RAW_POINTS = 400
_STYLE = {
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: the page's font, searchable
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.9,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve and what it is called."""

  label: str
  curve: Curve


def styled(draw):
  """Runs a drawing function under the report's style."""

  @functools.wraps(draw)
  def wrapped(*args, **kwargs):
    with matplotlib.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return wrapped


def to_svg(figure: Figure, name: str) -> str:
  """The figure as an <svg> element; equal figures give equal text."""
  buffer = io.StringIO()
  # The salt keeps the ids of two figures of one page apart.
  with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
    with warnings.catch_warnings():
      # The page's fonts draw the text, whatever ours lack.
      warnings.filterwarnings("ignore", message="Glyph")
      figure.savefig(
          buffer, format="svg", transparent=True, metadata={"Date": None}
      )
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  # Groups are numbered anew in each figure; nothing refers to them.
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  for color, variable in CSS_COLORS.items():
    svg = svg.replace(color, f"var(--{variable})")
  return svg


def tick(value: float, _=None) -> str:
  """A number short enough for an axis: 12k, 2.5M, 0.125."""
  size = abs(value)
  if 1e4 <= size < 1e6:
    text = f"{value / 1e3:.4g}k"
  elif 1e6 <= size < 1e9:
    text = f"{value / 1e6:.4g}M"
  else:
    text = f"{value:.4g}"
  return text.replace("-", "\N{MINUS SIGN}")


def shorten(text: str, length: int = 16) -> str:
  return text if len(text) <= length else text[: length - 1] + "…"


def panel(
    xlabel: str,
    ylabel: str,
    *,
    size: tuple[float, float] = SIZE,
    left: float = 0.7,
    right: float = 0.12,
    num_labels: int = 0,
) -> tuple[Figure, Axes]:
  """A figure with one panel.

  Margins are in inches and fixed: fitting them to the labels would take longer
  than all the rest. The one above has room for a legend of `num_labels`.
  """
  figure = Figure(figsize=size)
  axes = figure.add_subplot()
  rows = -(-num_labels // LEGEND_COLUMNS)
  figure.subplots_adjust(
      left=left / size[0],
      right=1 - right / size[0],
      bottom=(0.5 if xlabel else 0.28) / size[1],
      top=1 - (0.1 + 0.19 * rows) / size[1],
  )
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(tick))
  return figure, axes


def proxy(label: str, **style) -> Line2D:
  """An entry of a legend for what is drawn piece by piece."""
  return Line2D([], [], label=label, **style)


def legend(axes: Axes, handles: Sequence) -> None:
  """Above the panel, where it covers no data."""
  axes.legend(
      handles=handles,
      loc="lower left",
      bbox_to_anchor=(-0.03, 0.99),
      ncols=min(len(handles), LEGEND_COLUMNS),
      borderaxespad=0.1,
      columnspacing=1.0,
      labelspacing=0.25,
  )


def averaged(curve: Curve, num: int) -> Curve:
  """Means over `num` stretches of (nearly) equally many points."""
  if curve.steps.size <= num:
    return curve
  edges = np.linspace(0, curve.steps.size, num + 1).astype(int)
  sizes = np.diff(edges)
  return Curve(
      np.add.reduceat(curve.steps, edges[:-1]) / sizes,
      np.add.reduceat(curve.values, edges[:-1]) / sizes,
  )


def draw_curve(
    axes: Axes, line: Line, color: str, style: str, marker: str = "o"
):
  """A line; a long one also faintly as it was measured. Returns its handle."""
  curve = line.curve
  if curve.steps.size > _MANY_POINTS:
    raw = averaged(curve, _MAX_RAW_POINTS)
    axes.plot(raw.steps, raw.values, color=color, alpha=0.3, linewidth=0.7)
    curve = averaged(curve, _NUM_AVERAGES)
    marker = ""
  elif curve.steps.size > 30:
    marker = ""
  return axes.plot(
      curve.steps,
      curve.values,
      style,
      color=color,
      marker=marker,
      label=line.label,
  )[0]


def policy_styles(num: int) -> list[tuple[str, str]]:
  return [POLICY_STYLES[i % len(POLICY_STYLES)] for i in range(num)]


def upper(value: Interval) -> float:
  return value.high if np.isfinite(value.high) else value.mean


def lower(value: Interval) -> float:
  return value.low if np.isfinite(value.low) else value.mean


def whisker(axes: Axes, x: float, value: Interval, color: str) -> None:
  axes.errorbar(
      [x],
      [value.mean],
      yerr=errors(value),
      color=color,
      capsize=4,
      linewidth=1.3,
      linestyle="none",
  )


def errors(value: Interval) -> np.ndarray:
  """Distances down and up, as matplotlib wants them; none below 0."""
  down, up = value.mean - lower(value), upper(value) - value.mean
  return np.maximum([[down], [up]], 0.0)
