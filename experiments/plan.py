r"""Says what a run of PPO will take, before any chip is booked.

    python -m experiments.plan --config=configs/ppo.py:llama3_8b \
        --topology=v5e:8x8

Compiles the programs of an iteration (rollout, the reward model's score, score,
update) for a slice that need not be there, and prints and writes for each:
bytes a chip against its memory, matmul FLOPs, bytes that chips send, the
roofline's time; then tokens a second and days for --num_episodes. Models need
their config.json and no weights. What does not fit ends in a refusal that says
what to change, and exit code 1.

--topology=v5e:8x8, or by Cloud's name v5e-64, needs the extra `tpu`. Without it
the plan is for the devices here, and is then run once and measured (--measure).
--sweep_meshes plans all meshes of the slice and ranks those that fit; what was
compiled is kept in --cache_dir.
"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags
import jax
from ml_collections import config_flags

from experiments import ppo
from experiments.harness import (
    cli,
    devices,
    plan_measure,
    plan_report,
    plan_sweep,
    planner,
)
from experiments.harness import config as config_lib
from experiments.harness.planner import Plan, Target
from rlhf_jax import device_mesh
from rlhf_jax.planning import cache, chips, topologies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the flags say; see `launch`."""

  topology: str
  num_episodes: int
  workdir: str
  cache_dir: str
  sweep_meshes: bool
  sweep_limit: int
  measure: bool


def launch() -> None:
  """Defines the flags, which other binaries have too, and runs."""
  config = config_flags.DEFINE_config_file("config", None, "The config of PPO.")
  flags.DEFINE_string(
      "topology", "", "A slice of TPUs, v5e:8x8 or v5e-64; '' for what is here."
  )
  flags.DEFINE_integer(
      "num_episodes", 0, "That days are for; 0 for all of the config's."
  )
  flags.DEFINE_string(
      "workdir", "runs/plans", "Where plans go, by config and topology."
  )
  flags.DEFINE_string(
      "cache_dir", str(cache.FOLDER), "Where what was compiled is kept."
  )
  flags.DEFINE_bool("sweep_meshes", False, "Plan all meshes.")
  flags.DEFINE_integer(
      "sweep_limit", 0, "Compile so many meshes at the most; 0 for all."
  )
  flags.DEFINE_bool("measure", True, "Run and measure a plan for what is here.")
  flags.mark_flag_as_required("config")

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
    cli.quiet_third_parties()
    options = Options(**{
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(Options)
    })
    with cli.told_errors():
      sys.exit(0 if write_plan(config.value, _name(), options) else 1)

  app.run(main, flags_parser=cli.parse_flags)


def _name() -> str:
  """'ppo_llama3_8b': the config file and its mini-argument."""
  # absl takes --config=X and --config X.
  place = config_flags.get_config_filename(flags.FLAGS["config"])
  path, *rest = place.split(":", 1)
  return "_".join([pathlib.Path(path).stem, *rest])


def write_plan(raw_config, name: str, options: Options) -> bool:
  """Prints and writes a plan, or a sweep; whether something fits."""
  try:
    target = make_target(options.topology)
    with devices.planned_for(len(target.devices)):
      config = config_lib.from_config(ppo.Config, raw_config)
    if config.samples.num_slots:
      raise config_lib.ConfigError(
          f"samples.num_slots={config.samples.num_slots}: how often slots are "
          "refilled depends on when completions end, so there is no plan of "
          "it; set it to 0"
      )
    if config.fuse_iteration or config.samples.rollout_weights != "compute":
      raise config_lib.ConfigError(
          f"fuse_iteration={config.fuse_iteration}, samples.rollout_weights="
          f"{config.samples.rollout_weights!r}: a plan is of programs apart "
          "and of weights as they are; set False and 'compute'"
      )
    if config.samples.num_cache_buckets > 1:
      raise config_lib.ConfigError(
          f"samples.num_cache_buckets={config.samples.num_cache_buckets}: a "
          "plan counts the steps of one loop over a whole cache; set it to 1"
      )
    cache_dir = pathlib.Path(options.cache_dir)
    folder = pathlib.Path(options.workdir)
    there = target.name.replace(":", "-").replace(" ", "")
    place = folder / f"{name}_{there}"
    if options.sweep_meshes:
      found = plan_sweep.sweep(
          config, target, cache_dir, options.sweep_limit
      )
      text = plan_sweep.report(found, f"Meshes of {target.name} for {name}")
      _write(place.with_name(place.name + "_meshes"), text, found)
      return any(x.plan for x in found)
    mesh = device_mesh.make_mesh(config.mesh, target.devices)
    plan = planner.make_plan(config, mesh, target, cache_dir)
  except ValueError as error:
    # Sizes that do not divide over the mesh, no such topology.
    raise cli.UserError(str(error)) from error
  num_episodes = options.num_episodes or (
      config.loop.num_steps * config.rollout_batch_size
  )
  text = plan_report.report(plan, name, config, num_episodes)
  if options.measure and not options.topology and plan.fits:
    text += "\n" + measured_table(plan_measure.measure(config, mesh, plan))
  _write(place, text, plan)
  return plan.fits


def make_target(topology: str) -> Target:
  """What is planned for, '' for what is here.

  Raises:
    TopologyError: there is no such slice, or no libtpu.
  """
  if topology:
    name = topologies.full_name(topology)
    there = topologies.make_devices(name)
  else:
    there = jax.devices()
    name = f"{len(there)} x {there[0].device_kind}"
  chip = chips.chip_of(there[0].device_kind)
  memory_bytes = chip and chip.memory_bytes
  if not topology and (stats := there[0].memory_stats()):
    # What the allocator was given is less than the chip has.
    memory_bytes = stats["bytes_limit"]
  return Target(
      name=name, devices=there, chip=chip, memory_bytes=memory_bytes
  )


def measured_table(found: list[plan_measure.Measured]) -> str:
  """Predicted beside measured."""
  rows = [
      [
          x.name,
          plan_report.gib(x.predicted),
          plan_report.gib(x.measured),
          f"{x.error:+.1%}",
      ]
      for x in found
  ]
  header = ("measured here", "predicted GiB", "measured GiB", "off by")
  return plan_report.table(header, rows) + "\n"


def _write(place: pathlib.Path, text: str, data) -> None:
  print(text)
  place.parent.mkdir(parents=True, exist_ok=True)
  place.with_name(place.name + ".md").write_text(text, encoding="utf-8")
  data = [_plain(x) for x in data] if isinstance(data, list) else _plain(data)
  place.with_name(place.name + ".json").write_text(
      json.dumps(data, indent=2) + "\n", encoding="utf-8"
  )
  print(f"Written to {place}.md and .json")


def _plain(x: Plan | plan_sweep.Tried) -> dict:
  return dataclasses.asdict(x)


if __name__ == "__main__":
  launch()
