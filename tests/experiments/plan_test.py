"""Plans: what they say, that measuring agrees, and refusals."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

from ml_collections import ConfigDict
import pytest

from configs import ppo as ppo_config
from experiments import plan as binary
from experiments import ppo
from experiments.harness import (
    devices,
    plan_report,
    plan_sweep,
    planner,
)
from experiments.harness.config import from_config
from experiments.harness.planner import Target
from rlhf_jax import device_mesh
from rlhf_jax.planning import cache, topologies

REPO = pathlib.Path(__file__).resolve().parents[2]
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False,
    "tie_word_embeddings": False,
}


def write_shape(folder: pathlib.Path, **changes) -> str:
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(SHAPE | changes))
  return f"hf:{folder}"


def small(place: str, **mesh: int) -> ConfigDict:
  """PPO's smoke config for a model that is a config.json."""
  config = ppo_config.get_config("smoke")
  config.init_from = config.reward_model = place
  config.rollout_batch_size = 16
  config.ppo.update(num_epochs=1, num_minibatches=1)
  config.mesh.update(mesh)
  return config


@pytest.fixture
def target() -> Target:
  """The simulated devices, as chips of 1 GiB with v5e's figures."""
  found = binary.make_target("")
  chip = next(x for x in binary.chips.CHIPS if x.name == "v5e")
  return dataclasses.replace(found, chip=chip, memory_bytes=2.0**30)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("cache")


def make_plan(config: ConfigDict, target, cache_dir) -> planner.Plan:
  built = from_config(ppo.Config, config)
  mesh = device_mesh.make_mesh(built.mesh, target.devices)
  return planner.make_plan(built, mesh, target, cache_dir)


def test_a_plan_of_the_real_programs(tmp_path, target, cache_dir, monkeypatch):
  config = small(write_shape(tmp_path / "model"), fsdp=4, tensor=2)
  plan = make_plan(config, target, cache_dir)
  assert [x.name for x in plan.programs] == [
      "rollout", "reward", "score", "update"
  ]
  assert plan.fits and plan.num_chips == 8
  by_name = {x.name: x for x in plan.programs}
  update = by_name["update"]
  # Params and two moments of two models, most of it split over 8 devices; the
  # state is donated, so that little is put out beside it.
  assert plan.residents["state"] == pytest.approx(update.arguments, rel=0.05)
  assert update.outputs < 0.01 * update.arguments
  assert update.temporaries > 0
  # While it runs the other two models are there too.
  others = plan.residents["ref_params"] + plan.residents["reward_params"]
  assert update.others >= others
  # Weights are gathered over one axis; heads and feed-forward meet over the
  # other.
  assert update.sent["fsdp"] > 0 and update.sent["tensor"] > 0
  assert by_name["rollout"].sent["fsdp"] > 0
  assert plan.seconds == sum(x.roofline.seconds for x in plan.programs)
  # What was compiled is not compiled again.
  monkeypatch.setattr(
      cache.memory, "compile_program", lambda _: pytest.fail("compiled again")
  )
  assert make_plan(config, target, cache_dir) == plan
  text = plan_report.report(
      plan, "tiny", from_config(ppo.Config, config), 1_600
  )
  assert "Fits" in text and "days for 1,600 episodes" in text
  assert "mesh fsdp 4, tensor 2" in text
  # A smaller chip: a refusal that says what, by how much and what to do.
  small_chip = dataclasses.replace(target, memory_bytes=2.0**20)
  plan = make_plan(config, small_chip, cache_dir)
  assert not plan.fits
  text = plan_report.report(
      plan, "tiny", from_config(ppo.Config, config), 1_600
  )
  for part in (
      "Does not fit.", "GiB too much", "num_microbatches=2",
      "compute.remat=True", "lora.rank", "more chips", "- ref_params/",
  ):
    assert part in text, part


