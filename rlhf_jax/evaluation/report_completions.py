"""What the policies said to the same prompts, made fit to be shown.

Completions may hold anything, and be of any length.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from rlhf_jax.evaluation.report_data import RunData, policy_label
from rlhf_jax.evaluation.tolerant_json import finite

PROMPTS_A_FAMILY = 3
VISIBLE_CHARACTERS = 600  # of a completion; the rest is there to unfold
_MAX_CHARACTERS = 20_000

# What is said of a completion if its row has it.
_FACTS = {
    "true_reward": "true reward {:z.2f}",
    "score": "score {:z.2f}",
    "kl": "KL {:z.1f}",
    "length": "{:z.0f} tokens",
    "completion_length": "{:z.0f} tokens",
}
# C0 controls have pictures; other controls, lone surrogates and the marks that
# turn the direction of the text around them become a replacement character.
_HIDDEN = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    **dict.fromkeys(
        [*range(0x7F, 0xA0), *range(0xD800, 0xE000), *range(0x202A, 0x202F),
         *range(0x2066, 0x206A)],
        0xFFFD,
    ),
}


@dataclasses.dataclass(frozen=True)
class Completion:
  """What one policy said; `head` is shown, `tail` can be unfolded."""

  policy: str
  head: str
  tail: str
  facts: list[str]


@dataclasses.dataclass(frozen=True)
class PromptRow:
  prompt: str
  completions: list[Completion]


def completion_groups(run: RunData) -> dict[str, list[PromptRow]]:
  """{family: the first prompts of it that every policy answered}.

  The first ones in the file: nobody chose them. If no prompt was answered by
  all, the first ones are taken whoever answered.
  """
  policies = list(dict.fromkeys(r["policy"] for r in run.completions))
  answers: dict[str, dict[str, dict[str, dict]]] = {}
  for row in run.completions:
    family = row.get("family")
    family = family if isinstance(family, str) else "prompts"
    prompts = answers.setdefault(family, {})
    prompts.setdefault(row["prompt"], {}).setdefault(row["policy"], row)
  groups = {}
  for family, prompts in answers.items():
    whole = {p: a for p, a in prompts.items() if len(a) == len(policies)}
    chosen = list((whole or prompts).items())[:PROMPTS_A_FAMILY]
    groups[family] = [
        PromptRow(
            visible(prompt),
            [_completion(found[name]) for name in policies if name in found],
        )
        for prompt, found in chosen
    ]
  return groups


def _completion(row: dict[str, Any]) -> Completion:
  text = visible(row["completion"])
  # Not worth unfolding for the sake of a few more words.
  cut = VISIBLE_CHARACTERS if len(text) > 1.2 * VISIBLE_CHARACTERS else None
  tail = "" if cut is None else text[cut:_MAX_CHARACTERS]
  if len(text) > _MAX_CHARACTERS:
    tail += f" … ({len(text) - _MAX_CHARACTERS:,} more characters left out)"
  return Completion(
      policy_label(row["policy"]), text[:cut], tail, list(_facts(row))
  )


def _facts(row: dict[str, Any]) -> Iterator[str]:
  for key, fact in _FACTS.items():
    value = finite(row.get(key))
    if value is not None:
      yield fact.format(value)
  if row.get("ended") is False:
    yield "cut off at the limit"


def visible(text: str) -> str:
  """Text in which nothing is hidden: control characters become pictures."""
  return text.translate(_HIDDEN)
