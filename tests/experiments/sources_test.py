"""A config's source string made into records, and what is wrong told."""

import dataclasses
import gzip
import json
import re
import zipfile

import pytest

from experiments.harness import models, sources
from rlhf_jax.data import chat, publishers
from rlhf_jax.data.readers import ReadError
from rlhf_jax.data.records import Comparison, Prompt, Ranking
from rlhf_jax.data.special_tokens import RENDERED, mark


@pytest.fixture
def reader(tmp_path):
  return sources.Reader(seed=0, skipped_dir=tmp_path / "skipped")


def source(name, limit=0, on_error="raise", use="share"):
  return sources.SourceConfig(
      source=str(name), limit=limit, on_error=on_error, use=use
  )


def write_jsonl(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def prompt_rows(num):
  return [{"prompt": f"question {i}"} for i in range(num)]


# ---- The embedded world ------------------------------------------------------


def test_the_world_gives_exactly_what_is_asked_for(reader):
  for read in (reader.documents, reader.demonstrations, reader.prompts):
    for split in ("train", "heldout"):
      assert len(read(source(sources.ASSISTANT, 30), split)) == 30


@pytest.mark.parametrize("what", ["documents", "demonstrations", "prompts"])
def test_the_world_depends_on_the_seed_and_splits_differ(tmp_path, what):
  cfg = source(sources.ASSISTANT, 50)
  read = lambda seed, split: getattr(
      sources.Reader(seed, tmp_path), what
  )(cfg, split)
  assert read(0, "train") == read(0, "train")
  assert read(0, "train") != read(1, "train")
  assert read(0, "train") != read(0, "heldout")


def test_heldout_prompts_of_the_world_are_no_training_prompts(reader):
  cfg = source(sources.ASSISTANT, 200)
  train, heldout = (
      {x.prompt for x in reader.prompts(cfg, split)}
      for split in ("train", "heldout")
  )
  assert not train & heldout


def test_a_world_without_limit_is_refused():
  with pytest.raises(ValueError, match="world:assistant has no end"):
    source(sources.ASSISTANT)


# ---- Files -------------------------------------------------------------------


@pytest.mark.parametrize(
    "num, num_heldout", [(2, 1), (10, 1), (11, 2), (20, 2)]
)
def test_every_tenth_record_is_held_out(reader, tmp_path, num, num_heldout):
  path = write_jsonl(tmp_path / "p.jsonl", prompt_rows(num))
  train = reader.prompts(source(path), "train")
  heldout = reader.prompts(source(path), "heldout")
  assert len(heldout) == num_heldout
  assert {x.prompt for x in train} | {x.prompt for x in heldout} == {
      f"question {i}" for i in range(num)
  }
  assert len(train) + len(heldout) == num


def test_what_opens_alike_is_on_one_side(reader, tmp_path):
  # A dialogue at two lengths, far apart in the file, and a repeated pair.
  turn = "\n\nHuman: {}\n\nAssistant:"
  rows = [
      {"prompt": turn.format(i % 30), "chosen": f" {i}", "rejected": " no"}
      for i in range(60)
  ]
  for i in range(30):
    rows[i]["prompt"] += " a" + turn.format("more")
  path = write_jsonl(tmp_path / "comparisons.jsonl", rows)
  first_turns = {}
  for split in ("train", "heldout"):
    found = reader.comparisons(source(path), split)
    first_turns[split] = {
        x.prompt.partition("\n\nAssistant:")[0] for x in found
    }
    assert len(found) == 2 * len(first_turns[split])
  assert len(first_turns["train"]) == 27 and len(first_turns["heldout"]) == 3
  assert first_turns["train"].isdisjoint(first_turns["heldout"])


def test_texts_that_begin_alike_are_on_one_side(reader, tmp_path):
  stories = tmp_path / "stories.txt"
  stories.write_text("".join(f"Day {i % 20}. It was {i}.\n" for i in range(40)))
  cfg = source(f"stories:{stories}")
  heldout = {x.prompt for x in reader.prompts(cfg, "heldout")}
  assert len(heldout) == 2
  for read in (reader.documents, reader.demonstrations):
    train = str(read(cfg, "train"))
    assert not any(opening in train for opening in heldout)


def test_a_limit_takes_the_first(reader, tmp_path):
  path = write_jsonl(tmp_path / "p.jsonl", prompt_rows(20))
  train = reader.prompts(source(path), "train")
  heldout = reader.prompts(source(path), "heldout")
  assert reader.prompts(source(path, limit=3), "train") == train[:3]
  assert reader.prompts(source(path, limit=1), "heldout") == heldout[:1]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_file_that_was_divided_already_is_used_whole(
    reader, tmp_path, split, caplog
):
  path = write_jsonl(tmp_path / "p.jsonl", prompt_rows(20))
  with caplog.at_level("INFO", logger="absl"):
    found = reader.prompts(source(path, use="all"), split)
    assert [x.prompt for x in found] == [x["prompt"] for x in prompt_rows(20)]
    assert reader.prompts(source(path, 3, use="all"), split) == found[:3]
    reader.prompts(source(path), split)
  share = 18 if split == "train" else 2
  assert [x.getMessage().split(": ")[-1] for x in caplog.records] == [
      f"{n} of 20 records used" for n in (20, 3, share)
  ]


def test_globs_and_gzip_are_read(reader, tmp_path):
  write_jsonl(tmp_path / "a.jsonl", prompt_rows(10))
  zipped = "".join(json.dumps(row) + "\n" for row in prompt_rows(10))
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(zipped.encode()))
  found = reader.prompts(source(tmp_path / "*.jsonl*", use="all"), "train")
  assert len(found) == 20


