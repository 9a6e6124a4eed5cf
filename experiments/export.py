"""Writes a policy or a reward model as a folder in Hugging Face's layout.

    python -m experiments.export --model=runs/first/ppo --family=llama --to=OUT

OUT then holds config.json, model.safetensors, generation_config.json with all
end tokens, and the tokenizer's files with its chat template, for
`transformers`, vLLM and whatever else reads them. What was trained here from
scratch is of the family llama; an imported model goes back to its own.

A reward model keeps the order and the differences of its scores in units of the
reference policy's standard deviation: its gain goes into the head, its bias,
for which the layout has no place, is dropped and told.
"""

import pathlib

from absl import app, flags, logging
import jax

from experiments.harness import cli, models
from rlhf_jax.models.families import huggingface

_MODEL = flags.DEFINE_string("model", None, "The place of a model.")
_FAMILY = flags.DEFINE_string("family", "llama", "Its model_type there.")
_TO = flags.DEFINE_string("to", None, "The folder to write.")
_KIND = flags.DEFINE_enum(
    "kind", "policy", ["policy", "reward_model"], "What the model is."
)
flags.mark_flags_as_required(["model", "to"])


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
  cli.quiet_third_parties()
  with cli.told_errors():
    export(_MODEL.value, _FAMILY.value, _TO.value, _KIND.value)
    print(f"written: {_TO.value}")


def export(place: str, family: str, folder: str, kind: str) -> None:
  """Writes the model at `place` to `folder`.

  Raises:
    cli.UserError: the folder holds a model already.
    huggingface.FamilyError: the family cannot express it.
  """
  if (pathlib.Path(folder) / "config.json").exists():
    raise cli.UserError(f"--to={folder}: holds a model already")
  if kind == "policy":
    model = models.load_policy(place)
    params = model.params
  else:
    model = models.load_reward_model(place)
    params = _with_gain(model)
  tokenizer = model.tokenizer
  # config.json comes last: a folder without it is not taken for a whole one.
  tokenizer.export(folder)
  if kind == "reward_model" and not tokenizer.pad_is_safe:
    logging.warning(
        "export: the tokenizer has no token for padding alone, by which "
        "transformers finds where a row ends: there it scores one row at a time"
    )
  huggingface.save_folder(
      folder,
      model.config,
      jax.device_get(params),
      family=family,
      kind=kind,
      token_ids={
          "bos": tokenizer.bos_id,
          "eos": _one_or_all(tokenizer.eos_ids),
          "pad": tokenizer.pad_id if tokenizer.pad_is_safe else None,
      },
  )


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
  return ids[0] if len(ids) == 1 else list(ids)


def _with_gain(model: models.RewardModel):
  head = model.params["head"]
  gain = model.normalization.gain
  dropped = head["bias"] * gain + model.normalization.bias[None]
  logging.info(
      "export: scores are lower by the constant %.6f, which the layout has no "
      "place for",
      float(dropped[0]),
  )
  return {**model.params, "head": {"kernel": head["kernel"] * gain}}


if __name__ == "__main__":
  app.run(main)
