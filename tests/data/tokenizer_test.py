import json

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from rlhf_jax.data import tokenizer_training
from rlhf_jax.data.special_tokens import mark
from rlhf_jax.data.tokenizer import Tokenizer, TokenizerError

TEXTS = [
    "Once upon a time there was a little dog.",
    "The dog said hello, hello to 123 cats and 456 birds.",
    "A little cat ran away; the dog ran too.",
] * 8

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# What a sentencepiece file cannot give back by its nature: its sign for a
# space, and NUL, which ends a string in parts of its C++ code.
spm_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"),
    max_size=60,
)


@pytest.fixture(scope="module")
def bpe():
  return Tokenizer.train_byte_level_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory):
  folder = tmp_path_factory.mktemp("spm")
  corpus = folder / "corpus.txt"
  corpus.write_text("\n".join(TEXTS))
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus), model_prefix=str(folder / "m"), vocab_size=330,
      model_type="bpe", byte_fallback=True, minloglevel=2,
      normalization_rule_name="identity", hard_vocab_limit=False,
  )
  return folder / "m.model"


@pytest.fixture(scope="module")
def spm(spm_path):
  return Tokenizer.from_sentencepiece(spm_path)


def metaspace_tokenizer(tmp_path) -> Tokenizer:
  """A tokenizer that prepends a space, in the layout of Llama's folders."""
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
  vocab |= {c: 3 + i for i, c in enumerate("▁abc")}
  backend = tokenizers.Tokenizer(
      models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence([
      decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0),
  ])
  backend.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
      "bos_token": "<s>", "eos_token": "</s>",
  }))
  return Tokenizer.from_pretrained_folder(tmp_path)


@given(text=any_text)
def test_bpe_gives_back_any_text(bpe, text):
  assert bpe.decode(bpe.encode(text)) == text


@given(prompt=any_text, completion=any_text)
def test_bpe_gives_back_any_text_across_the_boundary(bpe, prompt, completion):
  ids = bpe.encode(prompt) + bpe.encode(completion, continues=True)
  assert bpe.decode(ids) == prompt + completion


@given(prompt=spm_text.filter(bool), completion=spm_text)
def test_spm_completion_is_not_given_a_space(spm, prompt, completion):
  tail = spm.encode(completion, continues=True)
  assert spm.decode(spm.encode(prompt) + tail) == prompt + completion
  assert spm.decode(tail, continues=True) == completion


def test_spm_prefix_space_is_only_for_the_start_of_a_text(spm):
  assert spm.encode("dog") == spm.encode(" dog", continues=True)
  assert spm.encode("dog", continues=True) != spm.encode("dog")


@pytest.mark.parametrize("completion", ["a", " a", "  b", "abc  "])
def test_prepended_space_of_a_folder_is_only_for_the_start(
    tmp_path, completion
):
  tokenizer = metaspace_tokenizer(tmp_path)
  tail = tokenizer.encode(completion, continues=True)
  assert tokenizer.decode(tokenizer.encode("ab ") + tail) == "ab " + completion
  assert tokenizer.decode(tail, continues=True) == completion
  assert tokenizer.encode("a") == [3, 4]


def test_folder_without_pad_lends_unk_and_survives_saving(tmp_path):
  tokenizer = metaspace_tokenizer(tmp_path)
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
  tokenizer.save(tmp_path / "saved")
  loaded = Tokenizer.load(tmp_path / "saved")
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.encode("ab", continues=True) == [4, 5]


def test_the_unknown_token_is_not_lost(tmp_path):
  import transformers

  tokenizer = metaspace_tokenizer(tmp_path)
  for write in (tokenizer.save, tokenizer.export):
    write(tmp_path / "out")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.unk_token_id == 0
    assert fast("a?", add_special_tokens=False).input_ids == [3, 4, 0]


def with_files(bpe, folder, **files) -> Tokenizer:
  """`bpe` as a model's folder, with fields of its JSON files."""
  bpe.save(folder)
  for name, fields in files.items():
    path = folder / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | fields))
  return Tokenizer.from_pretrained_folder(folder)


