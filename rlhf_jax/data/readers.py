"""Reads records from JSONL files, globs and prepared TFDS folders.

A bad record is reported as `file:line: field 'x': reason`. With
`on_error="raise"` the first one ends the reading. With `on_error="skip"` each
is written to `skipped_path` with its reason, and more than `max_skipped` of
them are an error: a file that is mostly bad is the wrong file. A damaged file
(missing, truncated gzip) is an error either way, because nobody knows what is
lost.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import glob
import gzip
import json
import logging
import os
import pathlib
from typing import Any, BinaryIO
import zlib

import jax

from rlhf_jax.data import chat, records
from rlhf_jax.data.records import Record, RecordError

TFDS_PREFIX = "tfds:"
MAX_LINE_BYTES = 64 * 1024 * 1024

_GZIP_MAGIC = b"\x1f\x8b"
_log = logging.getLogger(__name__)


class ReadError(ValueError):
  """A source that cannot be read, or has a bad record. Says where."""


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record that was passed over, as it is written to `skipped_path`."""

  file: str
  line: int
  field: str
  reason: str
  text: str

  def __str__(self) -> str:
    field = f"field {self.field!r}: " if self.field else ""
    return f"{self.file}:{self.line}: {field}{self.reason}"


def read_records(
    source: str | os.PathLike,
    kind: str,
    *,
    on_error: str = "raise",
    skipped_path: str | os.PathLike | None = None,
    max_skipped: float = 0.05,
    chat_template: str | chat.Template = "plain",
    split: str | None = None,
    data_dir: str | os.PathLike | None = None,
) -> list[Record]:
  """Reads every record of a source.

  Args:
    source: a .jsonl or .jsonl.gz file, a glob of them (read in sorted order),
      or `tfds:name[/config][:split]` prepared by `builders.prepare`.
    kind: one of `records.KINDS`.
    on_error: "raise" or "skip", see the module docstring.
    skipped_path: JSONL file for what is skipped; needed by "skip". It is
      written anew, and empty if nothing was skipped.
    max_skipped: the largest fraction that may be skipped.
    chat_template: how {messages} becomes text, see `chat`.
    split: which split of a TFDS source, if the source does not say it.
    data_dir: where `tfds:` sources lie; None is TFDS's own default.

  Returns:
    At least one record.

  Raises:
    ReadError: see above.
  """
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'skip'.")
  source = os.fspath(source)
  if source.startswith(TFDS_PREFIX):
    return _read_tfds(source, kind, split, data_dir)
  if split is not None or data_dir is not None:
    raise ReadError(
        f"{source}: split and data_dir are for {TFDS_PREFIX} sources; a file"
        " has no splits."
    )
  if on_error == "skip" and skipped_path is None:
    raise ValueError("on_error='skip' needs skipped_path, to lose nothing.")
  found, skipped = [], []
  for path in resolve_files(source):
    for item in _read_file(path, kind, chat_template):
      if not isinstance(item, Skipped):
        found.append(item)
      elif on_error == "raise":
        raise ReadError(str(item))
      else:
        skipped.append(item)
  if on_error == "skip":
    _report_skipped(source, skipped, len(found), skipped_path, max_skipped)
  if not found:
    raise ReadError(f"{source}: holds no records.")
  return found


def read_texts(source: str) -> list[str]:
  """The `text` of every record of a JSONL file or glob.

  Raises:
    ReadError: with file and line, a record that has none; or there are none.
  """
  found = []
  for path in resolve_files(source):
    for number, line in read_lines(path):
      try:
        found.append(records.text_of(parse_line(line)))
      except RecordError as error:
        raise ReadError(f"{path}:{number}: {error}") from error
  if not found:
    raise ReadError(f"{source}: holds no records.")
  return found


def field_names(source: str, data_dir: str | None = None) -> set[str]:
  """The fields of the source's first record; of one that is no object, none."""
  if source.startswith(TFDS_PREFIX):
    prepared = _prepared()
    name, colon, split = source.removeprefix(TFDS_PREFIX).rpartition(":")
    try:
      return prepared.column_names(name if colon else split, data_dir)
    except prepared.PreparedError as error:
      raise ReadError(f"{source}: {error}") from error
  for _, line in read_lines(resolve_files(source)[0]):
    try:
      obj = parse_line(line)
    except RecordError:
      continue
    return set(obj) if isinstance(obj, dict) else set()
  return set()


def resolve_files(source: str) -> list[pathlib.Path]:
  """The files that a path or glob names, sorted; at least one."""
  path = pathlib.Path(source)
  if path.is_file():
    return [path]
  if path.is_dir():
    raise ReadError(
        f"{source}: is a folder; give a file or a glob such as"
        f" {path / '*.jsonl'}."
    )
  if glob.has_magic(source):
    matches = sorted(glob.glob(source, recursive=True))
    files = [pathlib.Path(m) for m in matches if os.path.isfile(m)]
    if not files:
      raise ReadError(f"{source}: no file matches this glob.")
    return files
  raise ReadError(f"{source}: no such file.{_nearest(path)}")


