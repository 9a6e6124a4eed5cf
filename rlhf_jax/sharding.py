"""Where arrays lie on the mesh: params by their model's rules, activations.

A rule is a regular expression and what each dimension is split over. Of the
rules of a model the first that is found in a parameter's path counts; one that
none matches is an error. The mesh itself is that of `device_mesh.py`.
"""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax import device_mesh

# What one dimension is split over.
Split = str | tuple[str, ...] | None
# (regular expression, a Split for each dimension), searched for in a
# parameter's path 'trunk/layers/attention/query/kernel'; the first that is
# found counts. Missing dimensions are not split.
Rule = tuple[str, tuple[Split, ...]]
Rules = tuple[Rule, ...]


# --- rules --------------------------------------------------------------------


def spec_of(
    path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
  """How a parameter is split; scalars are not.

  Raises:
    ValueError: no rule matches, or a dimension does not divide.
  """
  if not shape:
    return PartitionSpec()
  for pattern, splits in rules:
    if re.search(pattern, path):
      _check_divides(path, shape, pattern, splits, mesh)
      return PartitionSpec(*splits)
  raise ValueError(
      f"{path} {shape}: no sharding rule matches; the last could be "
      "('.*', ()), a copy on every device"
  )


def _check_divides(path, shape, pattern, splits, mesh) -> None:
  if len(splits) > len(shape):
    raise ValueError(
        f"{path} {shape} has fewer dimensions than its sharding rule "
        f"{pattern!r} {splits}"
    )
  for i, split in enumerate(splits):
    axes = _axes(split)
    unknown = [axis for axis in axes if axis not in mesh.shape]
    if unknown:
      raise ValueError(
          f"sharding rule {pattern!r} {splits}: {unknown[0]!r} is none of the "
          f"mesh's axes {', '.join(mesh.shape)}"
      )
    num = math.prod(mesh.shape[axis] for axis in axes)
    if shape[i] % num:
      raise ValueError(
          f"{path} {shape}: its dimension {i} of {shape[i]} does not divide "
          f"over {' x '.join(axes)} = {num}; choose another mesh, or another "
          f"rule than {pattern!r} {splits}"
      )


def shardings_of(
    tree: Any, rules: Rules | Mapping[str, Rules], mesh: Mesh
) -> Any:
  """The sharding of every leaf of params, of a state, or of their shapes.

  What belongs to a parameter and has its path at its end, as an optimizer's
  moments do, goes where the parameter goes.

  Args:
    rules: of one model, or of several by the name that their part of the tree
      has: {'policy': ..., 'value': ...}.

  Raises:
    ValueError: see `spec_of`.
  """

  def sharding(key_path, leaf):
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    own, rest = rules, path
    if isinstance(rules, Mapping):
      names = path.split("/")
      found = [i for i, name in enumerate(names) if name in rules]
      own = rules[names[found[0]]] if found else ()
      rest = "/".join(names[found[0] + 1 :]) if found else path
    try:
      return NamedSharding(mesh, spec_of(rest, leaf.shape, own, mesh))
    except ValueError as error:
      where = f"{path}: " if rest != path else ""
      raise ValueError(f"{where}{error}") from error

  return jax.tree_util.tree_map_with_path(sharding, tree)


def place(
    tree: Any,
    rules: Rules | Mapping[str, Rules],
    mesh: Mesh,
    *,
    copy: bool = False,
) -> Any:
  """Every array of the tree where its rule puts it.

  Args:
    copy: also what lies there already, so that it may be donated.
  """
  shardings = shardings_of(tree, rules, mesh)
  return jax.tree.map(
      lambda x, y: device_mesh.put(x, y, copy=copy), tree, shardings
  )


def of(tree: Any) -> Any:
  """Where each array of the tree is."""
  return jax.tree.map(lambda x: x.sharding, tree)


def loader(
    rules: Rules, mesh: Mesh
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """(path, shape) -> where a parameter goes while it is read."""
  return lambda path, shape: NamedSharding(
      mesh, spec_of(path, shape, rules, mesh)
  )


# --- activations --------------------------------------------------------------


def mesh_of(x: jax.Array) -> Any | None:
  """The mesh that a traced array is on, or None where it is on one device.

  None too under pmap and shard_map, where each device sees its own part alone.
  """
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or mesh.size == 1:
    return None
  return None if AxisType.Manual in mesh.axis_types else mesh


def constrain(x: jax.Array, splits: tuple[Split, ...]) -> jax.Array:
  """Says how an activation lies on its mesh; without one it does nothing.

  A dimension that does not divide is not split: one token of a decode step has
  no sequence to split.
  """
  mesh = mesh_of(x)
  if mesh is None:
    return x
  spec = fitting_spec(x.shape, splits, mesh)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def fitting_spec(
    shape: tuple[int, ...], splits: tuple[Split, ...], mesh: Any
) -> PartitionSpec:
  """`splits` without axes that the mesh has not, or that do not divide."""
  fitting = []
  for size, split in zip(shape, splits, strict=True):
    axes = tuple(axis for axis in _axes(split) if axis in mesh.shape)
    divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
    fitting.append(axes if axes and divides else None)
  return PartitionSpec(*fitting)


def _axes(split: Split) -> tuple[str, ...]:
  if split is None:
    return ()
  return (split,) if isinstance(split, str) else tuple(split)