@pytest.mark.parametrize("files, eos_ids", [
    ({}, (1,)),
    ({"config": {"eos_token_id": 5}}, (1, 5)),
    ({"config": {"eos_token_id": [7, 1, 5]}}, (1, 7, 5)),
    ({"config": {"eos_token_id": None}}, (1,)),
    # What is about generation goes before the model's config.
    ({"generation_config": {"eos_token_id": [6]},
      "config": {"eos_token_id": 5}}, (1, 6)),
    ({"generation_config": {"temperature": 1.0},
      "config": {"eos_token_id": 5}}, (1, 5)),
    # Of another vocabulary.
    ({"config": {"eos_token_id": [5, 50256]}}, (1, 5)),
])
def test_a_folders_end_ids_are_all_kept(bpe, tmp_path, files, eos_ids):
  import transformers

  tokenizer = with_files(bpe, tmp_path, **files)
  assert (tokenizer.eos_ids, tokenizer.eos_id) == (eos_ids, 1)
  tokenizer.save(tmp_path / "saved")
  again = Tokenizer.load(tmp_path / "saved")
  assert again.eos_ids == eos_ids
  assert again.fingerprint == tokenizer.fingerprint
  # One end is what a tokenizer has anyway: its files are as ever.
  listed = tmp_path / "saved" / "generation_config.json"
  assert listed.exists() == (len(eos_ids) > 1)
  tokenizer.export(tmp_path / "out")
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  wanted = 1 if len(eos_ids) == 1 else list(eos_ids)
  assert (theirs.eos_token_id, theirs.pad_token_id) == (wanted, 0)
  assert Tokenizer.from_pretrained_folder(tmp_path / "out").eos_ids == eos_ids


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "</s>"}'])
def test_end_ids_that_are_none_are_named(bpe, tmp_path, text):
  bpe.save(tmp_path)
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(TokenizerError, match="generation_config.json: "):
    Tokenizer.from_pretrained_folder(tmp_path)


