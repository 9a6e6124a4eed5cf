"""One run as several real processes, on one machine with gloo collectives."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.experiments import tiny
from tests.faults import own_part

NUM_DEVICES = 4


@pytest.fixture(scope="module")
def settings(finished_run, tmp_path_factory):
  """binary, loop -> a config file, over four devices."""

  def make(binary, **loop):
    config = tiny.stage(binary, finished_run)
    stage = config.train if binary == "sft" else config
    stage.mesh.fsdp, stage.mesh.data = 2, 2
    stage.loop.update(tiny.loop(**loop) | dict(best_metric=""))
    return tiny.write_config(tmp_path_factory.mktemp(binary) / "c.py", config)

  return make


class Run:
  """Processes that share four devices; with one, a run as of old."""

  def __init__(self, binary, config, workdir, num, timeout=60):
    self.workdir = pathlib.Path(workdir)
    self.logs = [
        self.workdir.with_name(f"{self.workdir.name}_{num}_{i}.log")
        for i in range(num)
    ]
    joined = [
        "--distributed",
        f"--coordinator_address=localhost:{_free_port()}",
        f"--num_processes={num}",
        f"--heartbeat_timeout_seconds={timeout}",
    ]
    devices = f"--xla_force_host_platform_device_count={NUM_DEVICES // num}"
    self.processes = []
    for i, log in enumerate(self.logs):
      flags = [*joined, f"--process_id={i}"] if num > 1 else []
      with log.open("w") as f:
        self.processes.append(
            subprocess.Popen(
                tiny.command(binary, config, workdir, *flags),
                cwd=tiny.REPO,
                env=tiny.environment() | {"XLA_FLAGS": devices},
                stdout=f,
                stderr=f,
            )
        )

  def log(self, i) -> str:
    return self.logs[i].read_text()

  def wait(self, seconds=600) -> list[int]:
    """The exit codes."""
    end = time.monotonic() + seconds
    try:
      return [
          x.wait(timeout=max(0.1, end - time.monotonic()))
          for x in self.processes
      ]
    finally:
      for process in self.processes:
        process.kill()
        process.wait()

  def wait_for_step(self, step) -> None:
    path = self.workdir / "metrics.jsonl"
    end = time.monotonic() + 600
    while time.monotonic() < end:
      lines = path.read_text().split("\n")[:-1] if path.exists() else []
      if lines and json.loads(lines[-1])["step"] >= step:
        return
      assert all(x.poll() is None for x in self.processes), self.log(0)
      time.sleep(0.01)
    raise AssertionError(self.log(0))


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def finish(*args) -> pathlib.Path:
  """Runs processes to their end."""
  run = Run(*args)
  codes = run.wait()
  assert not any(codes), run.log(codes.index(max(codes, key=abs)))
  return run.workdir


def assert_close(found: pathlib.Path, wanted: pathlib.Path) -> None:
  a, b = tiny.last_checkpoint(found), tiny.last_checkpoint(wanted)
  assert a.keys() == b.keys()
  for name, array in a.items():
    np.testing.assert_allclose(array, b[name], atol=1e-5, err_msg=name)
  a, b = tiny.model_arrays(found), tiny.model_arrays(wanted)
  for name, array in a.items():
    np.testing.assert_allclose(array, b[name], atol=1e-5, err_msg=name)


def _moved(workdir: pathlib.Path, start: pathlib.Path) -> bool:
  """Whether training changed the params at all."""
  a, b = tiny.model_arrays(workdir), tiny.model_arrays(start)
  return all((a[name] != b[name]).any() for name in a if name in b)


@pytest.mark.parametrize("binary", ["ppo", "sft", "reward"])
def test_processes_change_nothing(binary, settings, finished_run, tmp_path):
  config = settings(binary, num_steps=2)
  one = finish(binary, config, tmp_path / "one", 1)
  if binary != "reward":
    start = "sft" if binary == "ppo" else "pretrain"
    assert _moved(one, finished_run / start)
  for num in (2, 4) if binary == "ppo" else (2,):
    several = finish(binary, config, tmp_path / f"several{num}", num)
    assert_close(several, one)
    # Process 0 alone writes: nothing is there twice.
    for name in ("metrics.jsonl", "samples.jsonl", "timing.jsonl"):
      if (one / name).exists():
        a, b = (tiny.read_jsonl(x / name) for x in (several, one))
        assert [x["step"] for x in a] == [x["step"] for x in b]
    assert _names(several) == _names(one)


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


_PIECES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from experiments.harness import hosts, stage
from experiments.harness.fingerprint import fingerprint
from rlhf_jax import device_mesh
from rlhf_jax.rewards import episodes
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.types import Rollout
from tests.faults import own_part

class Tokenizer:  # a token is a number
  def decode_batch(self, tokens, mask, **how):
    return [" ".join(map(str, row)) for row in tokens.tolist()]

address, num, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with hosts.joined(hosts.Hosts(
    coordinator_address=address, num_processes=num, process_id=index,
    heartbeat_timeout_seconds=60)):
  n = jax.device_count()
  whole = np.arange(12 * n * 3, dtype=np.float32).reshape(12 * n, 3)
  for sizes in (dict(data=-1), dict(fsdp=-1, tensor=2), dict(tensor=-1)):
    mesh = device_mesh.make_mesh(MeshConfig(**sizes))
    mine = device_mesh.local_rows(mesh, 12 * n)
    assert len(mine) == 12 * n // (1 if "data" not in sizes and
                                   "fsdp" not in sizes else num), sizes
    x = device_mesh.shard_rows({"x": whole[mine]}, mesh)["x"]
    assert x.shape == whole.shape and not x.is_fully_addressable
    assert (device_mesh.to_host(x) == whole).all()
    assert float(jax.jit(jnp.sum)(x)) == whole.sum()
    assert fingerprint(x) == fingerprint(whole)
    key = device_mesh.replicate(jax.random.key(3), mesh)
    assert jax.random.uniform(key) == jax.random.uniform(jax.random.key(3))
  mesh = device_mesh.make_mesh(MeshConfig(data=-1))
  ids = np.arange(12 * n * 2, dtype=np.int32).reshape(12 * n, 2)
  rollout = device_mesh.shard_rows(jax.tree.map(
      lambda x: x[device_mesh.local_rows(mesh, 12 * n)],
      Rollout(prompts=ids, prompt_mask=ids, completions=ids + 1,
              completion_mask=ids, logprobs=ids.astype(np.float32),
              ended=ids[:, 0] > 0)), mesh)
  calls = []
  def rule(prompt, completion):
    calls.append(prompt)
    return float(prompt.split()[0]) + float(completion.split()[1])
  score = episodes.make_rule_reward(rule)(
      episodes.Episodes(rollout, Tokenizer()))
  assert (score == ids[:, 0] + ids[:, 1] + 1).all(), score
  assert len(calls) == 12 * n // num
  # A number of rows that does not divide: the first are scored twice.
  odd = jax.tree.map(lambda x: np.asarray(x)[:7], device_mesh.to_host(rollout))
  score = episodes.make_rule_reward(rule)(episodes.Episodes(odd, Tokenizer()))
  assert (score == (ids[:, 0] + ids[:, 1] + 1)[:7]).all(), score
  own_part.check_read_anew(episodes.Episodes(odd, Tokenizer()), num)
  np.savez(sys.argv[4], **own_part.encoded())
  print("failure", own_part.failure(index, num))
  print("others", own_part.other_records(index))
  stage.barrier("done")
print("well")
"""


