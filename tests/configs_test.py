"""Every config builds, is documented, is read whole, and is checked whole."""

import ast
import dataclasses
import importlib
import importlib.util
import pathlib
import re
import typing

from ml_collections import ConfigDict
import pytest

from experiments.harness import cli, devices
from experiments.harness import config as config_lib
from experiments.harness.config import ConfigError, from_config
from rlhf_jax import device_mesh

REPO = pathlib.Path(__file__).resolve().parents[1]
STAGES = (
    "train_tokenizer", "pretrain", "sft", "preferences", "reward", "ppo",
    "evaluate", "rlhf", "population",
)
ARGS = {
    "train_tokenizer": ("full", "smoke", "chat"),
    "pretrain": ("full", "smoke"),
    "sft": ("full", "smoke"),
    "preferences": ("full", "smoke", "ranking"),
    "reward": ("full", "smoke", "ranking", "hh"),
    "ppo": (
        "full", "smoke", "hacking", "pythia_1b", "pythia_6.9b",
        "pythia_6.9b_lora", "llama3_8b", "llama3_70b",
    ),
    "evaluate": ("full", "smoke"),
    "rlhf": ("full", "smoke", "hacking", "lora", "stories"),
    "population": ("full", "smoke"),
}
# Which binary reads a config file that is not named after it.
BINARY = {
    "stories": None,
    "common": None,
    "own": None,
    "scale": None,
    "benchmark": None,  # no stage; tests/experiments/benchmark_test.py
}
CONFIG_FILES = sorted((REPO / "configs").glob("*.py"))
EACH = [(name, arg) for name in STAGES for arg in ARGS[name]]


def _module(name: str):
  return importlib.import_module(f"configs.{name}")


def _class(name: str) -> type:
  return importlib.import_module(f"experiments.{name}").Config


def _names() -> list[str]:
  return [path.stem for path in CONFIG_FILES if path.stem != "__init__"]


@pytest.mark.parametrize("name, arg", EACH)
def test_every_config_passes_its_experiments_checks(name, arg, monkeypatch):
  # Environment variables are read when data is, not before.
  monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
  built = from_config(_class(name), _module(name).get_config(arg))
  # What is saved beside the run builds the same again.
  saved = config_lib.to_dict(built)
  assert from_config(_class(name), saved) == built


def test_no_config_file_is_forgotten_here():
  own = {name for name in _names() if BINARY.get(name, name) is not None}
  assert own <= set(STAGES) | {
      name for name in own if hasattr(_module(name), "BINARY")
  }


@pytest.mark.parametrize("name", STAGES)
def test_full_is_the_default_and_another_mini_argument_is_refused(name):
  get_config = _module(name).get_config
  assert get_config().to_dict() == get_config("full").to_dict()
  for wrong in ("", "Smoke", "smoke ", "tiny"):
    with pytest.raises(ValueError, match="none of full, smoke"):
      get_config(wrong)


@pytest.mark.parametrize("name", STAGES)
def test_every_mini_argument_that_is_offered_is_known_here(name):
  offered = re.search(
      r"none of (.*)$", str(_error(lambda: _module(name).get_config("?")))
  )[1]
  assert tuple(offered.split(", ")) == ARGS[name]


def _error(call) -> Exception:
  try:
    call()
  except ValueError as error:
    return error
  raise AssertionError("nothing was raised")


@pytest.mark.parametrize("name", STAGES)
def test_a_configs_docstring_holds_its_command(name):
  text = " ".join(_module(name).__doc__.replace("\\\n", " ").split())
  assert f"python -m experiments.{name} --config=configs/{name}.py" in text
  assert "--workdir=" in text
  get_config_doc = _module(name).get_config.__doc__
  for arg in ARGS[name]:
    assert arg in get_config_doc, arg


_COMMAND = re.compile(
    r"python -m experiments\.(\w+) --config=configs/(\w+)\.py(?::(\S+))? "
    r"(?:--reuse=\S+ )?--(?:workdir|out)=\S+"
)


