"""Writes a policy or a reward model as a folder in Hugging Face's layout.

    python -m experiments.export --model=runs/first/ppo --family=llama --to=OUT

OUT then holds config.json, model.safetensors, generation_config.json with all
end tokens, and the tokenizer's files with its chat template, for
`transformers`, vLLM and whatever else reads them. What was trained here from
scratch is of the family llama; an imported model goes back to its own.

    python -m experiments.export --adapter --model=runs/lora/sft \
        --family=llama --to=OUT

writes only what the stage trained with lora: adapter_config.json and
adapter_model.safetensors, which `peft` loads onto the model that the stage
started from.

A reward model keeps the order and the differences of its scores in units of the
reference policy's standard deviation: its gain goes into the head, its bias,
for which the layout has no place, is dropped and told.
"""

import fnmatch

from absl import app, flags, logging
from etils import epath
import jax

from experiments.harness import adapters, buckets, cli, models, stage
from rlhf_jax.models.families import huggingface, peft_export

_MODEL = flags.DEFINE_string("model", None, "The place of a model.")
_FAMILY = flags.DEFINE_string("family", "llama", "Its model_type there.")
_TO = flags.DEFINE_string("to", None, "The folder to write.")
_KIND = flags.DEFINE_enum(
    "kind", "policy", ["policy", "reward_model"], "What the model is."
)
_ADAPTER = flags.DEFINE_bool(
    "adapter", False, "Writes the adapter of a stage alone, for peft."
)
flags.mark_flags_as_required(["model", "to"])

# What a model, a tokenizer or an adapter consists of in such folders. Beside
# what is written they would be read as its own, or be replaced by it.
_TAKEN = (
    "*config.json",
    "*.safetensors*",
    "*.bin",
    "*.model",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
  cli.quiet_third_parties()
  with cli.told_errors():
    if _ADAPTER.value:
      export_adapter(_MODEL.value, _FAMILY.value, _TO.value, _KIND.value)
    else:
      export(_MODEL.value, _FAMILY.value, _TO.value, _KIND.value)
    print(f"written: {_TO.value}")


def export(place: str, family: str, folder: str, kind: str) -> None:
  """Writes the model at `place` to `folder`.

  Raises:
    cli.UserError: the folder holds files of a model or tokenizer already.
    huggingface.FamilyError: the family cannot express it; nothing is written.
  """
  _check_is_free(folder)
  huggingface.find_family(family, "--family")
  if kind == "policy":
    model = models.load_policy(place)
    params = model.params
  else:
    model = models.load_reward_model(place)
    params = _with_gain(model)
  huggingface.check_expressible(model.config, family=family, kind=kind)
  tokenizer = model.tokenizer
  # config.json comes last: a folder without it is not taken for a whole one.
  with buckets.local_output(folder) as local:
    tokenizer.export(local)
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


def _check_is_free(folder: str) -> None:
  path = epath.Path(folder)
  if not path.exists():
    return
  taken = sorted(
      x.name
      for x in path.iterdir()
      if any(fnmatch.fnmatch(x.name, pattern) for pattern in _TAKEN)
  )
  if taken:
    raise cli.UserError(
        f"--to={folder}: holds {', '.join(taken)} already, and nothing of "
        "another model is written over; name a new folder"
    )


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
  return ids[0] if len(ids) == 1 else list(ids)


def export_adapter(place: str, family: str, folder: str, kind: str) -> None:
  """Writes the adapter that the stage at `place` trained to `folder`.

  Raises:
    cli.UserError: the folder holds files of a model or adapter already, or the
      adapter is a reward model's: `peft` has no place for its head beside one.
    FileNotFoundError: the stage trained no adapter.
    huggingface.FamilyError: the family has no such projections.
  """
  _check_is_free(folder)
  huggingface.find_family(family, "--family")
  place = models.expand(place)
  if models.CHECKPOINT.fullmatch(place):
    raise cli.UserError(
        f"--model={place}: with --adapter, name the folder of a stage that "
        "ended: its checkpoints hold no adapter in a folder of its own. Or "
        "leave --adapter out"
    )
  adapter = adapters.load(place)
  if kind != "policy" or adapter.head is not None:
    raise cli.UserError(
        f"{place}: an adapter of a reward model cannot be written alone, as "
        "its head has no place there; leave --adapter out"
    )
  started_from = models.expand(
      models.started_from(place, stage.read_config(place))
  )
  is_theirs = started_from.startswith(models.HUGGING_FACE)
  peft_export.save_adapter(
      folder,
      adapter.config,
      adapter.params,
      family=family,
      base=models.load_policy(place).params,
      base_name=(
          started_from.removeprefix(models.HUGGING_FACE) if is_theirs else None
      ),
  )


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