@pytest.mark.parametrize("num", [2, 3])
def test_rows_scores_texts_and_hashes_are_of_all_processes(num, tmp_path):
  address = f"localhost:{_free_port()}"
  env = tiny.environment() | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
  }
  processes = [
      subprocess.Popen(
          [
              *(sys.executable, "-c", _PIECES, address, str(num), str(i)),
              str(tmp_path / f"{i}.npz"),
          ],
          cwd=tiny.REPO,
          env=env,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
      )
      for i in range(num)
  ]
  logs = [process.communicate(timeout=300)[0] for process in processes]
  for process, log in zip(processes, logs):
    assert process.returncode == 0 and "well" in log, log
  _check_own_parts([np.load(tmp_path / f"{i}.npz") for i in range(num)])
  for i, log in enumerate(logs):
    told = f"process {num - 1} of {num} could not encode its part of the texts"
    told = "failure " + (f"OwnPartError: {told}: " if i < num - 1 else "")
    assert f"{told}ValueError: text 0 holds a lone surrogate" in log
    assert log.count("All processes must see the same files") == 2


def _check_own_parts(found) -> None:
  """All have the arrays of one process, and each encoded its part of them."""
  for name, wanted in own_part.encoded().items():
    arrays = [x[name] for x in found]
    if not name.endswith("/texts"):
      for array in arrays:
        np.testing.assert_array_equal(array, wanted, err_msg=name)
        assert array.dtype == wanted.dtype, name
      continue
    assert wanted >= len(own_part.TEXTS), name
    # Rankings of several lengths part here and there from their prompt.
    most = 1.2 * wanted if name.startswith("rankings") else wanted
    assert max(arrays) <= most / len(found) + 4, name
    assert wanted <= sum(arrays) <= most, name


