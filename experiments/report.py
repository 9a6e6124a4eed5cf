"""Writes the report of a run, whatever state the run is in.

    python -m experiments.report --run=runs/first

`experiments.rlhf` does the same when it ends; this is for a run that goes on,
that died half-way, or whose stages were run one by one. Writes
DIR/report.html in place of an earlier one and prints its headline.
"""

from absl import app, flags

from experiments.harness import cli

_RUN = flags.DEFINE_string("run", None, "The run's workdir.")
flags.mark_flag_as_required("run")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
  # Only now: a wrong flag need not wait for matplotlib.
  from rlhf_jax.evaluation import report  # pylint: disable=g-import-not-at-top

  with cli.told_errors():
    path = report.write_report(_RUN.value)
    print(report.summary_text(_RUN.value))
    print(f"\nreport: {path}")


if __name__ == "__main__":
  app.run(main)
