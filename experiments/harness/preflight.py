"""Whether what a config names is there, looked up before anything runs.

Only names are looked up, nothing is read. What is in `@run/` is passed over: an
earlier stage makes it.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
from typing import Any

from experiments.harness import evaluator, models, sources
from experiments.harness.config import ConfigError
from rlhf_jax.data import chat, readers
from rlhf_jax.rewards.episodes import RuleError

# Fields that name a model; '' in the others is for none.
_PLACES = ("init_from", "ref_policy", "reward_model")
_REQUIRED = ("init_from",)
_TOLD = (
    OSError, ConfigError, RuleError, readers.ReadError, chat.ChatTemplateError
)


def problems(path: str, section: Any) -> Iterator[str]:
  """What a stage's section names and is not there, each with its field."""
  for field, check, name in _named(path, section):
    if models.RUN in name:
      continue
    try:
      check(name)
    except _TOLD as error:
      yield f"{field}: {error}"


def _named(path: str, section: Any) -> Iterator[tuple[str, Any, str]]:
  """(field path, what checks it, its value)."""
  if isinstance(section, sources.SourceConfig):
    yield f"{path}.source", _check_source, section.source
    yield f"{path}.chat_template", _check_template, section.chat_template
    return
  # The evaluation's policies have names, its ref_policy is one of them.
  places = getattr(section, "places", None)
  if places is not None:
    for name, place in places.items():
      yield f"{path}.policies[{name}]", _check_place, place
  for field in dataclasses.fields(section):
    value, inner = getattr(section, field.name), f"{path}.{field.name}"
    if field.name == "normalize_on" and not section.ref_policy:
      continue  # is not read
    if dataclasses.is_dataclass(value):
      yield from _named(inner, value)
    elif field.name == "ref_policy" and places is not None:
      continue
    elif field.name in _PLACES and (value or field.name in _REQUIRED):
      yield inner, _check_place, value
    elif field.name == "judge" and value.startswith(evaluator.REWARD_MODEL):
      yield inner, _check_place, value.removeprefix(evaluator.REWARD_MODEL)
    elif field.name == "reward_rule" and value:
      yield inner, evaluator.load_reward_rule, value
    elif field.name == "path" and value:  # the tokenizer's
      yield inner, _check_exists, value


def _check_place(place: str) -> None:
  if not place:
    raise ConfigError("names no place")
  place = models.expand(place)
  models.check_syntax(place)
  if place.startswith(models.LLAMA2C):
    for path in place.removeprefix(models.LLAMA2C).partition(":")[::2]:
      _check_file(path)
  elif match := models.PEFT.fullmatch(place):
    _check_file(f"{match[1]}/adapter_config.json")
    _check_place(match[2])
  elif place.startswith(models.HUGGING_FACE):
    folder = place.removeprefix(models.HUGGING_FACE)
    _check_file(f"{folder}/config.json")
  elif checkpoint := models.CHECKPOINT.fullmatch(place):
    _check_exists(checkpoint[1])
  elif not (pathlib.Path(place) / "model").is_dir():
    raise ConfigError(
        f"{place} holds no finished model; {models.advice(place)}"
    )


def _check_source(source: str) -> None:
  if source in ("", sources.ASSISTANT):
    return
  source = models.expand(source)
  kind, _, path = source.partition(":")
  if kind in ("stories", "text"):
    _check_file(path)
  elif kind == "polarity":
    _check_file(path.rpartition(":")[0])
  elif not source.startswith(readers.TFDS_PREFIX):
    readers.resolve_files(path if kind in ("gsm8k", "oasst") else source)


def _check_template(choice: str) -> None:
  if choice != chat.OWN:  # which a tokenizer has or has not
    chat.make_template(choice)


def _check_exists(path: str) -> None:
  if not pathlib.Path(models.expand(path)).exists():
    raise ConfigError(f"{path!r}: no such file or folder")


def _check_file(path: str) -> None:
  if not pathlib.Path(path).is_file():
    raise ConfigError(f"{path!r}: no such file")
