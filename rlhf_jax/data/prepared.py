"""Records in a prepared TFDS folder: their features, and random access to them.

The folder is an ordinary TFDS dataset in ArrayRecord format, so `tfds` alone
can open it too. Neither writing nor reading needs TensorFlow, and nothing here
asks the network.
"""

from collections.abc import Sequence
import os
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import records

FILE_FORMAT = "array_record"

_INFO_FILE = "dataset_info.json"
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_TEXT = tfds.features.Text


class PreparedError(ValueError):
  """A prepared dataset that is not there, or not what was asked for."""


def features_of(kind: str) -> tfds.features.FeaturesDict:
  """The TFDS features of a kind of record.

  An absent annotator or source is stored as the empty string, which a valid
  record never holds. Weights, margins and scores are float32, as in a batch.
  """
  origin = {"annotator": _TEXT(), "source": _TEXT(), "weight": np.float32}
  columns = {
      "demonstration": {
          "texts": tfds.features.Sequence(_TEXT()),
          "trained": tfds.features.Sequence(np.int64),
      },
      "comparison": {
          "prompt": _TEXT(), "chosen": _TEXT(), "rejected": _TEXT(),
          "margin": np.float32, **origin,
      },
      "ranking": {
          "prompt": _TEXT(),
          "completions": tfds.features.Sequence(_TEXT()),
          "ranks": tfds.features.Sequence(np.int64),
          **origin,
      },
      "rating": {
          "prompt": _TEXT(), "completion": _TEXT(), "score": np.float32,
      },
      "prompt": {"prompt": _TEXT()},
  }
  return tfds.features.FeaturesDict(columns[kind])


def to_example(record: records.Record) -> dict[str, Any]:
  """A record as the columns of `features_of`."""
  if isinstance(record, records.Demonstration):
    return {
        "texts": [text for text, _ in record.spans],
        "trained": [int(trained) for _, trained in record.spans],
    }
  example = dict(vars(record))
  for field in ("annotator", "source"):
    if field in example and example[field] is None:
      example[field] = ""
  for field in ("completions", "ranks"):
    if field in example:
      example[field] = list(example[field])
  return example


def from_example(kind: str, example: dict[str, Any]) -> records.Record:
  """The inverse of `to_example`, from what TFDS reads."""
  plain = {name: _plain(value) for name, value in example.items()}
  if kind == "demonstration":
    pairs = zip(plain["texts"], plain["trained"], strict=True)
    return records.Demonstration(
        spans=tuple((text, bool(trained)) for text, trained in pairs)
    )
  for field in ("annotator", "source"):
    if field in plain and not plain[field]:
      plain[field] = None
  return _CLASSES[kind](**plain)


_CLASSES = {
    "comparison": records.Comparison,
    "ranking": records.Ranking,
    "rating": records.Rating,
    "prompt": records.Prompt,
}


class PreparedSplit(Sequence):
  """One split: `split[i]` reads record i alone from disk."""

  def __init__(self, source: Sequence, kind: str):
    self._source = source
    self._kind = kind

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> records.Record:
    if not -len(self) <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    return from_example(self._kind, self._source[index % len(self)])


def open_split(
    name: str,
    split: str | None,
    kind: str,
    data_dir: str | os.PathLike | None = None,
) -> PreparedSplit:
  """Opens a split of a dataset that `builders.prepare` wrote.

  Args:
    name: name[/config[/version]] below data_dir; the newest version if none is
      said. An absolute path works too.
    split: its name; None if there is only one.
    kind: what its records must be.
    data_dir: None is TFDS_DATA_DIR, or ~/tensorflow_datasets.

  Raises:
    PreparedError: there is no such dataset or split, or it holds another kind.
  """
  folder, builder = _open(name, data_dir)
  expected, stored = set(features_of(kind)), set(builder.info.features)
  if expected != stored:
    raise PreparedError(
        f"{folder} does not hold {kind} records: its columns are"
        f" {sorted(stored)}, not {sorted(expected)}."
    )
  splits = sorted(builder.info.splits)
  if split is None and len(splits) == 1:
    split = splits[0]
  if split not in splits:
    asked = "no split was given" if split is None else f"no split {split!r}"
    raise PreparedError(
        f"{asked}; {folder} has {', '.join(splits)}. Say tfds:{name}:SPLIT."
    )
  return PreparedSplit(builder.as_data_source(split=split), kind)


def column_names(
    name: str, data_dir: str | os.PathLike | None = None
) -> set[str]:
  """What the records of a prepared dataset hold."""
  return set(_open(name, data_dir)[1].info.features)


def _open(name: str, data_dir: str | os.PathLike | None):
  folder = _find_folder(pathlib.Path(data_dir or default_data_dir()) / name)
  return folder, tfds.builder_from_directory(folder)


def default_data_dir() -> str:
  """TFDS's own rule, said here because we never go through its registry."""
  if "TFDS_DATA_DIR" in os.environ:
    return os.environ["TFDS_DATA_DIR"]
  return os.path.join(os.path.expanduser("~"), "tensorflow_datasets")


def _find_folder(folder: pathlib.Path) -> pathlib.Path:
  if (folder / _INFO_FILE).is_file():
    return folder
  if not folder.is_dir():
    raise PreparedError(
        f"{folder}: no such prepared dataset. Write it with builders.prepare,"
        " or give data_dir."
    )
  children = [p for p in folder.iterdir() if p.is_dir()]
  # A killed preparation leaves `incomplete.*` folders, which have no version.
  versions = [
      p for p in children
      if _VERSION.fullmatch(p.name) and (p / _INFO_FILE).is_file()
  ]
  if not versions:
    listed = ", ".join(sorted(p.name for p in children)) or "nothing"
    raise PreparedError(
        f"{folder}: no prepared dataset here, only {listed}. Add the config to"
        " the name: tfds:name/config."
    )
  return max(versions, key=_version_key)


def _version_key(folder: pathlib.Path) -> tuple[int, ...]:
  return tuple(int(part) for part in folder.name.split("."))


def _plain(value: Any) -> Any:
  """Text and Python numbers instead of bytes and numpy scalars."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, (np.ndarray, np.generic)):
    value = value.tolist()
    return _plain(value) if not isinstance(value, (int, float)) else value
  if isinstance(value, (list, tuple)):
    return tuple(_plain(item) for item in value)
  return value
