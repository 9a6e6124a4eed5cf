from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.data import encoding
from rlhf_jax.data.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  validate_record,
)
from rlhf_jax.data.special_tokens import mark
from rlhf_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_byte_level_bpe(["abc abc abd"] * 4, 262)
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id

text = st.text("abc ", max_size=12)
nonempty = st.text("abc ", min_size=1, max_size=12)


def shown(prompt: str, completion: str) -> Demonstration:
  spans = ((prompt, False),) if prompt else ()
  return Demonstration((*spans, (completion, True)))


def real(tokens, mask) -> list[int]:
  return tokens[mask == 1].tolist()


def test_demonstration_layout_and_loss_mask():
  rows = [shown("ab", "c")]
  (example,), _ = encoding.encode_demonstrations(
      rows, TOKENIZER, max_length=20, policy="error", train_on_prompt=False
  )
  prompt, completion = TOKENIZER.encode("ab"), TOKENIZER.encode("c")
  assert example[0] == [BOS, *prompt, *completion, EOS]
  assert example[1] == [0.0] * (1 + len(prompt)) + [1.0] * 2
  (example,), _ = encoding.encode_demonstrations(
      rows, TOKENIZER, max_length=20, policy="error", train_on_prompt=True,
      add_bos=False,
  )
  assert example == ([*prompt, *completion, EOS], [1.0] * len(example[0]))


def test_eos_comes_once_at_the_end_of_a_conversation():
  talk = Demonstration(
      (("a", False), ("b", True), ("c", False), ("a", True))
  )
  (example,), _ = encoding.encode_demonstrations(
      [talk], TOKENIZER, max_length=20, policy="error", train_on_prompt=False
  )
  assert example[0].count(EOS) == 1 and example[0][-1] == EOS
  assert example[1] == [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_bos_is_not_doubled_by_text_that_spells_it():
  (example,), _ = encoding.encode_documents(
      ["<bos>a"], TOKENIZER, max_length=20, policy="error"
  )
  assert example[0].count(BOS) == 1


CHAT = Tokenizer.train_byte_level_bpe(["abc abc abd"] * 4, 262)
TALK = [
    {"role": "user", "content": "a <bos>"},
    {"role": "assistant", "content": "b"},
]
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template, starts", [
    (WITH_BOS, 1),  # the template's own
    (WITH_BOS.removeprefix("{{ bos_token }}"), 0),  # it has another beginning
    ("plain", 1),  # writes no special token: from here
])
def test_bos_comes_once_whoever_writes_it(template, starts):
  template = CHAT.template(template)
  record = validate_record("demonstration", {"messages": TALK}, template)
  (example,), _ = encoding.encode_demonstrations(
      [record], CHAT, max_length=40, policy="error", train_on_prompt=False
  )
  assert example[0].count(BOS) == starts
  assert example[0][:1].count(BOS) == starts
  assert example[0][-1] == EOS and example[0][-2] != EOS
  assert CHAT.decode(example[0]).startswith("a <bos>")
  prompt = validate_record("prompt", {"messages": TALK[:1]}, template)
  batch, _ = encoding.encode_prompts(
      [prompt], CHAT, max_prompt_length=40, policy="error"
  )
  ids = real(batch.prompts[0], batch.prompt_mask[0])
  assert ids == example[0][: len(ids)]
  # A long prompt loses its beginning, but not bos.
  batch, report = encoding.encode_prompts(
      [prompt], CHAT, max_prompt_length=4, policy="truncate_prompt_left"
  )
  assert report.num_truncated == 1
  assert batch.prompts[0].tolist().count(BOS) == starts
  assert batch.prompts[0][0] == BOS or not starts


ANSWER_ENDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "<bos>c"},
    {"role": "assistant", "content": "d"},
]


def prompt_ids(messages, template) -> list[int]:
  record = validate_record("prompt", {"messages": messages}, template)
  batch, _ = encoding.encode_prompts(
      [record], CHAT, max_prompt_length=99, policy="error"
  )
  return real(batch.prompts[0], batch.prompt_mask[0])


