"""Conversations to text, in spans that say which part the assistant wrote.

A chat template is the name of one below, or Jinja of the kind that Hugging Face
tokenizers carry; transformers renders it. Where the assistant's words begin and
end is never guessed from the text. There are two ways to know:

* A template with `{% generation %} ... {% endgeneration %}` around what the
  assistant writes says so itself.
* Of another, the prefixes of the conversation are rendered, and the differences
  are the spans: from the generation prompt to the end-of-turn token. A template
  that changes what it wrote earlier (one that takes old reasoning out, say)
  cannot be split so, and is refused.

Special tokens that the template writes are marked in the text, and those that
people spell in messages are not (see `special_tokens`). Every text of a
template that writes any has `special_tokens.RENDERED` in front.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
import re

import jinja2

from rlhf_jax.data import generation_prompts, special_tokens
from rlhf_jax.data.special_tokens import MARK, RENDERED, Marker

ROLES = ("system", "user", "assistant")
OWN = "tokenizer"

# Line breaks stand in expressions: as Hugging Face does, the environment drops
# a literal one after a block.
TEMPLATES = {
    # One message a paragraph, no names: for models that only ever complete.
    "plain": (
        "{% for m in messages %}{{ m.content }}"
        "{% if not (loop.last and m.role == 'assistant') %}{{ '\\n\\n' }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    # Anthropic's HH transcripts; a system message stands before the first turn.
    "hh": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '\\n\\nHuman: ' ~ m.content }}"
        "{% else %}{{ '\\n\\nAssistant: ' ~ m.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
}

Span = tuple[str, bool]
Messages = Sequence[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SOME_ANSWER = "Nine lives."
# What a template is told to see what it writes.
_TALK = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": _SOME_ANSWER},
)


class ChatTemplateError(ValueError):
  """A template that does not parse, or that cannot be split into spans."""


@dataclasses.dataclass(frozen=True)
class Template:
  """A Jinja template and the special tokens that it may place.

  source: Jinja.
  name: what messages call it.
  bos_token, eos_token: what the template sees under these names.
  special_tokens: texts that are tokens where the template writes them. Without
    any (no tokenizer is known) everything is text.
  """

  source: str
  name: str
  bos_token: str = ""
  eos_token: str = ""
  special_tokens: tuple[str, ...] = ()

  @property
  def has_generation_marks(self) -> bool:
    """Whether it says itself what the assistant writes."""
    return bool(_GENERATION.search(self.source))

  def error(self, what: object) -> ChatTemplateError:
    """An error that names the template."""
    return ChatTemplateError(f"chat template {self.name}: {what}")

  @functools.cached_property
  def front(self) -> str:
    """`RENDERED` if it writes special tokens in some conversation, else ''."""
    if self.source in TEMPLATES.values():
      return ""
    names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
    spelled = self.source + "".join(
        token for name, token in names.items() if name in self.source
    )
    if any(token in spelled for token in self.special_tokens):
      return RENDERED
    # It may put them together: '<|' + role + '|>'.
    try:
      return RENDERED if MARK in self.render(_TALK, False) else ""
    except ChatTemplateError:
      return ""

  @functools.cached_property
  def _marker(self) -> Marker:
    return Marker(self.special_tokens)

  def render(self, messages: Messages, generation_prompt: bool) -> str:
    """The text of a conversation, its special tokens marked."""
    text, _ = self._render(messages, generation_prompt, False)
    return self._marker.mark(text)

  def render_parts(self, messages: Messages) -> list[Span]:
    """The text in (text, whether a generation block wrote it) parts."""
    text, blocks = self._render(messages, False, True)
    parts, end = [], 0
    for start, stop in blocks:
      parts += [(text[end:start], False), (text[start:stop], True)]
      end = stop
    parts.append((text[end:], False))
    return [(self._marker.mark(text), written) for text, written in parts]

  def _render(
      self, messages: Messages, generation_prompt: bool, find_blocks: bool
  ) -> tuple[str, list[tuple[int, int]]]:
    # Here and not above: the import takes a second and is seldom needed.
    from transformers.utils import chat_template_utils

    protected = [
        {**x, "content": self._marker.protect(x["content"])} for x in messages
    ]
    try:
      (text,), blocks = chat_template_utils.render_jinja_template(
          [protected],
          chat_template=self.source,
          add_generation_prompt=generation_prompt,
          return_assistant_tokens_mask=find_blocks,
          bos_token=self.bos_token,
          eos_token=self.eos_token,
      )
    except Exception as error:
      # A template is a program and may raise anything; it is not our bug.
      raise self.error(error) from error
    return text, blocks[0] if find_blocks else []


def find(choice: str) -> str:
  """The Jinja of a choice: a name in `TEMPLATES`, a .jinja file, or itself.

  Raises:
    ChatTemplateError: it is none of them.
  """
  if choice in TEMPLATES:
    return TEMPLATES[choice]
  if choice.endswith(".jinja"):
    try:
      return pathlib.Path(os.path.expandvars(choice)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ChatTemplateError(f"chat template {choice}: {error}") from error
  if choice == OWN:
    raise ChatTemplateError(
        f"chat_template={OWN!r}: there is no tokenizer here to have one; give"
        f" {', '.join(map(repr, TEMPLATES))}, a .jinja file or a Jinja string."
    )
  if "{" not in choice:
    raise ChatTemplateError(
        f"no chat template is called {choice!r}; give one of"
        f" {sorted(TEMPLATES)}, {OWN!r} for the tokenizer's own, a .jinja file"
        " or a Jinja template."
    )
  return choice


def name_of(choice: str) -> str:
  """How messages call a choice."""
  return "of the config" if "{" in choice else choice


def make_template(choice: str | Template) -> Template:
  """A template that knows no tokenizer; one that does stays as it is.

  Raises:
    ChatTemplateError: there is none, or it is no Jinja.
  """
  if isinstance(choice, Template):
    _check_syntax(choice)
    return choice
  template = _without_tokenizer(choice)
  _check_syntax(template)
  return template


@functools.lru_cache(maxsize=16)
def _without_tokenizer(choice: str) -> Template:
  return Template(find(choice), name_of(choice))


@functools.lru_cache(maxsize=16)
def _check_syntax(template: Template) -> None:
  if template.source in TEMPLATES.values():
    return
  try:
    template.render([{"role": "user", "content": _SOME_ANSWER}], True)
  except ChatTemplateError as error:
    # It may have its reasons to refuse this conversation.
    if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
      raise


def render_spans(
    messages: Messages, chat_template: str | Template
) -> tuple[Span, ...]:
  """Renders a conversation into (text, trained) spans.

  The spans joined are the rendered text, but for white space and closing tokens
  behind the last end-of-turn token. A span is trained if the assistant wrote
  it, its end-of-turn token included; the header in front of its words is not.

  Args:
    messages: dicts of role and content, checked by the caller.
    chat_template: a `Template`, or what `find` takes.

  Raises:
    ChatTemplateError: see above, or a message is not in the text, or what
      stands before an answer is no prompt (see `generation_prompts`).
  """
  template = make_template(chat_template)
  if template.has_generation_marks:
    parts = template.render_parts(messages)
    _check_blocks(messages, parts, template)
    generation_prompts.check_rows(messages, parts, template)
  else:
    parts = _prefix_differences(messages, template)
  text = special_tokens.unmarked("".join(text for text, _ in parts))
  _check_nothing_left_out(messages, text, template)
  spans: list[Span] = []
  for piece, trained in parts:
    if spans and spans[-1][1] == trained:
      spans[-1] = (spans[-1][0] + piece, trained)
    elif piece:
      spans.append((piece, trained))
  if len(spans) > 1 and _only_closes(spans[-2:]):
    spans.pop()
  if spans:
    spans[0] = (template.front + spans[0][0], spans[0][1])
  return tuple(spans)


def _only_closes(spans: Sequence[Span]) -> bool:
  """Whether the second holds nothing but white space, or closing tokens.

  Closing tokens are those behind an end-of-turn token.
  """
  (answer, trained), (text, rest_trained) = spans
  if not trained or rest_trained:
    return False
  if answer.endswith(MARK):
    text = special_tokens.without_marked(text)
  return not text.strip()


def render_prompt(messages: Messages, chat_template: str | Template) -> str:
  """The text that the assistant's next words follow.

  Raises:
    ChatTemplateError: the template refuses, or leaves a message out, or the
      assistant's header (see `generation_prompts`).
  """
  template = make_template(chat_template)
  _check_prompts(template)
  text = template.render(messages, True)
  _check_nothing_left_out(messages, special_tokens.unmarked(text), template)
  return template.front + text


@functools.lru_cache(maxsize=16)
def _check_prompts(template: Template) -> None:
  generation_prompts.check_template(template)


def end_of_turn(template: Template) -> str | None:
  """The special token that ends the assistant's turns, if there is one."""
  try:
    text = template.render(_TALK, False)
  except ChatTemplateError:
    return None
  after = text.rpartition(_SOME_ANSWER)[2]
  found = re.match(rf"\s*{MARK}([^{MARK}]+){MARK}", after)
  return found and found[1]


