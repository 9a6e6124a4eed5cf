"""Checkpoints: exact round trips, survival of kills and damage, refusals."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import array_folder, checkpoint

CONFIG = {"seed": 0, "ppo": {"kl_coef": 0.1, "sizes": [1, 2]}}


def _open(directory, keep_last=2, config=CONFIG, **kwargs):
  return checkpoint.Checkpointer(
      directory, keep_last=keep_last, config=config, **kwargs
  )


def _small(step):
  return {"w": jnp.full((4, 3), step, jnp.float32), "step": jnp.int32(step)}


def _save_steps(directory, steps, **kwargs):
  with _open(directory, **kwargs) as checkpointer:
    for step in steps:
      checkpointer.save(step, _small(step), {"next": step})


def _names(directory):
  return sorted(path.name for path in directory.iterdir())


def _bits(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def _assert_same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    assert (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape)
    assert _bits(a) == _bits(b)


@flax.struct.dataclass
class _State:
  params: dict
  opt_state: optax.OptState
  rng: jax.Array
  step: jax.Array


def _full_state():
  params = {
      "a/b": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
      "half": jnp.array([[1.5, -2.25]], jnp.bfloat16),
      "empty": jnp.zeros((0, 3), jnp.float32),
      "flag": jnp.array(True),
  }
  return _State(
      params=params,
      opt_state=optax.adam(1e-3).init({"w": jnp.ones((2, 3))}),
      rng=jax.random.key(7),
      step=jnp.int32(3),
  )


# ---- Round trips -------------------------------------------------------------


def test_every_kind_of_leaf_comes_back_bitwise(tmp_path):
  state = {
      "state": _full_state(),
      "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
      "raw_key": jax.random.PRNGKey(2),
      "numpy": np.arange(6, dtype=np.int64).reshape(2, 3),
      "numpy_scalar": np.array(2.5),
      "nested": (jnp.arange(3), [jnp.ones(())]),
  }
  iterator_state = {"position": [1, 2], "epoch": None}
  with _open(tmp_path) as checkpointer:
    checkpointer.save(3, state, iterator_state)
    step, found, found_iterator = checkpointer.restore_latest(state)
  assert step == 3
  assert found_iterator == iterator_state
  _assert_same(found, state)


def test_restored_keys_continue_the_same_random_numbers(tmp_path):
  state = {"rng": jax.random.key(11)}
  with _open(tmp_path) as checkpointer:
    checkpointer.save(0, state, {})
    _, found, _ = checkpointer.restore_latest(
        jax.eval_shape(lambda: {"rng": jax.random.key(0)})
    )
  assert jax.random.bits(found["rng"]) == jax.random.bits(state["rng"])


def test_abstract_state_without_shardings_gives_uncommitted_arrays(tmp_path):
  state = _full_state()
  with _open(tmp_path) as checkpointer:
    checkpointer.save(0, state, {})
    _, found, _ = checkpointer.restore_latest(jax.eval_shape(lambda: state))
  _assert_same(found, state)
  assert not any(leaf.committed for leaf in jax.tree.leaves(found))


def test_a_directory_without_checkpoints_gives_none(tmp_path, caplog):
  with _open(tmp_path / "deep" / "new", best_metric="score") as checkpointer:
    assert checkpointer.restore_latest(_small(0)) is None
    assert checkpointer.restore_best(_small(0)) is None
  assert not caplog.records


def test_donating_or_changing_buffers_after_save_changes_nothing(tmp_path):
  clear = jax.jit(lambda x: x * 0.0 - 1.0, donate_argnums=0)
  x = jnp.arange(1 << 18, dtype=jnp.float32)
  clear(jnp.copy(x))  # Compiled before, so that it runs during the save.
  wanted = np.array(x)
  host = np.ones((1 << 18,))
  with _open(tmp_path) as checkpointer:
    checkpointer.save(0, {"x": x, "host": host}, {})
    host[:] = 5.0
    for _ in range(20):
      x = clear(x)
    abstract = {
        "x": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype),
        "host": host,
    }
    _, found, _ = checkpointer.restore_latest(abstract)
  np.testing.assert_array_equal(found["x"], wanted)
  np.testing.assert_array_equal(found["host"], 1.0)


# ---- Shardings ---------------------------------------------------------------


def _sharded(num_devices):
  mesh = jax.make_mesh(
      (num_devices,), ("data",), devices=jax.devices()[:num_devices]
  )
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = {
      "w": jnp.arange(32, dtype=jnp.float32).reshape(16, 2),
      "keys": jax.random.split(jax.random.key(0), 8),
      "step": jnp.int32(5),
  }
  return jax.device_put(state, {"w": split, "keys": split, "step": whole})


@pytest.mark.parametrize("saved, restored", [(8, 1), (1, 8), (8, 2)])
def test_state_moves_between_device_counts(tmp_path, saved, restored):
  wanted = _sharded(restored)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      wanted,
  )
  with _open(tmp_path) as checkpointer:
    checkpointer.save(5, _sharded(saved), {})
    _, found, _ = checkpointer.restore_latest(abstract)
  _assert_same(found, wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_donated_state_is_gone_before_another_is_read(tmp_path, monkeypatch):
  given = _sharded(2)
  with _open(tmp_path) as checkpointer:
    assert checkpointer.restore_latest(given, donate=True) is None
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))
    checkpointer.save(5, given, {})
    wanted = jax.device_get({k: v for k, v in given.items() if k != "keys"})
    read, seen = array_folder.read_arrays, []

    def watched(*args):
      seen.extend(x.is_deleted() for x in jax.tree.leaves(given))
      return read(*args)

    monkeypatch.setattr(array_folder, "read_arrays", watched)
    _, found, _ = checkpointer.restore_latest(given, donate=True)
  assert seen and all(seen)
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array)
    assert len(found[name].sharding.device_set) == 2


_ONE_DEVICE = """
import sys
import jax
import jax.numpy as jnp
from rlhf_jax import checkpoint
assert jax.device_count() == 1
state = {
    "w": jnp.zeros((16, 2)),
    "keys": jax.random.split(jax.random.key(9), 8),
    "step": jnp.int32(0),
}
with checkpoint.Checkpointer(sys.argv[1], keep_last=9, config={}) as c:
  step, state, iterator_state = c.restore_latest(state)
  c.save(step + 1, state, iterator_state)
