import json
import subprocess
import sys
import zipfile

import pytest

from rlhf_jax.data import builders, prepared, publishers
from rlhf_jax.data.readers import ReadError, read_records
from rlhf_jax.data.records import (
    Comparison,
    Demonstration,
    Prompt,
    Ranking,
    Rating,
)

RECORDS = {
    "demonstration": [
        Demonstration((("p\u2603", False), ("c", True))),
        Demonstration((("a", False), ("b", True), ("c", False), ("d", True))),
        Demonstration((("alone", True),)),
    ],
    "comparison": [
        Comparison("", "a", "b"),
        Comparison("p", "a\n", "b", "me", "web", 0.5, -2.0),
    ],
    "ranking": [
        Ranking("p", ("a", "b"), (0, 1)),
        Ranking("p", ("a", "b", "c"), (2, 0, 2), "me", None, 0.25),
    ],
    "rating": [Rating("p", "c", -1.5), Rating("", "d", 3.0)],
    "prompt": [Prompt(f"prompt {i}") for i in range(40)],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError(f"something asked the network: {args}")
  monkeypatch.setattr("socket.socket.connect", refuse)
  monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("kind", RECORDS)
def test_prepared_records_come_back_unchanged(tmp_path, kind):
  rows = RECORDS[kind]
  by_split = {"train": rows, "heldout": rows[:1]}
  folder = builders.write_records(by_split, kind, "mine", tmp_path)
  assert list(folder.glob("*.array_record*"))
  found = read_records("tfds:mine:train", kind, data_dir=tmp_path)
  assert found == rows
  found = read_records("tfds:mine", kind, split="heldout", data_dir=tmp_path)
  assert found == rows[:1]


def test_random_access(tmp_path):
  rows = RECORDS["prompt"]
  builders.write_records({"train": rows}, "prompt", "mine", tmp_path)
  split = prepared.open_split("mine", None, "prompt", tmp_path)
  assert (split[17], split[-1], len(split)) == (rows[17], rows[-1], 40)
  assert split[3] == rows[3]
  with pytest.raises(IndexError):
    split[40]


def test_prepare_validates_files_and_lists_what_it_skips(tmp_path):
  good = [{"prompt": f"p{i}"} for i in range(30)]
  source = tmp_path / "x.jsonl"
  source.write_text("\n".join(map(json.dumps, [*good, {"prompt": ""}])))
  with pytest.raises(ReadError, match="x.jsonl:31: field 'prompt'"):
    builders.prepare({"train": source}, "prompt", "mine", tmp_path / "tfds")
  builders.prepare(
      {"train": source}, "prompt", "mine", tmp_path / "tfds", on_error="skip",
      skipped_dir=tmp_path / "skipped",
  )
  assert len((tmp_path / "skipped" / "train.jsonl").read_text()) > 0
  found = read_records("tfds:mine", "prompt", data_dir=tmp_path / "tfds")
  assert found == [Prompt(f"p{i}") for i in range(30)]


def test_messages_are_stored_as_rendered(tmp_path):
  talk = {"messages": [
      {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
  ]}
  source = tmp_path / "x.jsonl"
  source.write_text(json.dumps(talk))
  builders.prepare(
      {"train": source}, "demonstration", "talk", tmp_path, chat_template="hh"
  )
  found = read_records("tfds:talk", "demonstration", data_dir=tmp_path)
  assert found == [
      Demonstration((("\n\nHuman: hi\n\nAssistant:", False), (" yo", True)))
  ]


def test_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  builders.write_records(
      {"train": RECORDS["rating"]}, "rating", "mine", tmp_path, config="small"
  )
  assert read_records("tfds:mine/small:train", "rating") == RECORDS["rating"]


def test_what_is_not_there_is_named(tmp_path):
  rows = {"train": RECORDS["prompt"], "test": RECORDS["prompt"]}
  builders.write_records(rows, "prompt", "mine", tmp_path, config="small")
  for source, kind, message in [
      ("tfds:other", "prompt", "no such prepared dataset"),
      ("tfds:mine", "prompt", "only small. Add the config"),
      ("tfds:mine/small", "prompt", "no split was given; .* test, train"),
      ("tfds:mine/small:dev", "prompt", "no split 'dev'; .* test, train"),
      ("tfds:mine/small:train", "rating", "does not hold rating records"),
  ]:
    with pytest.raises(ReadError, match=message):
      read_records(source, kind, data_dir=tmp_path)
  with pytest.raises(ReadError, match="also given as 'test'"):
    read_records("tfds:mine:train", "prompt", split="test", data_dir=tmp_path)


def test_killed_preparation_is_not_mistaken_for_a_dataset(tmp_path):
  folder = tmp_path / "mine" / "incomplete.AB12_1.0.0"
  folder.mkdir(parents=True)
  (folder / "dataset_info.json").write_text("{}")
  with pytest.raises(ReadError, match="no prepared dataset here"):
    read_records("tfds:mine", "prompt", data_dir=tmp_path)


def test_writing_is_refused_where_it_would_lose_something(tmp_path):
  rows = {"train": RECORDS["prompt"]}
  builders.write_records(rows, "prompt", "mine", tmp_path)
  for by_split, name, message in [
      (rows, "mine", "exists already"),
      (rows, "My-Data", "'My-Data': names of datasets"),
      ({"a/b": rows["train"]}, "other", "'a/b': names of"),
      ({"all": rows["train"]}, "other", "'all' is TFDS's own name"),
      ({"train": []}, "other", "split 'train' holds no records"),
      ({}, "other", "no splits"),
  ]:
    with pytest.raises(prepared.PreparedError, match=message):
      builders.write_records(by_split, "prompt", name, tmp_path)


def test_tensorflow_and_torch_are_not_needed(tmp_path):
  program = f"""
import sys
class Hide:
  # As if the two were not installed, whether they are or not.
  def __init__(self, finder):
    self.finder = finder
  def __getattr__(self, name):
    return getattr(self.finder, name)
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "torch"):
      return None
    return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
from rlhf_jax.data import builders, readers
from rlhf_jax.data.records import Prompt
rows = [Prompt("a"), Prompt("b")]
builders.write_records({{"train": rows}}, "prompt", "mine", {str(tmp_path)!r})
found = readers.read_records("tfds:mine", "prompt", data_dir={str(tmp_path)!r})
assert found == rows
"""
  done = subprocess.run(
      [sys.executable, "-c", program], timeout=120, capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stderr


# --- files as publishers ship them --------------------------------------------


def test_hh_builder(tmp_path):
  head = "\n\nHuman: q\n\nAssistant:"
  lines = [
      {"chosen": f"{head} good {i}", "rejected": f"{head} bad"}
      for i in range(25)
  ]
  lines.append({"chosen": f"{head} ", "rejected": f"{head} bad"})
  source = tmp_path / "train.jsonl"
  source.write_text("\n".join(map(json.dumps, lines)))
  builders.prepare_hh(
      {"train": source}, tmp_path, config="tiny", skipped_dir=tmp_path / "s"
  )
  found = read_records("tfds:hh/tiny:train", "comparison", data_dir=tmp_path)
  assert len(found) == 25
  assert found[3] == Comparison(head, " good 3", " bad")
  assert "turn is empty" in (tmp_path / "s" / "train.jsonl").read_text()


def test_gsm8k_builder(tmp_path):
  source = tmp_path / "train.jsonl"
  row = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
  source.write_text(json.dumps(row))
  builders.prepare_gsm8k({"train": source}, tmp_path)
  found = read_records("tfds:gsm8k", "demonstration", data_dir=tmp_path)
  assert found[0].prompt == "Question: 1+1?\nAnswer:"
  assert found[0].completion == " It is <<1+1=2>>2.\n#### 2"
  source.write_text(json.dumps(row | {"answer": "2"}))
  with pytest.raises(ReadError, match=":1: field 'answer': does not end"):
    publishers.read_gsm8k(source)


def polarity_zip(path, num=200):
  with zipfile.ZipFile(path, "w") as archive:
    for end, word in ((".pos", "fine"), (".neg", "dull")):
      lines = [f"a {word} film , take {i} \x85 caf\xe9 " for i in range(num)]
      text = "\n".join([*lines, lines[0], "it is a film ."])
      archive.writestr(f"x/rt-polarity{end}", text.encode("latin-1"))
  return path


def test_sentence_polarity_halves_and_splits_share_no_sentence(tmp_path):
  path = polarity_zip(tmp_path / "p.zip")
  seen: set[str] = set()
  for half, seed in ((0, 1), (1, 2)):
    found = publishers.read_sentence_polarity(path, half=half, seed=seed)
    for rows in found.values():
      assert rows and all("fine" in r.chosen for r in rows)
      assert all("dull" in r.rejected and r.prompt == "" for r in rows)
      mine = {text for r in rows for text in (r.chosen, r.rejected)}
      assert len(mine) == 2 * len(rows)
      assert not mine & seen
      seen |= mine
  # What is both positive and negative tells nothing.
  assert "it is a film ." not in seen
  assert len(seen) > 300


def test_sentence_polarity_pairing_follows_the_seed(tmp_path):
  path = polarity_zip(tmp_path / "p.zip")
  read = publishers.read_sentence_polarity
  first = read(path, half=0, seed=1)
  assert first == read(path, half=0, seed=1)
  assert first != read(path, half=0, seed=2)
  builders.prepare_sentence_polarity(path, tmp_path, half=0, seed=1)
  name = "tfds:sentence_polarity/half0_seed1:heldout"
  found = read_records(name, "comparison", data_dir=tmp_path)
  assert found == first["heldout"]
  with pytest.raises(ValueError, match="half=2"):
    read(path, half=2, seed=0)
  (tmp_path / "bad.zip").write_bytes(b"PK")
  with pytest.raises(ReadError, match="bad.zip"):
    read(tmp_path / "bad.zip", half=0, seed=0)


def test_oasst_trees_become_rankings(tmp_path):
  def message(role, text, rank, *replies, deleted=False):
    return dict(role=role, text=text, rank=rank, deleted=deleted,
                replies=list(replies))
  tree = message(
      "prompter", "q", None,
      message("assistant", "good", 0, message(
          "prompter", "more", None,
          message("assistant", "x", 1), message("assistant", "y", 0),
      )),
      message("assistant", "bad", 1),
      message("assistant", "gone", 2, deleted=True),
      message("assistant", "unranked", None),
  )
  path = tmp_path / "t.jsonl"
  path.write_text(json.dumps({"prompt": tree}))
  head = "\n\nHuman: q\n\nAssistant:"
  longer = head + " good\n\nHuman: more\n\nAssistant:"
  assert publishers.read_oasst(path) == [
      Ranking(head, (" good", " bad"), (0, 1)),
      Ranking(longer, (" x", " y"), (1, 0)),
  ]
  path.write_text(json.dumps({"prompt": {"role": "prompter"}}))
  with pytest.raises(ReadError, match="t.jsonl:1: not a tree"):
    publishers.read_oasst(path)