def test_processes_write_one_report(finished_run, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(finished_run, run)
  shutil.rmtree(run / "evaluate")
  for name in ("finished.json", "report.html"):
    (run / name).unlink()
  settings = tiny.pipeline()
  for stage in (settings.pretrain.train, settings.sft.train):
    stage.mesh.data = -1
  for stage in (settings.reward, settings.ppo):
    stage.mesh.data = -1
  path = tiny.write_config(tmp_path / "config.py", settings)
  finish("rlhf", path, run, 2)
  assert (run / "report.html").stat().st_size > 0
  for name in ("evaluate", "."):
    assert (run / name / "finished.json").exists()
  rows = tiny.read_jsonl(run / "evaluate" / "completions.jsonl")
  wanted = tiny.read_jsonl(finished_run / "evaluate" / "completions.jsonl")
  assert [x["completion"] for x in rows] == [x["completion"] for x in wanted]


# ---- One of them is gone -----------------------------------------------------

TIMEOUT = 15


def _whole_and_killed(settings, tmp_path, victim):
  config = settings("sft", num_steps=60, checkpoint_every=5, eval_every=60)
  whole = finish("sft", config, tmp_path / "whole", 2)
  run = Run("sft", config, tmp_path / "run", 2, TIMEOUT)
  run.wait_for_step(12)
  run.processes[victim].send_signal(signal.SIGKILL)
  start = time.monotonic()
  code = run.processes[1 - victim].wait(timeout=4 * TIMEOUT)
  seconds = time.monotonic() - start
  run.wait()
  assert code not in (0, None)
  return config, whole, run, seconds


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others_which_say_who(
    settings, tmp_path, victim
):
  config, whole, run, seconds = _whole_and_killed(settings, tmp_path, victim)
  log = run.log(1 - victim)
  # Time for a slow machine to get to know that what it waits for has happened.
  assert seconds < TIMEOUT + 5, log
  if victim:
    assert re.search(r"error: missing: process 1 of 2 \(\S+, pid \d+\)", log)
  else:
    assert re.search(
        r"process 0 of 2, the coordinator at localhost:\d+, is not there|"
        "the leader task was preempted/died",
        log,
    ), log
  # And the same command goes on, bitwise.
  resumed = finish("sft", config, tmp_path / "run", 2)
  tiny.assert_bitwise(
      tiny.last_checkpoint(resumed), tiny.last_checkpoint(whole)
  )
  tiny.assert_bitwise(tiny.model_arrays(resumed), tiny.model_arrays(whole))
  found, wanted = (x / "metrics.jsonl" for x in (resumed, whole))
  assert found.read_bytes() == wanted.read_bytes()


def test_a_signal_to_one_stops_all_at_one_step(settings, tmp_path):
  config = settings("sft", num_steps=200, checkpoint_every=200, eval_every=200)
  run = Run("sft", config, tmp_path / "run", 2)
  run.wait_for_step(8)
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [0, 0], run.log(0) + run.log(1)
  steps = [
      re.search(r"stopped by SIGTERM at step (\d+) of 200", run.log(i))[1]
      for i in range(2)
  ]
  assert steps[0] == steps[1] and int(steps[0]) >= 8
  folder = run.workdir / "checkpoints" / f"step_{int(steps[0]):08d}"
  assert folder.is_dir()
  # One process goes on with what two have saved.
  finish("sft", config, run.workdir, 1)
  assert_close(
      run.workdir, finish("sft", config, tmp_path / "whole", 1)
  )


def test_a_run_of_several_is_refused_where_another_is(settings, tmp_path):
  config = settings("sft", num_steps=2)
  code = (
      "import sys, time; from experiments.harness import lock;"
      " held = lock.hold(sys.argv[1]); print('held', flush=True);"
      " time.sleep(600)"
  )
  holder = subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path / "run")],
      cwd=tiny.REPO,
      stdout=subprocess.PIPE,
      text=True,
  )
  try:
    assert holder.stdout.readline() == "held\n"
    run = Run("sft", config, tmp_path / "run", 2)
    codes = run.wait()
  finally:
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
  assert codes == [1, 1], run.log(0) + run.log(1)
  assert run.log(0).count("error: ") == 1
  for i in range(2):
    assert f"is in use by process {holder.pid}" in run.log(i)


def test_flags_of_several_processes_need_distributed(settings, tmp_path):
  config = settings("sft", num_steps=2)
  tiny.assert_one_message(
      tiny.call("sft", config, tmp_path / "run", "--num_processes=2"),
      "--num_processes: give --distributed too",
  )
  tiny.assert_one_message(
      tiny.call("sft", config, tmp_path / "run", "--distributed"),
      "--coordinator_address=HOST:PORT",
  )