def test_what_the_compiler_refuses_is_told_with_its_numbers(
    tmp_path, target, cache_dir, monkeypatch
):
  message = (
      "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
      "(23.5G) exceeds available HBM (15.75G)."
  )

  def refuse(lowered):
    raise cache.TooLarge(message)

  monkeypatch.setattr(cache.memory, "compile_program", refuse)
  config = small(write_shape(tmp_path / "model"), fsdp=2)
  for _ in range(2):  # the second time from the cache
    plan = make_plan(config, target, cache_dir / "refused")
    assert not plan.fits and plan.seconds is None
    assert {x.name for x in plan.too_large} == {x.name for x in plan.programs}
    assert plan.programs[0].temporaries == 23.5 * 2**30
    text = plan_report.report(
        plan, "tiny", from_config(ppo.Config, config), 1
    )
    assert "the compiler needs 23.5 GiB a chip" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": {"num_slots": 8}}, "num_slots=8: .* set it to 0"),
        (
            {"samples": {"num_cache_buckets": 2}},
            "num_cache_buckets=2: .* set it to 1",
        ),
        ({"fuse_iteration": True}, "fuse_iteration=True"),
        (
            {
                "samples": {"rollout_weights": "int8"},
                "ppo": {"importance_correction": True},
            },
            "rollout_weights='int8'",
        ),
    ],
)
def test_what_has_no_plan_is_refused(tmp_path, changes, message):
  config = small(write_shape(tmp_path / "model"))
  config.update(changes)
  options = binary.Options(
      topology="",
      num_episodes=0,
      workdir=str(tmp_path),
      cache_dir=str(tmp_path),
      sweep_meshes=False,
      sweep_limit=0,
      measure=False,
  )
  with pytest.raises(binary.cli.UserError, match=message):
    binary.write_plan(config, "tiny", options)


def test_another_program_is_not_found_in_the_cache(tmp_path, target):
  config = from_config(ppo.Config, small(write_shape(tmp_path / "model")))
  mesh = device_mesh.make_mesh(config.mesh, target.devices)
  programs = lambda config: planner.plan_programs.make_iteration(
      config, mesh
  ).programs
  key = lambda program, name: cache.key(program.lower(), name)
  before = programs(config)[1]
  assert key(before, "a") == key(programs(config)[1], "a")
  assert key(before, "a") != key(before, "b")
  longer = dataclasses.replace(config.samples, max_completion_length=33)
  after = programs(dataclasses.replace(config, samples=longer))[1]
  assert key(after, "a") != key(before, "a")


@pytest.mark.skipif(
    not os.environ.get("RLHF_JAX_ALL_MESHES"),
    reason="RLHF_JAX_ALL_MESHES is not set: compiles four programs a mesh",
)
def test_a_sweep_ranks_all_meshes_of_four_devices(
    tmp_path, target, cache_dir
):
  target = dataclasses.replace(target, devices=target.devices[:4])
  # Two key-value heads are not four: that rules a mesh out.
  place = write_shape(
      tmp_path / "model", num_attention_heads=2, num_hidden_layers=1
  )
  config = from_config(ppo.Config, small(place))
  found = plan_sweep.sweep(config, target, cache_dir, limit=2)
  assert len(found) == len(list(plan_sweep.meshes(4))) == 10
  planned = [x.plan for x in found if x.plan]
  assert len(planned) == 2
  assert planned[0].seconds <= planned[1].seconds
  why_not = {str(x.mesh): x.why_not for x in found if not x.plan}
  assert "does not divide" in why_not["mesh {tensor: 4}"]
  assert "not among the first 2" in why_not.values()
  text = plan_sweep.report(found, "Meshes")
  assert text.index(plan_report.mesh_name(planned[0].mesh)) < text.index(
      plan_report.mesh_name(planned[1].mesh)
  )
  # Where models alone are too large nothing is compiled.
  tiny = dataclasses.replace(target, memory_bytes=1_000)
  found = plan_sweep.sweep(config, tiny, cache_dir / "none", limit=0)
  assert not any(x.plan for x in found)
  assert not (cache_dir / "none").exists()
  assert "No mesh fits" in plan_sweep.report(found, "Meshes")