def test_comparisons_and_rankings_are_told_apart_by_fields(reader, tmp_path):
  pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
  ranking = {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}
  pairs = write_jsonl(tmp_path / "no_ranking.jsonl", [pair])
  ranks = write_jsonl(tmp_path / "labels.jsonl", [ranking])
  read = lambda path: reader.comparisons(source(path, use="all"), "train")[0]
  assert isinstance(read(pairs), Comparison)
  assert isinstance(read(ranks), Ranking)


def test_stories_and_text_have_documents_and_first_sentences(reader, tmp_path):
  stories = tmp_path / "stories.txt"
  stories.write_text("".join(f"Day {i}. It rained.\n\nMore.\n"
                             for i in range(20)))
  name = f"stories:{stories}"
  documents = reader.documents(source(name, use="all"), "train")
  assert documents[0] == "Day 0. It rained.\n\nMore."
  assert reader.prompts(source(name, use="all"), "train")[3] == Prompt("Day 3.")
  spans = reader.demonstrations(source(name, use="all"), "train")[0].spans
  assert spans == ((documents[0], True),)

  text = tmp_path / "text.txt"
  text.write_text("One\nline.\n \nTwo.\n\n\nThree.")
  found = reader.documents(source(f"text:{text}", use="all"), "train")
  assert found == ["One\nline.", "Two.", "Three."]


def test_polarity_halves_and_splits_are_disjoint(reader, tmp_path):
  path = tmp_path / "polarity.zip"
  with zipfile.ZipFile(path, "w") as z:
    for side in ("pos", "neg"):
      lines = "".join(f"{side} film number {i} .\n" for i in range(200))
      z.writestr(f"rt-polarity.{side}", lines)
  parts = [
      reader.comparisons(source(f"polarity:{path}:{half}"), split)
      for half in (0, 1)
      for split in ("train", "heldout")
  ]
  texts = [{t for x in part for t in (x.chosen, x.rejected)} for part in parts]
  assert all(texts)
  assert sum(map(len, texts)) == len(set().union(*texts))
  whole = reader.comparisons(source(f"polarity:{path}:1", use="all"), "train")
  assert len(whole) == len(parts[2]) + len(parts[3])
  for wrong in ("2", "", "train"):
    with pytest.raises(ReadError, match="polarity:ZIP:0 or polarity:ZIP:1"):
      reader.comparisons(source(f"polarity:{path}:{wrong}"), "train")


