"""Whether prompts of a chat template end where its answers begin.

A model samples behind what the template writes with add_generation_prompt, and
learns to go on from what stands before an answer in a whole conversation. A
template that does not write the assistant's header into prompts would have it
sample behind another text than it has learned from.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import special_tokens
from rlhf_jax.data.special_tokens import MARK

_ANSWER = "Nine lives."
_TALK = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": _ANSWER},
)
_SYSTEM = {"role": "system", "content": "Be brief."}


def check_rows(
    messages: Sequence[dict[str, str]],
    parts: Sequence[tuple[str, bool]],
    template: Any,
) -> None:
  """Checks what stands before each answer that people or a system asked for.

  Args:
    messages: a conversation.
    parts: what `template.render_parts` makes of it, a block for each answer.
    template: a `chat.Template` with generation marks.

  Raises:
    chat.ChatTemplateError: it is not what a prompt of the messages before is.
  """
  before = ""
  blocks = []
  for text, written in parts:
    if written:
      blocks.append(before)
    before += text
  answers = [i for i, x in enumerate(messages) if x["role"] == "assistant"]
  for index, before in zip(answers, blocks, strict=True):
    # Nobody samples where there is nothing or an answer before.
    if index and messages[index - 1]["role"] != "assistant":
      prompt = template.render(messages[:index], True)
      if prompt != before:
        raise _error(prompt, before, f"messages[{index}]", template)


def check_template(template: Any) -> None:
  """Checks a prompt of a template against a conversation of its own.

  A prompt may go on with what the assistant is made to begin with ("<think>").
  A template that takes none of our conversations is let pass.

  Raises:
    chat.ChatTemplateError: it leaves out what stands before the answer.
  """
  for talk in (_TALK, (_SYSTEM, *_TALK)):
    try:
      prompt = template.render(talk[:-1], True)
      ignores = prompt == template.render(talk[:-1], False)
      before = _before_answer(talk, prompt, ignores, template)
    except ValueError:  # it raised, and may have its reasons
      continue
    if not prompt.startswith(before):
      raise _error(prompt, before, "an answer", template)
    return


def _before_answer(
    talk: Sequence[dict[str, str]], prompt: str, ignores: bool, template: Any
) -> str:
  """What the prompt has to hold of the text before the answer."""
  if template.has_generation_marks:
    parts = template.render_parts(talk)
    index = [written for _, written in parts].index(True)
    return "".join(text for text, _ in parts[:index])
  before, answer, _ = template.render(talk, False).rpartition(_ANSWER)
  if not answer or prompt.startswith(before):
    return ""
  header = before.removeprefix(prompt)
  if ignores:
    return before if header.strip() else ""
  # Of one that prompts, nobody knows without marks whether text is header or
  # answer ("<think>"); but special tokens begin no answer.
  return before if before.startswith(prompt) and MARK in header else ""


def _error(prompt: str, before: str, where: str, template: Any) -> Exception:
  prompted, written = special_tokens.where_they_part(prompt, before)
  return template.error(
      f"{written} stands before {where} and {prompted} at the end of"
      " the prompt, behind which models sample: the template must write the"
      " assistant's header where add_generation_prompt is true, and it alone."
  )