@pytest.mark.parametrize("specials, own, wanted, is_safe", [
    (("<e>", "<b>", "<p>"), "<p>", "<p>", True),
    # A padding token that is the end is none.
    (("<e>", "<b>", "<|reserved_special_token_0|>"), "<e>",
     "<|reserved_special_token_0|>", True),
    (("<e>", "<b>", "<unused1>", "<unused0>"), None, "<unused1>", True),
    (("<e>", "<b>", "<unused1>", "[PAD]"), None, "[PAD]", True),
    (("<e>", "<b>", "<unused1>", "<|finetune_right_pad_id|>"), None,
     "<|finetune_right_pad_id|>", True),
    (("<e>", "<b>", "<keypad>"), None, "<e>", False),
    (("<e>", "<b>"), "<b>", "<e>", False),
])
def test_padding_is_a_token_to_spare_or_else_the_end(
    tmp_path, specials, own, wanted, is_safe
):
  import transformers

  fast = tokenizers.Tokenizer.from_str(
      tokenizer_training.train_byte_level_bpe(TEXTS, 280, specials)
  )
  fast.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": own,
      "bos_token": "<b>", "eos_token": "<e>",
  }))
  # Trained here, it has a <pad> besides, which this folder does not speak of.
  text = (tmp_path / "tokenizer.json").read_text().replace("<pad>", "<zero>")
  (tmp_path / "tokenizer.json").write_text(text)
  tokenizer = Tokenizer.from_pretrained_folder(tmp_path)
  assert tokenizer.pad_id == tokenizer.special_tokens[wanted]
  assert tokenizer.pad_is_safe == is_safe
  tokenizer.export(tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert theirs.pad_token == (wanted if is_safe else None)
  tokenizer.save(tmp_path / "saved")
  again = Tokenizer.load(tmp_path / "saved")
  assert (again.pad_id, again.pad_is_safe) == (tokenizer.pad_id, is_safe)


def exported(tokenizer, folder):
  """The tokenizer that transformers reads from an exported model's folder."""
  import transformers

  tokenizer.export(folder)
  (folder / "config.json").write_text(json.dumps({
      "model_type": "llama", "architectures": ["LlamaForCausalLM"],
  }))
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def spm_exported(spm, tmp_path_factory):
  return exported(spm, tmp_path_factory.mktemp("exported"))


# It reads special tokens from text.
@given(text=spm_text.filter(lambda x: "<" not in x))
def test_transformers_has_the_ids_of_an_exported_sentencepiece_file(
    spm, spm_exported, text
):
  assert spm_exported(text, add_special_tokens=False).input_ids == (
      spm.encode(text)
  )
  assert spm_exported(text).input_ids == [spm.bos_id, *spm.encode(text)]
  assert spm_exported.decode(spm.encode(text)) == spm.decode(spm.encode(text))


@pytest.mark.parametrize("kind, rule", [
    ("bpe", "nmt_nfkc"), ("unigram", "identity"), ("unigram", "nmt_nfkc"),
])
def test_other_kinds_of_sentencepiece_files_are_exported_too(
    tmp_path, kind, rule
):
  (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"),
      vocab_size=330, model_type=kind, byte_fallback=True, minloglevel=2,
      normalization_rule_name=rule, hard_vocab_limit=False,
  )
  tokenizer = Tokenizer.from_sentencepiece(tmp_path / "m.model")
  theirs = exported(tokenizer, tmp_path / "out")
  for text in (*TEXTS[:3], "", " ", "  a  b ", "ﬁ\tÅ ☃\n\nx", "dog\n", "１２"):
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ids == tokenizer.encode(text), text
  assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
  assert theirs.pad_token_id == 0 and theirs.unk_token_id == 0


def test_a_tokenizer_trained_here_is_exported_with_its_start_token(
    bpe, tmp_path
):
  theirs = exported(bpe, tmp_path / "out")
  assert theirs(TEXTS[0]).input_ids == [bpe.bos_id, *bpe.encode(TEXTS[0])]
  assert theirs.pad_token_id == bpe.pad_id
  back = Tokenizer.from_pretrained_folder(tmp_path / "out")
  assert back.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
  # Once, and also where it came by way of another folder.
  theirs = exported(back, tmp_path / "again")
  assert theirs("a").input_ids == [2, *bpe.encode("a")]
  bpe.save(tmp_path / "saved")
  read = Tokenizer.from_pretrained_folder(tmp_path / "saved")
  theirs = exported(read, tmp_path / "third")
  assert theirs("a").input_ids == [2, *bpe.encode("a")]


def test_marked_tokens_are_read_and_spelled_ones_are_not(bpe, spm):
  for tokenizer, end in ((bpe, "<eos>"), (spm, "</s>")):
    rows = [["the dog" + mark(end), f" {end} ran", mark(end)], ["a"]]
    first, second, third = tokenizer.encode_rows(rows)[0]
    assert first == [*tokenizer.encode("the dog"), tokenizer.eos_id]
    assert tokenizer.eos_id not in second
    assert third == [tokenizer.eos_id]
    assert tokenizer.decode(second).strip() == f"{end} ran"
    assert tokenizer.encode_rows(rows)[1] == [tokenizer.encode("a")]


@given(texts=st.lists(spm_text, min_size=1, max_size=4))
def test_rows_without_marks_are_encoded_as_ever(bpe, spm, texts):
  for tokenizer in (bpe, spm):
    (found,) = tokenizer.encode_rows([texts])
    wanted = [
        tokenizer.encode(text, continues=any(texts[:i]))
        for i, text in enumerate(texts)
    ]
    assert found == wanted
    assert tokenizer.decode(sum(found, [])) == "".join(texts)


def test_pieces_for_people(bpe):
  ids = [bpe.bos_id, *bpe.encode("the ☃"), bpe.eos_id]
  pieces = [bpe.piece(i) for i in ids]
  assert pieces[0] == "<bos>" and pieces[-1] == "<eos>"
  assert "".join(pieces[1:3]).startswith("the")
  assert all(pieces)


def test_a_folders_chat_template_travels_along(bpe, tmp_path):
  bpe.save(tmp_path)
  template = (
      "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
  )
  path = tmp_path / "tokenizer_config.json"
  path.write_text(
      json.dumps(json.loads(path.read_text()) | {"chat_template": template})
  )
  tokenizer = Tokenizer.from_pretrained_folder(tmp_path)
  assert tokenizer.chat_template == template
  tokenizer.save(tmp_path / "saved")
  again = Tokenizer.load(tmp_path / "saved")
  assert again.chat_template == template
  assert again.fingerprint == tokenizer.fingerprint != bpe.fingerprint
  import transformers

  talk = [{"role": "user", "content": "hi"}]
  fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  assert fast.apply_chat_template(talk, tokenize=False) == "<|user|>hi"
  assert bpe.chat_template is None


def test_special_tokens_are_neither_added_nor_read_from_text(bpe, spm):
  for tokenizer, text in ((bpe, "a<eos><pad>b"), (spm, "a</s><s>b")):
    ids = tokenizer.encode(text)
    special = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id}
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_pad_equal_to_eos_cannot_happen(bpe, spm):
  assert len({bpe.pad_id, bpe.eos_id, bpe.bos_id}) == 3
  assert len({spm.pad_id, spm.eos_id, spm.bos_id}) == 3


def test_decode_drops_special_tokens_and_masked_tokens(bpe, spm):
  for tokenizer in (bpe, spm):
    ids = tokenizer.encode("the dog")
    ended = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(ended) == "the dog"
    rows = np.array([ended + [tokenizer.pad_id] * 3], np.int32)
    mask = np.array([[1] * len(ended) + [0] * 3])
    assert tokenizer.decode_batch(rows, mask) == ["the dog"]


def test_what_a_model_samples_beyond_the_vocabulary_is_no_text(bpe):
  ids = [bpe.vocab_size, *bpe.encode("the"), bpe.vocab_size + 7, bpe.eos_id]
  assert bpe.decode_batch([ids], drop_unknown=True) == ["the"]
  with pytest.raises(ValueError, match="outside the vocabulary"):
    bpe.decode_batch([ids])


def test_digits_are_single_tokens(bpe):
  assert len(bpe.encode("123456")) == 6


