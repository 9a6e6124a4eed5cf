"""Metrics: valid JSON, equal bytes after a kill and resume."""

import json
import math
import sys
import types

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import metric_writer


def _writer(workdir, tensorboard=False, wandb=False):
  return metric_writer.MetricWriter(
      workdir, tensorboard=tensorboard, wandb=wandb
  )


def _write_steps(writer, steps):
  for step in steps:
    writer.write(step, {"ppo/kl": step / 3, "ppo/score": float("nan")})
    writer.timing(step, {"seconds": 0.5})
    writer.samples(step, [{"prompt": "p", "completion": f"{step}\n"}] * 2)


def _refuse(name):
  raise AssertionError(f"{name} is not JSON")


def test_lines_are_strict_json_and_read_back_as_floats(tmp_path):
  values = {
      "nan": float("nan"), "up": jnp.inf, "down": -np.inf, "third": 1 / 3,
      "half": jnp.bfloat16(0.5), "count": np.int32(3), "zero": -0.0,
  }
  with _writer(tmp_path) as writer:
    writer.write(np.int64(7), values)
  path = tmp_path / "metrics.jsonl"
  raw = json.loads(path.read_text(), parse_constant=_refuse)
  assert raw["nan"] == "NaN"
  assert (raw["up"], raw["down"]) == ("Infinity", "-Infinity")
  [row] = metric_writer.read_metrics(path)
  assert row.pop("step") == 7
  assert math.isnan(row.pop("nan"))
  assert row == {
      "up": math.inf, "down": -math.inf, "third": 1 / 3, "half": 0.5,
      "count": 3.0, "zero": 0.0,
  }
  assert math.copysign(1, row["zero"]) == -1


@hypothesis.given(value=st.floats())
def test_every_float_comes_back_exactly(tmp_path_factory, value):
  workdir = tmp_path_factory.mktemp("run")
  with _writer(workdir) as writer:
    writer.write(0, {"x": value})
  [row] = metric_writer.read_metrics(workdir / "metrics.jsonl")
  assert np.float64(row["x"]).tobytes() == np.float64(value).tobytes() or (
      math.isnan(row["x"]) and math.isnan(value)
  )


def test_the_order_of_metrics_does_not_change_the_file(tmp_path):
  for name, order in [("a", ["x", "y"]), ("b", ["y", "x"])]:
    with _writer(tmp_path / name) as writer:
      writer.write(0, {key: 1.0 for key in order})
  a, b = [(tmp_path / n / "metrics.jsonl").read_bytes() for n in "ab"]
  assert a == b


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  writer = _writer(tmp_path)
  writer.write(0, {"x": 1.0})
  assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
  writer.close()


@pytest.mark.parametrize("restored", [-1, 0, 3, 5])
@pytest.mark.parametrize("cut", [0, 1, 20, 10**9])
def test_killed_and_resumed_files_equal_uninterrupted_ones(
    tmp_path, restored, cut
):
  with _writer(tmp_path / "whole") as writer:
    _write_steps(writer, range(8))
  with _writer(tmp_path / "killed") as writer:
    _write_steps(writer, range(6))
  for path in (tmp_path / "killed").glob("*.jsonl"):
    # The last line is cut, but never one of a step up to the restored one: a
    # checkpoint is saved after its metrics are written.
    data = path.read_bytes()
    kept = sum(
        len(line) for line in data.splitlines(keepends=True)
        if json.loads(line)["step"] <= restored
    )
    last = len(data) - len(data.splitlines(keepends=True)[-1])
    path.write_bytes(data[: max(len(data) - cut, last, kept)])
  with _writer(tmp_path / "killed") as writer:
    writer.truncate_after(restored)
    _write_steps(writer, range(restored + 1, 8))
  for name in ("metrics.jsonl", "timing.jsonl", "samples.jsonl"):
    whole = (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "killed" / name).read_bytes() == whole


def test_truncating_while_open_goes_on_in_the_same_file(tmp_path):
  with _writer(tmp_path) as writer:
    _write_steps(writer, range(4))
    writer.truncate_after(1)
    _write_steps(writer, [2])
  rows = metric_writer.read_metrics(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2]


