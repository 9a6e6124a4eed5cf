"""What is printed of a stage's input is what the stage reads."""

import json

from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import ppo as ppo_config
from configs import pretrain as pretrain_config
from configs import reward as reward_config
from configs import rlhf as rlhf_config
from configs import sft as sft_config
from configs import train_tokenizer as tokenizer_config
from experiments import inspect, sft
from experiments.harness import cli, language_model, models, show
from experiments.harness.config import from_config
from rlhf_jax.data import chat, readers
from rlhf_jax.data.tokenizer import Tokenizer
from tests.experiments import tiny

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {i} and <|im_end|>"},
            {"role": "assistant", "content": f"{i}."},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": f"{i} {i}." + more},
        ]
    }
    for i in range(20)
    for more in [" x" * 60 if i == 3 else ""]
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """What looks like a stage's folder: only its tokenizer is read."""
  folder = tmp_path_factory.mktemp("stage")
  tokenizer = Tokenizer.train_byte_level_bpe(
      ["say 1 and 2 again."] * 4, 280, tokenizer_config.CHAT_TOKENS,
      tokenizer_config.CHAT_TEMPLATE,
  )
  tokenizer.save(folder / "tokenizer")
  with (folder / "talks.jsonl").open("w") as f:
    f.writelines(json.dumps(x) + "\n" for x in TALKS)
  return folder


def sft_settings(place, **changes):
  config = sft_config.get_config("smoke")
  config.init_from = str(place)
  for name in ("demonstrations", "heldout_demonstrations"):
    config[name].update(
        source=str(place / "talks.jsonl"), limit=0, chat_template="tokenizer",
        use="all", **changes,
    )
  return config


def printed(config, tmp_path, num_records=1, split="train") -> str:
  name, checked = inspect.find_stage(config, "", "")
  tokenizer, parts = inspect._PARTS[name](checked, tmp_path)
  painter = show.Painter(tokenizer, color=False, table=False)
  found = [show.describe(tokenizer)]
  for part in parts:
    if part.split == split:
      found += show.shown(part, painter, num_records)
    found += show.counts(part)
  return "\n".join([*found, *show.skipped(tmp_path)])


def joined(text: str) -> str:
  return text.replace("\n    │", "").replace("│", "")


def test_a_chat_with_its_targets(place, tmp_path):
  text = printed(sft_settings(place), tmp_path)
  assert "end '<eos>' (1), '<|im_end|>' (4)" in text
  assert "a chat template" in text
  # What the user spells is text, what the template writes is a token.
  assert "│<│|│i│m│_│e│nd│|│>│<|im_end|>│⏎" in text
  assert "[[0.<|im_end|>]]⏎<|im_start|>user⏎Again.<|im_end|>⏎" in joined(text)
  assert "<|im_start|>assistant⏎[[0 0.<|im_end|>]]" in joined(text)
  assert "<bos>" not in text.partition("row 0")[2]  # nor does the template
  assert "19 of 20 records kept, 1 dropped" in text
  assert (
      "dropped as too long (train.seq_len=128, too_long='drop'): records 3"
      in text
  )


def test_rows_are_those_that_the_stage_trains_on(
    place, tmp_path, monkeypatch
):
  settings = sft_settings(place)
  config = from_config(sft.Config, settings)
  seen = {}

  def train(name, out, cfg, policy, examples, *others):
    for split in examples:
      seen[split] = language_model.pack(cfg, policy.tokenizer, examples[split])

  monkeypatch.setattr(language_model, "train", train)
  monkeypatch.setattr(
      models, "load_policy",
      lambda place, *_: models.Policy(None, None, models.load_tokenizer(place)),
  )
  sft.run(config, str(tmp_path / "sft"))
  _, parts = inspect.sft_parts(config, tmp_path)
  for part in parts:
    rows = list(part.rows)
    batch = seen[part.split]
    np.testing.assert_array_equal([x.tokens for x in rows], batch.tokens)
    np.testing.assert_array_equal([x.marked for x in rows], batch.loss_mask)
    np.testing.assert_array_equal(
        [x.segment_ids for x in rows], batch.segment_ids
    )


@pytest.mark.parametrize("module", [
    pretrain_config, sft_config, reward_config, ppo_config
])
def test_a_stage_is_told_by_its_config(module):
  name = module.__name__.rpartition(".")[2]
  config = module.get_config("smoke")
  assert inspect.find_stage(config, "", "")[0] == name


def test_a_stage_of_a_whole_run(tmp_path):
  config = rlhf_config.get_config("smoke")
  name, found = inspect.find_stage(config, "ppo", str(tmp_path))
  assert name == "ppo" and found.init_from == f"{tmp_path.resolve()}/sft"
  with pytest.raises(cli.UserError, match="one of its stages: pretrain, sft"):
    inspect.find_stage(config, "", str(tmp_path))
  with pytest.raises(cli.UserError, match="--workdir: stage sft reads @run/"):
    inspect.find_stage(config, "sft", "")


