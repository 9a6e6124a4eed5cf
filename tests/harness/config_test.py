"""Configs: every wrong field is named, and right ones convert exactly."""

import dataclasses
import json
from typing import Any, Literal

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import ml_collections
from ml_collections import config_dict
import numpy as np
import pytest

from experiments.harness import config as config_lib
from rlhf_jax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Schedule:
  peak: float
  warmup: int = 0

  def __post_init__(self):
    if self.peak <= 0:
      raise ValueError(f"peak must be positive, not {self.peak}")


@types.pytree_dataclass
class _Update:
  kl_coef: float
  num_epochs: int = types.static(4)
  estimator: Literal["k1", "k2", "exact"] = types.static("k1")
  kl_target: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  name: str
  steps: int
  debug: bool
  sizes: tuple[int, ...]
  betas: tuple[float, float]
  update: _Update
  schedule: _Schedule | None
  stages: tuple[_Schedule, ...] = ()
  coefs: dict[str, float] = dataclasses.field(default_factory=dict)
  limit: float = dataclasses.field(
      default=0.0, metadata={"allow_nan": True}
  )
  anything: Any = None


def _valid(**changes):
  return {
      "name": "run", "steps": 3, "debug": False, "sizes": (1, 2),
      "betas": (0.9, 0.95), "update": {"kl_coef": 0.1}, "schedule": None,
      **changes,
  }


def _problems(config, cls=_Run, path="config"):
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.from_config(cls, config, path)
  first, *lines = str(error.value).splitlines()
  assert first.startswith(f"{len(lines)} problem")
  return [line.strip() for line in lines]


def test_a_config_dict_becomes_nested_dataclasses():
  config = ml_collections.ConfigDict(_valid(sizes=[4, 5], stages=[]))
  config.schedule = ml_collections.ConfigDict({"peak": 1})
  config.stages = ({"peak": 2}, ml_collections.ConfigDict({"peak": 3.0}))
  config.coefs = {"a": 1}
  run = config_lib.from_config(_Run, config)
  assert run.update == _Update(kl_coef=0.1)
  assert run.sizes == (4, 5)
  assert [s.peak for s in run.stages] == [2.0, 3.0]
  assert run.coefs == {"a": 1.0}
  assert type(run.schedule.peak) is float


def test_field_references_are_resolved():
  config = ml_collections.ConfigDict(_valid())
  config.steps = 7
  config["update"].num_epochs = config.get_ref("steps") * 2
  config.sizes = (config.get_ref("steps").get(), 1)
  config.steps = 10
  assert config_lib.from_config(_Run, config).update.num_epochs == 20


def test_frozen_config_dicts_are_taken():
  config = ml_collections.FrozenConfigDict(_valid(sizes=[1, 2]))
  assert config_lib.from_config(_Run, config).sizes == (1, 2)


def test_a_placeholder_without_a_value_is_reported():
  config = ml_collections.ConfigDict(_valid())
  config.steps = config_dict.required_placeholder(int)
  assert _problems(config) == [
      "config.steps: is required and was given no value"
  ]
  config = ml_collections.ConfigDict(_valid())
  config.schedule = config_dict.placeholder(dict)
  assert config_lib.from_config(_Run, config).schedule is None


def test_all_problems_are_listed_in_one_error():
  config = _valid(steps="3", debug=1, sizes=(1, 2.5), betas=(0.9,), nmae="x")
  config["update"] = {"kl_coeff": 0.1, "estimator": "exat", "num_epochs": True}
  del config["name"]
  assert _problems(config, path="config.ppo") == [
      "config.ppo.nmae: unknown field; did you mean 'name'?",
      "config.ppo.name: missing (str)",
      "config.ppo.steps: expected int, got the str '3'",
      "config.ppo.debug: expected bool, got the int 1",
      "config.ppo.sizes[1]: expected int, got the float 2.5",
      "config.ppo.betas: expected 2 values, got 1",
      "config.ppo.update.kl_coeff: unknown field; did you mean 'kl_coef'?",
      "config.ppo.update.kl_coef: missing (float)",
      "config.ppo.update.num_epochs: expected int, got the bool True",
      "config.ppo.update.estimator: 'exat' is not one of 'k1', 'k2', 'exact';"
      " did you mean 'exact'?",
  ]


def test_an_unknown_field_like_no_other_lists_the_fields():
  [line] = _problems({"peak": 1.0, "zzz": 0}, _Schedule)
  assert line == "config.zzz: unknown field; _Schedule has: peak, warmup"


