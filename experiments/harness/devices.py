"""Over which devices a stage runs, and how its models lie on them."""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses

import jax

from rlhf_jax import device_mesh, sharding
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.models import partitioning
from rlhf_jax.sharding import Rules

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


def num_devices() -> int:
  """How many there are, or will be."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDevices:
  """Where a model that is not trained lies and runs.

  devices: so many of its own, the last that there are, or 0 for those of the
    policy.
  fsdp, tensor: how its own are divided; rows are split over what is left.
  """

  devices: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    if self.devices < 0 or self.fsdp < 1 or self.tensor < 1:
      raise ValueError(f"{self}: devices is 0 or more, fsdp and tensor 1 or "
                       "more")
    if not self.devices and self.fsdp * self.tensor > 1:
      raise ValueError(
          f"{self}: fsdp and tensor divide devices of its own, and it has none"
      )
    if self.devices:
      self.mesh.sizes(self.devices)

  @property
  def mesh(self) -> MeshConfig:
    """The shape of its own devices."""
    return MeshConfig(data=-1, fsdp=self.fsdp, tensor=self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementConfig:
  """Which models have devices of their own; see `OwnDevices`."""

  ref_policy: OwnDevices
  reward_model: OwnDevices

  @property
  def num_devices(self) -> int:
    """How many the policy cannot have."""
    return self.ref_policy.devices + self.reward_model.devices


def make_meshes(
    mesh: MeshConfig, placement: PlacementConfig
) -> dict[str, jax.sharding.Mesh]:
  """The meshes of 'policy', 'ref_policy' and 'reward_model'.

  Raises:
    ValueError: there are not so many devices, or they are of several processes,
      of which each must have a part in all that runs.
  """
  if placement.num_devices and jax.process_count() > 1:
    raise ValueError(
        "placement: models have devices of their own where one process has "
        f"all devices, and there are {jax.process_count()}; set devices=0"
    )
  rest = jax.devices()
  own = {
      "ref_policy": placement.ref_policy,
      "reward_model": placement.reward_model,
  }
  meshes = {}
  for name, config in own.items():
    if config.devices:
      rest, mine = rest[: -config.devices], rest[-config.devices :]
      meshes[name] = device_mesh.make_mesh(config.mesh, mine)
  meshes["policy"] = device_mesh.make_mesh(mesh, rest)
  return {name: meshes["policy"] for name in own} | meshes


def check_divides(
    batch_size: int,
    num_parts: int,
    mesh: MeshConfig,
    name: str = "batch_size",
    num_taken: int = 0,
) -> None:
  """Checks that a batch splits into parts and each part over the devices.

  Args:
    num_taken: devices that others have.

  Raises:
    ValueError: with the numbers, the batch's under its field's name.
  """
  if batch_size < 1 or num_parts < 1:
    raise ValueError(
        f"{name}={batch_size} and its number of parts ({num_parts}) must be "
        "positive"
    )
  num_shards = mesh.num_row_shards(num_devices() - num_taken)
  if batch_size % (num_parts * num_shards):
    raise ValueError(
        f"{name}={batch_size} does not divide into {num_parts} parts "
        f"(minibatches x microbatches) on {num_shards} devices: it must be a "
        f"multiple of {num_parts * num_shards}"
    )


def check_length(
    length: int, mesh: MeshConfig, name: str, num_taken: int = 0
) -> None:
  """Checks that rows of so many tokens split over the mesh's `sequence`.

  Args:
    num_taken: devices that others have.

  Raises:
    ValueError: with the numbers.
  """
  num = mesh.sizes(num_devices() - num_taken)["sequence"]
  if length % num:
    raise ValueError(f"{name}={length} does not divide over {mesh}")
