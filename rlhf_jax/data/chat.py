"""Conversations to text, in spans that say which part the assistant wrote.

A chat template is the name of one below or a Jinja string of the kind that
Hugging Face tokenizers carry (it sees `messages` and `add_generation_prompt`).
Where the assistant's words begin and end is not guessed from the text: the
template is rendered for each prefix of the conversation and the differences are
the spans. A template that changes what it wrote earlier cannot be split so, and
is refused.
"""

import functools

import jinja2
import jinja2.sandbox

ROLES = ("system", "user", "assistant")

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


class ChatTemplateError(ValueError):
  """A template that does not parse, or that cannot be split into spans."""


def render_spans(
    messages: list[dict[str, str]], chat_template: str
) -> tuple[Span, ...]:
  """Renders a conversation into (text, trained) spans.

  The spans joined are the rendered text. A span is trained if the assistant
  wrote it; the header in front of its words is not.

  Args:
    messages: dicts of role and content, checked by the caller.
    chat_template: a name in `TEMPLATES` or a Jinja string.

  Raises:
    ChatTemplateError: see above.
  """
  template = compile_template(chat_template)
  spans: list[Span] = []
  text = ""
  for index, message in enumerate(messages):
    trained = message["role"] == "assistant"
    if trained:
      header = _render(template, messages[:index], True)
      text = _extend(spans, text, header, False)
    whole = _render(template, messages[: index + 1], False)
    text = _extend(spans, text, whole, trained)
  return tuple(spans)


def render_prompt(messages: list[dict[str, str]], chat_template: str) -> str:
  """The text that the assistant's next words follow."""
  return _render(compile_template(chat_template), messages, True)


@functools.lru_cache(maxsize=16)
def compile_template(chat_template: str) -> jinja2.Template:
  """Compiles a named template or a Jinja string, sandboxed."""
  source = TEMPLATES.get(chat_template, chat_template)
  if source is chat_template and "{" not in source:
    raise ChatTemplateError(
        f"no chat template is called {chat_template!r}; give one of"
        f" {sorted(TEMPLATES)} or a Jinja template."
    )
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
      keep_trailing_newline=True,
  )
  environment.globals["raise_exception"] = _raise_exception
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise ChatTemplateError(f"chat template: {error}") from error


def _render(
    template: jinja2.Template, messages: list[dict], generation_prompt: bool
) -> str:
  try:
    return template.render(
        messages=messages, add_generation_prompt=generation_prompt,
        bos_token="", eos_token="",
    )
  except Exception as error:
    # A template is a program and may raise anything; it is not our bug.
    raise ChatTemplateError(f"chat template: {error}") from error


def _extend(spans: list[Span], before: str, after: str, trained: bool) -> str:
  """Appends what `after` has beyond `before`; returns the text so far."""
  if not after.startswith(before):
    # The assistant's own separator may only come once a message follows.
    raise ChatTemplateError(
        "chat template: a longer conversation does not begin with the text of"
        " the shorter one, so the assistant's part cannot be told apart"
        f" (near {before[-40:]!r})."
    )
  if len(after) > len(before):
    piece = after[len(before):]
    if spans and spans[-1][1] == trained:
      spans[-1] = (spans[-1][0] + piece, trained)
    else:
      spans.append((piece, trained))
  return after


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)