def test_a_stage_that_the_config_is_not_is_refused():
  config = sft_config.get_config()
  with pytest.raises(cli.UserError, match="that of the single stage sft; le"):
    inspect.find_stage(config, "ppo", "")
  assert inspect.find_stage(config, "sft", "")[0] == "sft"


def test_a_config_is_required():
  done = tiny.inspect()
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "--config" in done.stderr


def test_the_config_of_something_else_is_refused():
  with pytest.raises(cli.UserError, match="none of pretrain, sft, reward, ppo"):
    inspect.find_stage(ConfigDict({"policies": (), "prompts": {}}), "", "")


def test_pretraining_reads_split_documents(tmp_path):
  config = pretrain_config.get_config("smoke")
  config.documents.limit = config.heldout_documents.limit = 20
  config.tokenizer.vocab_size = config.model.vocab_size = 300
  config.train.seq_len = 32
  text = printed(config, tmp_path)
  assert "row 0\n  segment 1: columns 0-" in text
  assert "20 of 20 records kept" in text and "split" in text
  assert "rows of 32 tokens" in text


def test_pairs_show_both_sides_and_where_they_are_scored(place, tmp_path):
  rows = [
      {"prompt": f"Say {i}", "chosen": f" {i}", "rejected": " no"}
      for i in range(4)
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in rows))
  config = reward_config.get_config("smoke")
  config.init_from, config.ref_policy = str(place), ""
  config.comparisons.source = config.heldout.source = str(path)
  text = printed(config, tmp_path / "skipped")
  assert "pair 0, weight 1, margin 0: chosen, scored at column 22" in text
  assert "pair 0, weight 1, margin 0: rejected, scored at column 23" in text
  assert "pair 1" not in text
  assert "[[ 0<eos>]]" in joined(text) and "[[ no<eos>]]" in joined(text)


def test_prompts_and_what_ends_their_completions(place, tmp_path):
  config = ppo_config.get_config("smoke")
  config.init_from = str(place)
  for name in ("prompts", "heldout_prompts"):
    config[name].update(
        source=str(place / "talks.jsonl"), limit=0, use="all",
        chat_template="tokenizer",
    )
  config.samples.max_prompt_length = 100
  text = printed(config, tmp_path, num_records=2)
  # Of each the first answer, and the beginning of the second.
  assert joined(text).count("<|im_start|>assistant⏎") == 4
  assert "[[" not in text
  assert "end at '<eos>', '<|im_end|>'" in text
  assert "prompt 1\n" in text and "prompt 2\n" not in text


def test_skipped_records_are_told(place, tmp_path):
  path = tmp_path / "talks.jsonl"
  lines = [json.dumps(x) for x in TALKS] * 2
  path.write_text("\n".join([*lines, '{"prompt": "x"}']))
  config = sft_settings(place)
  for name in ("demonstrations", "heldout_demonstrations"):
    config[name].update(source=str(path), on_error="skip")
  text = printed(config, tmp_path / "skipped")
  assert f"skipped as bad: 1 records of {path}\n  line 41: " in text
  assert "'completion': missing" in text


def test_what_is_wrong_is_one_error(place, tmp_path):
  read = lambda settings: printed(settings, tmp_path)
  settings = sft_settings(place)
  settings.demonstrations.source = "/no/such.jsonl"
  with pytest.raises(readers.ReadError, match="/no/such.jsonl: no such file"):
    read(settings)
  (tmp_path / "empty.jsonl").touch()
  settings.demonstrations.source = str(tmp_path / "empty.jsonl")
  with pytest.raises(readers.ReadError, match="empty.jsonl: holds no records"):
    read(settings)
  bare = tmp_path / "bare"
  Tokenizer.train_byte_level_bpe(["a"], 260).save(bare / "tokenizer")
  settings = sft_settings(place)
  settings.init_from = str(bare)
  with pytest.raises(chat.ChatTemplateError, match="has no chat template; giv"):
    read(settings)
  settings.init_from = str(tmp_path / "nothing")
  with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
    read(settings)


@pytest.mark.parametrize("choice, no_color, wanted", [
    ("always", "1", True), ("never", "", False), ("auto", "", False),
    ("auto", "1", False),
])
def test_colour_is_for_terminals(monkeypatch, choice, no_color, wanted):
  monkeypatch.setenv("NO_COLOR", no_color)
  assert inspect.use_color(choice) == wanted
  monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
  assert inspect.use_color(choice) == (
      wanted or (choice == "auto" and not no_color)
  )


def test_as_a_user_starts_it(place, tmp_path):
  config = tiny.write_config(tmp_path / "config.py", sft_settings(place))
  flags = [f"--config={config}", "--num_records=1", "--color=always"]
  done = tiny.inspect(*flags)
  assert done.returncode == 0, done.stderr
  assert "\033[1;32m<|im_end|>\033[0m" in done.stdout
  assert "19 of 20 records kept" in done.stdout
  done = tiny.inspect(*flags, "--config.demonstrations.chat_template=plane")
  tiny.assert_one_message(done, "no chat template is called 'plane'")
