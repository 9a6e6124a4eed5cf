"""Many runs of PPO at once: each is its lone run; what cannot be is told."""

import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import population as population_config
from experiments import population, ppo
from experiments.harness import loop, models, population_programs, stopping
from experiments.harness.config import ConfigError, from_config
from experiments.harness.member_writer import MemberWriter
from experiments.harness.population_iteration import named_metrics
from rlhf_jax import checkpoint
from rlhf_jax.evaluation import report_data
from tests.experiments import loop_test, tiny


def _settings(run, num_seeds=1, vary=(), **changes) -> ConfigDict:
  """The tiny PPO stage of `run`, as a population."""
  lone = tiny.stage("ppo", run)
  lone.loop.best_metric = ""
  _change(lone, changes)
  return ConfigDict(dict(num_seeds=num_seeds, vary=vary, ppo=lone))


def _change(section, changes):
  for name, value in changes.items():
    *parents, last = name.split("__")
    target = section
    for parent in parents:
      target = target[parent]
    target[last] = value


def _run(settings, workdir):
  population.run(from_config(population.Config, settings), str(workdir))
  return workdir


def _assert_is_lone_run(member, lone):
  """What both left is the same, up to rounding."""
  for name in ("metrics.jsonl", "samples.jsonl"):
    found, wanted = tiny.read_jsonl(member / name), tiny.read_jsonl(lone / name)
    assert len(found) == len(wanted) > 0
    for own, row in zip(found, wanted):
      assert own.keys() == row.keys()
      for key, value in row.items():
        _assert_close(own[key], value, f"{name} {row['step']} {key}")
  _assert_close(_finished(member), _finished(lone), "finished.json")
  wanted = tiny.model_arrays(lone)
  found = tiny.model_arrays(member)
  assert found.keys() == wanted.keys()
  for name, array in found.items():
    np.testing.assert_allclose(array, wanted[name], atol=1e-5, err_msg=name)
  own, config = (json.loads((x / "config.json").read_text()) for x in (
      member, lone
  ))
  assert {x for x in config if config[x] != own[x]} <= {"mesh"}


