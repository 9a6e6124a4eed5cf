r"""Shows completions of several policies side by side in the terminal.

    python -m experiments.sample --policies=runs/first/sft,runs/first/ppo \
        --prompts='What color is the cat?\n'

A place is a stage's folder (see `harness/models.py`). Without --prompts, the
prompts are held-out requests of the embedded domain.
"""

import pathlib
import shutil
import sys
import textwrap

from absl import app, flags
import jax

from experiments.harness import checks, cli, evaluator, models, sources
from rlhf_jax.data import chat
from rlhf_jax.data.records import Prompt

_POLICIES = flags.DEFINE_list("policies", None, "Places, divided by commas.")
_PROMPTS = flags.DEFINE_multi_string(
    "prompts", [], "A prompt, \\n a line break; give the flag again for more."
)
_NUM_PROMPTS = flags.DEFINE_integer(
    "num_prompts", 6, "How many of the embedded domain's, without --prompts."
)
_LENGTH = flags.DEFINE_integer("max_completion_length", 64, "In tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "Of the sampling.")
_GREEDY = flags.DEFINE_bool("greedy", False, "The likeliest token each time.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Of so many tokens; 0 is all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Of tokens with so much mass.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", "",
    "Makes each prompt a user's message: 'tokenizer' for each policy's own, "
    "'hh', a .jinja file or Jinja; '' leaves it as it is.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
flags.mark_flag_as_required("policies")


def main(argv):
  del argv
  cli.quiet_third_parties()
  with cli.told_errors():
    _check_flags()
    show(_POLICIES.value, _PROMPTS.value)


def _check_flags() -> None:
  ranges = {
      "num_prompts": ">= 1",
      "max_completion_length": ">= 1",
      "temperature": "> 0",
      "top_k": ">= 0",
      "top_p": "(0, 1]",
      "seed": "seed",
  }
  try:
    checks.check_ranges(flags.FLAGS, "", ranges)
  except ValueError as error:
    raise cli.UserError(f"flags: {error}") from error


def show(places: list[str], prompts: list[str]) -> None:
  """Prints a block a prompt, a column a policy."""
  if not prompts:
    reader = sources.Reader(_SEED.value, pathlib.Path("unused"))
    cfg = sources.SourceConfig(
        source=sources.ASSISTANT, limit=_NUM_PROMPTS.value
    )
    prompts = [x.prompt for x in reader.prompts(cfg, "heldout")]
  # The embedded domain's requests end with a line break; in a shell it is
  # awkward to type.
  prompts = [x.replace("\\n", "\n") for x in prompts]
  columns = [_completions(place, prompts) for place in places]
  terminal = shutil.get_terminal_size((100, 24)).columns
  width = max(16, (terminal - 3 * (len(places) - 1)) // len(places))
  for i, prompt in enumerate(prompts):
    print("\n" + "=" * min(terminal, 100))
    print(prompt.strip())
    _print_columns(
        [f"[{place}]" for place in places], width, emphasise=sys.stdout.isatty()
    )
    _print_columns([column[i] for column in columns], width)


def _completions(place: str, prompts: list[str]) -> list[str]:
  policy = models.load_policy(place)
  longest = policy.config.max_length - _LENGTH.value
  if longest < 1:
    raise cli.UserError(
        f"--max_completion_length={_LENGTH.value} leaves no room for a prompt "
        f"in {place}, whose max_length is {policy.config.max_length}"
    )
  if _CHAT_TEMPLATE.value:
    template = policy.tokenizer.template(_CHAT_TEMPLATE.value)
    prompts = [
        chat.render_prompt([{"role": "user", "content": x}], template)
        for x in prompts
    ]
  encoded = policy.tokenizer.encode_rows([[x] for x in prompts])
  lengths = [len(ids) + 1 for (ids,) in encoded]
  cfg = evaluator.SampleConfig(
      max_prompt_length=min(max(lengths), longest),
      max_completion_length=_LENGTH.value,
      temperature=_TEMPERATURE.value,
      greedy=_GREEDY.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      stop_tokens=(),
      stop_after=0,
      too_long="error",
      num_slots=0,
      num_cache_buckets=1,
      rollout_weights="compute",
  )
  sampler = evaluator.Evaluator(
      policy.config,
      policy.tokenizer,
      evaluator.encode_prompts(
          [Prompt(prompt=x) for x in prompts],
          policy.tokenizer,
          cfg,
      ),
      cfg,
      seed=_SEED.value,
      batch_size=len(prompts),
  )
  rows = sampler.rows(jax.device_put(policy.params))
  return [row["completion"] for row in rows]


def _print_columns(
    cells: list[str], width: int, emphasise: bool = False
) -> None:
  wrapped = [
      [
          line
          for part in cell.split("\n")
          for line in (textwrap.wrap(part, width) or [""])
      ]
      for cell in cells
  ]
  for i in range(max(map(len, wrapped))):
    line = " | ".join(
        (lines[i] if i < len(lines) else "").ljust(width) for lines in wrapped
    ).rstrip()
    print(f"\033[1m{line}\033[0m" if emphasise else line)


if __name__ == "__main__":
  app.run(main)