"""


def test_a_process_with_one_device_reads_what_eight_saved(tmp_path):
  state = _sharded(8)
  with _open(tmp_path, config={}) as checkpointer:
    checkpointer.save(5, state, {})
  subprocess.run(
      [sys.executable, "-c", _ONE_DEVICE, str(tmp_path)],
      env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
      check=True,
  )
  with _open(tmp_path, config={}) as checkpointer:
    step, found, _ = checkpointer.restore_latest(state)
  assert step == 6
  _assert_same(found, state)


# ---- What is kept ------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
  scores = [0.1, 0.9, float("nan"), 0.3, float("inf"), 0.2]
  with _open(tmp_path, best_metric="score") as checkpointer:
    for step, score in enumerate(scores):
      checkpointer.save(step, _small(step), {}, {"score": score})
    checkpointer.save(6, _small(6), {})
    checkpointer.wait()
    assert _names(tmp_path) == [f"step_0000000{i}" for i in (1, 5, 6)]
    step, found, _ = checkpointer.restore_best(_small(0))
    assert step == 1
    _assert_same(found, _small(1))
    assert checkpointer.restore_latest(_small(0))[0] == 6


def test_smallest_metric_is_best_in_mode_min(tmp_path):
  with _open(tmp_path, best_metric="loss", best_mode="min") as checkpointer:
    for step, loss in enumerate([3.0, 1.0, 1.0, 2.0]):
      checkpointer.save(step, _small(step), {}, {"loss": loss})
    assert checkpointer.restore_best(_small(0))[0] == 1


def test_only_nan_metrics_means_no_best(tmp_path):
  with _open(tmp_path, best_metric="loss") as checkpointer:
    checkpointer.save(0, _small(0), {}, {"loss": float("nan")})
    assert checkpointer.restore_best(_small(0)) is None


def test_saving_a_step_again_replaces_it(tmp_path):
  with _open(tmp_path) as checkpointer:
    checkpointer.save(4, _small(1), {})
    checkpointer.save(4, _small(2), {})
  with _open(tmp_path) as checkpointer:
    checkpointer.save(4, _small(3), {})
    _, found, _ = checkpointer.restore_latest(_small(0))
  _assert_same(found, _small(3))
  assert _names(tmp_path) == ["step_00000004.3"]


def test_a_metric_that_is_never_given_is_an_error(tmp_path):
  with _open(tmp_path, best_metric="score") as checkpointer:
    with pytest.raises(ValueError, match="'score' is not among .*'scores'"):
      checkpointer.save(0, _small(0), {}, {"scores": 1.0})


# ---- Damage ------------------------------------------------------------------


def _largest_file(folder):
  files = [p for p in (folder / "arrays").rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def _truncate_array(folder):
  path = _largest_file(folder)
  path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(folder):
  path = _largest_file(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def _edit_info(folder):
  path = folder / "checkpoint.json"
  path.write_text(path.read_text().replace('"next": 2', '"next": 3'))


DAMAGE = {
    "truncated array": (_truncate_array, "bytes instead of"),
    "flipped bit": (_flip_a_bit, "changed since it was written"),
    "missing array": (
        lambda folder: _largest_file(folder).unlink(), "cannot be read"
    ),
    "no arrays": (
        lambda folder: shutil.rmtree(folder / "arrays"), "cannot be read"
    ),
    "missing metadata": (
        lambda folder: (folder / "checkpoint.json").unlink(), "never finished"
    ),
    "empty folder": (_empty, "never finished"),
    "garbage json": (
        lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff{]"),
        "not valid JSON",
    ),
    "truncated json": (
        lambda folder: os.truncate(folder / "checkpoint.json", 100),
        "not valid JSON",
    ),
    "other json": (
        lambda folder: (folder / "checkpoint.json").write_text("[]"),
        "does not describe",
    ),
    "edited json": (_edit_info, "changed since it was written"),
    "later format": (
        lambda folder: (folder / "checkpoint.json").write_text('{"format": 9}'),
        "format 9",
    ),
    "json is a folder": (
        lambda folder: (
            (folder / "checkpoint.json").unlink(),
            (folder / "checkpoint.json").mkdir(),
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, kind):
  damage, reason = DAMAGE[kind]
  _save_steps(tmp_path, [1, 2])
  damage(tmp_path / "step_00000002")
  with _open(tmp_path) as checkpointer:
    with caplog.at_level(logging.WARNING):
      step, found, iterator_state = checkpointer.restore_latest(_small(0))
    assert (step, iterator_state) == (1, {"next": 1})
    _assert_same(found, _small(1))
    [record] = caplog.records
    assert str(tmp_path / "step_00000002") in record.getMessage()
    assert reason in record.getMessage()
    # The run goes on from there, and its checkpoints count.
    checkpointer.save(2, _small(2), {"next": 2})
    assert checkpointer.restore_latest(_small(0))[0] == 2
  assert _names(tmp_path) == ["step_00000001", "step_00000002.2"]


def test_a_damaged_later_checkpoint_never_pushes_out_an_intact_one(tmp_path):
  _save_steps(tmp_path, [1, 9])
  _truncate_array(tmp_path / "step_00000009")
  with _open(tmp_path, keep_last=1) as checkpointer:
    assert checkpointer.restore_latest(_small(0))[0] == 1
    checkpointer.save(2, _small(2), {})
    checkpointer.wait()
    assert checkpointer.restore_latest(_small(0))[0] == 2
  with _open(tmp_path, keep_last=1) as checkpointer:
    assert checkpointer.restore_latest(_small(0))[0] == 2


def test_a_damaged_best_gives_the_next_best(tmp_path):
  with _open(tmp_path, best_metric="score", keep_last=3) as checkpointer:
    for step, score in enumerate([2.0, 3.0, 1.0]):
      checkpointer.save(step, _small(step), {}, {"score": score})
  _truncate_array(tmp_path / "step_00000001")
  with _open(tmp_path, best_metric="score", keep_last=3) as checkpointer:
    assert checkpointer.restore_best(_small(0))[0] == 0


# ---- Params alone ------------------------------------------------------------


def _save_params(directory, steps, metrics=None, **kwargs):
  with _open(directory, keep_last=9, **kwargs) as checkpointer:
    for step in steps:
      state = {"params": _small(step)}
      checkpointer.save(step, state, {}, metrics and metrics[step])


def _params_step(directory, which, **kwargs):
  found, _ = checkpoint.load_params(directory, which, ("params",), **kwargs)
  return int(found["step"])


def test_last_params_are_of_the_newest_intact_checkpoint(tmp_path, caplog):
  _save_params(tmp_path, [1, 2, 3])
  (tmp_path / "step_00000003" / "checkpoint.json").unlink()
  _truncate_array(tmp_path / "step_00000002")
  assert _params_step(tmp_path, "last") == 1
  assert [x.getMessage().split()[1] for x in caplog.records] == [
      str(tmp_path / f"step_0000000{step}") for step in (3, 2)
  ]


def test_a_step_that_is_being_rewritten_is_read_as_it_was(tmp_path):
  _save_params(tmp_path, [1, 2])
  shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001.2")
  (tmp_path / "step_00000001.2" / "checkpoint.json").unlink()
  assert _params_step(tmp_path, 1) == 1
  (tmp_path / "step_00000001" / "checkpoint.json").unlink()
  with pytest.raises(checkpoint.CheckpointError, match="of step 1 .* 1, 2"):
    _params_step(tmp_path, 1)


@pytest.mark.parametrize("mode, wanted", [("max", [2, 4]), ("min", [1, 3])])
def test_best_params_are_of_the_best_intact_checkpoint(tmp_path, mode, wanted):
  scores = {1: 0.0, 2: 3.0, 3: 0.5, 4: 2.0, 5: 1.0}
  metrics = {step: {"score": x} for step, x in scores.items()}
  best = dict(best_metric="score", best_mode=mode)
  _save_params(tmp_path, scores, metrics, **best)
  assert _params_step(tmp_path, "best", **best) == wanted[0]
  _truncate_array(tmp_path / f"step_0000000{wanted[0]}")
  assert _params_step(tmp_path, "best", **best) == wanted[1]
  with pytest.raises(checkpoint.CheckpointError, match="with its 'loss'"):
    _params_step(tmp_path, "best", best_metric="loss")


# ---- Kills -------------------------------------------------------------------


class _Killed(BaseException):
  pass


@pytest.mark.parametrize("point", range(4))
def test_stopping_between_any_two_file_operations_is_safe(
    tmp_path, monkeypatch, point
):
  """At each of our own renames and deletions; keep_last=1 is the hardest."""
  _save_steps(tmp_path, [1], keep_last=1)
  count = 0

  def stopping(function):
    def call(*args, **kwargs):
      nonlocal count
      if "step_" in str(args[0]) and "orbax" not in str(args[0]):
        count += 1
        if count > point:
          raise _Killed
      return function(*args, **kwargs)
    return call

  with monkeypatch.context() as patch:
    for module, name in [(os, "replace"), (os, "rename"), (shutil, "rmtree")]:
      patch.setattr(module, name, stopping(getattr(module, name)))
    try:
      _save_steps(tmp_path, [2], keep_last=1)
    except _Killed:
      pass
  with _open(tmp_path, keep_last=1) as checkpointer:
    step, found, iterator_state = checkpointer.restore_latest(_small(0))
    assert step == iterator_state["next"] == (1 if point == 0 else 2)
    _assert_same(found, _small(step))
    checkpointer.save(3, _small(3), {"next": 3})
  assert _names(tmp_path) == ["step_00000003"]


_ENDLESS = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from rlhf_jax import checkpoint
def state(step):
  leaves = {f"w{i}": np.full((64, 8), step, np.float32) for i in range(20)}
  return {**leaves, "step": np.int32(step)}
c = checkpoint.Checkpointer(sys.argv[1], keep_last=1, config={})
found = c.restore_latest(state(0))
start = 0
if found:
  start, restored, iterator_state = found
  assert iterator_state == {"next": start}
  assert all((np.asarray(x) == start).all() for x in jax.tree.leaves(restored))
print(start, flush=True)
for step in range(start + 1, 100000):
  c.save(step, state(step), {"next": step})
"""