@pytest.mark.parametrize("name", [x for x in _names() if x != "common"])
def test_every_config_file_holds_commands_that_can_be_run(name):
  text = " ".join(_module(name).__doc__.replace("\\\n", " ").split())
  commands = _COMMAND.findall(text)
  assert 0 < len(commands) == text.count("python -m experiments.")
  for binary, config, arg in commands:
    built = _module(config).get_config(*([arg] if arg else []))
    from_config(_class(binary), built)


@pytest.mark.parametrize("name", _names())
def test_every_public_function_of_a_config_file_is_documented(name):
  tree = ast.parse((REPO / "configs" / f"{name}.py").read_text())
  assert ast.get_docstring(tree)
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
      assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", STAGES)
def test_two_calls_share_nothing(name):
  first, second = _module(name).get_config(), _module(name).get_config()
  _scribble(first)
  assert second.to_dict() == _module(name).get_config().to_dict()


def _scribble(config: ConfigDict) -> None:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      _scribble(value)
    else:
      with config.ignore_type():
        config[name] = "changed"


# ---- Every field is read -----------------------------------------------------


def _dataclasses(cls, found=None) -> set[type]:
  """`cls` and every dataclass among the types of its fields."""
  found = set() if found is None else found
  if cls in found:
    return found
  found.add(cls)
  for hint in typing.get_type_hints(cls).values():
    for member in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(member):
        _dataclasses(member, found)
  return found


def _reads() -> set[str]:
  """Names of all attributes read in the code, validation left out."""
  found = set()
  for path in [
      *(REPO / "experiments").rglob("*.py"),
      *(REPO / "rlhf_jax").rglob("*.py"),
  ]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        node.body = [ast.Pass()]
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        found.add(node.attr)
  return found


def test_every_field_of_every_config_is_read_somewhere():
  reads = _reads()
  # rlhf takes its stages by name, in the order of STAGES.
  rlhf = importlib.import_module("experiments.rlhf")
  reads.update(rlhf.STAGES)
  unread = [
      f"{cls.__qualname__}.{field.name}"
      for cls in sorted(
          set().union(*(_dataclasses(_class(name)) for name in STAGES)),
          key=lambda cls: cls.__qualname__,
      )
      for field in dataclasses.fields(cls)
      if field.name not in reads and not _is_checked_value(cls, field)
  ]
  assert not unread


def _is_checked_value(cls, field) -> bool:
  """A Literal of one value says what there is; checking it is reading it."""
  hint = typing.get_type_hints(cls)[field.name]
  return (
      typing.get_origin(hint) is typing.Literal
      and len(typing.get_args(hint)) == 1
  )


def test_every_field_is_in_every_base_config():
  # A field with a default in the dataclass would be a hidden knob otherwise.
  for name in STAGES:
    _check_complete(_class(name), _module(name).get_config(), name)


def _check_complete(cls, config, path):
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    assert field.name in config, f"{path}.{field.name}"
    value = config[field.name]
    members = [hints[field.name], *typing.get_args(hints[field.name])]
    inner = [m for m in members if dataclasses.is_dataclass(m)]
    if inner and value is not None:
      _check_complete(inner[0], value, f"{path}.{field.name}")


# ---- What is refused, before anything compiles -------------------------------


def _refused(name: str, change, *parts: str, arg: str = "smoke") -> None:
  config = _module(name).get_config(arg)
  with config.unlocked(), config.ignore_type():
    change(config)
  with pytest.raises(ConfigError) as error:
    from_config(_class(name), config)
  for part in parts:
    assert part in str(error.value)


def test_an_unknown_field_is_told_with_the_nearest_name():
  def change(config):
    config.train.optimizer.learning_rat = 1.0
    config.train.loop.checkpoint_evry = 1

  _refused(
      "sft",
      change,
      "config.train.optimizer.learning_rat: unknown field; did you mean "
      "'learning_rate'?",
      "config.train.loop.checkpoint_evry: unknown field; did you mean "
      "'checkpoint_every'?",
      "2 problems",
  )


