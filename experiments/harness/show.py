"""Rows of tokens as text for people: what is learned from, what is padding.

With colour, kinds differ by it; without, by signs, so that nothing is lost:

    context   as it is
    marked    [[in brackets]]: targets of the loss, or the completion
    padding   (its token x how often)

A │ divides tokens, a line break is shown as ⏎.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.lengths import LengthReport
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models.attention import segment_positions
from rlhf_jax.types import LMBatch

CONTEXT, MARKED, PADDING = "context", "marked", "padding"
_COLOR = {CONTEXT: "36", MARKED: "1;32", PADDING: "2"}
_DIVIDER = "│"
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of tokens as a model reads it: [T] each.

  title: what it is.
  segment_ids: 0 is padding; positions restart at each.
  marked: 1 on targets, or on the completion.
  num_records: how many records end with it.
  """

  title: str
  tokens: np.ndarray
  segment_ids: np.ndarray
  marked: np.ndarray
  num_records: int

  @property
  def positions(self) -> np.ndarray:
    """The positions that the model gives the tokens."""
    return np.asarray(segment_positions(jnp.asarray(self.segment_ids)[None]))[0]

  @property
  def kinds(self) -> list[str]:
    """The kind of each token."""
    return [
        PADDING if not segment else MARKED if marked else CONTEXT
        for segment, marked in zip(self.segment_ids, self.marked, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Part:
  """Some of what a stage reads.

  split: train or heldout.
  marked: what the marked tokens are, '' if there are none.
  report: what the length limits did, if the stage counts it.
  limits: the fields that records may be too long for.
  notes: more lines for the end.
  """

  name: str
  split: str
  rows: Iterator[Row]
  marked: str
  report: LengthReport | None
  limits: str
  notes: tuple[str, ...] = ()


class Painter:
  """Makes rows into lines.

  Args:
    tokenizer: what the tokens are of.
    color: ANSI colours; signs without.
    table: a line a token instead of running text.
  """

  def __init__(self, tokenizer: Tokenizer, *, color: bool, table: bool):
    self._tokenizer, self._color, self._table = tokenizer, color, table

  def legend(self, marked: str) -> str:
    """One line that says how `marked` ('' if nothing is) and the rest look."""
    kinds = [("context", CONTEXT), (marked, MARKED), ("(padding)", PADDING)]
    return "  ".join(self._kind(*x) for x in kinds if x[0])

  def lines(self, row: Row, most_segments: int | None = None) -> list[str]:
    """A row's lines, a part for each run of a segment or of padding.

    Args:
      most_segments: records to show; of more the number is said.
    """
    found = [self._bold(row.title)]
    positions, shown, start = row.positions, 0, 0
    ids = row.segment_ids.tolist()
    for segment, run in itertools.groupby(ids):
      size = len(list(run))
      if segment and shown == most_segments:
        more = len({x for x in ids[start:] if x})
        found.append(f"  and {more} more in this row")
        break
      shown += bool(segment)
      found += self._segment(row, positions, start, start + size)
      start += size
    return found

  def _segment(
      self, row: Row, positions: np.ndarray, start: int, end: int
  ) -> list[str]:
    segment = int(row.segment_ids[start])
    if not segment:
      return [f"  {self._padding(row.tokens[start:end].tolist())}"]
    head = (
        f"  segment {segment}: columns {start}-{end - 1}, positions "
        f"{positions[start]}-{positions[end - 1]}, {end - start} tokens"
    )
    if np.any(row.marked):
      head += f", {np.count_nonzero(row.marked[start:end])} marked"
    if self._table:
      return [head, *self._token_lines(row, positions, start, end)]
    lines = self._text(row, start, end).split("\n")
    return [head, *(f"    {line}" for line in lines if line)]

  def _text(self, row: Row, start: int, end: int) -> str:
    parts = []
    pairs = zip(row.tokens[start:end], row.kinds[start:end], strict=True)
    for kind, run in itertools.groupby(pairs, key=lambda x: x[1]):
      pieces = [self._piece(int(id_)) for id_, _ in run]
      parts.append(self._join(pieces, kind))
    return self._divider().join(parts)

  def _join(self, pieces: list[str], kind: str) -> str:
    if not self._color:
      text = _DIVIDER.join(pieces)
      return f"[[{text}]]" if kind == MARKED else text
    return self._divider().join(self._kind(piece, kind) for piece in pieces)

  def _token_lines(
      self, row: Row, positions: np.ndarray, start: int, end: int
  ) -> list[str]:
    lines = ["    column  position  segment      id  kind     token"]
    for i in range(start, end):
      id_, kind = int(row.tokens[i]), row.kinds[i]
      piece = self._piece(id_).replace("\n", "")
      lines.append(
          f"    {i:6d}  {positions[i]:8d}  {row.segment_ids[i]:7d}  {id_:6d}"
          f"  {kind:7s}  {self._kind(piece, kind)}"
      )
    return lines

  def _piece(self, id_: int) -> str:
    """A token's text; what cannot be seen is spelled."""
    text = self._tokenizer.piece(id_)
    return "".join(
        "⏎\n" if x == "\n" else x if x.isprintable() else repr(x)[1:-1]
        for x in text
    )

  def _padding(self, ids: list[int]) -> str:
    names = [
        f"{self._piece(id_)} x {len(list(run))}"
        for id_, run in itertools.groupby(ids)
    ]
    return self._kind(f"({', '.join(names)})", PADDING)

  def _divider(self) -> str:
    return self._kind(_DIVIDER, PADDING) if self._color else _DIVIDER

  def _bold(self, text: str) -> str:
    return f"\033[1m{text}\033[0m" if self._color else text

  def _kind(self, text: str, kind: str) -> str:
    if not self._color:
      return f"[[{text}]]" if kind == MARKED and not self._table else text
    # A colour ends with its line, for pagers.
    start = f"\033[{_COLOR[kind]}m"
    return "\n".join(
        f"{start}{line}\033[0m" if line else line for line in text.split("\n")
    )


def shown(
    part: Part, painter: Painter, num_records: int
) -> Iterator[str]:
  """The lines of the first records."""
  yield f"\n{part.name}   {painter.legend(part.marked)}"
  for row in part.rows:
    yield ""
    yield from painter.lines(row, num_records)
    num_records -= row.num_records
    if num_records <= 0:
      return


def counts(part: Part) -> Iterator[str]:
  """How many records there are, and what became of the others."""
  yield f"{part.name}: {part.report or ''}".rstrip()
  yield from (f"  {note}" for note in part.notes)
  places = part.report.dropped if part.report else ()
  if not places:
    return
  named = ", ".join(map(str, places[:_MOST_NAMED]))
  more = len(places) - _MOST_NAMED
  yield (
      f"  dropped as too long ({part.limits}): records {named}"
      + (f" and {more} more" if more > 0 else "")
  )


def describe(tokenizer: Tokenizer) -> str:
  """One line about a tokenizer."""
  say = lambda id_: f"{tokenizer.piece(id_)!r} ({id_})"
  bos = "none" if tokenizer.bos_id is None else say(tokenizer.bos_id)
  template = "a chat template" if tokenizer.chat_template else "no template"
  return (
      f"{tokenizer.vocab_size} tokens, start {bos},"
      f" end {', '.join(map(say, tokenizer.eos_ids))},"
      f" padding {say(tokenizer.pad_id)}, {template}"
  )


def skipped(folder: pathlib.Path) -> Iterator[str]:
  """What on_error='skip' passed over."""
  for path in sorted(folder.glob("*.jsonl")):
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if not rows:
      continue
    yield f"skipped as bad: {len(rows)} records of {rows[0]['file']}"
    for row in itertools.islice(rows, _MOST_NAMED):
      field = f"field {row['field']!r}: " if row["field"] else ""
      yield f"  line {row['line']}: {field}{row['reason']}"


def filled(batch: LMBatch) -> str:
  """How full the rows are."""
  rows, length = batch.tokens.shape
  return (
      f"packed into {rows} rows of {length} tokens,"
      f" {np.mean(batch.segment_ids > 0):.1%} filled,"
      f" {int(batch.loss_mask.sum())} targets"
  )