def test_kill_9_at_random_moments_never_loses_the_last_checkpoint(tmp_path):
  rng = random.Random(0)
  env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  starts = []
  for _ in range(6):
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(tmp_path)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    line = process.stdout.readline()
    time.sleep(rng.uniform(0.15, 0.5))
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert line and process.returncode == -signal.SIGKILL, errors
    starts.append(int(line))
  assert starts == sorted(starts)
  assert starts[-1] > 0


# ---- Refusals ----------------------------------------------------------------


def test_another_config_is_refused_with_the_fields(tmp_path):
  _save_steps(tmp_path, [1])
  other = {"seed": 0.0, "ppo": {"kl_coef": 0.2, "sizes": (1, 2)}, "new": None}
  with _open(tmp_path, config=other) as checkpointer:
    with pytest.raises(checkpoint.ConfigMismatch) as error:
      checkpointer.restore_latest(_small(0))
  lines = str(error.value).splitlines()[1:-1]
  assert [line.strip() for line in lines] == [
      "new: saved nothing, given None",
      "ppo.kl_coef: saved 0.1, given 0.2",
      "seed: saved 0, given 0.0",
  ]


def test_free_fields_may_differ_at_any_depth(tmp_path):
  _save_steps(tmp_path, [1], config={"a": {"keep": 1, "lr": 1}, "keep": 1})
  given = {"a": {"lr": 1, "keep": 2}}
  with _open(tmp_path, config=given, free_fields=["keep"]) as checkpointer:
    assert checkpointer.restore_latest(_small(0))[0] == 1
  given["a"]["lr"] = 2
  with _open(tmp_path, config=given, free_fields=["keep"]) as checkpointer:
    with pytest.raises(checkpoint.ConfigMismatch) as error:
      checkpointer.restore_latest(_small(0))
  assert "a.lr: saved 1, given 2" in str(error.value)
  assert "keep" not in str(error.value)