def test_wrong_types_are_told_together():
  def change(config):
    config.seed = "0"
    config.ppo.num_epochs = 4.0
    config.ppo.whiten_rewards = 1
    config.ppo.kl_estimator = "k4"
    config.samples.stop_tokens = "."
    config.value_init = "reward-model"

  _refused(
      "ppo",
      change,
      "6 problems",
      "config.seed: expected int, got the str '0'",
      "config.ppo.num_epochs: expected int, got the float 4.0",
      "config.ppo.whiten_rewards: expected bool, got the int 1",
      "config.ppo.kl_estimator: 'k4' is not one of",
      "config.samples.stop_tokens: expected tuple",
      "did you mean 'reward_model'?",
  )


def test_a_missing_field_is_told():
  def change(config):
    del config.loop.num_steps

  _refused("reward", change, "config.loop.num_steps: missing (int)")


DOES_NOT_DIVIDE = [
    ("sft", lambda c: c.train.update(batch_size=10, mesh=dict(data=4)), "10"),
    ("sft", lambda c: c.train.sft.update(num_microbatches=5), "16"),
    ("reward", lambda c: c.reward.update(num_microbatches=3), "16"),
    ("reward", lambda c: c.mesh.update(data=5), "5 devices"),
    (
        "reward",
        lambda c: c.update(parallelism="pmap", mesh=dict(fsdp=2)),
        "mesh.fsdp=2, but pmap",
    ),
    (
        "sft",
        lambda c: c.train.update(parallelism="pmap", mesh=dict(tensor=2)),
        "mesh.tensor=2, but pmap",
    ),
    (
        "ppo",
        lambda c: c.update(parallelism="pmap", mesh=dict(replica=2)),
        "mesh.replica=2, but pmap",
    ),
    ("ppo", lambda c: c.ppo.update(num_minibatches=3), "32"),
    (
        "ppo",
        lambda c: c.ppo.update(num_minibatches=4, num_microbatches=16),
        "multiple of 64",
    ),
    ("ppo", lambda c: c.update(rollout_batch_size=0), "rollout_batch_size=0"),
    (
        "ppo",
        lambda c: (
            c.ppo.update(ptx_coef=1.0),
            c.ptx_documents.update(source="text:x"),
        ),
        "ptx",
    ),
    ("pretrain", lambda c: c.model.update(num_heads=3), "num_heads"),
    ("pretrain", lambda c: c.model.update(head_dim=7), "head_dim"),
    ("preferences", lambda c: c.update(num_completions=1), "at least 2"),
    (
        "preferences",
        lambda c: c.samples.update(num_slots=3),
        "samples.num_slots=3 must be at least num_completions=4",
    ),
    ("preferences", lambda c: c.update(batch_size=3), "batch_size=3"),
    (
        "ppo",
        lambda c: (c.samples.update(num_slots=4), c.mesh.update(data=2)),
        "over 2 devices, and a refill would gather them",
    ),
    (
        "sft",
        lambda c: (
            c.train.samples.update(num_slots=4), c.train.mesh.update(fsdp=2)
        ),
        "samples.num_slots=4",
    ),
    ("evaluate", lambda c: c.samples.update(num_slots=-1), "0 or greater"),
    (
        "ppo",
        lambda c: c.samples.update(num_slots=4, num_cache_buckets=2),
        "samples.num_cache_buckets=2 and samples.num_slots=4: slots share",
    ),
    (
        "ppo",
        lambda c: c.samples.update(rollout_weights="int8"),
        "samples.rollout_weights='int8' samples from another distribution",
    ),
    (
        "evaluate",
        lambda c: c.samples.update(num_cache_buckets=0),
        "num_cache_buckets",
    ),
    (
        "sft",
        lambda c: c.train.loop.update(log_every=4, checkpoint_every=6),
        "multiple of log_every=4",
    ),
    (
        "sft",
        lambda c: c.train.loop.update(
            log_every=1, best_metric="eval/loss", eval_every=4,
            checkpoint_every=2,
        ),
        "multiple of eval_every=4",
    ),
]


@pytest.mark.parametrize("name, change, part", DOES_NOT_DIVIDE)
def test_sizes_that_do_not_divide_are_refused(
    name, change, part, monkeypatch
):
  # Before anything compiles: nothing is even traced.
  monkeypatch.setattr("jax.jit", None)
  _refused(name, change, part)


def test_int8_rollouts_of_a_policy_that_is_not_older_are_corrected():
  config = _module("ppo").get_config("smoke")
  config.samples.rollout_weights = "int8"
  config.ppo.importance_correction = True
  assert from_config(_class("ppo"), config).overlap == 0


