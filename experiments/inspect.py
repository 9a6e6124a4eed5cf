r"""Prints what a model will see: tokens, masks and positions of some records.

    python -m experiments.inspect --config=configs/sft.py --num_records=3

--config is that of pretrain, sft, reward or ppo, with any --config.x=...; or
that of a whole run, with --stage=NAME and --workdir=DIR. Rows are made by the
very functions that the stage calls. At the end it says how many records were
kept, dropped, shortened or skipped, and why. Nothing is written.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
import numpy as np

from experiments import ppo, pretrain, reward, sft
from experiments.harness import (
    cli,
    evaluator,
    language_model,
    models,
    show,
    sources,
)
from experiments.harness import config as config_lib
from rlhf_jax.data import chat
from rlhf_jax.data.encoding import LengthReport
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import LMBatch, PromptBatch, RankingBatch

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config of a stage, or of a whole run with --stage."
)
_STAGE = flags.DEFINE_string("stage", "", "Which, of a whole run's config.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "What @run/ stands for, in a whole run's config."
)
_NUM_RECORDS = flags.DEFINE_integer("num_records", 3, "How many to print.")
_SPLIT = flags.DEFINE_enum(
    "split", "train", ["train", "heldout"], "Which records to print."
)
_TABLE = flags.DEFINE_bool("table", False, "A line a token.")
_COLOR = flags.DEFINE_enum(
    "color", "auto", ["auto", "always", "never"],
    "auto: in a terminal, unless NO_COLOR is set.",
)
flags.mark_flag_as_required("config")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
  cli.quiet_third_parties()
  logging.set_verbosity(logging.WARNING)  # all that is logged is printed
  with cli.told_errors(), tempfile.TemporaryDirectory() as skipped_dir:
    if _NUM_RECORDS.value < 0:
      raise cli.UserError(f"--num_records={_NUM_RECORDS.value} is negative")
    name, config = find_stage(_CONFIG.value, _STAGE.value, _WORKDIR.value)
    tokenizer, parts = _PARTS[name](config, pathlib.Path(skipped_dir))
    painter = show.Painter(
        tokenizer, color=use_color(_COLOR.value), table=_TABLE.value
    )
    print(f"{name}: {show.describe(tokenizer)}")
    for part in parts:
      if part.split == _SPLIT.value and _NUM_RECORDS.value:
        print("\n".join(show.shown(part, painter, _NUM_RECORDS.value)))
    print()
    for part in parts:
      print("\n".join(show.counts(part)))
    for line in show.skipped(pathlib.Path(skipped_dir)):
      print(line)


def use_color(choice: str) -> bool:
  """Whether to print in colour; see https://no-color.org."""
  if choice == "auto":
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
  return choice == "always"


def find_stage(
    config: ConfigDict, stage: str, workdir: str
) -> tuple[str, Any]:
  """A stage's name and its checked config.

  Raises:
    cli.UserError: it is the config of none, of a run without --stage, or of
      another stage than --stage.
  """
  if set(config) <= {*_CLASSES, "preferences", "evaluate"}:  # a whole run
    names = [x for x in _CLASSES if x in config and config[x] is not None]
    if stage not in names:
      raise cli.UserError(
          f"--stage={stage!r}: this config is that of a whole run; name one of"
          f" its stages: {', '.join(names)}"
      )
    text = json.dumps(config_lib.to_dict(config[stage]))
    if models.RUN in text and not workdir:
      raise cli.UserError(
          f"--workdir: stage {stage} reads {models.RUN}...; name the run's"
          " folder"
      )
    beside = json.dumps(f"{pathlib.Path(workdir).resolve()}/")[1:-1]
    plain = json.loads(text.replace(models.RUN, beside))
    name = "reward" if stage == "judge" else stage
    return name, config_lib.from_config(_CLASSES[stage], plain)
  keys = set(config)
  likeness = {
      name: len(keys & fields) / len(keys | fields)
      for name, fields in _FIELDS.items()
  }
  name = max(likeness, key=likeness.get)
  if likeness[name] < 0.5:
    raise cli.UserError(
        f"--config: this is the config of none of {', '.join(_FIELDS)}, whose"
        f" rows can be shown; its sections are {', '.join(config)}"
    )
  if stage and _CLASSES.get(stage) is not _CLASSES[name]:
    raise cli.UserError(
        f"--stage={stage!r}: this config is that of the single stage {name}; "
        "leave --stage out"
    )
  return name, config_lib.from_config(_CLASSES[name], config)


_CLASSES = {
    "pretrain": pretrain.Config,
    "sft": sft.Config,
    "reward": reward.Config,
    "judge": reward.Config,
    "ppo": ppo.Config,
}
_FIELDS = {
    name: {field.name for field in dataclasses.fields(cls)}
    for name, cls in _CLASSES.items()
    if name != "judge"
}


# ---- What stages read --------------------------------------------------------


def pretrain_parts(config: pretrain.Config, skipped_dir: pathlib.Path):
  """Packed documents."""
  reader = sources.Reader(config.train.seed, skipped_dir)
  tokenizer, examples, reports = pretrain.make_examples(config, reader)
  limits = f"train.seq_len={config.train.seq_len}"
  return tokenizer, packed_parts(
      config, "documents", tokenizer, examples, reports, limits
  )