def test_configs_with_nan_and_tuples_equal_themselves(tmp_path):
  config = {"a": float("nan"), "b": (1, 2), "c": {"d": None}}
  _save_steps(tmp_path, [1], config=config)
  with _open(tmp_path, config=config) as checkpointer:
    assert checkpointer.restore_latest(_small(0))[0] == 1


def test_another_state_is_refused_with_the_leaves(tmp_path):
  _save_steps(tmp_path, [1])
  given = {
      "w": jnp.zeros((4, 2), jnp.float32),
      "step": jnp.float32(0),
      "value": {"kernel": jnp.zeros(2)},
  }
  with _open(tmp_path) as checkpointer:
    with pytest.raises(checkpoint.StateMismatch) as error:
      checkpointer.restore_latest(given)
    with pytest.raises(checkpoint.StateMismatch, match="'w': not in the state"):
      checkpointer.restore_latest({"step": jnp.int32(0)})
  message = str(error.value)
  assert "'w': saved float32[4, 3], given float32[4, 2]" in message
  assert "'step': saved int32[], given float32[]" in message
  assert "'value.kernel': not in the checkpoint" in message


def test_a_key_is_not_restored_as_raw_numbers(tmp_path):
  with _open(tmp_path) as checkpointer:
    checkpointer.save(0, {"rng": jax.random.key(0)}, {})
    with pytest.raises(checkpoint.StateMismatch, match="'rng'.*uint32"):
      checkpointer.restore_latest({"rng": jax.random.PRNGKey(0)})


