r"""Measures how fast this machine trains and samples, and how fast it could.

    python -m experiments.benchmark --config=configs/benchmark.py:small \
        --out=small.jsonl

Runs every measure of the config after a warm-up, prints a table and writes a
line of JSON a figure: median, least and most of the repeats, compilations and
their seconds, peak memory, and the floor that this machine's own matmuls and
memory set, measured in the same run (`harness/benchmark_limits.py`). In the
table "share" is the floor's of the median, "matmul" and "copy" those of either
limit alone, and "again" what was compiled after the warm-up, which should be
nothing.

    generation   new tokens/s, whole; prompts alone; the new tokens alone, which
                 is the difference of the two
    sft          tokens/s of a supervised step
    reward, dpo  pairs/s of a reward step, and of a policy's against a reference
    ppo          seconds of an iteration: whole, and rollout, score and update
    startup      seconds from a process's start to its first finished iteration,
                 with an empty compilation cache and with the one it left

--peer runs the same work by other libraries too, in turns with ours;
--peer_python names Pythons that have what this one has not, --only_peers some
of them by parts of their names. --compare=old.json tells what became slower
than the noise of both, and ends with exit code 1 if anything did.

On a GPU jax takes memory as it needs it, unless XLA_PYTHON_CLIENT_PREALLOCATE
says otherwise: other processes, peers' and startup's, need some too.
"""

import dataclasses
import datetime
import gc
import os
import pathlib
import platform
import sys
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from experiments.harness import (
    benchmark_peers,
    benchmark_ppo,
    benchmark_programs,
    benchmark_report,
    benchmark_start,
    cli,
    stage,
)
from experiments.harness import config as config_lib
from experiments.harness.benchmark_config import MEASURES, Config
from experiments.harness.benchmark_limits import Limits
from experiments.harness.benchmark_peers import PeerError, Worker
from experiments.harness.benchmark_report import Line
from experiments.harness.benchmark_start import StartError
from experiments.harness.benchmark_timing import (
    Compilations,
    Measure,
    Part,
    PeakMemory,
)