def _assert_close(found, wanted, what):
  if isinstance(wanted, float):
    np.testing.assert_allclose(
        found, wanted, rtol=1e-4, atol=1e-5, err_msg=what
    )
  elif isinstance(wanted, dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
      _assert_close(found[name], value, f"{what} {name}")
  else:
    assert found == wanted, what


def _finished(folder):
  return json.loads((folder / "finished.json").read_text())


def _moved(folder, others):
  """By how much at most the model is another one than theirs."""
  own = tiny.model_arrays(folder)
  return min(
      max(np.abs(x - tiny.model_arrays(other)[name]).max()
          for name, x in own.items())
      for other in others
  )


# ---- Each is its lone run ----------------------------------------------------


@pytest.fixture(scope="module")
def promoted():
  with jax.numpy_dtype_promotion("standard"):
    yield


FEW = dict(
    loop__num_steps=4,
    loop__eval_every=2,
    loop__checkpoint_every=2,
    # So large that members soon differ in their every number.
    optimizer__learning_rate=3e-3,
)


@pytest.fixture(scope="module")
def two_seeds(finished_run, tmp_path_factory, promoted):
  settings = _settings(finished_run, num_seeds=2, **FEW)
  return _run(settings, tmp_path_factory.mktemp("population") / "seeds")


def _run_alone(run, workdir, **changes):
  lone = tiny.stage("ppo", run)
  lone.loop.best_metric = ""
  _change(lone, FEW | changes)
  ppo.run(from_config(ppo.Config, lone), str(workdir))
  return workdir


def test_members_of_several_seeds_are_their_lone_runs(
    two_seeds, finished_run, tmp_path
):
  members = [two_seeds / f"seed{seed}" / "ppo" for seed in (0, 1)]
  for seed, member in enumerate(members):
    lone = _run_alone(finished_run, tmp_path / f"{seed}", seed=seed)
    _assert_is_lone_run(member, lone)
  assert _moved(members[0], [members[1], finished_run / "sft"]) > 1e-3
  # What reads runs and policies reads these.
  curves = report_data.read_run(two_seeds / "seed1").curves["ppo"]
  np.testing.assert_array_equal(curves["ppo/kl"].steps, [1, 2, 3, 4])
  models.load_policy(str(members[1]))
  # What was sampled is of other prompts, too.
  prompts = [
      {row["prompt"] for row in tiny.read_jsonl(x / "samples.jsonl")}
      for x in members
  ]
  assert prompts[0] != prompts[1]


VARY = {
    "ppo.kl_coef": (0.05, 0.5),
    "ppo.temperature": (1.0, 0.8),
    "ppo.max_update_kl": (float("inf"), 1e-6),
    "optimizer.learning_rate": (3e-3, 1e-3),
    "optimizer.max_grad_norm": (1.0, 0.1),
}
SETTINGS = (
    "kl_coef0.05_temperature1.0_max_update_klinf_learning_rate0.003_"
    "max_grad_norm1.0",
    "kl_coef0.5_temperature0.8_max_update_kl1e-06_learning_rate0.001_"
    "max_grad_norm0.1",
)


def _vary():
  return tuple(f"{name}={','.join(map(str, x))}" for name, x in VARY.items())


def _setting(i):
  return {name.replace(".", "__"): each[i] for name, each in VARY.items()}


def test_members_of_several_coefficients_are_their_lone_runs(
    finished_run, tmp_path
):
  settings = _settings(finished_run, vary=_vary(), **FEW)
  workdir = _run(settings, tmp_path / "coefficients")
  for i, name in enumerate(SETTINGS):
    member = workdir / f"{name}_seed0" / "ppo"
    lone = _run_alone(finished_run, tmp_path / f"{i}", **_setting(i))
    _assert_is_lone_run(member, lone)
    # One goes on where the other has stopped.
    stopped = [
        row["ppo/stopped_early"]
        for row in tiny.read_jsonl(member / "metrics.jsonl")
        if "ppo/stopped_early" in row
    ]
    assert any(stopped) == bool(i)


def count_digits(prompt: str, completion: str) -> float:
  """A rule that the test below names by module and function."""
  del prompt
  return float(sum(x.isdigit() for x in completion)) + 0.1 * len(completion)


def test_members_with_adapters_text_and_a_rule_on_two_devices(
    finished_run, tmp_path
):
  changes = dict(
      loop__num_steps=2,
      # Of the held-out prompts one seed keeps 6 and the other 5, in two parts.
      heldout_prompts__limit=7,
      samples__max_prompt_length=29,
      samples__too_long="drop",
      rollout_batch_size=4,
      reward_model="",
      reward_rule=f"{__name__}:count_digits",
      value_network="shared",
      value_init="zero",
      lora__rank=2,
      ppo__ptx_coef=0.5,
      ptx_documents__source="world:assistant",
      ptx_documents__limit=20,
      ptx_batch_size=4,
      ptx_seq_len=32,
      num_logged_samples=7,
  )
  settings = _settings(
      finished_run, 2, vary=_vary(), mesh__data=2, **FEW | changes
  )
  workdir = _run(settings, tmp_path / "members")
  lone = _run_alone(
      finished_run, tmp_path / "lone", seed=1, **_setting(0), **changes
  )
  members = [workdir / f"{name}_seed1" / "ppo" for name in SETTINGS]
  _assert_is_lone_run(members[0], lone)
  assert [
      len({row["prompt"] for row in tiny.read_jsonl(x / "samples.jsonl")})
      for x in (lone, workdir / f"{SETTINGS[0]}_seed0" / "ppo")
  ] == [5, 6]
  found, other, wanted = (
      checkpoint.load_model(x / "adapter")[1]
      for x in (*members, lone)
  )
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), found, wanted
  )
  apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, other)
  assert max(jax.tree.leaves(apart)) > 1e-3


# ---- Resume ------------------------------------------------------------------


def test_a_population_that_was_killed_ends_bitwise_as_it_would_have(
    two_seeds, finished_run, tmp_path
):
  killed = tmp_path / "killed"
  shutil.copytree(two_seeds, killed)
  (killed / "finished.json").unlink()
  shutil.rmtree(killed / "checkpoints" / "step_00000004")
  for seed in (0, 1):
    member = killed / f"seed{seed}" / "ppo"
    # One of them had been written when the kill came.
    if seed:
      (member / "finished.json").unlink()
      shutil.rmtree(member / "model")
    with (member / "metrics.jsonl").open("a") as f:
      f.write('{"step": 5, "ppo/k')
  _run(_settings(finished_run, num_seeds=2, **FEW), killed)
  for seed in (0, 1):
    found, wanted = (x / f"seed{seed}" / "ppo" for x in (killed, two_seeds))
    for name in ("metrics.jsonl", "samples.jsonl", "finished.json"):
      assert (found / name).read_bytes() == (wanted / name).read_bytes()
    tiny.assert_bitwise(tiny.model_arrays(found), tiny.model_arrays(wanted))
  tiny.assert_bitwise(
      tiny.last_checkpoint(killed), tiny.last_checkpoint(two_seeds)
  )
  assert len(tiny.read_jsonl(killed / "timing.jsonl")) == 4