NONSENSE = [
    ("ppo", lambda c: c.update(value_network="shared"), "value_init"),
    ("ppo", lambda c: c.ptx_documents.update(source="text:x"), "both or"),
    ("ppo", lambda c: c.ppo.update(kl_coef=float("nan")), "kl_coef: is NaN"),
    ("ppo", lambda c: c.loop.update(num_steps=0), "num_steps"),
    ("evaluate", lambda c: c.update(ref_policy="gpt"), "base, sft, ppo"),
    ("evaluate", lambda c: c.update(policies=("runs/x",)), "name=place"),
    ("sft", lambda c: c.demonstrations.update(limit=0), "no end"),
    ("sft", lambda c: c.demonstrations.update(limit=-1), "negative"),
    ("sft", lambda c: c.demonstrations.update(on_error="ignore"), "on_error"),
    (
        "pretrain",
        lambda c: c.tokenizer.update(vocab_size=600),
        "must be equal",
    ),
]


OUT_OF_RANGE = [
    ("num_epochs", 0, "1 or greater"),
    ("num_minibatches", 0, "1 or greater"),
    ("num_microbatches", -1, "1 or greater"),
    ("temperature", 0.0, "greater than 0"),
    ("gamma", 1.1, "from 0 to 1"),
    ("gae_lambda", -0.1, "from 0 to 1"),
    ("cliprange", 0.0, "greater than 0"),
    ("cliprange_value", -1.0, "greater than 0"),
    ("vf_coef", -0.1, "0 or greater"),
    ("entropy_coef", -0.1, "0 or greater"),
    ("ptx_coef", -0.1, "0 or greater"),
    ("max_update_kl", 0.0, "greater than 0"),
    ("kl_target", 0.0, "greater than 0"),
    ("kl_horizon", -1.0, "greater than 0"),
    ("kl_coef", 0.0, "greater than 0"),
]


@pytest.mark.parametrize("field, value, wanted", OUT_OF_RANGE)
def test_a_ppo_number_out_of_its_range_is_refused(field, value, wanted):
  _refused(
      "ppo",
      lambda c: c.ppo.update({field: value}),
      f"ppo.{field}={value} must be {wanted}",
  )


def test_a_fixed_controller_needs_no_target_and_may_have_no_penalty():
  config = _module("ppo").get_config("smoke")
  config.ppo.update(
      kl_controller="fixed", kl_coef=0.0, kl_target=0.0, kl_horizon=0.0
  )
  from_config(_class("ppo"), config)
  config.ppo.kl_coef = -0.1
  with pytest.raises(ConfigError, match="ppo.kl_coef=-0.1 must be 0 or"):
    from_config(_class("ppo"), config)


@pytest.mark.parametrize("field, value", [
    ("learning_rate", 0.0),
    ("warmup_steps", -1),
    ("warmup_steps", 1_000_000),
    ("final_fraction", 1.5),
    ("b1", 1.0),
    ("b2", -0.1),
    ("epsilon", 0.0),
    ("weight_decay", -0.1),
    ("max_grad_norm", 0.0),
])
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_an_optimizers_number_out_of_its_range_is_refused(name, field, value):
  change = lambda c: getattr(c, "train", c).optimizer.update({field: value})
  _refused(name, change, f"optimizer.{field}={value} must be ")


def test_warmup_of_ppo_is_counted_in_optimizer_steps():
  config = _module("ppo").get_config("smoke")
  num_updates = (
      config.loop.num_steps * config.ppo.num_epochs * config.ppo.num_minibatches
  )
  config.optimizer.warmup_steps = num_updates - 1
  from_config(_class("ppo"), config)
  config.optimizer.warmup_steps = num_updates
  with pytest.raises(ConfigError, match=f"less than the {num_updates} optim"):
    from_config(_class("ppo"), config)