def test_python_numbers_in_a_state_are_refused(tmp_path):
  with _open(tmp_path) as checkpointer:
    with pytest.raises(TypeError, match="'opt.count' is a Python int"):
      checkpointer.save(0, {"opt": {"count": 1}}, {})


def test_iterator_state_must_be_json(tmp_path):
  with _open(tmp_path) as checkpointer:
    with pytest.raises(TypeError, match="JSON"):
      checkpointer.save(0, _small(0), {"rng": object()})


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path}/file/x"):
    _open(tmp_path / "file" / "x")


_BLOCKED = """
import pathlib, sys
import numpy as np
from rlhf_jax import checkpoint
directory = pathlib.Path(sys.argv[1]) / "run"
c = checkpoint.Checkpointer(directory, keep_last=1, config={})
directory.rmdir()
directory.write_text("")
c.save(0, {"w": np.zeros(4)}, {})
c.wait()
"""


def test_a_blocked_directory_is_named_and_the_process_ends(tmp_path):
  result = subprocess.run(
      [sys.executable, "-c", _BLOCKED, str(tmp_path)],
      env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE, text=True, check=False, timeout=60,
  )
  assert result.returncode == 1
  last = result.stderr.strip().splitlines()[-1]
  assert f"CheckpointError: cannot write {tmp_path}/run/step_00000000:" in last