def run_binary(*args: str, num_devices: int = 1) -> subprocess.CompletedProcess:
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
  }
  return subprocess.run(
      [sys.executable, "-m", "experiments.plan", *args],
      cwd=REPO, env=env, capture_output=True, text=True, timeout=1200,
      check=False,
  )


def test_predicted_bytes_are_those_that_are_measured(tmp_path):
  # Short rows and few tokens: for attention's scores and for logits the matrix
  # library of CPUs takes scratch of their size, which no compiler lays out.
  place = write_shape(
      tmp_path / "model", hidden_size=256, intermediate_size=1024,
      num_key_value_heads=4,
  )
  done = run_binary(
      "--config=configs/ppo.py:smoke",
      f"--config.init_from={place}",
      f"--config.reward_model={place}",
      "--config.rollout_batch_size=512",
      "--config.samples.max_prompt_length=24",
      "--config.samples.max_completion_length=16",
      "--config.ppo.num_epochs=1",
      "--config.ppo.num_minibatches=1",
      "--config.compute.remat=True",
      f"--workdir={tmp_path / 'plans'}",
      f"--cache_dir={tmp_path / 'cache'}",
  )
  assert done.returncode == 0, done.stderr
  rows = re.findall(r"^\| (\w+) .* ([+-][\d.]+)% \|$", done.stdout, re.M)
  off = {name: float(percent) for name, percent in rows}
  assert set(off) == {"rollout", "reward", "score", "update"}
  assert all(abs(percent) < 10 for percent in off.values()), off
  [written] = (tmp_path / "plans").glob("*.json")
  assert json.loads(written.read_text())["programs"][0]["name"] == "rollout"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--topology=v7x:2x2"], "v7x:2x2"),
        (["--topology=v5e:2x2x2"], "2 dimensions"),
        (["--config.mesh.data=3"], "3 devices"),
        (["--config.init_from=hf:/no/such"], "/no/such"),
    ],
)
def test_what_the_user_can_mend_is_a_message(args, message, tmp_path):
  done = run_binary(
      "--config=configs/ppo.py:smoke", f"--workdir={tmp_path}", *args
  )
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_a_config_is_checked_for_the_slice_and_not_for_what_is_here():
  config = ppo_config.get_config("llama3_8b")
  config.mesh.update(tensor=4)
  with devices.planned_for(64):
    built = from_config(ppo.Config, config)
    assert built.mesh.sizes(64)["fsdp"] == 16
    config.mesh.update(tensor=3)
    with pytest.raises(ValueError, match="64 devices do not divide"):
      from_config(ppo.Config, config)


def test_a_plan_for_tpus_that_are_not_here(tmp_path, cache_dir):
  pytest.importorskip("libtpu", reason="libtpu compiles for TPUs")
  target = binary.make_target("v5e:2x2")
  assert target.chip.name == "v5e" and len(target.devices) == 4
  config = small(write_shape(tmp_path / "model"))
  config.mesh.update(fsdp=2, tensor=2)
  plan = make_plan(config, target, cache_dir)
  assert plan.fits and plan.seconds > 0
  # Its text does not say how often loops run: it is read from conditions.
  here = make_plan(config, binary.make_target(""), cache_dir)
  for there, on_cpu in zip(plan.programs, here.programs, strict=True):
    assert there.flops == on_cpu.flops
    assert set(there.sent) & {"fsdp", "tensor"}


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(
      topologies.importlib.util, "find_spec", lambda name: None
  )
  with pytest.raises(topologies.TopologyError, match=r"rlhf_jax\[tpu\]"):
    binary.make_target("v5e-64")
