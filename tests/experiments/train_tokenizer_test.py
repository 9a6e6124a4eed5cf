"""A tokenizer trained by itself, and pretraining that takes it."""

import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from configs import pretrain as pretrain_config
from configs import train_tokenizer as tokenizer_config
from experiments import pretrain, train_tokenizer
from experiments.harness import cli, models, sources
from experiments.harness.config import ConfigError, from_config
from rlhf_jax.data.chat import render_spans
from rlhf_jax.data.special_tokens import unmarked
from rlhf_jax.data.tokenizer import Tokenizer

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def settings(**changes):
  config = tokenizer_config.get_config("smoke")
  config.documents.limit = config.heldout_documents.limit = 40
  config.vocab_size = 300
  config.update(changes)
  return config


def trained(folder, **changes) -> Tokenizer:
  config = from_config(train_tokenizer.Config, settings(**changes))
  train_tokenizer.run(config, str(folder))
  return models.load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  return trained(
      tmp_path_factory.mktemp("chats"),
      special_tokens=tokenizer_config.CHAT_TOKENS,
      chat_template=tokenizer_config.CHAT_TEMPLATE,
  )


@given(text=any_text)
def test_any_text_comes_back(chats, text):
  assert chats.decode(chats.encode(text)) == text
  assert not set(chats.encode(text)) & set(chats.special_tokens.values())


def test_it_is_the_same_every_time_and_says_how_good_it_is(tmp_path):
  first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
  assert first.fingerprint == second.fingerprint
  files = lambda x: {
      p.name: p.read_bytes() for p in (tmp_path / x / "tokenizer").iterdir()
  }
  assert files("a") == files("b")
  summary = json.loads((tmp_path / "a" / "finished.json").read_text())
  assert summary["vocab_size"] == first.vocab_size == 300
  assert 1 < summary["heldout_bytes_per_token"] < 10
  other = trained(tmp_path / "c", vocab_size=280)
  assert other.vocab_size == 280 and other.fingerprint != first.fingerprint


def test_its_chat_template_travels_along(chats, tmp_path):
  import transformers

  assert chats.special_tokens == {
      "<pad>": 0, "<eos>": 1, "<bos>": 2, "<|im_start|>": 3, "<|im_end|>": 4,
  }
  assert chats.eos_ids == (1, 4)
  talk = [
      {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
  ]
  spans = render_spans(talk, chats.template("tokenizer"))
  assert [(unmarked(x), trained) for x, trained in spans] == [
      ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
      ("Ho<|im_end|>", True),
  ]
  chats.export(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
  ours = chats.encode_rows([[x for x, _ in spans]])[0]
  assert ids[:-1] == sum(ours, []) and theirs.decode(ids[-1:]) == "\n"


@pytest.mark.parametrize("name, text", [
    ("text.txt", "a dog\n\na cat\n\na dog and a cat\n\nanother"),
    ("text.jsonl", "\n".join(
        json.dumps({"text": f"a dog {i}"}) for i in range(4)
    )),
    ("demonstrations.jsonl", "\n".join(
        json.dumps({"prompt": f"dog {i}", "completion": " cat"})
        for i in range(4)
    )),
    ("talks.jsonl", "\n".join(
        json.dumps({"messages": [
            {"role": "user", "content": f"dog {i}"},
            {"role": "assistant", "content": "cat"},
        ]})
        for i in range(4)
    )),
])
def test_it_learns_from_any_source(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  kind = "text:" if name.endswith("txt") else ""
  source = settings().documents
  source.update(source=f"{kind}{tmp_path / name}", limit=0)
  tokenizer = trained(
      tmp_path / "out", documents=source, heldout_documents=source,
      vocab_size=262,
  )
  assert len(tokenizer.encode(" dog")) < 4  # a merge was learnt


def test_a_jsonl_document_without_text_is_told(tmp_path):
  path = tmp_path / "text.jsonl"
  path.write_text('{"text": "a"}\n{"txt": "b"}\n')
  cfg = sources.SourceConfig(source=str(path), limit=0, use="all")
  with pytest.raises(ValueError, match="text.jsonl:2: field 'text': missing"):
    sources.Reader(0, tmp_path).documents(cfg, "train")


@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 258}, "vocab_size=258 is too small"),
    ({"special_tokens": ("<a>", "<a>")}, r"\['<a>'\] are there twice"),
    ({"special_tokens": ("<eos>",)}, r"\['<eos>'\] are there twice"),
    ({"special_tokens": (" <a>",)}, "special token ' <a>': it must have"),
    ({"special_tokens": ("",)}, "special token '': it must have"),
])
def test_what_cannot_be_is_one_error(tmp_path, changes, message):
  with pytest.raises(cli.UserError, match=message):
    trained(tmp_path, **changes)


@pytest.mark.parametrize("template, message", [
    ("{% for %}", "chat template of the config: "),
    ("absent.jinja", "chat template absent.jinja: .*No such file"),
    ("chatml", "no chat template is called 'chatml'"),
    ("tokenizer", "there is no tokenizer here"),
])
def test_a_template_that_is_none_is_told_before_anything_is_read(
    template, message
):
  with pytest.raises(ConfigError, match=f"chat_template: .*{message}"):
    from_config(train_tokenizer.Config, settings(chat_template=template))


def test_pretraining_takes_it(tmp_path, chats):
  chats.save(tmp_path / "stage" / "tokenizer")
  chats.export(tmp_path / "hf")
  for place in ("stage", "hf"):
    found = pretrain.make_tokenizer(
        pretrain.TokenizerConfig(path=str(tmp_path / place), vocab_size=0), []
    )
    text = "The dog ran.\n☃"
    assert found.encode(text) == chats.encode(text)
    assert found.eos_ids == chats.eos_ids
    assert found.chat_template == chats.chat_template
  config = pretrain_config.get_config("smoke")
  config.tokenizer.path = str(tmp_path / "stage")
  config.documents.limit = config.heldout_documents.limit = 10
  checked = from_config(pretrain.Config, config)
  with pytest.raises(ValueError, match="has 300 tokens, and model.vocab_size"):
    pretrain.make_examples(checked, sources.Reader(0, tmp_path))
  config.model.vocab_size = 300
  checked = from_config(pretrain.Config, config)
  found, examples, _ = pretrain.make_examples(
      checked, sources.Reader(0, tmp_path)
  )
  assert found.fingerprint == chats.fingerprint
  assert len(examples["train"]) >= 10