_FULL_DISK = """
import resource, signal, sys
import numpy as np
from rlhf_jax import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c = checkpoint.Checkpointer(sys.argv[1], keep_last=1, config={})
c.save(1, {"w": np.zeros(4)}, {})
c.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).random(100000)
for _ in range(2):
  try:
    c.save(2, {"w": noise}, {})
    c.wait()
  except checkpoint.CheckpointError as e:
    print(e)
resource.setrlimit(
    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(c.restore_latest({"w": np.zeros(4)})[0])
c.save(3, {"w": np.zeros(4)}, {})
print(c.restore_latest({"w": np.zeros(4)})[0])
c.close()
"""


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
  """Files may not grow past a limit, which fails as a full disk does."""
  result = subprocess.run(
      [sys.executable, "-c", _FULL_DISK, str(tmp_path)],
      env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, check=False,
  )
  assert result.returncode == 0, result.stderr
  assert f"cannot write {tmp_path}/step_00000002:" in result.stdout
  assert f"cannot write {tmp_path}/step_00000002.2:" in result.stdout
  assert result.stdout.split()[-2:] == ["1", "3"]
  assert _names(tmp_path) == ["step_00000003"]


@pytest.mark.parametrize(
    "kwargs", [dict(keep_last=0), dict(keep_last=1, best_mode="avg")]
)
def test_wrong_arguments_are_named(tmp_path, kwargs):
  with pytest.raises(ValueError, match="keep_last|best_mode"):
    _open(tmp_path, **kwargs)


# ---- Finished models ---------------------------------------------------------


def _params():
  return {
      "trunk": {"w.x": jnp.ones((2, 3)), "b": jnp.zeros((2,), jnp.bfloat16)},
      "head": {"kernel": jnp.arange(3, dtype=jnp.float32)},
  }


def test_a_model_comes_back_with_its_config(tmp_path):
  for width in (7, 8):  # The second replaces the first.
    checkpoint.save_model(
        tmp_path / "model", {"width": width}, _params(), {"gain": 0.5}
    )
  config, params, extra = checkpoint.load_model(tmp_path / "model")
  assert (config, extra) == ({"width": 8}, {"gain": 0.5})
  _assert_same(params, _params())
  assert _names(tmp_path) == ["model"]


def test_a_model_that_was_not_finished_or_is_damaged_is_not_loaded(tmp_path):
  model = tmp_path / "model"
  with pytest.raises(checkpoint.CheckpointError, match=f"{model}"):
    checkpoint.load_model(model)
  checkpoint.save_model(model, {}, _params(), {})
  _truncate_array(model)
  with pytest.raises(checkpoint.CheckpointError, match="bytes instead of"):
    checkpoint.load_model(model)


def test_a_failed_save_leaves_the_earlier_model(tmp_path, monkeypatch):
  model = tmp_path / "model"
  checkpoint.save_model(model, {"width": 7}, _params(), {})

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(json, "dumps", full)
  with pytest.raises((checkpoint.CheckpointError, OSError), match="No space"):
    checkpoint.save_model(model, {"width": 8}, _params(), {})
  monkeypatch.undo()
  assert checkpoint.load_model(model)[0] == {"width": 7}


def test_params_with_a_slash_in_a_name_are_refused(tmp_path):
  with pytest.raises(ValueError, match="without '/'"):
    checkpoint.save_model(tmp_path / "m", {}, {"a/b": jnp.ones(1)}, {})