# ---- What one member does, and the others do not -----------------------------


def _toy(workdir, broken, **changes):
  """loop_test's toy, twice; the second member's batches are broken at some."""
  task = loop_test.make_task()
  one_step = task.step

  class Batches(loop_test.Counted):
    """Both members', side by side."""

    def __next__(self):
      rows = super().__next__()["x"]
      other = np.full_like(rows, np.nan if self.position in broken else 1)
      return {"x": np.stack([rows, other])}

  step = jax.vmap(lambda state, batch: one_step(state, batch)[:2])
  folders = {name: f"{name}/toy" for name in ("a", "b")}
  task = loop.Task(
      name="toys",
      state=population_programs.stack([task.state, task.state]),
      step=lambda state, batch: (*step(state, batch), batch),
      batches=Batches(),
      evaluate=lambda state: (
          {f"{x}/eval/w": state.params["w"][i] for i, x in enumerate("ab")},
          [{"member": "b", "prompt": "?"}],
      ),
      skipped_steps=lambda state: state.skipped_steps,
      make_writer=functools.partial(MemberWriter, folders=folders),
      named=functools.partial(named_metrics, ("a", "b")),
  )
  loop_test.train(task, loop_test.config(**changes), workdir)
  return [
      tiny.read_jsonl(workdir / x / "toy/metrics.jsonl") for x in ("a", "b")
  ]


def test_a_member_with_nan_is_named_and_the_others_go_on(tmp_path, caplog):
  settings = dict(num_steps=4, log_every=4)
  with caplog.at_level(logging.WARNING, logger="absl"):
    good, bad = _toy(tmp_path / "one", broken=[2], **settings)
  alone, _ = _toy(tmp_path / "none", broken=[], **settings)
  assert good == alone
  assert [row.get("nonfinite/steps") for row in bad] == [None, 1 / 4, None]
  assert (
      "1 of 2 optimizer steps of step 2 were not applied: NaN or Inf in "
      "b/loss, b/w. Its batch is in"
  ) in caplog.text
  samples = tmp_path / "one" / "b" / "toy/samples.jsonl"
  assert tiny.read_jsonl(samples)[0] == {"step": 0, "prompt": "?"}
  assert not (tmp_path / "one" / "a" / "toy/samples.jsonl").exists()


def test_a_member_of_nothing_but_nan_stops_all(tmp_path):
  with pytest.raises(loop.NonFiniteError, match="in b/loss.* 2 optimizer"):
    _toy(tmp_path, broken=range(9), num_steps=8, max_nonfinite_steps=2)


def test_sums_that_were_not_logged_go_on_behind_a_checkpoint(
    tmp_path, monkeypatch
):
  settings = dict(num_steps=6, log_every=6)
  whole = _toy(tmp_path / "whole", broken=[], **settings)
  told = iter([False] * 4 + [True])
  with monkeypatch.context() as m:
    m.setattr(stopping, "requested", lambda: next(told))
    with pytest.raises(stopping.Stopped, match="at step 4 of 6"):
      _toy(tmp_path / "cut", broken=[], **settings)
  assert _toy(tmp_path / "cut", broken=[], **settings) == whole


# ---- What is refused ---------------------------------------------------------


