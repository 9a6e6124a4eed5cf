"""Prepares record files once into TFDS folders of ArrayRecord.

Preparing validates everything, gives random access and named splits, and needs
neither TensorFlow nor the network. Afterwards `read_records("tfds:name:split",
kind, data_dir=...)` reads it, and so does plain `tfds.builder_from_directory`.

`prepare` takes files of any kind of record; `prepare_hh`, `prepare_gsm8k` and
`prepare_sentence_polarity` take the raw files as their publishers ship them.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re

import tensorflow_datasets as tfds

from rlhf_jax.data import chat, prepared, publishers, readers
from rlhf_jax.data.records import KINDS, Record

VERSION = "1.0.0"

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class _RecordBuilder(
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Writes records that are already validated. One class for all kinds."""

  VERSION = tfds.core.Version(VERSION)
  pkg_dir_path = None

  def __init__(
      self, *, kind: str, records_by_split: Mapping[str, Sequence[Record]],
      description: str, **kwargs,
  ):
    self._kind = kind
    self._records = records_by_split
    self._description = description
    super().__init__(file_format=prepared.FILE_FORMAT, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self._description,
        features=prepared.features_of(self._kind),
        # The order of the files is kept: reproducible, and easy to look up.
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is ever downloaded
    return {
        split: self._generate_examples(rows)
        for split, rows in self._records.items()
    }

  def _generate_examples(self, rows: Sequence[Record]):
    for index, record in enumerate(rows):
      yield index, prepared.to_example(record)


def write_records(
    records_by_split: Mapping[str, Sequence[Record]],
    kind: str,
    name: str,
    data_dir: str | os.PathLike,
    *,
    config: str | None = None,
    description: str = "",
) -> pathlib.Path:
  """Writes records to data_dir/name[/config]/version.

  Args:
    records_by_split: split name -> validated records, at least one in each.
    kind: one of `records.KINDS`.
    name: of the dataset: lower case, digits and underscores.
    data_dir: made if it does not exist.
    config: a variant of the dataset, in a folder of its own.
    description: kept in the dataset's info.

  Returns:
    The folder.

  Raises:
    PreparedError: a name that TFDS does not allow, an empty split, or the
      folder exists already (it is never overwritten).
  """
  _check_names(kind, name, config, records_by_split)
  folder = pathlib.Path(data_dir, name, *([config] if config else []), VERSION)
  if folder.exists():
    raise prepared.PreparedError(
        f"{folder} exists already. Remove it to prepare it anew, or give"
        " another name."
    )
  cls = type(name, (_RecordBuilder,), {"name": name}, skip_registration=True)
  builder = cls(
      kind=kind,
      records_by_split=records_by_split,
      description=description or f"{kind} records",
      data_dir=os.fspath(data_dir),
      config=tfds.core.BuilderConfig(name=config) if config else None,
  )
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
          # Never ask the public bucket for a dataset of the same name.
          try_download_gcs=False,
      ),
      file_format=prepared.FILE_FORMAT,
  )
  return folder


def prepare(
    source_by_split: Mapping[str, str | os.PathLike],
    kind: str,
    name: str,
    data_dir: str | os.PathLike,
    *,
    on_error: str = "raise",
    skipped_dir: str | os.PathLike | None = None,
    chat_template: str | chat.Template = "plain",
) -> pathlib.Path:
  """Validates record files and writes them as one dataset.

  Args:
    source_by_split: split name -> file or glob, as in `readers.read_records`.
    kind, name, data_dir: as in `write_records`.
    on_error: as in `read_records`; "skip" writes skipped_dir/SPLIT.jsonl.
    skipped_dir: needed by "skip".
    chat_template: how {messages} becomes text; the text is what is stored.

  Returns:
    The folder.
  """
  _check_names(kind, name, None, source_by_split)
  found = {}
  for split, source in source_by_split.items():
    found[split] = readers.read_records(
        source, kind, on_error=on_error, chat_template=chat_template,
        skipped_path=_skipped_path(skipped_dir, split),
    )
  return write_records(found, kind, name, data_dir)


def prepare_hh(
    file_by_split: Mapping[str, str | os.PathLike],
    data_dir: str | os.PathLike,
    *,
    config: str,
    skipped_dir: str | os.PathLike,
) -> pathlib.Path:
  """Anthropic's HH files (`train.jsonl.gz`, `test.jsonl.gz`) as comparisons.

  A few of the published pairs cannot be used: an empty answer, or transcripts
  that part before their last turn. They are listed in skipped_dir/SPLIT.jsonl.

  Args:
    file_by_split: split name -> file.
    data_dir: where to write.
    config: which part it is, such as harmless_base.
    skipped_dir: for what is skipped.
  """
  found = {
      split: readers.read_records(
          path,
          "comparison",
          on_error="skip",
          skipped_path=_skipped_path(skipped_dir, split),
      )
      for split, path in file_by_split.items()
  }
  return write_records(
      found, "comparison", "hh", data_dir, config=config,
      description="HH: human preferences about helpfulness and harmlessness"
      " (Bai et al., arXiv 2204.05862).",
  )


def prepare_gsm8k(
    file_by_split: Mapping[str, str | os.PathLike],
    data_dir: str | os.PathLike,
) -> pathlib.Path:
  """GSM8K's JSONL files of {question, answer} as demonstrations."""
  found = {
      split: publishers.read_gsm8k(path)
      for split, path in file_by_split.items()
  }
  return write_records(
      found, "demonstration", "gsm8k", data_dir,
      description="GSM8K: grade-school word problems with worked answers"
      " (Cobbe et al., arXiv 2110.14168).",
  )


def prepare_sentence_polarity(
    zip_path: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    half: int,
    seed: int,
) -> pathlib.Path:
  """The sentence polarity zip as comparisons, splits train and heldout."""
  return write_records(
      publishers.read_sentence_polarity(zip_path, half=half, seed=seed),
      "comparison", "sentence_polarity", data_dir,
      config=f"half{half}_seed{seed}",
      description="Film review sentences, positive preferred to negative"
      " (Pang and Lee, ACL 2005).",
  )


def _skipped_path(
    folder: str | os.PathLike | None, split: str
) -> pathlib.Path | None:
  return None if folder is None else pathlib.Path(folder) / f"{split}.jsonl"


def _check_names(
    kind: str, name: str, config: str | None, by_split: Mapping
) -> None:
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
  if not by_split:
    raise prepared.PreparedError(f"{name}: there are no splits to write.")
  for what in (name, *([config] if config else []), *by_split):
    if not _NAME.fullmatch(what):
      raise prepared.PreparedError(
          f"{what!r}: names of datasets, configs and splits are lower case"
          " letters, digits and underscores, and start with a letter."
      )
  if "all" in by_split:
    raise prepared.PreparedError(
        "'all' is TFDS's own name for every split together; choose another."
    )
  for split, rows in by_split.items():
    if not isinstance(rows, (str, os.PathLike)) and not len(rows):
      raise prepared.PreparedError(f"split {split!r} holds no records.")