def test_what_a_dataclass_refuses_is_reported_under_its_path():
  config = _valid(schedule={"peak": -1}, stages=({"peak": 0},), debug=None)
  assert _problems(config) == [
      "config.debug: expected bool, got None",
      "config.schedule: peak must be positive, not -1.0",
      "config.stages[0]: peak must be positive, not 0.0",
  ]


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("steps", 1e3, "expected int, got the float 1000.0"),
        ("steps", np.float32(2), "expected int, got the float 2.0"),
        ("steps", None, "expected int, got None"),
        ("betas", (True, 0.5), "[0]: expected float, got the bool True"),
        ("betas", "ab", "expected tuple[float, float], got the str 'ab'"),
        ("betas", (float("nan"), 0.5), "[0]: is NaN"),
        ("sizes", 3, "expected tuple[int, ...], got the int 3"),
        ("name", 3, "expected str, got the int 3"),
        ("update", 3, "expected the fields of _Update, got the int 3"),
        ("schedule", 3, "expected _Schedule or None, got the int 3"),
        ("coefs", {"a": "b"}, ".a: expected float, got the str 'b'"),
        ("coefs", {"a": 10**400}, "is too large for a float"),
    ],
)
def test_wrong_values_are_named(field, value, reason):
  [line] = _problems(_valid(**{field: value}))
  assert line.startswith(f"config.{field}")
  assert reason in line


def test_numpy_scalars_become_python_numbers():
  run = config_lib.from_config(
      _Run,
      _valid(
          steps=np.int64(5), debug=np.bool_(True),
          betas=[np.float32(0.5), np.int32(1)], name=np.str_("n"),
      ),
  )
  values = (run.steps, run.debug, run.betas, run.name)
  assert values == (5, True, (0.5, 1.0), "n")
  assert [type(v) for v in (run.steps, run.debug, *run.betas, run.name)] == [
      int, bool, float, float, str
  ]


def test_nan_is_refused_unless_the_field_allows_it():
  run = config_lib.from_config(_Run, _valid(limit=float("nan")))
  assert run.limit != run.limit
  assert _problems(_valid(update={"kl_coef": float("nan")})) == [
      "config.update.kl_coef: is NaN"
  ]
  assert _problems(_valid(update={"kl_coef": 0, "kl_target": np.nan})) == [
      "config.update.kl_target: is NaN"
  ]


def test_a_built_dataclass_is_taken_as_it_is():
  update = _Update(kl_coef=0.5)
  assert config_lib.from_config(_Run, _valid(update=update)).update is update


def test_static_fields_are_plain_fields():
  update = config_lib.from_config(
      _Update, {"kl_coef": 1, "num_epochs": 2, "estimator": "exact"}
  )
  assert jax.tree.leaves(update) == [1.0]
  assert (update.num_epochs, update.estimator) == (2, "exact")


def test_a_leaf_annotated_as_array_or_float_takes_floats_only():
  @dataclasses.dataclass(frozen=True)
  class Leaf:
    beta: Float[Array, ""] | float

  assert config_lib.from_config(Leaf, {"beta": 1}).beta == 1.0
  assert _problems({"beta": "a"}, Leaf) == [
      "config.beta: expected float, got the str 'a'"
  ]


def test_an_annotation_that_no_config_can_fill_is_a_programming_error():
  @dataclasses.dataclass(frozen=True)
  class Wrong:
    x: set

  with pytest.raises(TypeError, match="config.x"):
    config_lib.from_config(Wrong, {"x": 1})


def test_to_dict_is_json_and_builds_the_same_dataclass():
  run = config_lib.from_config(
      _Run, _valid(schedule={"peak": 2}, stages=[{"peak": 1.5}], coefs={"a": 2})
  )
  saved = json.loads(json.dumps(config_lib.to_dict(run)))
  assert saved["update"] == {
      "kl_coef": 0.1, "num_epochs": 4, "estimator": "k1", "kl_target": None
  }
  assert config_lib.from_config(_Run, saved) == run


def test_to_dict_takes_arrays_and_config_dicts():
  config = ml_collections.ConfigDict({"a": {"b": (1, 2)}, "n": np.float64(2)})
  config["twice"] = config.get_ref("n")
  config["arrays"] = [np.arange(2), jnp.float32(0.5)]
  assert config_lib.to_dict(config) == {
      "a": {"b": [1, 2]}, "n": 2.0, "twice": 2.0, "arrays": [[0, 1], 0.5]
  }
  with pytest.raises(TypeError, match=r"config\.f\[0\]: a .*function"):
    config_lib.to_dict({"f": (lambda: 0,)})


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["peak", "kl_coef", "x"]), inner),
    max_leaves=6,
)


@hypothesis.given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(_Run)]), _VALUES
    )
)
def test_any_config_gives_a_dataclass_or_one_config_error(changes):
  try:
    run = config_lib.from_config(_Run, _valid(**changes))
  except config_lib.ConfigError as e:
    lines = str(e).splitlines()[1:]
    assert all(line.startswith("  config.") for line in lines)
  else:
    config_lib.to_dict(run)
