"""Text in which special tokens are marked, made into ids."""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import special_tokens
from rlhf_jax.data.special_tokens import (
    MARK,
    RENDERED,
    TokenizerError,
    mark,
)
from rlhf_jax.data.tokenizer_backends import FastBackend, SentencePieceBackend


def encode_rows(
    tokenizer: Any,
    backend: FastBackend | SentencePieceBackend,
    rows: Sequence[Sequence[str]],
) -> list[list[list[int]]]:
  """What `Tokenizer.encode_rows` says."""
  # In front of the row's text, which need not be its first that is not empty.
  rows = [[text.removeprefix(RENDERED) for text in row] for row in rows]
  result = [[[] for _ in row] for row in rows]
  ordinary = {False: [], True: []}
  marked = []
  for r, row in enumerate(rows):
    before = ""  # the last text that is more than white space, and such
    for i, text in enumerate(row):
      if MARK in text or special_tokens.last_marked(before):
        marked.append((r, i, before))
      else:
        ordinary[bool(before)].append((r, i))
      before = text if text.strip() else before + text
  for continues, places in ordinary.items():
    # Completions of one prompt repeat it.
    texts = dict.fromkeys(rows[r][i] for r, i in places)
    found = tokenizer.encode_batch(list(texts), continues=continues)
    ids_of = dict(zip(texts, found, strict=True))
    for r, i in places:
      result[r][i] = list(ids_of[rows[r][i]])
  for r, i, before in marked:
    last = next((x[-1] for x in reversed(result[r][:i]) if x), None)
    result[r][i] = _encode_marked(tokenizer, backend, rows[r][i], before, last)
  return result


def _encode_marked(
    tokenizer: Any,
    backend: FastBackend | SentencePieceBackend,
    text: str,
    before: str,
    last_id: int | None,
) -> list[int]:
  """Ids of a text after `before`, whose last id is `last_id`."""
  check_unicode(0, text)
  for token in special_tokens.marked_tokens(text):
    if token not in tokenizer.special_tokens:
      some = ", ".join(list(tokenizer.special_tokens)[:8])
      raise TokenizerError(
          f"{token!r} is no special token of this tokenizer ({some}, ...): the"
          " text was made by the chat template of another."
      )
  if not before:
    return backend.encode_marked(text)
  token = special_tokens.last_marked(before)
  if token and last_id == tokenizer.special_tokens[token]:
    # What stands directly behind a special token may be the start of a word.
    return backend.encode_marked(mark(token) + text)[1:]
  plain = text.partition(MARK)[0]
  ids = tokenizer.encode(plain, continues=True)
  rest = text[len(plain):]
  return ids + (backend.encode_marked(rest) if rest else [])


def check_unicode(index: int, text: str) -> None:
  """Raises ValueError for what is no Unicode text."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
        f"text {index} holds a lone surrogate at character {error.start},"
        " which is no Unicode text; clean it before encoding."
    ) from error