def test_truncating_an_empty_workdir_does_nothing(tmp_path):
  with _writer(tmp_path) as writer:
    writer.truncate_after(5)
  assert not list(tmp_path.glob("*.jsonl"))


def test_reading_leaves_out_half_a_last_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "x": 1.0}\n{"step": 1, "x": 2')
  assert metric_writer.read_metrics(path) == [{"step": 0, "x": 1.0}]


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"step": null}', ""])
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
  with pytest.raises(ValueError, match="metrics.jsonl:2: not a line"):
    metric_writer.read_metrics(path)
  with _writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a line"):
      writer.truncate_after(1)


@pytest.mark.parametrize("value", [np.ones(2), "high", None, [1.0]])
def test_a_metric_that_is_not_a_scalar_is_named(tmp_path, value):
  with _writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="'ppo/kl' is not a scalar"):
      writer.write(0, {"ppo/kl": value})


def test_step_is_not_a_metric(tmp_path):
  with _writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="'step'"):
      writer.write(0, {"step": 1.0})


def test_samples_keep_any_text_and_numbers(tmp_path):
  row = {
      "prompt": "lone \ud800, NUL \0,   and \n", "score": np.float32(np.nan),
      "parts": {"form": np.float32(0.5)}, "tokens": np.arange(2),
  }
  with _writer(tmp_path) as writer:
    writer.samples(3, [row])
  found = json.loads(
      (tmp_path / "samples.jsonl").read_text(), parse_constant=_refuse
  )
  assert found == {
      "step": 3, "prompt": row["prompt"], "score": "NaN",
      "parts": {"form": 0.5}, "tokens": [0, 1],
  }


def test_tensorboard_files_are_written_and_resumed(tmp_path):
  with _writer(tmp_path, tensorboard=True) as writer:
    _write_steps(writer, range(3))
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.truncate_after(0)
    _write_steps(writer, [1])
  files = list((tmp_path / "tensorboard").glob("events.*"))
  contents = b"".join(path.read_bytes() for path in files)
  for name in (b"ppo/kl", b"timing/seconds", b"samples/0"):
    assert name in contents


def test_no_tensorboard_folder_without_being_asked(tmp_path):
  with _writer(tmp_path) as writer:
    _write_steps(writer, [0])
  assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match="wandb is not installed.*wandb=False"):
    _writer(tmp_path, wandb=True)


def test_wandb_gets_the_metrics_and_the_same_run_on_resume(
    tmp_path, monkeypatch
):
  calls = []
  run = types.SimpleNamespace(
      log=lambda values, step: calls.append((step, values)),
      finish=lambda: calls.append("finish"),
  )

  def init(**kwargs):
    calls.append(kwargs["id"])
    return run

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  for step in range(2):
    with _writer(tmp_path, wandb=True) as writer:
      writer.write(step, {"x": 1.0})
  assert calls[0] == calls[3]
  assert calls[1:3] == [(0, {"x": 1.0}), "finish"]


def test_a_full_disk_is_told_with_the_file(tmp_path):
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with metric_writer.MetricWriter(
      tmp_path, tensorboard=False, wandb=False
  ) as writer:
    with pytest.raises(
        metric_writer.MetricsFileError,
        match=f"cannot write {tmp_path}/metrics.jsonl: No space left on device",
    ):
      writer.write(1, {"x": 1.0})


def test_lines_that_were_lost_are_counted(tmp_path):
  make = lambda: metric_writer.MetricWriter(
      tmp_path, tensorboard=False, wandb=False
  )
  with make() as writer:
    for step in range(4):
      writer.write(step, {"x": 1.0})
    assert writer.num_lines["metrics.jsonl"] == 4
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes()[:-5])
  with make() as writer:
    writer.truncate_after(3)
    assert writer.num_lines["metrics.jsonl"] == 3
    writer.write(4, {"x": 1.0})
    assert writer.num_lines["metrics.jsonl"] == 4
