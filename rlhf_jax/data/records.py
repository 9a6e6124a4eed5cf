"""The five kinds of records, and the one validator for all of them.

  demonstration  {prompt, completion} or {messages: [{role, content}, ...]}
  comparison     {prompt, chosen, rejected, annotator?, source?, weight?,
                 margin?}, or {chosen, rejected} as whole transcripts
  ranking        {prompt, completions, ranks, annotator?, source?, weight?};
                 a smaller rank is better, equal ranks are ties
  rating         {prompt, completion, score}
  prompt         {prompt}; or {messages}, of which a last answer is left out

A record is what parsed JSON says, so anything can be in it. `validate_record`
takes any Python object and either returns a record or raises `RecordError`,
which names the field and the reason. Other fields are let pass, unless one
looks like a misspelt optional field, which would be lost in silence.
"""

import dataclasses
import difflib
import math
from typing import Any

from rlhf_jax.data import chat

KINDS = ("demonstration", "comparison", "ranking", "rating", "prompt")

# Far above any real record. Whoever meets these has joined two files by
# accident or put a whole corpus into one field.
MAX_CHARACTERS = 1_000_000
MAX_COMPLETIONS = 1_024
MAX_MESSAGES = 10_000
MAX_RANK = 1_000_000
MAX_NUMBER = 3e38  # batches hold float32

_TURN = "\n\nAssistant:"
_OPTIONAL = {
    "comparison": ("annotator", "source", "weight", "margin"),
    "ranking": ("annotator", "source", "weight"),
}


class RecordError(ValueError):
  """What is wrong with a record: `field` and `reason`."""

  def __init__(self, field: str, reason: str):
    super().__init__(f"field {field!r}: {reason}" if field else reason)
    self.field = field
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """Text to imitate.

  spans: (text, trained) in reading order; only trained text is learned from
    (unless the prompt is asked for too). The last span is the completion.
  """

  spans: tuple[tuple[str, bool], ...]

  @property
  def prompt(self) -> str:
    return "".join(text for text, _ in self.spans[:-1])

  @property
  def completion(self) -> str:
    return self.spans[-1][0]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two completions of one prompt; the first was preferred."""

  prompt: str
  chosen: str
  rejected: str
  annotator: str | None = None
  source: str | None = None
  weight: float = 1.0
  margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ranking:
  """Completions of one prompt with their ranks (smaller is better)."""

  prompt: str
  completions: tuple[str, ...]
  ranks: tuple[int, ...]
  annotator: str | None = None
  source: str | None = None
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rating:
  """A completion and its score on some scale."""

  prompt: str
  completion: str
  score: float


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Something to complete."""

  prompt: str


Record = Demonstration | Comparison | Ranking | Rating | Prompt