# ---- What goes wrong ---------------------------------------------------------


def test_an_environment_variable_that_is_not_set_is_named(reader, monkeypatch):
  monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
  cfg = source("stories:${NO_SUCH_FOLDER}/x.txt")
  for read in (reader.documents, reader.prompts, reader.demonstrations):
    with pytest.raises(FileNotFoundError, match="NO_SUCH_FOLDER is not set"):
      read(cfg, "train")
  monkeypatch.setenv("NO_SUCH_FOLDER", "")
  with pytest.raises(FileNotFoundError, match="NO_SUCH_FOLDER"):
    reader.documents(cfg, "train")


def test_an_environment_variable_is_put_in(monkeypatch):
  monkeypatch.setenv("SOME_FOLDER", "/x")
  assert models.expand("a:${SOME_FOLDER}/b:${SOME_FOLDER}") == "a:/x/b:/x"
  assert models.expand("$SOME_FOLDER and $100") == "$SOME_FOLDER and $100"


@pytest.mark.parametrize("name", ["corpus.txt", "", "storys:x.txt"])
def test_text_without_its_kind_is_told_which_there_are(reader, name):
  with pytest.raises(ReadError, match="stories:PATH or text:PATH"):
    reader.documents(source(name), "train")


def test_missing_and_empty_files_are_named(reader, tmp_path):
  (tmp_path / "prompts.jsonl").write_text("")
  (tmp_path / "blank.txt").write_text(" \n\n ")
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ReadError, match=r"prompts.jsonl.*no records"):
    reader.prompts(source(tmp_path / "prompts.jsonl"), "train")
  with pytest.raises(ReadError, match=r"Did you mean .*prompts.jsonl"):
    reader.prompts(source(tmp_path / "promts.jsonl"), "train")
  with pytest.raises(ReadError, match="holds no text"):
    reader.documents(source(f"text:{tmp_path / 'blank.txt'}"), "train")
  with pytest.raises(ReadError, match="not UTF-8"):
    reader.documents(source(f"text:{tmp_path / 'latin.txt'}"), "train")
  with pytest.raises(FileNotFoundError, match="gone.txt"):
    reader.documents(source(f"text:{tmp_path / 'gone.txt'}"), "train")


def test_one_record_cannot_be_divided(reader, tmp_path):
  path = write_jsonl(tmp_path / "one.jsonl", prompt_rows(1))
  with pytest.raises(ReadError, match="one prompt alone"):
    reader.prompts(source(path), "train")
  assert len(reader.prompts(source(path, use="all"), "train")) == 1


def _damaged(path, num_good, num_bad):
  write_jsonl(path, [*prompt_rows(num_good), *[{"promt": 1}] * num_bad])
  return path


def test_bad_records_raise_or_are_written_down(reader, tmp_path):
  path = _damaged(tmp_path / "p.jsonl", 99, 1)
  with pytest.raises(ReadError, match=r"p\.jsonl:100"):
    reader.prompts(source(path), "train")
  found = reader.prompts(source(path, on_error="skip", use="all"), "train")
  assert len(found) == 99
  (skipped,) = (tmp_path / "skipped").iterdir()
  (row,) = map(json.loads, skipped.read_text().splitlines())
  assert row["line"] == 100 and row["file"] == str(path)


def test_more_than_five_percent_skipped_is_an_error(reader, tmp_path):
  path = _damaged(tmp_path / "p.jsonl", 94, 6)
  with pytest.raises(ReadError, match=r"6 of 100 records skipped.*5\.0%"):
    reader.prompts(source(path, on_error="skip"), "train")
  path = _damaged(tmp_path / "q.jsonl", 95, 5)
  cfg = source(path, on_error="skip", use="all")
  assert len(reader.prompts(cfg, "train")) == 95


def test_skipped_records_of_files_with_one_name_are_kept_apart(
    reader, tmp_path
):
  for folder in ("a", "b"):
    path = _damaged(tmp_path / folder / "p.jsonl", 99, 1)
    reader.prompts(source(path, on_error="skip"), "train")
  assert len(list((tmp_path / "skipped").iterdir())) == 2