def test_training_is_deterministic_and_saving_keeps_everything(bpe, tmp_path):
  again = Tokenizer.train_byte_level_bpe(iter(TEXTS), 320)
  assert again.fingerprint == bpe.fingerprint
  other = Tokenizer.train_byte_level_bpe(TEXTS, 300)
  assert other.fingerprint != bpe.fingerprint
  bpe.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  assert loaded.fingerprint == bpe.fingerprint
  assert vars(loaded).keys() == vars(bpe).keys()
  assert (loaded.pad_id, loaded.eos_id, loaded.bos_id) == (0, 1, 2)
  assert loaded.vocab_size == bpe.vocab_size <= 320
  assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_transformers_reads_what_was_saved(bpe, tmp_path):
  bpe.save(tmp_path)
  loaded = Tokenizer.from_pretrained_folder(tmp_path)
  assert loaded.encode(TEXTS[1]) == bpe.encode(TEXTS[1])
  assert (loaded.pad_id, loaded.eos_id, loaded.bos_id) == (0, 1, 2)


def test_saving_over_another_kind_leaves_no_stale_file(bpe, spm, tmp_path):
  bpe.save(tmp_path)
  spm.save(tmp_path)
  assert Tokenizer.load(tmp_path).fingerprint == spm.fingerprint
  bpe.save(tmp_path)
  assert Tokenizer.load(tmp_path).fingerprint == bpe.fingerprint


def test_batch_equals_one_by_one(spm):
  rows = spm.encode_batch(TEXTS[:3], continues=True)
  assert rows == [spm.encode(text, continues=True) for text in TEXTS[:3]]
  assert spm.decode_batch(rows) == [spm.decode(row) for row in rows]
  assert spm.encode_batch([]) == spm.decode_batch([]) == []


def test_half_a_character_decodes_to_the_replacement_character(bpe, spm):
  for tokenizer in (bpe, spm):
    assert tokenizer.decode(tokenizer.encode("a☃")[:-1]).startswith("a")


def test_errors_say_what_to_do(bpe, spm_path, tmp_path):
  with pytest.raises(ValueError, match="at least 259"):
    Tokenizer.train_byte_level_bpe(TEXTS, 258)
  with pytest.raises(ValueError, match="text 1 holds a lone surrogate"):
    bpe.encode_batch(["ok", "x\ud800"])
  with pytest.raises(ValueError, match="outside the vocabulary of"):
    bpe.decode([5, 320])
  with pytest.raises(TokenizerError, match="No such file"):
    Tokenizer.from_sentencepiece(tmp_path / "absent.model")
  with pytest.raises(TokenizerError, match="no such folder"):
    Tokenizer.from_pretrained_folder(tmp_path / "absent")
  with pytest.raises(TokenizerError, match="transformers cannot read"):
    Tokenizer.from_pretrained_folder(tmp_path)
  damaged = tmp_path / "tokenizer.model"
  damaged.write_bytes(b"not a model")
  with pytest.raises(TokenizerError, match="not a sentencepiece model"):
    Tokenizer.load(tmp_path)
  damaged.unlink()
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(TokenizerError, match="tokenizer_config.json"):
    Tokenizer.load(tmp_path)


def test_tokenizer_without_eos_is_refused(tmp_path):
  bpe = Tokenizer.train_byte_level_bpe(TEXTS, 270)
  bpe.save(tmp_path)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config["eos_token"] = None
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(TokenizerError, match="no end-of-sequence token"):
    Tokenizer.load(tmp_path)


def test_gpt2_gives_the_published_ids(data_dir, tmp_path):
  source = data_dir / "gpt2_bpe"
  (tmp_path / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
  (tmp_path / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>",
      "bos_token": "<|endoftext|>",
  }))
  tokenizer = Tokenizer.from_pretrained_folder(tmp_path)
  assert tokenizer.encode("Hello world") == [15496, 995]
  # It has no token to spare for padding, which masks tell.
  assert tokenizer.eos_id == tokenizer.pad_id == 50256
  assert not tokenizer.pad_is_safe
  theirs = exported(tokenizer, tmp_path / "out")
  # Behind its own post-processor.
  assert theirs("Hello world").input_ids == [50256, 15496, 995]
  assert theirs.pad_token is None
  assert tokenizer.vocab_size == 50257


def test_stories_tokenizer(data_dir):
  tokenizer = Tokenizer.from_sentencepiece(
      data_dir / "stories260K" / "tok512.model"
  )
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.vocab_size == 512
  assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
  stories = (data_dir / "tinystories_fragment" / "tiny_stories.txt").read_text()
  rows = tokenizer.encode_batch(stories.split("\n"))
  assert "\n".join(tokenizer.decode_batch(rows)) == stories
