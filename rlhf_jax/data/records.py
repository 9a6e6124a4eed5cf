"""The five kinds of records, and the one validator for all of them.

  demonstration  {prompt, completion} or {messages: [{role, content}, ...]}
  comparison     {prompt, chosen, rejected, annotator?, source?, weight?,
                 margin?}, or {chosen, rejected} as whole transcripts or as
                 conversations: lists of messages, which go on from those in
                 prompt or say them again; a text in prompt is what the user
                 says first
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
from typing import Any

from rlhf_jax.data import chat, fields
from rlhf_jax.data.fields import (
    MAX_COMPLETIONS,
    MAX_MESSAGES,
    MAX_RANK,
    RecordError,
    type_name,
)

KINDS = ("demonstration", "comparison", "ranking", "rating", "prompt")

_TURN = "\n\nAssistant:"
_OPTIONAL = {
    "comparison": ("annotator", "source", "weight", "margin"),
    "ranking": ("annotator", "source", "weight"),
}


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
    raise RecordError("", f"a record is a JSON object, not {type_name(obj)}")
  _check_spelling(kind, obj)
  if kind == "demonstration":
    return _demonstration(obj, template)
  if kind == "prompt":
    return _prompt(obj, template)
  if kind == "comparison":
    return _comparison(obj, template)
  return _VALIDATORS[kind](obj)


def text_of(obj: Any) -> str:
  """The field `text` of a parsed JSON object.

  Raises:
    RecordError: it has no such text.
  """
  if not isinstance(obj, dict):
    raise RecordError("", f"a record is a JSON object, not {type_name(obj)}")
  return fields.text(obj, "text")


def _demonstration(obj: dict, template: chat.Template) -> Demonstration:
  if "messages" in obj:
    if "prompt" in obj or "completion" in obj:
      raise RecordError("messages", "give either messages or prompt/completion")
    messages = _messages(obj["messages"], "messages")
    return Demonstration(spans=_spans(messages, "messages", template))
  prompt = fields.text(obj, "prompt", allow_empty=True)
  completion = fields.text(obj, "completion")
  spans = ((prompt, False),) if prompt else ()
  return Demonstration(spans=(*spans, (completion, True)))


def _spans(
    messages: list[dict[str, str]], field: str, template: chat.Template
) -> tuple[chat.Span, ...]:
  """Spans of a conversation, whose last is an answer."""
  if messages[-1]["role"] != "assistant":
    raise RecordError(field, "the last message must be the assistant's")
  try:
    spans = chat.render_spans(messages, template)
  except chat.ChatTemplateError as error:
    raise RecordError(field, str(error)) from error
  if not spans or not spans[-1][1]:
    raise RecordError(
        field, "the chat template writes text after the last answer"
    )
  return spans


def _messages(messages: Any, field: str) -> list[dict[str, str]]:
  if not isinstance(messages, list) or not messages:
    raise RecordError(field, "must be a list of at least one message")
  if len(messages) > MAX_MESSAGES:
    raise RecordError(field, f"{len(messages)} messages are too many")
  for index, message in enumerate(messages):
    where = f"{field}[{index}]"
    if not isinstance(message, dict):
      raise RecordError(where, f"must be an object, not {type_name(message)}")
    role = message["role"] if "role" in message else None
    if not isinstance(role, str) or role not in chat.ROLES:
      raise RecordError(
          f"{where}.role", f"must be one of {', '.join(chat.ROLES)}"
      )
    fields.text(message, "content", where=f"{where}.content")
  messages = [{key: m[key] for key in ("role", "content")} for m in messages]
  fields.check_length(field, sum(len(m["content"]) for m in messages))
  return messages


def _comparison(obj: dict, template: chat.Template) -> Comparison:
  if "chosen" in obj and isinstance(obj["chosen"], list):
    prompt, chosen, rejected = _compared_chats(obj, template)
  else:
    prompt, chosen, rejected = _compared_texts(obj)
  return Comparison(
      prompt=prompt,
      chosen=chosen,
      rejected=rejected,
      annotator=fields.optional_text(obj, "annotator"),
      source=fields.optional_text(obj, "source"),
      weight=fields.number(obj, "weight", default=1.0, minimum=0.0),
      margin=fields.number(obj, "margin", default=0.0),
  )


def _compared_texts(obj: dict) -> tuple[str, str, str]:
  """Prompt, chosen and rejected of texts."""
  chosen, rejected = fields.text(obj, "chosen"), fields.text(obj, "rejected")
  if chosen == rejected:
    raise RecordError("rejected", "is identical to chosen")
  if "prompt" in obj:
    return fields.text(obj, "prompt", allow_empty=True), chosen, rejected
  return split_transcripts(chosen, rejected)


def _compared_chats(
    obj: dict, template: chat.Template
) -> tuple[str, str, str]:
  """Prompt, chosen and rejected of two conversations that part at the end."""
  sides = {}
  for field in ("chosen", "rejected"):
    if field not in obj:
      raise RecordError(field, "missing")
    sides[field] = _messages(obj[field], field)
  if "prompt" in obj:
    sides = {
        field: _with_prompt(obj, field, messages)
        for field, messages in sides.items()
    }
  if sides["chosen"] == sides["rejected"]:
    raise RecordError("rejected", "is identical to chosen")
  if sides["chosen"][:-1] != sides["rejected"][:-1]:
    raise RecordError(
        "rejected",
        "the two conversations differ before their last message, so they do"
        " not answer the same prompt",
    )
  spans = {
      field: _spans(messages, field, template)
      for field, messages in sides.items()
  }
  prompts = {
      field: "".join(text for text, _ in found[:-1])
      for field, found in spans.items()
  }
  if prompts["chosen"] != prompts["rejected"]:
    raise RecordError(
        "rejected", "the chat template writes another prompt for it"
    )
  return prompts["chosen"], spans["chosen"][-1][0], spans["rejected"][-1][0]


def _with_prompt(
    obj: dict, field: str, messages: list[dict[str, str]]
) -> list[dict[str, str]]:
  """The whole conversation of a side and of the prompt beside it."""
  goes_on = messages[0]["role"] == "assistant"
  if isinstance(obj["prompt"], list):
    start = _messages(obj["prompt"], "prompt")
    if messages[: len(start)] == start:
      return messages
    if goes_on or messages[0]["role"] != start[-1]["role"]:
      return start + messages
    raise RecordError(
        "prompt", f"{field} neither goes on from its messages nor begins with"
        " them",
    )
  text = fields.text(obj, "prompt")
  if goes_on:
    return [{"role": "user", "content": text}, *messages]
  said = next((m["content"] for m in messages if m["role"] == "user"), "")
  if text.strip() != said.strip():
    raise RecordError(
        "prompt", f"is not what the user says first in {field}; leave it out if"
        " that is the whole conversation",
    )
  return messages


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
  prompt = fields.text(obj, "prompt", allow_empty=True)
  completions = fields.list_of(obj, "completions")
  if not 2 <= len(completions) <= MAX_COMPLETIONS:
    raise RecordError(
        "completions", f"holds {len(completions)}; 2 to {MAX_COMPLETIONS} make"
        " a ranking",
    )
  for index, text in enumerate(completions):
    fields.check_text(f"completions[{index}]", text, allow_empty=False)
  fields.check_length("completions", sum(map(len, completions)))
  ranks = fields.list_of(obj, "ranks")
  if len(ranks) != len(completions):
    raise RecordError(
        "ranks", f"{len(ranks)} ranks for {len(completions)} completions"
    )
  seen: dict[str, int] = {}
  for index, (text, rank) in enumerate(zip(completions, ranks, strict=True)):
    where = f"ranks[{index}]"
    if isinstance(rank, bool) or not isinstance(rank, int):
      raise RecordError(where, f"must be an integer, not {type_name(rank)}")
    if not -MAX_RANK <= rank <= MAX_RANK:
      raise RecordError(where, f"must be within -{MAX_RANK} and {MAX_RANK}")
    if seen.setdefault(text, rank) != rank:
      raise RecordError(where, "identical completions have different ranks")
  return Ranking(
      prompt=prompt,
      completions=tuple(completions),
      ranks=tuple(ranks),
      annotator=fields.optional_text(obj, "annotator"),
      source=fields.optional_text(obj, "source"),
      weight=fields.number(obj, "weight", default=1.0, minimum=0.0),
  )


def _rating(obj: dict) -> Rating:
  return Rating(
      prompt=fields.text(obj, "prompt", allow_empty=True),
      completion=fields.text(obj, "completion"),
      score=fields.number(obj, "score"),
  )


def _prompt(obj: dict, template: chat.Template) -> Prompt:
  if "messages" not in obj:
    return Prompt(prompt=fields.text(obj, "prompt"))
  if "prompt" in obj:
    raise RecordError("messages", "give either messages or prompt")
  messages = _messages(obj["messages"], "messages")
  if messages[-1]["role"] == "assistant" and len(messages) > 1:
    messages.pop()  # a demonstration's file serves as a file of prompts
  try:
    return Prompt(prompt=chat.render_prompt(messages, template))
  except chat.ChatTemplateError as error:
    raise RecordError("messages", str(error)) from error


_VALIDATORS = {
    "ranking": _ranking,
    "rating": _rating,
}


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
