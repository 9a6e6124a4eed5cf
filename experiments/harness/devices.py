"""Over which devices a stage runs, and how its models lie on them."""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses

import jax

from rlhf_jax import sharding
from rlhf_jax.models import partitioning
from rlhf_jax.sharding import MeshConfig, Rules

_OWN_RULES = {
    "policy": partitioning.POLICY_RULES,
    "ref_policy": partitioning.POLICY_RULES,
    "value": partitioning.SCALAR_RULES,
    "reward_model": partitioning.SCALAR_RULES,
}


_planned = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planned_for(num_devices: int) -> Iterator[None]:
  """A config that is checked in here is for so many devices, here or not."""
  token = _planned.set(num_devices)
  try:
    yield
  finally:
    _planned.reset(token)


def _device_count() -> int:
  planned = _planned.get()
  return jax.device_count() if planned is None else planned


class _Sharding:
  """Rules that come before a model's own, those of `models/partitioning.py`.

  Each is (regular expression for a parameter's path, what each dimension is
  split over); the first that is found counts.
  """

  def rules_of(self, model: str) -> Rules:
    """All rules of one model, in order."""
    return (*getattr(self, model), *_OWN_RULES[model])


  def placing(self, model: str, mesh: jax.sharding.Mesh):
    """(parameter's path, shape) -> where it goes, of one model."""
    return sharding.loader(self.rules_of(model), mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySharding(_Sharding):
  """Of a language model's stage."""

  policy: Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelSharding(_Sharding):
  """Of the reward model's stage."""

  reward_model: Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSharding(_Sharding):
  """Of PPO's four models."""

  policy: Rules
  value: Rules
  ref_policy: Rules
  reward_model: Rules


def check_divides(
    batch_size: int,
    num_parts: int,
    mesh: MeshConfig,
    name: str = "batch_size",
) -> None:
  """Checks that a batch splits into parts and each part over the devices.

  Raises:
    ValueError: with the numbers, the batch's under its field's name.
  """
  if batch_size < 1 or num_parts < 1:
    raise ValueError(
        f"{name}={batch_size} and its number of parts ({num_parts}) must be "
        "positive"
    )
  num_devices = mesh.num_row_shards(_device_count())
  if batch_size % (num_parts * num_devices):
    raise ValueError(
        f"{name}={batch_size} does not divide into {num_parts} parts "
        f"(minibatches x microbatches) on {num_devices} devices: it must be a "
        f"multiple of {num_parts * num_devices}"
    )


def check_length(length: int, mesh: MeshConfig, name: str) -> None:
  """Checks that rows of so many tokens split over the mesh's `sequence`.

  Raises:
    ValueError: with the numbers.
  """
  num = mesh.sizes(_device_count())["sequence"]
  if length % num:
    raise ValueError(f"{name}={length} does not divide over {mesh}")