def _prefix_differences(messages: Messages, template: Template) -> list[Span]:
  """Spans by rendering the conversation up to each of the assistant's turns."""
  _check_prompts(template)
  parts: list[Span] = []
  before = ""
  for index, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    header = template.render(messages[:index], True)
    parts.append((_rest(before, header, index, messages, template), False))
    whole = template.render(messages[: index + 1], False)
    written = _rest(header, whole, index, messages, template)
    _check_header(message["content"], written, template)
    end = _end_of_answer(message["content"], written)
    parts.append((written[:end], True))
    # What is behind may say that the conversation ends here, which it may not.
    before = header + written[:end]
  if messages[-1]["role"] != "assistant":
    whole = template.render(messages, False)
  rest = _rest(before, whole, len(messages) - 1, messages, template)
  return [*parts, (rest, False)]


def _end_of_answer(content: str, written: str) -> int:
  """Where the assistant's part ends: behind its end-of-turn token."""
  answer = re.escape(content.strip())
  found = re.search(rf"{answer}\s*{MARK}[^{MARK}]+{MARK}", written)
  if found:
    return found.end()
  end = written.rfind(MARK) + 1
  # Without a token at its end, all is the assistant's.
  return end if end and not written[end:].strip() else len(written)


def _rest(
    before: str, after: str, index: int, messages: Messages, template: Template
) -> str:
  """What `after` has beyond `before`."""
  if after.startswith(before):
    return after[len(before):]
  shorter, longer = special_tokens.where_they_part(before, after)
  raise template.error(
      f"messages[{index}] ({messages[index]['role']}): the longer conversation"
      " does not begin with the text of the shorter one, so the assistant's"
      f" part cannot be told apart: {shorter} became {longer}. Put"
      " {% generation %} and {% endgeneration %} around what the assistant"
      " writes, or take another template."
  )


