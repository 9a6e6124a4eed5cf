"""From a ConfigDict to the frozen dataclasses that the library takes, and back.

A config is checked whole, before anything compiles: `from_config` walks the
dataclass's fields, and one error lists everything that is wrong, each line with
the field's dotted path.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from typing import Any, Literal, TypeVar, Union

import ml_collections
from ml_collections.config_dict import config_dict
import numpy as np

T = TypeVar("T")

_BAD = object()  # A value that was reported and cannot be used.
_PLAIN = (bool, int, float, str)


class ConfigError(ValueError):
  """Everything that is wrong with a config, a line each."""


def from_config(
    cls: type[T],
    config: ml_collections.ConfigDict | dict[str, Any],
    path: str = "config",
) -> T:
  """Builds the frozen dataclass `cls` from `config`, checking every field.

  Field types: bool, int, float, str, None, Any, Literal, Optional and other
  unions, tuple[X, ...] and tuple[X, Y], dict[str, X], and dataclasses, to any
  depth. An int is taken for a float, a list for a tuple, a numpy scalar for
  its Python number; a bool is never a number, a float never an int. NaN is
  refused unless the field has metadata `{"allow_nan": True}`. Fields with a
  default may be left out.

  Args:
    cls: a dataclass; what its `__post_init__` raises as ValueError is reported
      under its path.
    config: a section with the names of its fields.
    path: how messages call the section.

  Raises:
    ConfigError: lists every problem: unknown fields with the nearest name,
      missing fields, wrong types, values that a dataclass refused.
  """
  problems: list[str] = []
  value = _build_dataclass(cls, config, path, problems)
  if problems:
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    raise ConfigError(f"{count} in {path}:\n  " + "\n  ".join(problems))
  return value


def to_dict(obj: Any, path: str = "config") -> Any:
  """JSON-able form of a config: dataclasses become dicts, tuples lists.

  Raises:
    TypeError: a value that JSON cannot hold; names its path.
  """
  if obj is None or type(obj) in _PLAIN:
    return obj
  if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
    return {
        field.name: to_dict(getattr(obj, field.name), f"{path}.{field.name}")
        for field in dataclasses.fields(obj)
    }
  if isinstance(obj, (dict, ml_collections.ConfigDict)):
    return {
        str(name): to_dict(obj[name], f"{path}.{name}") for name in obj.keys()
    }
  if isinstance(obj, (tuple, list)):
    return [to_dict(item, f"{path}[{i}]") for i, item in enumerate(obj)]
  if isinstance(obj, os.PathLike):
    return os.fspath(obj)
  if hasattr(obj, "tolist"):  # Numpy scalars, numpy and jax arrays.
    return obj.tolist()
  raise TypeError(f"{path}: a {type(obj).__name__} cannot be saved as JSON")


def dotted_paths(config: Any, prefix: str = "") -> list[str]:
  """The path of every section and field: 'train', 'train.seed', ..."""
  if isinstance(config, ml_collections.ConfigDict):
    # A reference may be to a value that is still to be given.
    items = config.items(preserve_field_references=True)
  else:
    items = config.items() if isinstance(config, dict) else ()
  found = []
  for name, value in items:
    found += [f"{prefix}{name}", *dotted_paths(value, f"{prefix}{name}.")]
  return found


def nearest_paths(path: str, paths: list[str], num: int = 3) -> list[str]:
  """Up to `num` of `paths`: those of the same last name, or the most similar.

  The commonest slip leaves out a section: ppo.kl_coef for ppo.ppo.kl_coef.
  """
  last = path.rpartition(".")[2]
  similarity = lambda other: difflib.SequenceMatcher(None, path, other).ratio()
  alike = [x for x in paths if x.rpartition(".")[2] == last]
  alike.sort(key=similarity, reverse=True)
  near = alike or difflib.get_close_matches(path, paths, n=num)
  return near[:num]


def _build_dataclass(cls, config, path, problems):
  if isinstance(config, cls):
    return config
  if not isinstance(config, (dict, ml_collections.ConfigDict)):
    problems.append(
        f"{path}: expected the fields of {cls.__name__}, got {_show(config)}"
    )
    return _BAD
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  before = len(problems)
  for name in config.keys():
    if name not in fields:
      problems.append(_unknown(cls, name, fields, path))
  hints = typing.get_type_hints(cls)
  values = {}
  for name, field in fields.items():
    inner = f"{path}.{name}"
    if name in config:
      value = _get(config, name, inner, problems)
      if value is not _BAD:
        allow_nan = field.metadata.get("allow_nan", False)
        value = _convert(hints[name], value, inner, problems, allow_nan)
      values[name] = value
    elif _required(field):
      problems.append(f"{inner}: missing ({_type_name(hints[name])})")
  if len(problems) > before:
    return _BAD
  try:
    return cls(**values)
  except ValueError as e:
    problems.append(f"{path}: {e}")
    return _BAD


def _required(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is missing and field.default_factory is missing


def _unknown(cls, name, fields, path) -> str:
  near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
  hint = f"did you mean '{near[0]}'?" if near else (
      f"{cls.__name__} has: {', '.join(sorted(fields))}"
  )
  return f"{path}.{name}: unknown field; {hint}"


def _get(config, name, path, problems):
  try:
    return config[name]  # A ConfigDict resolves its references here.
  except config_dict.RequiredValueError:
    problems.append(f"{path}: is required and was given no value")
    return _BAD


def _convert(hint, value, path, problems, allow_nan):
  """`value` as the annotation `hint` wants it, or _BAD and a problem."""
  if isinstance(value, np.generic):
    value = value.item()
  origin = typing.get_origin(hint)
  if hint is Any:
    return value
  if origin in (Union, types.UnionType):
    return _convert_union(hint, value, path, problems, allow_nan)
  if origin is Literal:
    return _convert_literal(hint, value, path, problems)
  if origin is tuple or hint is tuple:
    return _convert_tuple(hint, value, path, problems, allow_nan)
  if origin is dict or hint is dict:
    return _convert_dict(hint, value, path, problems, allow_nan)
  if dataclasses.is_dataclass(hint):
    return _build_dataclass(hint, value, path, problems)
  if hint in _PLAIN or hint in (None, type(None)):
    return _convert_plain(hint, value, path, problems, allow_nan)
  raise TypeError(f"{path}: no config value makes a {_type_name(hint)}")


def _convert_plain(hint, value, path, problems, allow_nan):
  if hint is float and type(value) is int:
    try:
      return float(value)
    except OverflowError:
      problems.append(f"{path}: {value} is too large for a float")
      return _BAD
  if hint in (None, type(None)):
    fits = value is None
  else:  # By exact type: a bool is an int to isinstance.
    fits = type(value) is hint
  if not fits:
    problems.append(f"{path}: expected {_type_name(hint)}, got {_show(value)}")
    return _BAD
  if hint is float and math.isnan(value) and not allow_nan:
    problems.append(f"{path}: is NaN")
    return _BAD
  return value


def _convert_union(hint, value, path, problems, allow_nan):
  """The first member that takes the value; one of its own type goes first.

  Members that no config value makes (arrays, say) are left out.
  """
  members = [m for m in typing.get_args(hint) if _is_buildable(m)]
  reports = []
  for member in sorted(members, key=lambda m: type(value) is not m):
    found = []
    converted = _convert(member, value, path, found, allow_nan)
    if not found:
      return converted
    reports.append(found)
  # What is wrong inside a section says more than "expected this or that".
  inner = [r for r in reports if not r[0].startswith(f"{path}: expected")]
  names = " or ".join(_type_name(member) for member in members)
  expected = f"{path}: expected {names}, got {_show(value)}"
  problems.extend(inner[0] if inner else [expected])
  return _BAD


def _is_buildable(hint) -> bool:
  return (
      hint in (*_PLAIN, type(None), Any, tuple, dict)
      or typing.get_origin(hint) is not None
      or dataclasses.is_dataclass(hint)
  )


def _convert_literal(hint, value, path, problems):
  choices = typing.get_args(hint)
  for choice in choices:
    if type(choice) is type(value) and choice == value:
      return choice
  problem = f"{path}: {value!r} is not one of {', '.join(map(repr, choices))}"
  near = difflib.get_close_matches(str(value), map(str, choices), n=1)
  problems.append(problem + (f"; did you mean {near[0]!r}?" if near else ""))
  return _BAD


def _convert_tuple(hint, value, path, problems, allow_nan):
  if not isinstance(value, (tuple, list)):
    problems.append(f"{path}: expected {_type_name(hint)}, got {_show(value)}")
    return _BAD
  members = typing.get_args(hint)
  if not members:
    return tuple(value)
  if members[-1] is Ellipsis:
    members = (members[0],) * len(value)
  elif members == ((),):
    members = ()
  if len(members) != len(value):
    problems.append(
        f"{path}: expected {len(members)} values, got {len(value)}"
    )
    return _BAD
  items = tuple(
      _convert(member, item, f"{path}[{i}]", problems, allow_nan)
      for i, (member, item) in enumerate(zip(members, value))
  )
  return _BAD if any(item is _BAD for item in items) else items


def _convert_dict(hint, value, path, problems, allow_nan):
  if not isinstance(value, (dict, ml_collections.ConfigDict)):
    problems.append(f"{path}: expected {_type_name(hint)}, got {_show(value)}")
    return _BAD
  member = (typing.get_args(hint) or (str, Any))[1]
  items = {}
  for name in value.keys():
    inner = f"{path}.{name}"
    item = _get(value, name, inner, problems)
    if item is not _BAD:
      item = _convert(member, item, inner, problems, allow_nan)
    items[str(name)] = item
  return _BAD if any(item is _BAD for item in items.values()) else items


def _type_name(hint) -> str:
  if hint in (None, type(None)):
    return "None"
  if typing.get_origin(hint) in (Union, types.UnionType):
    return " or ".join(_type_name(m) for m in typing.get_args(hint))
  if typing.get_origin(hint) is None and isinstance(hint, type):
    return hint.__name__
  return str(hint).replace("typing.", "")


def _show(value) -> str:
  if isinstance(value, (dict, ml_collections.ConfigDict)):
    return f"the section with fields {sorted(map(str, value.keys()))}"
  if value is None:
    return "None"
  return f"the {type(value).__name__} {value!r}"
