"""Chat templates of families against transformers and texts written by hand."""

import json
import re

import pytest

from rlhf_jax.data import chat, encoding, records
from rlhf_jax.data.special_tokens import mark, unmarked
from rlhf_jax.data.tokenizer import Tokenizer
from tests.data import chat_families
from tests.data.chat_families import EXPECTED, FAMILIES, conversation

EACH = list(EXPECTED)
STABLE = [x for x in EACH if FAMILIES[x[0]].prefixes_are_stable]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("families")
  return {
      (name, marks): chat_families.write_tokenizer(
          root / f"{name}{marks:d}", name, marks
      )
      for name in FAMILIES
      for marks in (False, True)
  }


@pytest.fixture(scope="module")
def tokenizers(folders):
  return {
      key: Tokenizer.from_pretrained_folder(path)
      for key, path in folders.items()
  }


def golden(name: str, which: str) -> dict:
  path = chat_families.GOLDEN / f"{name}.json"
  found = json.loads(path.read_text("utf-8"))
  keys = ("tokens", "ids", "mask", "prompt_ids")
  return {key: found[f"{which} {key}"] for key in keys}


def encode(tokenizer: Tokenizer, messages: list) -> tuple[list, list]:
  """Ids and loss mask, as the SFT stage makes them of a record."""
  record = records.validate_record(
      "demonstration", {"messages": messages}, tokenizer.template("tokenizer")
  )
  (example,), _ = encoding.encode_demonstrations(
      [record], tokenizer, max_length=512, policy="error",
      train_on_prompt=False,
  )
  return example


def without_end(ids: list, wanted: dict, tokenizer: Tokenizer) -> tuple:
  """Golden ids and mask without white space behind the last end of turn."""
  rest = wanted["ids"][len(ids):]
  assert not tokenizer.decode(rest, continues=True).strip()
  assert not any(wanted["mask"][len(ids):])
  return wanted["ids"][: len(ids)], wanted["mask"][: len(ids)]


def is_single(name: str, which: str) -> bool:
  return which == "short" or FAMILIES[name].prefixes_are_stable


@pytest.mark.parametrize("name, which", EACH)
@pytest.mark.parametrize("marks", [False, True])
def test_text_is_that_of_the_published_format(tokenizers, name, which, marks):
  template = tokenizers[name, marks].template("tokenizer")
  messages = conversation(name, which)
  expected = EXPECTED[name, which]
  plain = lambda text: re.sub(r"\[\[|\]\]", "", text)
  assert unmarked(template.render(messages, False)) == plain(expected)
  prompt = unmarked(chat.render_prompt(messages[:-1], template))
  assert prompt == plain(expected[: expected.rindex("[[")])


@pytest.mark.parametrize("name, which", EACH)
def test_spans_of_generation_marks_are_what_the_assistant_writes(
    tokenizers, name, which
):
  template = tokenizers[name, True].template("tokenizer")
  spans = chat.render_spans(conversation(name, which), template)
  wanted = re.findall(r"\[\[(.*?)\]\]", EXPECTED[name, which], re.DOTALL)
  assert [unmarked(text) for text, trained in spans if trained] == wanted


@pytest.mark.parametrize("name, which", STABLE)
def test_prefix_differences_equal_generation_marks(tokenizers, name, which):
  messages = conversation(name, which)
  by_prefix, by_marks = (
      chat.render_spans(messages, tokenizers[name, x].template("tokenizer"))
      for x in (False, True)
  )
  assert by_prefix == by_marks


@pytest.mark.parametrize("name, which", EACH)
def test_tokens_and_masks_are_golden(tokenizers, name, which):
  tokenizer = tokenizers[name, True]
  ids, loss_mask = encode(tokenizer, conversation(name, which))
  wanted_ids, wanted_mask = without_end(ids, golden(name, which), tokenizer)
  assert ids == wanted_ids
  assert loss_mask == wanted_mask
  # The last target ends a completion.
  assert loss_mask[-1] == 1 and ids[-1] in tokenizer.eos_ids
  assert ids[-1] == tokenizer.special_tokens[FAMILIES[name].end_of_turn]
  if is_single(name, which):
    assert encode(tokenizers[name, False], conversation(name, which)) == (
        ids, loss_mask
    )


@pytest.mark.parametrize("name, which", EACH)
def test_prompts_are_golden(tokenizers, name, which):
  tokenizer = tokenizers[name, False]
  prompt = records.validate_record(
      "prompt", {"messages": conversation(name, which)},
      tokenizer.template("tokenizer"),
  )
  batch, _ = encoding.encode_prompts(
      [prompt], tokenizer, max_prompt_length=256, policy="error"
  )
  ids = batch.prompts[0][batch.prompt_mask[0] == 1].tolist()
  assert ids == golden(name, which)["prompt_ids"]