@pytest.mark.parametrize("change, part", [
    (lambda c: c.pretrain.train.update(seq_len=129), "pretrain.train.seq_len"),
    (lambda c: c.sft.train.update(seq_len=129), "sft.train.seq_len"),
    (
        lambda c: c.reward.update(max_completion_length=109),
        "reward.max_prompt_length + reward.max_completion_length",
    ),
    (
        lambda c: c.preferences.samples.update(max_completion_length=109),
        "preferences.samples.max_completion_length=129",
    ),
    # A reward model reads an end token behind what a stop token ended.
    (
        lambda c: c.reward.samples.update(max_completion_length=108),
        "reward.samples.max_completion_length + 1 (an end token",
    ),
    (
        lambda c: c.ppo.samples.update(max_completion_length=108),
        "ppo.samples.max_prompt_length + ppo.samples.max_completion_length + 1",
    ),
    (
        lambda c: c.evaluate.samples.update(max_prompt_length=96),
        "evaluate.samples.max_prompt_length + ",
    ),
    (
        # Of another length itself, judged by one of this run's.
        lambda c: (
            c.update(judge=c.reward.copy_and_resolve_references()),
            c.ppo.update(
                init_from="models/long",
                reward_model="models/long",
                judge="reward_model:@run/judge",
            ),
            c.ppo.samples.update(max_completion_length=108),
        ),
        "ppo.samples.max_completion_length + 1",
    ),
])
def test_a_length_that_the_runs_model_does_not_have_is_refused(change, part):
  _refused("rlhf", change, part, "=129", "pretrain.model.max_length=128")


def test_another_model_may_be_longer():
  config = _module("rlhf").get_config("smoke")
  config.reward.init_from = "models/long"
  config.reward.max_completion_length = 500
  # What starts from it is as long.
  config.ppo.init_from = config.ppo.reward_model = "@run/reward"
  config.ppo.judge = "world:assistant"
  config.ppo.samples.max_completion_length = 500
  from_config(_class("rlhf"), config)


def test_evaluation_shows_the_target_that_the_controller_aims_at():
  def change(config):
    config.evaluate.kl_target = 3.0

  _refused("rlhf", change, "evaluate.kl_target=3.0", "ppo.ppo.kl_target=1.5")
  config = _module("rlhf").get_config("smoke")
  config.evaluate.kl_target = 0.0
  config.ppo.ppo.kl_controller = "fixed"
  from_config(_class("rlhf"), config)


INFINITY = float("inf")
NO_SUCH_NUMBER = [
    ("preferences", lambda c: c.update(batch_size=-5), "batch_size=-5"),
    (
        "preferences",
        lambda c: c.samples.update(greedy=True),
        "makes all completions of a prompt the same",
    ),
    ("preferences", lambda c: c.samples.update(top_k=1), "top_k=1"),
    ("reward", lambda c: c.update(max_prompt_length=0), "max_prompt_length=0"),
    (
        "reward",
        lambda c: c.update(max_completion_length=-5),
        "max_completion_length=-5",
    ),
    ("reward", lambda c: c.reward.update(center_coef=-0.1), "center_coef=-0.1"),
    ("pretrain", lambda c: c.train.update(seq_len=0), "seq_len=0"),
    ("sft", lambda c: c.train.update(seq_len=1), "seq_len=1"),
    ("sft", lambda c: c.train.sft.update(z_loss_coef=-1.0), "z_loss_coef=-1"),
    ("ppo", lambda c: c.update(num_logged_samples=-3), "num_logged_samples=-3"),
    (
        "ppo",
        lambda c: (
            c.ppo.update(ptx_coef=1.0),
            c.ptx_documents.update(source="text:x"),
            c.update(ptx_batch_size=32),
        ),
        "ptx_seq_len=0 must be 2 or greater",
    ),
    *(
        (name, lambda c, seed=seed: c.update(seed=seed), f"seed={seed} must be")
        for name in ("preferences", "reward", "ppo")
        for seed in (-1, 2**32)
    ),
    ("sft", lambda c: c.train.update(seed=-1), "seed=-1 must be 0 or greater"),
    *(
        ("ppo", lambda c, x=field: c.ppo.update({x: INFINITY}), f"{field}=inf")
        for field in (
            "kl_coef",
            "temperature",
            "cliprange",
            "vf_coef",
            "missing_eos_score",
            "kl_horizon",
        )
    ),
    (
        "ppo",
        lambda c: c.samples.update(temperature=INFINITY),
        "temperature=inf must be greater than 0 and finite",
    ),
    *(
        (
            "reward",
            lambda c, x=field: c.optimizer.update({x: INFINITY}),
            f"optimizer.{field}=inf",
        )
        for field in ("learning_rate", "weight_decay")
    ),
]