@pytest.mark.parametrize("template", [
    ANSWER_ENDS,
    # No token is spelled in the template.
    ANSWER_ENDS.replace("eos_token", "'<' + 'eos' + '>'"),
    "{{ bos_token }}" + ANSWER_ENDS,
])
def test_all_rows_of_a_template_begin_as_transformers_begins_them(
    tmp_path, template
):
  import transformers

  CHAT.export(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  # Theirs reads what people spell: "<bos>" of a message is compared as text.
  said = [x | {"content": x["content"].replace("<bos>", "")} for x in TURNS]
  wanted = lambda messages, **kwargs: theirs.apply_chat_template(
      messages, chat_template=template, return_dict=False, **kwargs
  )
  ours = CHAT.template(template)
  for end in (1, 3):
    ids = prompt_ids(said[:end], ours)
    assert ids == wanted(said[:end], add_generation_prompt=True)
    pair = {"chosen": said[:end + 1], "rejected": said[:end] + [
        {"role": "assistant", "content": "a"}
    ]}
    batch, _ = encoding.encode_comparisons(
        [validate_record("comparison", pair, ours)], CHAT,
        max_prompt_length=99, max_completion_length=9, policy="error",
    )
    for side, messages in enumerate(pair.values()):
      row = real(batch.tokens[0, side], batch.attention_mask[0, side])
      assert row == wanted(messages)[:-1]  # no line break at its end
    (example,), _ = encoding.encode_demonstrations(
        [validate_record("demonstration", {"messages": pair["chosen"]}, ours)],
        CHAT, max_length=99, policy="error", train_on_prompt=False,
    )
    assert example[0] == wanted(pair["chosen"])[:-1]
    assert prompt_ids(TURNS[:end], ours)[:1] == ids[:1]
  assert prompt_ids(said[:1], CHAT.template("hh"))[0] == BOS


@pytest.mark.parametrize("prompt", ["ab", "<bos>ab"])
def test_a_prompt_that_spells_bos_at_its_beginning_has_it_once(prompt):
  wanted = [BOS, *TOKENIZER.encode("ab")]
  batch, _ = encoding.encode_prompts(
      [Prompt(prompt)], TOKENIZER, max_prompt_length=12, policy="error"
  )
  assert real(batch.prompts[0], batch.prompt_mask[0]) == wanted
  (example,), _ = encoding.encode_demonstrations(
      [shown(prompt, "c")], TOKENIZER, max_length=12, policy="error",
      train_on_prompt=False,
  )
  assert example[0] == [*wanted, *TOKENIZER.encode("c"), EOS]
  pairs, _ = encoding.encode_comparisons(
      [Comparison(prompt, "a", "b")], TOKENIZER, max_prompt_length=12,
      max_completion_length=4, policy="error",
  )
  row = pairs.tokens[0, 0][pairs.attention_mask[0, 0] == 1].tolist()
  assert row == [*wanted, *TOKENIZER.encode("a"), EOS]


def test_a_completion_that_a_template_ended_gets_no_other_end():
  record = Demonstration((("a", False), ("b" + mark("<eos>"), True)))
  (example,), _ = encoding.encode_demonstrations(
      [record], TOKENIZER, max_length=12, policy="error", train_on_prompt=False
  )
  assert example[0].count(EOS) == 1 and example[0][-1] == EOS
  assert example[1][-2:] == [1.0, 1.0]


def test_documents_split_into_pieces_that_join_to_the_whole():
  ids = [BOS, *TOKENIZER.encode("abcabcabcabc"), EOS]
  pieces, report = encoding.encode_documents(
      ["abcabcabcabc", "a"], TOKENIZER, max_length=4, policy="split"
  )
  assert sum([piece for piece, _ in pieces[:-1]], []) == ids
  assert all(len(piece) <= 4 and set(mask) == {1.0} for piece, mask in pieces)
  assert (report.num_records, report.num_kept, report.num_split) == (2, 2, 1)
  assert report.longest_completion == len(ids)


def test_policies_for_a_long_prompt_and_a_long_completion():
  rows = [shown("a b c a b c", "c"), shown("a", "c a b c a b c"),
          shown("a", "c")]
  def run(policy):
    return encoding.encode_demonstrations(
        rows, TOKENIZER, max_length=7, policy=policy, train_on_prompt=False
    )
  kept, report = run("drop")
  assert (len(kept), report.num_dropped, report.num_truncated) == (1, 2, 0)
  kept, report = run("truncate_prompt_left")
  assert (len(kept), report.num_dropped, report.num_truncated) == (2, 1, 1)
  cut = kept[0][0]
  assert len(cut) == 7 and cut[0] == BOS and cut[-1] == EOS
  assert cut[1:5] == TOKENIZER.encode("a b c a b c")[-4:]
  with pytest.raises(encoding.LengthError, match="record 0: its prompt has"):
    run("error")
  assert "2 of 3 records kept, 1 dropped, 1 truncated" in str(report)


def test_nothing_that_fits_is_an_error():
  with pytest.raises(encoding.LengthError, match="all 1 records are longer"):
    encoding.encode_documents(
        ["abc abc"], TOKENIZER, max_length=2, policy="drop"
    )
  with pytest.raises(encoding.LengthError, match="no records"):
    encoding.encode_prompts([], TOKENIZER, max_prompt_length=4, policy="drop")
  with pytest.raises(ValueError, match="policy='cut' is not one of drop"):
    encoding.encode_documents(["a"], TOKENIZER, max_length=2, policy="cut")
  with pytest.raises(ValueError, match="max_prompt_length leaves no room"):
    encoding.encode_prompts(
        [Prompt("a")], TOKENIZER, max_prompt_length=1, policy="drop"
    )


P, C = 8, 9


@given(rows=st.lists(st.tuples(text, nonempty, nonempty), min_size=1,
                     max_size=6), policy=st.sampled_from(
                         ["drop", "truncate_prompt_left"]),
       add_bos=st.booleans())
def test_comparisons_end_and_start_at_the_boundary(rows, policy, add_bos):
  records = [
      Comparison(*row, weight=i + 1.0, margin=i / 2)
      for i, row in enumerate(rows)
  ]
  # One that always fits, so that some row is left.
  records.append(Comparison("a", "b", "c", weight=99.0))
  batch, report = encoding.encode_comparisons(
      records, TOKENIZER, max_prompt_length=P, max_completion_length=C,
      policy=policy, add_bos=add_bos,
  )
  assert report.num_kept == len(batch.weight) == len(batch.tokens)
  assert report.num_kept + report.num_dropped == report.num_records
  kept = iter(range(len(batch.weight)))
  for record in records:
    prompt = TOKENIZER.encode(record.prompt)
    sides = [TOKENIZER.encode(t) for t in (record.chosen, record.rejected)]
    room = P - add_bos
    if max(map(len, sides)) + 1 > C:
      continue
    if len(prompt) > room and policy == "drop":
      continue
    row = next(kept)
    assert batch.weight[row] == np.float32(record.weight)
    assert batch.margin[row] == np.float32(record.margin)
    prompt = [BOS] * add_bos + prompt[max(0, len(prompt) - room):]
    for side in (0, 1):
      tokens, mask = batch.tokens[row, side], batch.attention_mask[row, side]
      assert real(tokens[:P], mask[:P]) == prompt
      assert real(tokens[P:], mask[P:]) == [*sides[side], EOS]
      # Prompts are padded on the left, completions on the right.
      assert (np.diff(mask[:P]) >= 0).all() and (np.diff(mask[P:]) <= 0).all()
      assert (tokens[mask == 0] == TOKENIZER.pad_id).all()
  assert next(kept, None) is None


def test_rankings_fill_up_to_the_longest():
  records = [
      Ranking("a", ("b", "c"), (1, 0), weight=0.5),
      Ranking("a", ("b", "c", "a"), (0, 2, 2)),
      Ranking("a", ("b", "c" * 50), (0, 1)),
  ]
  batch, report = encoding.encode_rankings(
      records, TOKENIZER, max_prompt_length=4, max_completion_length=4,
      policy="drop",
  )
  assert report.num_dropped == 1
  assert batch.tokens.shape == (2, 3, 8)
  assert batch.ranks.tolist() == [[1, 0, 0], [0, 2, 2]]
  assert batch.completion_valid.tolist() == [[True, True, False], [True] * 3]
  assert batch.attention_mask[0, 2].sum() == 0
  assert batch.weight.tolist() == [0.5, 1.0]


@given(rows=st.lists(nonempty, min_size=1, max_size=8), add_bos=st.booleans())
def test_prompts_are_left_padded_and_know_their_place(rows, add_bos):
  records = [Prompt("a"), *map(Prompt, rows)]
  batch, _ = encoding.encode_prompts(
      records, TOKENIZER, max_prompt_length=6, policy="drop", add_bos=add_bos
  )
  for place, tokens, mask in zip(
      batch.index, batch.prompts, batch.prompt_mask, strict=True
  ):
    expected = [BOS] * add_bos + TOKENIZER.encode(records[place].prompt)
    assert real(tokens, mask) == expected
    assert mask[-1] == 1 and (np.diff(mask) >= 0).all()
  too_long = [
      i for i, record in enumerate(records)
      if len(TOKENIZER.encode(record.prompt)) + add_bos > 6
  ]
  assert set(batch.index.tolist()) == set(range(len(records))) - set(too_long)


def test_truncated_prompt_keeps_bos_and_its_end():
  batch, report = encoding.encode_prompts(
      [Prompt("a b c a b c")], TOKENIZER, max_prompt_length=4,
      policy="truncate_prompt_left",
  )
  expected = [BOS, *TOKENIZER.encode("a b c a b c")[-3:]]
  assert batch.prompts[0].tolist() == expected
  assert report.num_truncated == 1


def test_prompt_of_nothing_is_refused():
  with pytest.raises(ValueError, match="record 0 has an empty prompt"):
    encoding.encode_prompts(
        [Prompt("")], TOKENIZER, max_prompt_length=4, policy="drop",
        add_bos=False,
    )


def test_dtypes():
  batch, _ = encoding.encode_comparisons(
      [Comparison("a", "b", "c")], TOKENIZER, max_prompt_length=4,
      max_completion_length=4, policy="error",
  )
  assert batch.tokens.dtype == batch.attention_mask.dtype == np.int32
  assert batch.weight.dtype == batch.margin.dtype == np.float32