@pytest.mark.parametrize("name, which", EACH)
def test_transformers_makes_the_same_of_its_template(
    folders, tokenizers, name, which
):
  import transformers

  fast = transformers.AutoTokenizer.from_pretrained(folders[name, True])
  messages = conversation(name, which)
  found = fast.apply_chat_template(
      messages, tokenize=True, return_dict=True,
      return_assistant_tokens_mask=True,
  )
  ids, loss_mask = encode(tokenizers[name, True], messages)
  assert found["input_ids"][: len(ids)] == ids
  theirs = found["assistant_masks"][: len(ids)]
  assert theirs == loss_mask
  assert not any(found["assistant_masks"][len(ids):])
  prompt = fast.apply_chat_template(
      messages[:-1], tokenize=True, add_generation_prompt=True,
      return_dict=False,
  )
  assert prompt == golden(name, which)["prompt_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_users_spell_is_text(tokenizers, name):
  """All of a family's tokens in a message: as many tokens as without them."""
  tokenizer = tokenizers[name, True]
  spelled = " ".join(FAMILIES[name].special)
  count = lambda ids: [ids.count(x) for x in tokenizer.special_tokens.values()]
  said = lambda text: [
      {"role": "user", "content": f"Say {text}."},
      {"role": "assistant", "content": f"{text}?"},
  ]
  ids, loss_mask = encode(tokenizer, said(spelled))
  plain, _ = encode(tokenizer, said("x"))
  assert count(ids) == count(plain)
  template = tokenizer.template("tokenizer")
  spans = chat.render_spans(said(spelled), template)
  text = "".join(unmarked(x) for x, _ in spans)
  assert text.count(spelled) == 2
  written = [i for i, x in zip(ids, loss_mask, strict=True) if x]
  assert tokenizer.decode(written).strip() == (
      f"<think>\n\n</think>\n\n{spelled}?" if name == "qwen3" else f"{spelled}?"
  )


@pytest.mark.parametrize("prompt_apart", [False, True])
@pytest.mark.parametrize("name, which", STABLE)
def test_a_comparison_of_chats_is_tokens_of_demonstrations(
    tokenizers, name, which, prompt_apart
):
  tokenizer = tokenizers[name, False]
  start = conversation(name, which)[:-1]
  ends = [[{"role": "assistant", "content": x}] for x in ("Yes.", "No ☃")]
  obj = {"prompt": start} if prompt_apart else {}
  for field, end in zip(("chosen", "rejected"), ends, strict=True):
    obj[field] = end if prompt_apart else start + end
  record = records.validate_record(
      "comparison", obj, tokenizer.template("tokenizer")
  )
  batch, _ = encoding.encode_comparisons(
      [record], tokenizer, max_prompt_length=256, max_completion_length=32,
      policy="error",
  )
  for side, end in enumerate(ends):
    ids = batch.tokens[0, side][batch.attention_mask[0, side] == 1].tolist()
    assert ids == encode(tokenizer, start + end)[0]
  prompt = batch.tokens[0, 0, :256][batch.attention_mask[0, 0, :256] == 1]
  assert prompt.tolist() == golden(name, which)["prompt_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_turn_ends_completions(tokenizers, name):
  tokenizer = tokenizers[name, False]
  family = FAMILIES[name]
  ids = [tokenizer.special_tokens[x] for x in (family.eos, family.end_of_turn)]
  assert tokenizer.eos_ids == tuple(dict.fromkeys(ids))
  assert tokenizer.eos_id == ids[0]


def test_a_template_that_takes_reasoning_out_is_refused(tokenizers):
  template = tokenizers["qwen3", False].template("tokenizer")
  with pytest.raises(
      chat.ChatTemplateError,
      match=r"template tokenizer: messages\[4\] \(assistant\): the longer.*"
      r"<think>.*generation",
  ):
    chat.render_spans(conversation("qwen3", "long"), template)


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_message_is_refused_by_its_template(tokenizers, name):
  template = tokenizers[name, False].template("tokenizer")
  with pytest.raises(chat.ChatTemplateError, match="system role"):
    chat.render_spans(
        [chat_families.SYSTEM, *chat_families.SHORT], template
    )


@pytest.mark.parametrize("change, message", [
    # Nobody would learn to stop.
    (lambda x: x.replace("+ '<|im_end|>' }}{% endgeneration %}",
                         "}}{% endgeneration %}{{ '<|im_end|>' }}"),
     "is behind the last generation block"),
    (lambda x: x.replace("{% if m.role == 'assistant' %}{% generation %}",
                         "{% if false %}{% generation %}"),
     "0 generation blocks for 2 answers"),
    (lambda x: re.sub(r"{% (end)?generation %}", "", x).replace(
        "{% if add_generation_prompt %}", "{% if false %}"),
     "stands before an answer and .* at the end of the prompt"),
])
def test_a_template_that_masks_wrongly_is_refused(tokenizers, change, message):
  tokenizer = tokenizers["qwen2", True]
  source = change(tokenizer.chat_template)
  assert source != tokenizer.chat_template
  with pytest.raises(chat.ChatTemplateError, match=message):
    chat.render_spans(
        conversation("qwen2", "long"), tokenizer.template(source)
    )


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma", "phi3", "olmo2"])
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("render, end", [
    (chat.render_spans, None), (chat.render_prompt, 1),
])
def test_a_template_without_a_generation_prompt_is_refused(
    tokenizers, name, marks, render, end
):
  tokenizer = tokenizers[name, marks]
  source = tokenizer.chat_template.replace("add_generation_prompt", "false")
  messages = conversation(name, "short")[:end]
  assert render(messages, tokenizer.template("tokenizer"))
  with pytest.raises(
      chat.ChatTemplateError,
      match=r"^chat template of the config: .*header.*add_generation_prompt",
  ):
    render(messages, tokenizer.template(source))


def test_a_prompt_may_begin_the_answer_but_no_row_has_it(tokenizers):
  """As templates of models that always reason: "<think>" ends the prompt."""
  tokenizer = tokenizers["qwen2", True]
  source = tokenizer.chat_template.replace(
      "<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"
  )
  assert source != tokenizer.chat_template
  template = tokenizer.template(source)
  messages = conversation("qwen2", "short")
  prompt = chat.render_prompt(messages[:1], template)
  assert unmarked(prompt).endswith("<|im_start|>assistant\n<think>\n")
  with pytest.raises(chat.ChatTemplateError, match="it alone"):
    chat.render_spans(messages, template)


def test_a_mark_of_another_tokenizer_is_refused(tokenizers):
  with pytest.raises(ValueError, match="'<|im_end|>' is no special token of"):
    tokenizers["llama3", False].encode_rows([["Hi" + mark("<|im_end|>")]])
