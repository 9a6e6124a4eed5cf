import math

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from rlhf_jax.data import records
from rlhf_jax.data.records import RecordError, validate_record

COMPARISON = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKING = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]}
RATING = {"prompt": "p", "completion": "c", "score": 1}
MESSAGES = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
]


def test_good_records():
  shown = validate_record("demonstration", {"prompt": "p", "completion": "c"})
  assert shown.spans == (("p", False), ("c", True))
  assert (shown.prompt, shown.completion) == ("p", "c")
  shown = validate_record("demonstration", {"messages": MESSAGES}, "hh")
  assert shown.prompt == "\n\nHuman: hi\n\nAssistant:"
  assert shown.completion == " yo"
  assert validate_record("comparison", COMPARISON).weight == 1.0
  full = COMPARISON | {"annotator": "x", "weight": 2, "margin": -0.5, "id": 7}
  found = validate_record("comparison", full)
  assert (found.annotator, found.weight, found.margin) == ("x", 2.0, -0.5)
  assert validate_record("ranking", RANKING).ranks == (1, 0, 1)
  assert validate_record("rating", RATING).score == 1.0
  assert validate_record("prompt", {"prompt": "p"}).prompt == "p"


def test_transcripts_split_at_the_last_assistant_turn():
  head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
  found = validate_record(
      "comparison", {"chosen": head + " good", "rejected": head + " bad"}
  )
  assert (found.prompt, found.chosen, found.rejected) == (head, " good", " bad")


HEAD = "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize("kind, obj, field, reason", [
    ("prompt", [], "", "a list"),
    ("prompt", None, "", "null"),
    ("prompt", {}, "prompt", "missing"),
    ("prompt", {"prompt": " \n"}, "prompt", "empty"),
    ("prompt", {"prompt": 3}, "prompt", "an integer"),
    ("prompt", {"prompt": "a\0b"}, "prompt", "NUL character at 1"),
    ("prompt", {"prompt": "a\ud800"}, "prompt", "surrogate at character 1"),
    ("prompt", {"prompt": "a" * 1_000_001}, "prompt", "limit is 1000000"),
    ("comparison", COMPARISON | {"rejected": "a"}, "rejected", "identical"),
    ("comparison", COMPARISON | {"weight": math.nan}, "weight", "finite"),
    ("comparison", COMPARISON | {"weight": -1}, "weight", "below 0"),
    ("comparison", COMPARISON | {"weight": True}, "weight", "boolean"),
    ("comparison", COMPARISON | {"margin": 10**400}, "margin", "finite"),
    ("comparison", COMPARISON | {"margin": "1"}, "margin", "a string"),
    ("comparison", COMPARISON | {"annotator": 4}, "annotator", "an integer"),
    ("comparison", COMPARISON | {"weigth": 4}, "weigth", "mean 'weight'"),
    ("comparison", {"chosen": "a", "rejected": "b"}, "chosen", "no prompt"),
    ("comparison", {"chosen": HEAD + " ", "rejected": HEAD + " b"}, "chosen",
     "last assistant turn is empty"),
    ("comparison", {"chosen": HEAD + " a", "rejected": "x" + HEAD + " b"},
     "rejected", "differ before"),
    ("ranking", RANKING | {"ranks": [1, 2]}, "ranks", "2 ranks for 3"),
    ("ranking", RANKING | {"ranks": [1, 2, 1.5]}, "ranks[2]", "integer"),
    ("ranking", RANKING | {"ranks": [1, 2, False]}, "ranks[2]", "boolean"),
    ("ranking", RANKING | {"ranks": [1, 2, 10**9]}, "ranks[2]", "within"),
    ("ranking", RANKING | {"completions": ["a"]}, "completions", "holds 1"),
    ("ranking", RANKING | {"completions": "abc"}, "completions", "a string"),
    ("ranking", RANKING | {"completions": ["a", "b", ""]}, "completions[2]",
     "empty"),
    ("ranking", RANKING | {"completions": ["a", "a", "b"]}, "ranks[1]",
     "identical completions"),
    ("rating", RATING | {"score": -math.inf}, "score", "finite"),
    ("rating", RATING | {"score": None}, "score", "null"),
    ("demonstration", {"prompt": "p"}, "completion", "missing"),
    ("demonstration", {"messages": []}, "messages", "at least one"),
    ("demonstration", {"messages": MESSAGES[:1]}, "messages", "last message"),
    ("demonstration", {"messages": [{"role": "bot", "content": "x"}]},
     "messages[0].role", "one of system"),
    ("demonstration", {"messages": [{"role": ["user"], "content": "x"}]},
     "messages[0].role", "one of system"),
    ("demonstration", {"messages": [{"role": "user"}]},
     "messages[0].content", "missing"),
    ("demonstration", {"messages": ["hi"]}, "messages[0]", "a string"),
    ("demonstration", {"messages": MESSAGES, "prompt": "x"}, "messages",
     "either"),
    ("prompt", {"messages": MESSAGES, "prompt": "x"}, "messages", "either"),
])
def test_bad_records_name_field_and_reason(kind, obj, field, reason):
  with pytest.raises(RecordError) as caught:
    validate_record(kind, obj)
  assert caught.value.field == field
  assert reason in caught.value.reason