def validate_record(
    kind: str, obj: Any, chat_template: str | chat.Template = "plain"
) -> Record:
  """Turns a parsed JSON object into a record.

  Args:
    kind: one of `KINDS`.
    obj: anything.
    chat_template: how {messages} becomes text, see `chat`.

  Raises:
    RecordError: the object is no such record. Nothing else is raised for a bad
      object (a bad `kind` is a ValueError, a bad template a ChatTemplateError).
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
  template = chat.make_template(chat_template)
  if not isinstance(obj, dict):
    raise RecordError("", f"a record is a JSON object, not {_type_name(obj)}")
  _check_spelling(kind, obj)
  if kind == "demonstration":
    return _demonstration(obj, template)
  if kind == "prompt":
    return _prompt(obj, template)
  return _VALIDATORS[kind](obj)


def text_of(obj: Any) -> str:
  """The field `text` of a parsed JSON object.

  Raises:
    RecordError: it has no such text.
  """
  if not isinstance(obj, dict):
    raise RecordError("", f"a record is a JSON object, not {_type_name(obj)}")
  return _text(obj, "text")


def _demonstration(obj: dict, template: chat.Template) -> Demonstration:
  if "messages" in obj:
    if "prompt" in obj or "completion" in obj:
      raise RecordError("messages", "give either messages or prompt/completion")
    messages = _messages(obj["messages"])
    if messages[-1]["role"] != "assistant":
      raise RecordError("messages", "the last message must be the assistant's")
    try:
      spans = chat.render_spans(messages, template)
    except chat.ChatTemplateError as error:
      raise RecordError("messages", str(error)) from error
    if not spans or not spans[-1][1]:
      raise RecordError(
          "messages", "the chat template writes text after the last answer"
      )
    return Demonstration(spans=spans)
  prompt = _text(obj, "prompt", allow_empty=True)
  completion = _text(obj, "completion")
  spans = ((prompt, False),) if prompt else ()
  return Demonstration(spans=(*spans, (completion, True)))


def _messages(messages: Any) -> list[dict[str, str]]:
  if not isinstance(messages, list) or not messages:
    raise RecordError("messages", "must be a list of at least one message")
  if len(messages) > MAX_MESSAGES:
    raise RecordError("messages", f"{len(messages)} messages are too many")
  for index, message in enumerate(messages):
    where = f"messages[{index}]"
    if not isinstance(message, dict):
      raise RecordError(where, f"must be an object, not {_type_name(message)}")
    role = message["role"] if "role" in message else None
    if not isinstance(role, str) or role not in chat.ROLES:
      raise RecordError(
          f"{where}.role", f"must be one of {', '.join(chat.ROLES)}"
      )
    _text(message, "content", where=f"{where}.content")
  messages = [{key: m[key] for key in ("role", "content")} for m in messages]
  _check_length("messages", sum(len(m["content"]) for m in messages))
  return messages


def _comparison(obj: dict) -> Comparison:
  chosen, rejected = _text(obj, "chosen"), _text(obj, "rejected")
  if chosen == rejected:
    raise RecordError("rejected", "is identical to chosen")
  if "prompt" in obj:
    prompt = _text(obj, "prompt", allow_empty=True)
  else:
    prompt, chosen, rejected = split_transcripts(chosen, rejected)
  return Comparison(
      prompt=prompt,
      chosen=chosen,
      rejected=rejected,
      annotator=_optional_text(obj, "annotator"),
      source=_optional_text(obj, "source"),
      weight=_number(obj, "weight", default=1.0, minimum=0.0),
      margin=_number(obj, "margin", default=0.0),
  )


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Splits two whole transcripts at their last assistant turn.

  The prompt is everything up to and including the last "\\n\\nAssistant:"; it
  has to be the same in both.

  Returns:
    prompt, chosen completion, rejected completion.

  Raises:
    RecordError: there is no such turn, or the transcripts part before it.
  """
  ends = {}
  for field, text in (("chosen", chosen), ("rejected", rejected)):
    start = text.rfind(_TURN)
    if start < 0:
      raise RecordError(
          field,
          "there is no prompt field, so this must be a whole transcript, but"
          f" it has no {_TURN!r} turn",
      )
    ends[field] = start + len(_TURN)
  prompt = chosen[: ends["chosen"]]
  if prompt != rejected[: ends["rejected"]]:
    raise RecordError(
        "rejected",
        "the two transcripts differ before their last assistant turn, so they"
        " do not answer the same prompt",
    )
  completions = chosen[len(prompt):], rejected[len(prompt):]
  for field, text in zip(("chosen", "rejected"), completions, strict=True):
    if not text.strip():
      raise RecordError(field, "the last assistant turn is empty")
  return prompt, *completions


def _ranking(obj: dict) -> Ranking:
  prompt = _text(obj, "prompt", allow_empty=True)
  completions = _list(obj, "completions")
  if not 2 <= len(completions) <= MAX_COMPLETIONS:
    raise RecordError(
        "completions", f"holds {len(completions)}; 2 to {MAX_COMPLETIONS} make"
        " a ranking",
    )
  for index, text in enumerate(completions):
    _check_text(f"completions[{index}]", text, allow_empty=False)
  _check_length("completions", sum(map(len, completions)))
  ranks = _list(obj, "ranks")
  if len(ranks) != len(completions):
    raise RecordError(
        "ranks", f"{len(ranks)} ranks for {len(completions)} completions"
    )
  seen: dict[str, int] = {}
  for index, (text, rank) in enumerate(zip(completions, ranks, strict=True)):
    where = f"ranks[{index}]"
    if isinstance(rank, bool) or not isinstance(rank, int):
      raise RecordError(where, f"must be an integer, not {_type_name(rank)}")
    if not -MAX_RANK <= rank <= MAX_RANK:
      raise RecordError(where, f"must be within -{MAX_RANK} and {MAX_RANK}")
    if seen.setdefault(text, rank) != rank:
      raise RecordError(where, "identical completions have different ranks")
  return Ranking(
      prompt=prompt,
      completions=tuple(completions),
      ranks=tuple(ranks),
      annotator=_optional_text(obj, "annotator"),
      source=_optional_text(obj, "source"),
      weight=_number(obj, "weight", default=1.0, minimum=0.0),
  )


