"""One page that shows what a run did: `write_report(run_dir)`.

    run folder --report_data--> RunData --report_headline--> sentences
                                        --report_figures---> SVG
                                        --report.html------> one HTML file

The page needs nothing but itself: figures are part of it, it holds no script
and asks the network for nothing. Completions are text of a model and may hold
anything; the template escapes them, and the page's content policy forbids
scripts besides.
"""

from collections.abc import Mapping
import importlib.resources
import os
import pathlib
from typing import Any

import jinja2

from rlhf_jax.evaluation import figure_style, report_sections
from rlhf_jax.evaluation import report_figures as figures
from rlhf_jax.evaluation import report_headline as headline
from rlhf_jax.evaluation.report_completions import completion_groups
from rlhf_jax.evaluation.report_data import RunData, policy_label, read_run


def write_report(
    run_dir: str | os.PathLike, output: str | os.PathLike = "report.html"
) -> pathlib.Path:
  """Writes the report of a run, complete or not.

  Args:
    run_dir: the run's folder; each file in it is optional.
    output: the file to write; a relative one is put into the run folder.

  Returns:
    The path of the report.

  Raises:
    FileNotFoundError: there is no such run folder.
  """
  page = render(read_run(run_dir))
  path = pathlib.Path(run_dir) / output
  # A reader (or a killed run) must never find half a page.
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(page.encode("utf-8", "replace"))
  os.replace(partial, path)
  return path


def summary_text(run_dir: str | os.PathLike) -> str:
  """The outcome of a run as plain text for a terminal.

  Raises:
    FileNotFoundError: there is no such run folder.
  """
  return "\n".join(headline.plain_text(read_run(run_dir)))


def plot_overoptimisation(
    run_dir: str | os.PathLike, path: str | os.PathLike
) -> None:
  """Draws score and true reward over PPO, an axis each, as a PNG file.

  Raises:
    FileNotFoundError: there is no such run folder.
    ValueError: the run has no such curves.
  """
  run = read_run(run_dir)
  missing = report_sections.missing_for_overoptimisation(run)
  if missing:
    raise ValueError(
        f"{pathlib.Path(run_dir) / 'ppo' / 'metrics.jsonl'}: no finite values "
        f"of {missing}, which the plot needs"
    )
  figure = figures.overoptimisation(
      run, headline.find_overoptimisation(run), size=(7, 4.2)
  )
  figure.savefig(path, format="png", dpi=160, facecolor="white")


def render(run: RunData) -> str:
  """The page as text."""
  environment = jinja2.Environment(
      autoescape=True,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
  )
  template = (
      importlib.resources.files("rlhf_jax.evaluation")
      .joinpath("report.html")
      .read_text("utf-8")
  )
  return environment.from_string(template).render(
      run=run,
      sentences=headline.sentences(run),
      quantities=headline.QUANTITIES,
      columns=headline.columns(run.evaluation) if run.evaluation else [],
      parts=report_sections.parts_table(run.evaluation),
      headline_panels=report_sections.headline_panels(run),
      sections=report_sections.sections(run),
      completions=completion_groups(run),
      other_metrics=report_sections.other_metrics(run),
      config=flatten(run.config or {}),
      policy_label=policy_label,
      clock=headline.clock,
      css_colors=figure_style.CSS_COLORS,
  )


def flatten(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
  """{stage: {dotted field: value}}; fields outside any stage under ''."""
  flat: dict[str, dict[str, str]] = {}
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      flat[str(name)] = dict(_leaves(value, ""))
    else:
      flat.setdefault("", {})[str(name)] = str(value)
  return flat


def _leaves(value: Any, path: str):
  if isinstance(value, Mapping) and value:
    for name, each in value.items():
      yield from _leaves(each, f"{path}.{name}" if path else str(name))
  else:
    yield path, str(value)
