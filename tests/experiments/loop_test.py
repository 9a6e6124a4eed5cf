"""The loop: exact means, guarded steps, evaluations and checkpoints."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import loop
from experiments.harness.config import ConfigError
from rlhf_jax import array_folder
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.train_state import create_train_state
from rlhf_jax.updates import gradient
from tests.experiments import tiny


class Counted:
  """Batches [k, k, ..., k] of k + 1 rows at step k, some of them broken."""

  def __init__(self, broken=()):
    self.position, self.broken = 0, broken

  def __next__(self):
    self.position += 1
    rows = np.full(self.position + 1, self.position, np.float32)
    if self.position in self.broken:
      rows[1] = np.nan
    return {"x": rows}

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


class Bad(Counted):
  """Batches of nothing but NaN."""

  def __next__(self):
    return {"x": np.full(2, np.nan, np.float32)}


def make_task(broken=(), evaluate=None):
  """Fits w to the batches by momentum, which remembers every step."""
  tx = optax.sgd(0.1, momentum=0.9)

  def objective(params, batch):
    error = params["w"] - batch["x"]
    return (error**2).mean(), {"toy/x": metrics_lib.average(batch["x"])}

  @jax.jit
  def update(state, batch):
    grads, metrics = gradient.accumulate_gradients(
        objective, state.params, batch, 1
    )
    return gradient.apply_gradients(state, grads, metrics, tx)

  return loop.Task(
      name="toy",
      state=create_train_state({"w": jnp.zeros(())}, tx, jax.random.key(0)),
      step=lambda state, batch: (*update(state, batch), batch),
      batches=Counted(broken),
      evaluate=evaluate or (lambda state: ({"eval/w": state.params["w"]}, [])),
      skipped_steps=lambda state: state.skipped_steps,
  )


def config(num_steps, **changes):
  fields = dict(
      num_steps=num_steps,
      log_every=1,
      eval_every=num_steps,
      checkpoint_every=num_steps,
      keep_checkpoints=1,
      best_metric="",
      best_mode="max",
      max_nonfinite_steps=2,
      tensorboard=False,
      wandb=False,
  )
  return loop.LoopConfig(**fields | changes)


def train(task, cfg, workdir):
  return loop.run_loop(task, cfg, workdir=str(workdir), config={"toy": 1})


def rows(workdir, name):
  return {
      row["step"]: row[name]
      for row in tiny.read_jsonl(workdir / "metrics.jsonl")
      if name in row
  }


# ---- Means -------------------------------------------------------------------


def test_a_mean_over_steps_weighs_every_row_once(tmp_path):
  train(make_task(), config(7, log_every=3, checkpoint_every=3), tmp_path)
  everything = np.concatenate
  wanted = {
      # Of 2 rows of 1, 3 rows of 2, 4 rows of 3, ...
      3: np.mean(everything([np.full(k + 1, k) for k in (1, 2, 3)])),
      6: np.mean(everything([np.full(k + 1, k) for k in (4, 5, 6)])),
      7: 7.0,
  }
  found = rows(tmp_path, "toy/x")
  assert found.keys() == wanted.keys()
  for step, mean in wanted.items():
    np.testing.assert_allclose(found[step], mean, rtol=1e-6)
  assert list(rows(tmp_path, "eval/w")) == [0, 7]


def test_the_wall_clock_is_kept_apart_from_what_must_repeat(tmp_path):
  train(make_task(), config(2), tmp_path)
  assert "second" not in (tmp_path / "metrics.jsonl").read_text()
  timing = tiny.read_jsonl(tmp_path / "timing.jsonl")
  assert all(row["seconds_per_step"] > 0 for row in timing)


# ---- NaN ---------------------------------------------------------------------


def test_a_nan_batch_changes_nothing_and_is_saved(tmp_path, caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    broken = train(
        make_task(broken=[3]), config(5, log_every=5), tmp_path / "broken"
    )
  # The same steps, without the broken one.
  task = make_task()
  state = task.state
  for position in (1, 2, 4, 5):
    task.batches.set_state({"position": position - 1})
    state, _, _ = task.step(state, next(task.batches))
  assert broken.params["w"].tobytes() == state.params["w"].tobytes()
  tiny.assert_bitwise(
      dict(enumerate(map(np.asarray, jax.tree.leaves(broken.opt_state)))),
      dict(enumerate(map(np.asarray, jax.tree.leaves(state.opt_state)))),
  )
  assert int(broken.step) == 5
  # What was good is still averaged, and what was not is counted.
  good = np.concatenate([np.full(k + 1, k) for k in (1, 2, 4, 5)])
  found = rows(tmp_path / "broken", "toy/x")[5]
  np.testing.assert_allclose(found, good.mean(), rtol=1e-6)
  share = rows(tmp_path / "broken", "nonfinite/steps")[5]
  np.testing.assert_allclose(share, 1 / 5, rtol=1e-6)
  saved = np.load(tmp_path / "broken" / "nonfinite" / "step_3.npz")
  np.testing.assert_array_equal(saved["x"], [3, np.nan, 3, 3])
  message = caplog.text
  assert "step 3 was not applied: NaN or Inf in " in message
  assert "loss" in message and "w" in message and "step_3.npz" in message


def test_bad_steps_that_are_not_in_a_row_do_not_stop_the_run(tmp_path):
  state = train(make_task(broken=[2, 4, 6]), config(7), tmp_path)
  assert int(state.step) == 7
  assert len(list((tmp_path / "nonfinite").iterdir())) == 3


def test_the_run_stops_after_so_many_and_names_the_tensor(tmp_path):
  cfg = config(9, max_nonfinite_steps=3, checkpoint_every=2)
  task = make_task(broken=[5, 6, 7, 8])
  with pytest.raises(loop.NonFiniteError) as error:
    train(task, cfg, tmp_path)
  assert re.search(
      r"step 7 was not applied: NaN or Inf in (loss, w|w, loss)\. Its batch is "
      r"in \S+step_7\.npz\..* max_nonfinite_steps is 3",
      str(error.value),
  )
  # The same command again takes it up where it was whole.
  again = make_task(broken=[])
  state = train(again, cfg, tmp_path)
  assert int(state.step) == 9


def test_a_bad_last_step_is_seen_too(tmp_path):
  with pytest.raises(loop.NonFiniteError, match="step 4"):
    train(make_task(broken=[3, 4]), config(4, log_every=4), tmp_path)


def make_iterations(broken):
  """As PPO: an iteration is two optimizer steps, on row 0 and on the rest."""
  task = make_task(broken)
  one_step = task.step

  def step(state, batch):
    state, first, _ = one_step(state, {"x": batch["x"][:1]})
    state, second, _ = one_step(state, {"x": batch["x"][1:]})
    return state, metrics_lib.add(first, second), batch

  return dataclasses.replace(task, step=step, unit="iteration")


def test_an_iteration_says_how_many_of_its_steps_were_not_applied(
    tmp_path, caplog
):
  with caplog.at_level(logging.WARNING, logger="absl"):
    state = train(make_iterations([2]), config(3, log_every=3), tmp_path)
  assert int(state.step) == 6
  assert "1 of 2 optimizer steps of iteration 2 were not applied" in caplog.text
  share = rows(tmp_path, "nonfinite/steps")[3]
  np.testing.assert_allclose(share, 1 / 6, rtol=1e-6)


def test_optimizer_steps_in_a_row_are_what_stops_a_run(tmp_path):
  # Every iteration's last step is bad, but the one before it was not.
  train(make_iterations([1, 2, 3]), config(3), tmp_path / "alternating")
  task = make_iterations([])
  task.batches = Bad()
  with pytest.raises(loop.NonFiniteError, match="2 of 2 .* iteration 1 .* 2 o"):
    train(task, config(3), tmp_path / "all")


def test_a_program_that_diverges_ends_with_one_message(finished_run, tmp_path):
  settings = tiny.stage("sft", finished_run)
  settings.train.optimizer.learning_rate = 1e39  # infinite in float32
  settings.train.optimizer.warmup_steps = 0
  settings.train.loop.update(tiny.loop(6, eval_every=6))
  settings.train.loop.max_nonfinite_steps = 2
  path = tiny.write_config(tmp_path / "config.py", settings)
  done = tiny.call("sft", path, tmp_path / "sft")
  tiny.assert_one_message(
      done,
      "sft: step 2 was not applied",
      "NaN or Inf in update",
      "max_nonfinite_steps is 2",
  )
  assert (tmp_path / "sft" / "nonfinite" / "step_1.npz").exists()
  assert not (tmp_path / "sft" / "model").exists()
  assert not (tmp_path / "sft" / "finished.json").exists()


# ---- Checkpoints and evaluations ---------------------------------------------


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
  scores = {0: 9.0, 1: 0.1, 2: 0.8, 3: 0.3, 4: 0.2, 5: 0.4, 6: 0.5}
  task = make_task(
      evaluate=lambda state: ({"eval/score": scores[int(state.step)]}, [])
  )
  cfg = config(
      6, eval_every=1, checkpoint_every=1, best_metric="eval/score"
  )
  train(task, cfg, tmp_path)
  kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert kept == ["step_00000002", "step_00000006"]


def test_a_checkpoint_holds_no_evaluation_of_another_step(tmp_path):
  def saved(workdir):
    return {
        info["step"]: sorted(info["metrics"])
        for info in map(
            array_folder.read_info,
            sorted((workdir / "checkpoints").glob("step_*")),
        )
    }

  cfg = config(6, eval_every=2, checkpoint_every=1, keep_checkpoints=9)
  train(make_task(), cfg, tmp_path / "whole")
  wanted = {step: ["eval/w"] * (step % 2 == 0) for step in range(1, 7)}
  assert saved(tmp_path / "whole") == wanted
  # The same after a run that ended on the way.
  short = dataclasses.replace(cfg, num_steps=4)
  train(make_task(), short, tmp_path / "resumed")
  train(make_task(), cfg, tmp_path / "resumed")
  assert saved(tmp_path / "resumed") == wanted


def files(folder):
  return {
      path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


@pytest.mark.parametrize(
    "changed",
    [
        {"text": {"x": np.arange(7.0)}},
        {"text": {"x": np.arange(6.0) + (np.arange(6) == 5)}},
        {"text": {"x": np.arange(6.0).reshape(2, 3)}},
        {"text": {"x": np.arange(6.0, dtype=np.float32)}},
        {"text": {"y": np.arange(6.0)}},
        {"text": None},
    ],
)
def test_a_resumed_run_refuses_inputs_that_have_changed(tmp_path, changed):
  inputs = {"text": {"x": np.arange(6.0)}, "model": jnp.ones((2, 2))}

  def go_on(num_steps, inputs):
    task = dataclasses.replace(make_task(), inputs=inputs)
    return train(task, config(num_steps), tmp_path)

  go_on(2, inputs)
  before = files(tmp_path)
  with pytest.raises(ConfigError, match="from step 2: .* since: text. Put"):
    go_on(4, inputs | changed)
  with pytest.raises(ConfigError, match="since: model, text. Put"):
    go_on(4, changed)
  assert files(tmp_path) == before
  # Equal contents, read anew.
  again = {"text": {"x": np.arange(6.0)}, "model": np.ones((2, 2), np.float32)}
  assert int(go_on(4, again).step) == 4


def test_a_best_metric_that_nobody_measures_is_told_at_once(tmp_path):
  cfg = config(6, best_metric="eval/wins")
  with pytest.raises(ConfigError, match="'eval/wins' is not among .*: eval/w"):
    train(make_task(), cfg, tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_that_is_over_trains_no_more(tmp_path):
  first = train(make_task(), config(3), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  again = make_task(broken=range(10))
  state = train(again, config(3), tmp_path)
  assert state.params["w"].tobytes() == first.params["w"].tobytes()
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_files_are_written_when_asked_for(tmp_path):
  train(make_task(), config(2, tensorboard=True), tmp_path)
  events = list((tmp_path / "tensorboard").iterdir())
  assert events and events[0].stat().st_size > 0