def _rating(obj: dict) -> Rating:
  return Rating(
      prompt=_text(obj, "prompt", allow_empty=True),
      completion=_text(obj, "completion"),
      score=_number(obj, "score"),
  )


def _prompt(obj: dict, template: chat.Template) -> Prompt:
  if "messages" not in obj:
    return Prompt(prompt=_text(obj, "prompt"))
  messages = _messages(obj["messages"])
  if messages[-1]["role"] == "assistant":
    messages.pop()  # a demonstration's file serves as a file of prompts
  try:
    return Prompt(prompt=chat.render_prompt(messages, template))
  except chat.ChatTemplateError as error:
    raise RecordError("messages", str(error)) from error


_VALIDATORS = {
    "comparison": _comparison,
    "ranking": _ranking,
    "rating": _rating,
}


# --- fields -------------------------------------------------------------------


def _check_spelling(kind: str, obj: dict) -> None:
  optional = _OPTIONAL[kind] if kind in _OPTIONAL else ()
  absent = [name for name in optional if name not in obj]
  if len(obj) > 64:  # not written by hand, so not misspelt
    return
  for key in obj:
    if isinstance(key, str) and key not in optional:
      near = difflib.get_close_matches(key[:64], absent, n=1, cutoff=0.8)
      if near:
        raise RecordError(key[:64], f"unknown; did you mean {near[0]!r}?")


def _text(
    obj: dict, field: str, *, allow_empty: bool = False, where: str = ""
) -> str:
  where = where or field
  if field not in obj:
    raise RecordError(where, "missing")
  _check_text(where, obj[field], allow_empty)
  return obj[field]


def _check_text(where: str, value: Any, allow_empty: bool) -> None:
  if not isinstance(value, str):
    raise RecordError(where, f"must be a string, not {_type_name(value)}")
  _check_length(where, len(value))
  if not allow_empty and not value.strip():
    raise RecordError(where, "is empty")
  if "\0" in value:
    raise RecordError(where, f"NUL character at {value.index(chr(0))}")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise RecordError(
        where, f"lone surrogate at character {error.start}"
    ) from error


def _check_length(where: str, length: int) -> None:
  if length > MAX_CHARACTERS:
    raise RecordError(
        where, f"{length} characters; the limit is {MAX_CHARACTERS}"
    )


def _optional_text(obj: dict, field: str) -> str | None:
  if field not in obj or obj[field] is None:
    return None
  return _text(obj, field)


def _list(obj: dict, field: str) -> list:
  if field not in obj:
    raise RecordError(field, "missing")
  if not isinstance(obj[field], list):
    raise RecordError(field, f"must be a list, not {_type_name(obj[field])}")
  return obj[field]


def _number(
    obj: dict, field: str, *, default: float | None = None,
    minimum: float = -math.inf,
) -> float:
  if field not in obj and default is not None:
    return default
  if field not in obj:
    raise RecordError(field, "missing")
  value = obj[field]
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise RecordError(field, f"must be a number, not {_type_name(value)}")
  try:
    number = float(value)
  except OverflowError:  # JSON's integers have no bound
    number = math.inf
  if not abs(number) <= MAX_NUMBER:  # so put, it refuses NaN too
    raise RecordError(field, "must be a finite number within float32")
  if number < minimum:
    raise RecordError(field, f"is {number:g}; it may not be below {minimum:g}")
  return number


def _type_name(value: Any) -> str:
  names = {bool: "a boolean", type(None): "null", dict: "an object",
           list: "a list", str: "a string", int: "an integer",
           float: "a number"}
  return names[type(value)] if type(value) in names else type(value).__name__