# ---- Conversations -----------------------------------------------------------


def test_messages_become_text_by_the_configs_template(reader, tmp_path):
  rows = [
      {
          "messages": [
              {"role": "user", "content": f"hi {i}"},
              {"role": "assistant", "content": "ho"},
          ]
      }
      for i in range(20)
  ]
  path = write_jsonl(tmp_path / "talk.jsonl", rows)
  cfg = dataclasses.replace(source(path, use="all"), chat_template="hh")
  found = reader.demonstrations(cfg, "train")[3]
  assert found.prompt == "\n\nHuman: hi 3\n\nAssistant:"
  assert found.completion == " ho"


def test_open_assistants_trees_are_rankings(reader, tmp_path):
  reply = lambda text, rank: {
      "role": "assistant",
      "text": text,
      "replies": [],
      "rank": rank,
      "deleted": False,
  }
  trees = [
      {
          "prompt": {
              "role": "prompter",
              "text": f"q{i}",
              "replies": [reply("bad", 1), reply("good", 0)],
          }
      }
      for i in range(11)
  ]
  path = write_jsonl(tmp_path / "trees.jsonl", trees)
  cfg = dataclasses.replace(source(f"oasst:{path}"), chat_template="hh")
  train, heldout = (reader.comparisons(cfg, x) for x in ("train", "heldout"))
  assert (len(train), len(heldout)) == (9, 2)
  assert train[0] == Ranking(
      "\n\nHuman: q1\n\nAssistant:", (" bad", " good"), (1, 0)
  )
  marking = chat.Template(
      "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
      "of the test", eos_token="<eos>", special_tokens=("<eos>",),
  )
  found = publishers.read_oasst(path, chat_template=marking)
  assert found[1].prompt == RENDERED + "q1" + mark("<eos>")


@pytest.mark.parametrize("what", ["documents", "demonstrations", "prompts"])
def test_no_text_can_mark_a_special_token(reader, tmp_path, what):
  path = tmp_path / "text.txt"
  path.write_text("a\n\nb \0<eos>\0 c")
  with pytest.raises(ReadError, match="text.txt: NUL character at 5"):
    getattr(reader, what)(source(f"text:{path}", use="all"), "train")


def talk(*texts):
  roles = ("user", "assistant")
  return [
      {"role": roles[i % 2], "content": text} for i, text in enumerate(texts)
  ]


@pytest.mark.parametrize("template", ["plain", "hh"])
def test_a_dialogue_at_two_lengths_is_on_one_side(reader, tmp_path, template):
  short = [{"messages": talk(f"Who is {i}?", "Me.")} for i in range(40)]
  long = [
      {"messages": [*row["messages"], *talk("Sure?", f"Yes, {i}.")]}
      for i, row in enumerate(short)
  ]
  path = write_jsonl(tmp_path / "talk.jsonl", short + long)
  cfg = dataclasses.replace(source(path), chat_template=template)
  train, heldout = (reader.prompts(cfg, x) for x in ("train", "heldout"))
  assert (len(train), len(heldout)) == (72, 8)
  who = lambda found: {re.search(r"Who is (\d+)", x.prompt)[1] for x in found}
  assert who(train).isdisjoint(who(heldout))


@pytest.mark.parametrize("num_preambles", [1, 2])
def test_a_shared_instruction_is_no_origin(reader, tmp_path, num_preambles):
  rows = [
      {"prompt": f"Be {i % num_preambles}.\n\nAssistant: yes\n\nHuman: q{i}?"}
      for i in range(1000)
  ]
  path = write_jsonl(tmp_path / "p.jsonl", rows)
  assert len(reader.prompts(source(path), "heldout")) == 100


def test_what_is_no_record_cannot_be_skipped():
  for name in ("gsm8k:x", "oasst:x", "text:x", "stories:x", "polarity:x:0"):
    with pytest.raises(ValueError, match="on_error='skip' is for files of"):
      source(name, on_error="skip")