REFUSED = [
    (dict(num_seeds=0), "num_seeds=0 must be 1 or greater"),
    (dict(vary=("ppo.kl_coef",)), "'ppo.kl_coef' is not 'field=value,value"),
    (dict(vary=("ppo.kl_coef=",)), "ppo.kl_coef is given no values"),
    (dict(vary=("ppo.kl_coef=0.1,x",)), "ppo.kl_coef: 'x' is no number"),
    (dict(vary=("ppo.kl_coef=0.1,nan",)), "ppo.kl_coef: 'nan' is no number"),
    (dict(vary=("ppo.kl_coef=0.1,",)), "ppo.kl_coef: '' is no number"),
    (
        dict(vary=("ppo.kl_coef=0.1,0.2", "ppo.kl_coef=0.1,0.2")),
        "ppo.kl_coef is given twice",
    ),
    (
        dict(vary=("ppo.kl_coef=0.1,0.2", "ppo.gamma=1,1,1")),
        "all must have as many values, and ppo.kl_coef has 2, ppo.gamma has 3",
    ),
    (dict(vary=("ppo.kl_coef=0.1,1e-1",)), "two settings are the same"),
    (
        dict(vary=("ppo.kl_coeff=0.1,0.2",)),
        "no field 'ppo.kl_coeff'; did you mean ppo.kl_coef",
    ),
    (dict(vary=("ppo.ppo.gamma=1,0.9",)), "did you mean ppo.gamma?"),
    (dict(vary=("x=1,2",)), "there is no field 'x'; what can vary is ppo.temp"),
    (dict(vary=("seed=1,2",)), "set num_seeds"),
    (
        dict(vary=("ppo.num_epochs=1,2",)),
        "ppo.num_epochs is the same in all members, as it is part of the "
        "program that they share; what can vary is ppo.temperature, ",
    ),
    (
        dict(vary=("optimizer.final_fraction=0,1",)),
        "optimizer.final_fraction is the same in all members",
    ),
    (
        dict(vary=("ppo.kl_coef=0.1,-1",)),
        "member kl_coef-1.0_seed0: ppo.kl_coef=-1.0 must be greater than 0",
    ),
    (
        dict(vary=("ppo.ptx_coef=0,1",)),
        "member ptx_coef1.0_seed0: ptx_seq_len=0 must be 2 or greater",
    ),
    (
        dict(num_seeds=2, ppo__seed=2**32 - 1),
        "member seed4294967296: seed=4294967296 must be 0 or greater and less",
    ),
    (
        dict(ppo__mesh__fsdp=2, ppo__mesh__data=2),
        "ppo.mesh.fsdp=2: members are split by rows alone",
    ),
    (dict(ppo__parallelism="pmap"), "ppo.parallelism='pmap': members are"),
    (
        dict(ppo__overlap=1, ppo__ppo__importance_correction=True),
        "ppo.overlap=1: members sample and score by turns; set 0",
    ),
    (dict(ppo__fuse_iteration=True), "ppo.fuse_iteration=True: members'"),
    (dict(ppo__placement__ref_policy__devices=1), "ppo.placement: all models"),
    (
        dict(
            ppo__samples__rollout_weights="int8",
            ppo__ppo__importance_correction=True,
        ),
        "ppo.samples.rollout_weights='int8': members are evaluated",
    ),
    (dict(ppo__samples__num_slots=4), "ppo.samples.num_slots=4: slots of"),
    (dict(ppo__loop__best_metric="eval/score"), "best_metric='eval/score': a"),
]


@pytest.mark.parametrize("changes, part", REFUSED)
def test_what_members_cannot_have_is_refused_before_anything_compiles(
    changes, part, monkeypatch
):
  monkeypatch.setattr("jax.jit", None)
  settings = population_config.get_config("smoke")
  _change(settings, changes)
  with pytest.raises(ConfigError) as error:
    from_config(population.Config, settings)
  assert part in str(error.value)


def test_one_process_is_one_run_of_wandb(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  settings = population_config.get_config("smoke")
  settings.ppo.loop.wandb = True
  with pytest.raises(ConfigError, match="ppo.loop.wandb=True: a process"):
    from_config(population.Config, settings)


def test_every_setting_is_run_with_every_seed():
  settings = population_config.get_config("smoke")
  settings.update(
      vary=("ppo.kl_coef=0.1,0.2", "optimizer.learning_rate=1e-3,0.1")
  )
  settings.ppo.seed = 5
  members = from_config(population.Config, settings).members()
  assert [
      (x.seed, x.ppo.kl_coef, x.optimizer.learning_rate)
      for x in members.values()
  ] == [(5, 0.1, 1e-3), (6, 0.1, 1e-3), (5, 0.2, 0.1), (6, 0.2, 0.1)]
  assert list(members)[0] == "kl_coef0.1_learning_rate0.001_seed5"


def test_another_population_in_the_same_folder_is_refused(
    two_seeds, finished_run
):
  settings = _settings(finished_run, num_seeds=3, **FEW)
  with pytest.raises(ValueError, match="num_seeds: saved 2, given 3"):
    _run(settings, two_seeds)


def test_what_is_stacked_is_one_array_of_each():
  trees = [{"x": np.ones(2), "key": jax.random.key(i), "c": 0.5 + i}
           for i in (0, 1)]
  stacked = population_programs.stack(trees)
  assert isinstance(stacked["x"], np.ndarray) and stacked["x"].shape == (2, 2)
  np.testing.assert_array_equal(stacked["c"], jnp.float32([0.5, 1.5]))
  again = population_programs.member(stacked, 1)
  assert again["key"] == jax.random.key(1)