def _check_header(content: str, written: str, template: Template) -> None:
  header = written.partition(content.strip())[0]
  if header != written and MARK in header:
    raise template.error(
        f"{special_tokens.unmarked(header)!r} stands before the assistant's"
        " words and not at the end of the prompt: the template must write it"
        " where add_generation_prompt is true."
    )


def _check_blocks(
    messages: Messages, parts: list[Span], template: Template
) -> None:
  answers = sum(x["role"] == "assistant" for x in messages)
  blocks = sum(written for _, written in parts)
  if blocks != answers:
    raise template.error(
        f"it has {blocks} generation blocks for {answers} answers of the"
        " assistant: {% generation %} must stand around each."
    )
  if messages[-1]["role"] == "assistant" and not _only_closes(parts[-2:]):
    what = special_tokens.unmarked(parts[-1][0])
    raise template.error(
        f"{what!r} is behind the last generation block, so that nobody would"
        " learn to write it: move {% endgeneration %} behind it."
    )


def _check_nothing_left_out(
    messages: Messages, text: str, template: Template
) -> None:
  for index, message in enumerate(messages):
    # The assistant's may be taken apart: reasoning and answer.
    if message["role"] == "assistant":
      continue
    if message["content"].strip() not in text:
      raise template.error(
          f"messages[{index}] ({message['role']}) is not in the text that it"
          " makes."
      )