def _nearest(path: pathlib.Path) -> str:
  """Names the most similar file beside a missing one, or the missing folder."""
  if not path.parent.is_dir():
    return f" The folder {path.parent} does not exist either."
  names = sorted(child.name for child in path.parent.iterdir())
  near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
  return f" Did you mean {path.parent / near[0]}?" if near else ""


# --- JSONL --------------------------------------------------------------------


def _read_file(
    path: pathlib.Path, kind: str, chat_template: str | chat.Template
) -> Iterator[Record | Skipped]:
  for number, line in read_lines(path):
    try:
      obj = parse_line(line)
      yield records.validate_record(kind, obj, chat_template)
    except RecordError as error:
      text = line.decode("utf-8", "backslashreplace").strip()
      yield Skipped(str(path), number, error.field, error.reason, text)


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """(line number, line) of each line that is not blank; unzips gzip.

  Raises:
    ReadError: the file cannot be read to its end.
  """
  number = 0
  try:
    with _open(path) as stream:
      while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
          raise ReadError(
              f"{path}:{number}: this line is longer than {MAX_LINE_BYTES}"
              " bytes; the format is one JSON object a line."
          )
        if number == 1:
          line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
          yield number, line
  except EOFError as error:
    raise ReadError(
        f"{path}: the gzip file ends early, after line {number}; it was"
        " truncated. Fetch or write it again."
    ) from error
  except (gzip.BadGzipFile, zlib.error) as error:
    raise ReadError(
        f"{path}: damaged gzip after line {number}: {error}"
    ) from error
  except OSError as error:
    raise ReadError(f"{path}: {error.strerror or error}") from error


def _open(path: pathlib.Path) -> BinaryIO:
  """Opens plain or gzip by what the file holds, not by its name."""
  stream = path.open("rb")
  zipped = stream.peek(2)[:2] == _GZIP_MAGIC
  if zipped:
    stream.close()
    return gzip.open(path, "rb")
  if path.suffix == ".gz":
    empty = not stream.peek(1)
    stream.close()
    raise ReadError(
        f"{path}: " + ("is empty." if empty else
                       "is named .gz but holds no gzip data.")
    )
  return stream


def parse_line(line: bytes) -> Any:
  """Parses one line of JSONL; whatever is wrong with it is a RecordError."""
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    hint = " (UTF-16?)" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    raise RecordError(
        "", f"not UTF-8 at byte {error.start} of the line{hint}"
    ) from error
  try:
    return json.loads(text, object_pairs_hook=_unique_keys)
  except RecordError:
    raise
  except json.JSONDecodeError as error:
    raise RecordError(
        "", f"not JSON: {error.msg} at column {error.colno}"
    ) from error
  except (ValueError, RecursionError) as error:
    # Integers of thousands of digits and absurd nesting.
    raise RecordError("", f"not usable JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  obj = dict(pairs)
  if len(obj) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise RecordError(twice[:64], "given twice")
  return obj


def _report_skipped(
    source: str, skipped: list[Skipped], num_read: int,
    skipped_path: str | os.PathLike, max_skipped: float,
) -> None:
  path = pathlib.Path(skipped_path)
  if jax.process_index() == 0:  # all of a run's processes read the same
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
      for item in skipped:
        stream.write(json.dumps(dataclasses.asdict(item)) + "\n")
  if not skipped:
    return
  total = num_read + len(skipped)
  summary = (
      f"{source}: {len(skipped)} of {total} records skipped, listed in {path}."
      f" The first: {skipped[0]}"
  )
  if len(skipped) > max_skipped * total:
    raise ReadError(f"{summary}. That is more than {max_skipped:.1%}.")
  _log.warning("%s", summary)


# --- TFDS ---------------------------------------------------------------------


def _prepared():
  """The module, which takes half a second to import and few sources need."""
  from rlhf_jax.data import prepared  # pylint: disable=g-import-not-at-top

  return prepared


def _read_tfds(
    source: str, kind: str, split: str | None,
    data_dir: str | os.PathLike | None,
) -> list[Record]:
  prepared = _prepared()
  name, colon, given = source.removeprefix(TFDS_PREFIX).rpartition(":")
  if not colon:
    name, given = given, None
  if given is not None and split is not None and given != split:
    raise ReadError(f"{source}: the split is also given as {split!r}.")
  try:
    found = prepared.open_split(name, given or split, kind, data_dir)
  except prepared.PreparedError as error:
    raise ReadError(f"{source}: {error}") from error
  if not len(found):
    raise ReadError(f"{source}: holds no records.")
  return [found[index] for index in range(len(found))]