def sft_parts(config: sft.Config, skipped_dir: pathlib.Path):
  """Packed demonstrations."""
  tokenizer = models.load_tokenizer(config.init_from)
  reader = sources.Reader(config.train.seed, skipped_dir, tokenizer)
  examples, reports = sft.make_examples(config, reader)
  limits = f"train.seq_len={config.train.seq_len}"
  return tokenizer, packed_parts(
      config, "demonstrations", tokenizer, examples, reports,
      f"{limits}, too_long={config.too_long!r}",
  )


def packed_parts(
    config: pretrain.Config | sft.Config,
    field: str,
    tokenizer: Tokenizer,
    examples: dict[str, list],
    reports: dict[str, LengthReport],
    limits: str,
) -> list[show.Part]:
  """What a stage of next-token training reads."""
  parts = []
  for split, name in (("train", field), ("heldout", f"heldout_{field}")):
    batch = language_model.pack(config.train, tokenizer, examples[split])
    parts.append(
        show.Part(
            _name(name, getattr(config, name)), split, packed_rows(batch),
            "target of the loss", reports[split], limits, (show.filled(batch),),
        )
    )
  return parts


def _name(field: str, cfg: sources.SourceConfig) -> str:
  template = chat.name_of(cfg.chat_template)
  return f"{field} ({cfg.source}, chat template {template})"


def packed_rows(batch: LMBatch) -> Iterator[show.Row]:
  """The rows of a packed batch."""
  for i in range(batch.tokens.shape[0]):
    yield show.Row(
        f"row {i}", batch.tokens[i], batch.segment_ids[i], batch.loss_mask[i],
        num_records=int(batch.segment_ids[i].max()),
    )


def reward_parts(config: reward.Config, skipped_dir: pathlib.Path):
  """Pairs or rankings."""
  tokenizer = models.load_tokenizer(config.init_from)
  reader = sources.Reader(config.seed, skipped_dir, tokenizer)
  parts = []
  for split, name in (("train", "comparisons"), ("heldout", "heldout")):
    source = getattr(config, name)
    batch, _, report = reward.encode(
        config, tokenizer, reader.comparisons(source, split)
    )
    limits = (
        f"max_prompt_length={config.max_prompt_length}, max_completion_length="
        f"{config.max_completion_length}, too_long={config.too_long!r}"
    )
    parts.append(
        show.Part(
            _name(name, source), split,
            judged_rows(batch, config.max_prompt_length),
            "completion, scored at its last token", report, limits,
        )
    )
  return tokenizer, parts


def judged_rows(batch, boundary: int) -> Iterator[show.Row]:
  """The sequences of pairs or rankings; completions start at `boundary`."""
  in_completion = np.arange(batch.tokens.shape[2]) >= boundary
  for i in range(batch.tokens.shape[0]):
    # Others fill a shorter ranking up.
    real = np.flatnonzero(batch.attention_mask[i].any(axis=1))
    for k in real:
      mask = batch.attention_mask[i, k]
      if isinstance(batch, RankingBatch):
        what = f"ranking {i}, weight {batch.weight[i]:g}: rank "
        what += str(batch.ranks[i, k])
      else:
        what = f"pair {i}, weight {batch.weight[i]:g}, margin "
        what += f"{batch.margin[i]:g}: {('chosen', 'rejected')[k]}"
      last = int(np.flatnonzero(mask)[-1])
      yield show.Row(
          f"{what}, scored at column {last}", batch.tokens[i, k], mask,
          mask * in_completion, num_records=int(k == real[-1]),
      )


def ppo_parts(config: ppo.Config, skipped_dir: pathlib.Path):
  """Prompts, and documents with PTX."""
  tokenizer = models.load_tokenizer(config.init_from)
  reader = sources.Reader(config.seed, skipped_dir, tokenizer)
  samples, parts = config.samples, []
  limits = (
      f"samples.max_prompt_length={samples.max_prompt_length},"
      f" samples.too_long={samples.too_long!r}"
  )
  stops = "".join(f", {x!r} after {samples.stop_after} tokens"
                  for x in samples.stop_tokens)
  ends = ", ".join(repr(tokenizer.piece(x)) for x in tokenizer.eos_ids)
  note = (
      f"completions have at most {samples.max_completion_length} tokens and end"
      f" at {ends}{stops}"
  )
  for split, name in (("train", "prompts"), ("heldout", "heldout_prompts")):
    source = getattr(config, name)
    batch, report = evaluator.count_prompts(
        reader.prompts(source, split), tokenizer, samples
    )
    parts.append(
        show.Part(
            _name(name, source), split, prompt_rows(batch), "", report, limits,
            (note,) if split == "train" else (),
        )
    )
  documents = ppo.make_ptx_rows(config, reader)
  if documents is not None:
    parts.append(
        show.Part(
            _name("ptx_documents", config.ptx_documents), "train",
            packed_rows(documents), "target of the loss", None, "",
            (show.filled(documents),),
        )
    )
  return tokenizer, parts


def prompt_rows(batch: PromptBatch) -> Iterator[show.Row]:
  """Prompts, nothing of which is a target."""
  for i, place in enumerate(batch.index):
    mask = batch.prompt_mask[i]
    yield show.Row(
        f"prompt {place}", batch.prompts[i], mask, np.zeros_like(mask),
        num_records=1,
    )


_PARTS: dict[str, Callable[..., tuple[Tokenizer, list[show.Part]]]] = {
    "pretrain": pretrain_parts,
    "sft": sft_parts,
    "reward": reward_parts,
    "ppo": ppo_parts,
}


if __name__ == "__main__":
  app.run(main, flags_parser=cli.parse_flags)