@pytest.mark.parametrize("name, change, part", NO_SUCH_NUMBER)
def test_a_number_that_no_stage_can_work_with_is_refused(name, change, part):
  _refused(name, change, part)


def test_an_infinite_gradient_norm_is_taken_for_no_clipping():
  config = _module("reward").get_config("smoke")
  config.optimizer.max_grad_norm = INFINITY
  from_config(_class("reward"), config)


def test_a_seed_may_have_32_bits():
  config = _module("ppo").get_config()
  config.seed = 2**32 - 1
  from_config(_class("ppo"), config)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_wandb_that_is_not_installed_is_missed_at_the_start(name, monkeypatch):
  real = importlib.util.find_spec
  monkeypatch.setattr(
      "importlib.util.find_spec",
      lambda x: None if x == "wandb" else real(x),
  )
  loop = lambda c: c.train.loop if name == "sft" else c.loop
  _refused(name, lambda c: loop(c).update(wandb=True), "pip install wandb")


@pytest.mark.parametrize("name, change, part", NONSENSE)
def test_what_makes_no_sense_is_refused(name, change, part):
  _refused(name, change, part)


def test_problems_of_every_stage_are_told_at_once():
  def change(config):
    config.pretrain.train.sed = 1
    config.reward.batch_size = "8"
    config.evaluate.policies = ("x",)

  _refused(
      "rlhf",
      change,
      "config.pretrain.train.sed",
      "config.reward.batch_size",
      "config.evaluate",
  )


@pytest.mark.parametrize("batch_size, num_parts, mesh, fits", [
    (8, 2, dict(data=4), True),
    (8, 2, dict(data=8), False),
    (8, 2, dict(replica=2, fsdp=2), True),
    (8, 2, dict(replica=2, fsdp=4), False),
    (8, 8, dict(tensor=4, sequence=2), True),  # they split no rows
    (8, 1, dict(data=-1), True),  # all eight simulated devices
    (12, 1, dict(data=-1), False),
    (4, 1, dict(fsdp=-1, tensor=2), True),
    (8, 0, {}, False),
    (0, 1, {}, False),
    (8, 1, dict(data=16), False),
    (8, 1, dict(data=-1, tensor=3), False),
])
def test_check_divides(batch_size, num_parts, mesh, fits):
  mesh = device_mesh.MeshConfig(**mesh)
  if fits:
    devices.check_divides(batch_size, num_parts, mesh)
  else:
    with pytest.raises(ValueError):
      devices.check_divides(batch_size, num_parts, mesh)


def test_a_config_error_is_one_that_the_user_can_mend(capsys):
  with pytest.raises(SystemExit) as ended, cli.told_errors():
    from_config(_class("sft"), {})
  assert ended.value.code == 1
  assert capsys.readouterr().err.startswith("\nerror: ")


def test_a_seed_moves_every_stages_seed_and_nothing_else():
  get_config = _module("rlhf").get_config
  zero = get_config("full").to_dict()
  three = get_config("full,seed=3").to_dict()
  assert _without_seeds(zero) == _without_seeds(three)
  seeds = lambda config: list(_seeds(config))
  assert [x + 3 for x in seeds(zero)] == seeds(three)
  assert len(seeds(zero)) == 6


def _seeds(value):
  for name, item in value.items():
    if name == "seed":
      yield item
    elif isinstance(item, dict):
      yield from _seeds(item)


def _without_seeds(value):
  if not isinstance(value, dict):
    return value
  return {k: _without_seeds(v) for k, v in value.items() if k != "seed"}


@pytest.mark.parametrize("arg", ["full,seed", "full,seed=x", "full,sed=1",
                                 "full,seed=1,seed=2", "seed=1", "full,seed="])
def test_a_seed_that_is_none_is_refused(arg):
  with pytest.raises(ValueError, match="mini-argument|seed"):
    _module("rlhf").get_config(arg)