_MAKERS = dict(
    zip(
        MEASURES,
        (
            benchmark_programs.generation,
            benchmark_programs.supervised,
            benchmark_programs.reward_step,
            benchmark_programs.dpo_step,
            benchmark_ppo.iteration,
            benchmark_start.startup,
        ),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the flags say; see `launch`."""

  peer: bool = False
  peer_python: tuple[str, ...] = ()
  only_peers: tuple[str, ...] = ()
  compare: str = ""
  out: str = ""


def launch() -> None:
  """Defines the flags and runs."""
  config = config_flags.DEFINE_config_file(
      "config", None, "configs/benchmark.py and a size."
  )
  peer = flags.DEFINE_bool("peer", False, "Measure other libraries too.")
  peer_python = flags.DEFINE_list(
      "peer_python", [], "Other Pythons, for what this one has not installed."
  )
  only_peers = flags.DEFINE_list(
      "only_peers", [], "Parts of the names of some peers, for these alone."
  )
  compare = flags.DEFINE_string("compare", "", "An older result's file.")
  out = flags.DEFINE_string("out", "", "Where lines of JSON go; '' for none.")
  flags.mark_flag_as_required("config")

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
    cli.quiet_third_parties()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = Options(
        peer=peer.value,
        peer_python=tuple(peer_python.value),
        only_peers=tuple(only_peers.value),
        compare=compare.value,
        out=out.value,
    )
    with cli.told_errors():
      built = config_lib.from_config(Config, config.value)
      try:
        is_slower = benchmark(built, options)
      except (benchmark_report.CompareError, PeerError, StartError) as error:
        raise cli.UserError(str(error)) from error
    sys.exit(1 if is_slower else 0)

  app.run(main, flags_parser=cli.parse_flags)


def benchmark(config: Config, options: Options) -> bool:
  """Measures all, writes and prints; whether something became slower.

  Raises:
    StartError: a measure of ours failed; the others are written and printed.
  """
  # Before anything is measured: what is wrong must not cost the run.
  context = machine()
  old = []
  if options.compare:
    old = benchmark_report.read_lines(options.compare)
    benchmark_report.check_comparable(
        old, config.size, config.measures, context["device"]
    )
  pythons = None
  if options.peer:
    pythons = benchmark_peers.pythons(options.peer_python)
    benchmark_peers.check_names(options.only_peers)
  elif options.only_peers or options.peer_python:
    raise PeerError("--only_peers and --peer_python need --peer: give it too")
  compilations = Compilations()
  limits = Limits(config.model.dtype, config.copy_mib)
  lines, rows = [], []
  out = pathlib.Path(options.out) if options.out else None
  if out:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("", encoding="utf-8")
  for name in config.measures:
    logging.info("benchmark: %s %s", config.size, name)
    try:
      found = measure(
          name, config, limits, compilations, pythons, options.only_peers
      )
    except StartError as error:
      # What the others have measured is not lost.
      found = [benchmark_report.unmeasured(config.size, name, str(error))]
    lines += found
    rows += [benchmark_report.as_json(x, context) for x in found]
    if out:
      # A long run that is cut short has told what it knew.
      out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    gc.collect()
  print(_title(config, context))
  print(benchmark_report.table(lines))
  ours = [x for x in lines if x.by == benchmark_report.OURS]
  failed = [x.name for x in ours if x.skipped]
  if failed:
    raise StartError(f"not measured: {', '.join(failed)}; see the table")
  if not options.compare:
    return False
  new = [dataclasses.asdict(x) | context for x in lines]
  slower = benchmark_report.slower(old, new)
  for told in slower:
    print(f"slower: {told}")
  if not slower:
    print(f"Nothing is slower than in {options.compare}.")
  return bool(slower)


def measure(
    name: str,
    config: Config,
    limits: Limits,
    compilations: Compilations,
    pythons: dict[str, dict[str, str]] | None,
    only_peers: tuple[str, ...] = (),
) -> list[Line]:
  """Lines of one measure: ours, and peers' where there are Pythons for them."""
  memory, before = PeakMemory(), (compilations.count, compilations.seconds)
  ours = _MAKERS[name](config)
  if ours.has_warmup:
    for _ in range(config.warmups):
      ours.run()
  count, seconds = compilations.since(*before)
  peers = dict(
      benchmark_peers.start(name, config, pythons, only_peers)
      if pythons
      else ()
  )
  warm = (compilations.count, compilations.seconds)
  turns = {benchmark_report.OURS: ours} | {
      peer.name: worker
      for peer, worker in peers.items()
      if isinstance(worker, Worker)
  }
  times, failed = _take_turns(turns, config.repeats)
  process = {
      "compile_seconds": seconds,
      "compilations": count,
      "compilations_after_warmup": compilations.since(*warm)[0],
      "peak_bytes": memory.bytes(),
      "peak_of": memory.kind,
  }
  if not ours.has_warmup:
    process = None  # It is other processes that are measured.
  lines = _own_lines(config, ours, times, limits, process)
  for peer, worker in peers.items():
    lines += _peer_lines(config, ours, peer, worker, times, failed)
    if isinstance(worker, Worker):
      worker.close()
  return lines


def _take_turns(
    turns: dict[str, Any], repeats: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
  """A B A B: (seconds of each by part, why some broke off)."""
  times = {name: [] for name in turns}
  failed = {}
  for repeat in range(repeats):
    for name, one in turns.items():
      if name in failed:
        continue
      try:
        times[name].append(one.run())
      except PeerError as error:
        failed[name] = f"in repeat {repeat + 1}: {error}"
  return times, failed


def _own_lines(config, ours: Measure, times, limits, process) -> list[Line]:
  own = times[benchmark_report.OURS]
  return [
      benchmark_report.make_line(
          config.size,
          benchmark_report.OURS,
          part,
          [x[part.name] for x in own],
          limits.floor(part.loads) if part.loads else None,
          process=process,
      )
      for part in ours.parts
  ]


def _peer_lines(config, ours, peer, worker, times, failed) -> list[Line]:
  parts = ours.parts
  if peer.part:
    parts = (Part(name=peer.part, unit="s", amount=None),)
  reason = failed[peer.name] if peer.name in failed else ""
  if isinstance(worker, PeerError):
    reason = str(worker)
  if reason:
    return [
        benchmark_report.skipped(config.size, peer.name, parts[0], reason)
    ]
  found = times[peer.name]
  return [
      benchmark_report.make_line(
          config.size,
          peer.name,
          part,
          [x[part.name] for x in found],
          peer_versions=worker.versions,
      )
      for part in parts
      if part.name in found[0]
  ]


# ---- where it was measured ---------------------------------------------------


def machine() -> dict[str, Any]:
  """What a reader needs to measure the same again."""
  context = stage.versions()
  device = jax.devices()[0]
  if device.platform == "cpu":
    context["device"] = f"{_processor()}, {context['cpu_cores']} cores"
  return context | {
      "platform": device.platform,
      "driver": _driver(),
      "time": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
  }


def _processor() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def _driver() -> str:
  """The graphics driver's own line, '' where there is none."""
  version = pathlib.Path("/proc/driver/nvidia/version")
  return version.read_text().splitlines()[0] if version.exists() else ""


def _title(config: Config, context: dict[str, Any]) -> str:
  shape = config.model
  return (
      f"\n{config.size}: {shape.num_layers} layers of width {shape.width}, "
      f"vocabulary {shape.vocab_size:,}, {shape.dtype}; "
      f"{config.ppo.rollout_batch_size} prompts of {config.prompt_length} and "
      f"{config.completion_length} new tokens\n{context['device']}, jax "
      f"{context['jax']}, commit {context['commit']}\n"
  )


if __name__ == "__main__":
  launch()
