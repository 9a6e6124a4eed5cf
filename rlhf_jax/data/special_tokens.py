"""Special tokens: how text says them, and which ids pad, start and end.

**In text.** What a user types is text, whatever it spells: "<eos>" is five
characters. What a chat template writes is not: its "<|im_end|>" is a token.
Text therefore marks a special token by NUL characters around it, which no
record may hold, and only `Tokenizer.encode_rows` reads such marks. What was
rendered by a template that writes special tokens has `RENDERED` in front, even
where there is none in this text: such a template writes the start token or
wants none, and its prompts must begin as its answered conversations do.

**Ends.** A tokenizer has an end-of-sequence token, `eos_id`, which training
puts behind completions. A model may end with others too: generation_config.json
lists them, and a chat template has an end-of-turn token. Any of them ends a
completion.

**Padding** is told by masks and never by its id, so any id would do. In this
order: the tokenizer's own padding token; a token that is reserved and never
means anything; the unknown token; the end token. A padding token that is an end
or the start token is passed over, because elsewhere masks are guessed from ids:
only what never occurs in a row (`pad_is_safe`) is written for other programs.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import logging
import os
import pathlib
import re
from typing import Any

MARK = "\0"
# No token: none has an empty text.
RENDERED = MARK + MARK
GENERATION_CONFIG = "generation_config.json"

_MARKED = re.compile(f"{MARK}([^{MARK}]+){MARK}")
# <|reserved_special_token_0|>, <unused0>, <|extra_0|>, [PAD]
_RESERVED = re.compile(
    r"<?[\[<|]+_?(reserved|unused|extra|placeholder|dummy|finetune_right_pad"
    r"|pad)[\w ]*[\]>|]+",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)


class TokenizerError(ValueError):
  """A tokenizer file that is missing, damaged or without a needed token."""


def mark(token: str) -> str:
  """The token, as text of records says it."""
  return f"{MARK}{token}{MARK}"


def unmarked(text: str) -> str:
  """Text with its special tokens spelled, for people."""
  return text.replace(MARK, "")


def where_they_part(one: str, other: str) -> tuple[str, str]:
  """What stands in each text where they cease to be the same, for people."""
  same = len(os.path.commonprefix([one, other]))
  here = slice(max(same - 20, 0), same + 20)
  return repr(unmarked(one[here])), repr(unmarked(other[here]))


def is_rendered(row: Sequence[str]) -> bool:
  """Whether a template that writes special tokens made a row of texts."""
  return any(MARK in text for text in row)


def without_marked(text: str) -> str:
  """Text without its special tokens."""
  return _MARKED.sub("", text)


def marked_tokens(text: str) -> list[str]:
  """The special tokens in a text, in order."""
  return _MARKED.findall(text)


def last_marked(text: str) -> str | None:
  """The special token that a text ends with, but for white space."""
  text = text.rstrip()
  if not text.endswith(MARK):
    return None
  return text[text.rindex(MARK, 0, -1) + 1 : -1]


class Marker:
  """Marks a template's special tokens and leaves people's as they are.

  Before rendering, `protect` breaks every special token in a message by a NUL;
  after it, `mark` marks those that are whole, and joins the broken ones.
  """

  def __init__(self, tokens: Iterable[str]):
    # The longest first: one may begin with another.
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in ordered)
    self._pattern = re.compile(f"(?:{pattern})(?!{MARK})") if pattern else None

  def protect(self, text: str) -> str:
    """Text that `mark` makes into `text` again, without a token in it."""
    if self._pattern is None:
      return text
    return self._pattern.sub(lambda x: f"{x[0][0]}{MARK}{x[0][1:]}", text)

  def mark(self, text: str) -> str:
    """Marks whole tokens, joins protected ones."""
    if self._pattern is None:
      return text.replace(MARK, "")
    parts, end = [], 0
    for found in self._pattern.finditer(text):
      parts += [text[end : found.start()].replace(MARK, ""), mark(found[0])]
      end = found.end()
    return "".join([*parts, text[end:].replace(MARK, "")])


def choose_pad(
    ids: Mapping[str, int | None],
    eos_ids: Iterable[int],
    special_tokens: Mapping[str, int],
    unk_id: int | None,
    unk_is_never_text: bool,
) -> tuple[int, bool]:
  """(pad id, whether it is safe where masks are guessed from ids).

  Args:
    ids: the tokenizer's own of "pad", "eos" and "bos".
    eos_ids: all that end.
    special_tokens: text -> id.
    unk_id: of the unknown token.
    unk_is_never_text: every text has tokens without it.
  """
  taken = {*eos_ids, ids["bos"]}
  if ids["pad"] is not None and ids["pad"] not in taken:
    return ids["pad"], True
  reserved = [
      id_
      for token, id_ in special_tokens.items()
      if _RESERVED.fullmatch(token) and id_ not in taken
  ]
  if reserved:
    # A token that says that it is for padding goes before others.
    named = [special_tokens[x] for x in special_tokens if "pad" in x.lower()]
    return next((x for x in named if x in reserved), min(reserved)), True
  if unk_id is not None and unk_id not in taken:
    return unk_id, unk_is_never_text
  return ids["eos"], False


def listed_eos_ids(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
  """End ids that a model's folder lists: of generation, else of its config.

  Raises:
    TokenizerError: a file is no JSON object, or its ids are no integers.
  """
  for name in (GENERATION_CONFIG, "config.json"):
    path = folder / name
    if not path.is_file():
      continue
    fields = _read_object(path)
    found = fields["eos_token_id"] if "eos_token_id" in fields else None
    if found is None:
      continue
    found = found if isinstance(found, list) else [found]
    if not all(type(x) is int and x >= 0 for x in found):
      raise TokenizerError(f"{path}: eos_token_id={found} are no token ids.")
    strange = [x for x in found if x >= vocab_size]
    if strange:
      _log.warning(
          "%s: eos_token_id %s is outside the tokenizer's vocabulary of %d and"
          " passed over", path, strange, vocab_size,
      )
    return tuple(x for x in found if x < vocab_size)
  return ()


def generation_config(
    bos_id: int | None, eos_ids: tuple[int, ...], pad_id: int | None
) -> bytes:
  """generation_config.json with these ids."""
  eos = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
  fields = {"bos_token_id": bos_id, "eos_token_id": eos, "pad_token_id": pad_id}
  fields = {name: value for name, value in fields.items() if value is not None}
  return (json.dumps(fields, indent=2) + "\n").encode()


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise TokenizerError(f"{path}: {error}") from error
  if not isinstance(fields, dict):
    raise TokenizerError(f"{path}: holds no JSON object.")
  return fields