def test_bad_arguments_are_not_the_records_fault():
  with pytest.raises(ValueError, match="kind='pair' is not one of"):
    validate_record("pair", {})
  with pytest.raises(ValueError, match="no chat template is called"):
    validate_record("prompt", {"prompt": "x"}, "nope")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Real field names with anything in them reach further than random names.
fields = st.sampled_from([
    "prompt", "completion", "chosen", "rejected", "completions", "ranks",
    "score", "weight", "margin", "annotator", "messages", "role", "content",
])
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content"]),
        st.sampled_from(["user", "assistant", "system"]) | json_values,
    ),
    max_size=3,
)
objects = json_values | st.dictionaries(
    fields,
    json_values | st.text(min_size=1) | messages
    | st.lists(st.text(), max_size=3) | st.lists(st.integers(), max_size=3),
    max_size=8,
)


SAID = {"role": "user", "content": "Hi"}
ANSWERS = [{"role": "assistant", "content": x} for x in ("Yes", "No")]


def test_conversations_are_compared_by_their_last_answers():
  obj = {
      "chosen": [SAID, ANSWERS[0]], "rejected": [SAID, ANSWERS[1]],
      "weight": 2.0, "prompt": "Hi",
  }
  found = records.validate_record("comparison", obj, "hh")
  assert found == records.Comparison(
      "\n\nHuman: Hi\n\nAssistant:", " Yes", " No", weight=2.0
  )


BE_KIND = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("prompt, start, head", [
    ("Hi", [], ""),
    (" Hi\n", [SAID], ""),
    ("Hi", [BE_KIND, SAID], "Be kind."),
    ([SAID], [], ""),
    ([SAID], [SAID], ""),
    ([BE_KIND], [SAID], "Be kind."),
    ([BE_KIND, SAID], [], "Be kind."),
    ([BE_KIND, SAID], [BE_KIND, SAID], "Be kind."),
])
def test_the_prompt_beside_conversations_is_said_once(prompt, start, head):
  obj = {"prompt": prompt} | {
      field: [*start, answer]
      for field, answer in zip(("chosen", "rejected"), ANSWERS, strict=True)
  }
  found = records.validate_record("comparison", obj, "hh")
  assert found == records.Comparison(
      head + "\n\nHuman: Hi\n\nAssistant:", " Yes", " No"
  )


@pytest.mark.parametrize("obj, field, reason", [
    ({"prompt": "Ho", "chosen": [SAID, ANSWERS[0]],
      "rejected": [SAID, ANSWERS[1]]}, "prompt", "not what the user says"),
    ({"prompt": "Hi", "chosen": [BE_KIND, ANSWERS[0]],
      "rejected": [BE_KIND, ANSWERS[1]]}, "prompt", "not what the user says"),
    ({"prompt": " ", "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
     "prompt", "is empty"),
    ({"prompt": 3, "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
     "prompt", "an integer"),
    ({"prompt": [SAID | {"content": "Ho"}], "chosen": [SAID, ANSWERS[0]],
      "rejected": [SAID, ANSWERS[1]]}, "prompt", "neither goes on"),
    ({"chosen": [SAID, ANSWERS[0]]}, "rejected", "missing"),
    ({"chosen": [SAID, ANSWERS[0]], "rejected": "No"}, "rejected", "a list of"),
    ({"chosen": [SAID], "rejected": [SAID | {"content": "x"}]}, "chosen",
     "must be the assistant's"),
    ({"chosen": [SAID, ANSWERS[0]], "rejected": [ANSWERS[1]]}, "rejected",
     "differ before their last message"),
    ({"chosen": [SAID, ANSWERS[0]], "rejected": [SAID, ANSWERS[0]]},
     "rejected", "identical to chosen"),
    ({"prompt": [], "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]},
     "prompt", "at least one message"),
    ({"chosen": [SAID, {"role": "bot", "content": "x"}], "rejected": []},
     "chosen[1].role", "must be one of"),
])
def test_conversations_that_cannot_be_compared(obj, field, reason):
  with pytest.raises(records.RecordError) as error:
    records.validate_record("comparison", obj)
  assert error.value.field == field and reason in error.value.reason


@settings(max_examples=300)
@given(kind=st.sampled_from(records.KINDS), obj=objects,
       template=st.sampled_from(["plain", "hh"]))
def test_any_json_gives_a_record_or_a_record_error(kind, obj, template):
  try:
    record = validate_record(kind, obj, template)
  except RecordError as error:
    assert error.reason
  else:
    assert type(record).__name__.lower() == kind
