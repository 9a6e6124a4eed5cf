"""Real files, read whole: what is dirty in them is counted, not lost."""

import json

from rlhf_jax.data import encoding, packing, publishers
from rlhf_jax.data.readers import read_records
from rlhf_jax.data.tokenizer import Tokenizer


def test_hh_harmless_is_read_whole(data_dir, tmp_path):
  path = data_dir / "hh_harmless" / "hh_harmless_base_dev.jsonl.gz"
  skipped = tmp_path / "skipped.jsonl"
  found = read_records(
      path, "comparison", on_error="skip", skipped_path=skipped
  )
  lines = [json.loads(line) for line in skipped.read_text().splitlines()]
  assert (len(found), len(lines)) == (1828, 6)
  empty = [x["line"] for x in lines if "empty" in x["reason"]]
  differ = [x["line"] for x in lines if "differ before" in x["reason"]]
  assert empty == [70, 737]
  assert differ == [980, 1333, 1546, 1613]
  for record in found:
    assert record.prompt.startswith("\n\nHuman:")
    assert record.prompt.endswith("\n\nAssistant:")
    assert "\n\nAssistant:" not in record.chosen + record.rejected


def test_hh_harmless_lengths_are_counted(data_dir, tmp_path):
  path = data_dir / "hh_harmless" / "hh_harmless_base_dev.jsonl.gz"
  found = read_records(
      path, "comparison", on_error="skip", skipped_path=tmp_path / "skipped"
  )
  tokenizer = Tokenizer.from_sentencepiece(
      data_dir / "stories260K" / "tok512.model"
  )
  batch, report = encoding.encode_comparisons(
      found, tokenizer, max_prompt_length=300, max_completion_length=212,
      policy="truncate_prompt_left",
  )
  assert report.num_records == 1828
  assert report.num_kept == len(batch.weight)
  row = batch.tokens[0, 0][batch.attention_mask[0, 0] == 1]
  assert row[0] == tokenizer.bos_id and row[-1] == tokenizer.eos_id
  whole = found[0].prompt + found[0].chosen
  assert whole.endswith(tokenizer.decode(row))


def test_gsm8k_is_read_and_packed_whole(data_dir):
  found = publishers.read_gsm8k(data_dir / "gsm8k" / "train.jsonl")
  assert len(found) == 7473
  tokenizer = Tokenizer.train_byte_level_bpe(
      (record.completion for record in found[:500]), 1024
  )
  examples, report = encoding.encode_demonstrations(
      found, tokenizer, max_length=512, policy="drop", train_on_prompt=False
  )
  batch = packing.pack(examples, 512)
  assert (batch.segment_ids > 0).sum() == sum(len(ids) for ids, _ in examples)
  assert report.num_kept + report.num_dropped == 7473


def test_sentence_polarity_is_read_whole(data_dir):
  path = data_dir / "sentence_polarity" / "sentence_polarity.zip"
  counts = [
      {split: len(rows) for split, rows in publishers.read_sentence_polarity(
          path, half=half, seed=0
      ).items()}
      for half in (0, 1)
  ]
  assert counts == [
      {"train": 2372, "heldout": 273}, {"train": 2391, "heldout": 253},
  ]


def test_oasst_is_read_whole(data_dir):
  found = publishers.read_oasst(
      data_dir / "oasst_en100" / "en_100_tree.jsonl"
  )
  assert len(found) == 212
  assert all(len(record.ranks) >= 2 for record in found)
  assert all(r.prompt.endswith("\n\nAssistant:") for r in found)
