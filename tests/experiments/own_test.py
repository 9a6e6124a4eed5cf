"""configs/own.py: the whole pipeline on a user's three files."""

import json

from ml_collections import ConfigDict
import pytest

from configs import own
from experiments import rlhf
from experiments.harness.config import from_config
from tests.experiments import tiny

VOCAB_SIZE = 270  # so little text has no more


def write_folder(folder):
  folder.mkdir()
  facts = [f"The {i}th number is {i} and not {i + 1}." for i in range(120)]
  (folder / "text.txt").write_text("\n\n".join(facts))
  rows = {
      "demonstrations": [
          {
              "messages": [
                  {"role": "user", "content": f"Which is number {i}?"},
                  {"role": "assistant", "content": f"It is {i}."},
              ]
          }
          for i in range(40)
      ],
      "comparisons": [
          {
              "prompt": f"Which is number {i}?\n\n",
              "chosen": f"It is {i}.",
              "rejected": "Who knows?",
          }
          for i in range(40)
      ],
  }
  for name, each in rows.items():
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in each)
    )


def make_tiny(config: ConfigDict) -> ConfigDict:
  config.pretrain.tokenizer.vocab_size = VOCAB_SIZE
  config.pretrain.model.update(
      vocab_size=VOCAB_SIZE, num_layers=1, width=16, head_dim=4, ff_dim=32,
      scan_unroll=1,
  )
  for name in ("pretrain", "sft"):
    train = config[name].train
    train.update(batch_size=4, seq_len=64)
    tiny.shorten(train.samples)
    train.optimizer.warmup_steps = 0
    train.loop.update(tiny.loop())
  config.reward.update(
      max_prompt_length=tiny.PROMPT_LENGTH, max_completion_length=32
  )
  config.reward.batch_size = 4
  config.reward.optimizer.warmup_steps = 0
  config.reward.loop.update(tiny.loop())
  config.ppo.rollout_batch_size = 4
  config.ppo.loop.update(tiny.loop())
  config.evaluate.batch_size = 4
  for name in ("reward", "ppo", "evaluate"):
    tiny.shorten(config[name].samples)
  return config


def test_three_files_make_a_run(tmp_path, capsys):
  write_folder(tmp_path / "mine")
  config = make_tiny(own.get_config(str(tmp_path / "mine")))
  rlhf.run(from_config(rlhf.Config, config), str(tmp_path / "run"))
  told = capsys.readouterr().out
  assert "The reward model's score on 4 held-out prompts" in told
  rows = tiny.read_jsonl(tmp_path / "run/evaluate/completions.jsonl")
  assert {row["policy"] for row in rows} == {"base", "sft", "ppo"}
  assert {row["prompt"].strip() for row in rows} == {
      f"Which is number {i}?" for i in (9, 19, 29, 39)
  }


def test_the_folder_must_be_named():
  with pytest.raises(ValueError, match=r"configs/own.py:FOLDER"):
    own.get_config()
