"""Chat formats of families, each with a small tokenizer of its kind.

    python -m tests.data.chat_families

writes golden_templates/: the two vocabularies and, of each family, the tokens
and masks that transformers makes of `CONVERSATIONS`. The texts in `EXPECTED`
are written by hand from the families' published formats; what the assistant
writes stands in [[ ]].
"""

import dataclasses
import json
import pathlib
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

GOLDEN = pathlib.Path(__file__).parent / "golden_templates"
CORPUS = ["The snow is cold. How are you? I am fine. user system "] * 8
_WORDS = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

SHORT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine, ☃!"},
]
LONG = [
    {"role": "user", "content": "What is\n2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "The  snow?"},
    {"role": "assistant", "content": "Cold.\n\nVery."},
]
SYSTEM = {"role": "system", "content": "Be kind."}


@dataclasses.dataclass(frozen=True)
class Family:
  """special: its tokens; text: tokens that are added and not special.

  prefix: how its tokenizer puts a space before a text's first word.
  """

  prefix: str  # "bytes": none, it has no such sign
  special: tuple[str, ...]
  bos: str | None
  eos: str
  end_of_turn: str
  has_system: bool = True
  strips_behind: bool = False
  text: tuple[str, ...] = ()
  prefixes_are_stable: bool = True


FAMILIES = {
    "llama2": Family("each", ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "llama3": Family(
        "bytes",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
        "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    ),
    "mistral": Family(
        "first", ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>",
        has_system=False,
    ),
    "qwen2": Family(
        "bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None,
        "<|endoftext|>", "<|im_end|>",
    ),
    "qwen3": Family(
        "bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None,
        "<|im_end|>", "<|im_end|>", text=("<think>", "</think>"),
        prefixes_are_stable=False,
    ),
    "gemma": Family(
        "never",
        ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>", "<eos>", "<end_of_turn>", has_system=False,
    ),
    "phi3": Family(
        "each",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>",
         "<|end|>"),
        "<s>", "<|endoftext|>", "<|end|>", strips_behind=True,
    ),
    "olmo2": Family(
        "bytes", ("<|endoftext|>", "<|pad|>"), "<|endoftext|>",
        "<|endoftext|>", "<|endoftext|>",
    ),
}

EXPECTED = {
    ("llama2", "short"): "<s>[INST] How are you? [/INST][[ Fine, ☃! </s>]]",
    ("llama2", "long"): (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhat is\n2+2? [/INST]"
        "[[ 4. </s>]]<s>[INST] The  snow? [/INST][[ Cold.\n\nVery. </s>]]"
    ),
    ("llama3", "short"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "How are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n[[Fine, ☃!<|eot_id|>]]"
    ),
    ("llama3", "long"): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n[[4.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>\n\n"
        "The  snow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "[[Cold.\n\nVery.<|eot_id|>]]"
    ),
    ("mistral", "short"): "<s>[INST] How are you?[/INST][[ Fine, ☃!</s>]]",
    ("mistral", "long"): (
        "<s>[INST] What is\n2+2?[/INST][[ 4.</s>]]"
        "[INST] The  snow?[/INST][[ Cold.\n\nVery.</s>]]"
    ),
    ("qwen2", "short"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n[[Fine, ☃!<|im_end|>]]\n"
    ),
    ("qwen2", "long"): (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhat is\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[4.<|im_end|>]]\n"
        "<|im_start|>user\nThe  snow?<|im_end|>\n"
        "<|im_start|>assistant\n[[Cold.\n\nVery.<|im_end|>]]\n"
    ),
    ("qwen3", "short"): (
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nFine, ☃!<|im_end|>]]\n"
    ),
    ("qwen3", "long"): (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhat is\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[4.<|im_end|>]]\n"
        "<|im_start|>user\nThe  snow?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nCold.\n\nVery.<|im_end|>]]\n"
    ),
    ("gemma", "short"): (
        "<bos><start_of_turn>user\nHow are you?<end_of_turn>\n"
        "<start_of_turn>model\n[[Fine, ☃!<end_of_turn>]]\n"
    ),
    ("gemma", "long"): (
        "<bos><start_of_turn>user\nWhat is\n2+2?<end_of_turn>\n"
        "<start_of_turn>model\n[[4.<end_of_turn>]]\n"
        "<start_of_turn>user\nThe  snow?<end_of_turn>\n"
        "<start_of_turn>model\n[[Cold.\n\nVery.<end_of_turn>]]\n"
    ),
    ("phi3", "short"): (
        "<|user|>\nHow are you?<|end|>\n<|assistant|>\n[[Fine, ☃!<|end|>]]\n"
        "<|endoftext|>"
    ),
    ("phi3", "long"): (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nWhat is\n2+2?<|end|>\n"
        "<|assistant|>\n[[4.<|end|>]]\n<|user|>\nThe  snow?<|end|>\n"
        "<|assistant|>\n[[Cold.\n\nVery.<|end|>]]\n<|endoftext|>"
    ),
    ("olmo2", "short"): (
        "<|endoftext|><|user|>\nHow are you?\n"
        "<|assistant|>\n[[Fine, ☃!<|endoftext|>]]"
    ),
    ("olmo2", "long"): (
        "<|endoftext|><|system|>\nBe kind.\n<|user|>\nWhat is\n2+2?\n"
        "<|assistant|>\n[[4.<|endoftext|>]]\n<|user|>\nThe  snow?\n"
        "<|assistant|>\n[[Cold.\n\nVery.<|endoftext|>]]"
    ),
}


def conversation(name: str, which: str) -> list[dict[str, str]]:
  """The messages of an entry in `EXPECTED`."""
  if which == "short":
    return SHORT
  return [SYSTEM, *LONG] if FAMILIES[name].has_system else LONG


def template(name: str, generation_marks: bool) -> str:
  """A family's Jinja, with or without its {% generation %} marks."""
  source = (GOLDEN / f"{name}.jinja").read_text("utf-8")
  if generation_marks:
    return source
  return re.sub(r"\{% (end)?generation %\}", "", source)


def write_tokenizer(
    folder: pathlib.Path, name: str, generation_marks: bool = False
) -> pathlib.Path:
  """A tokenizer folder of a family, as it comes with a model."""
  family = FAMILIES[name]
  kind = "bytes" if family.prefix == "bytes" else "pieces"
  backend = tokenizers.Tokenizer.from_file(str(GOLDEN / f"{kind}.json"))
  if kind == "pieces":
    _use_prefix(backend, family.prefix)
  backend.add_tokens([
      tokenizers.AddedToken(
          x, special=True, normalized=False,
          rstrip=family.strips_behind and x.startswith("<|"),
      )
      for x in family.special
  ])
  backend.add_tokens([
      tokenizers.AddedToken(x, special=False, normalized=False)
      for x in family.text
  ])
  folder.mkdir(parents=True, exist_ok=True)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": family.bos,
      "eos_token": family.eos,
      "chat_template": template(name, generation_marks),
  }))
  return folder


def _use_prefix(backend: tokenizers.Tokenizer, prefix: str) -> None:
  space = normalizers.Replace(" ", "▁")
  strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
  if prefix == "each":
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), space]
    )
  elif prefix == "first":
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first", split=False
    )
  else:
    backend.normalizer = space
  backend.decoder = decoders.Sequence([
      decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
      *strip,
  ])


def _train(kind: str) -> tokenizers.Tokenizer:
  if kind == "bytes":
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    alphabet, initial = sorted(pre_tokenizers.ByteLevel.alphabet()), []
  else:
    backend = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet, initial = [], [f"<0x{i:02X}>" for i in range(256)]
  backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
      vocab_size=300, initial_alphabet=alphabet, special_tokens=initial,
      show_progress=False,
  ))
  if kind == "bytes":
    return backend
  # Bytes are ordinary tokens of the model and none that text could spell.
  spec = json.loads(backend.to_str())
  spec["added_tokens"], spec["pre_tokenizer"] = [], None
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _golden(name: str, which: str, folder: pathlib.Path) -> dict:
  """Of the hand-written text, by transformers; masks by its offsets."""
  import transformers

  fast = transformers.AutoTokenizer.from_pretrained(folder)
  expected = EXPECTED[name, which]
  plain = re.sub(r"\[\[|\]\]", "", expected)
  found = fast(plain, add_special_tokens=False, return_offsets_mapping=True)
  inside, is_inside = [], False
  for part in re.split(r"(\[\[|\]\])", expected):
    if part in ("[[", "]]"):
      is_inside = part == "[["
    else:
      inside += [is_inside] * len(part)
  ids = found["input_ids"]
  mask = [_is_inside(plain, inside, *x) for x in found["offset_mapping"]]
  prompt = expected[: expected.rindex("[[")]
  prompt = re.sub(r"\[\[|\]\]", "", prompt)
  return {
      "tokens": fast.convert_ids_to_tokens(ids),
      "ids": ids,
      "mask": mask,
      "prompt_ids": fast(prompt, add_special_tokens=False)["input_ids"],
  }


def _is_inside(text: str, inside: list[bool], start: int, end: int) -> int:
  """Some special tokens take the white space behind them along."""
  places = [i for i in range(start, end) if not text[i].isspace()]
  return int(all(inside[i] for i in places or range(start, end)))


def _write() -> None:
  import tempfile

  for kind in ("bytes", "pieces"):
    (GOLDEN / f"{kind}.json").write_text(
        json.dumps(json.loads(_train(kind).to_str()), ensure_ascii=False)
        + "\n", "utf-8",
    )
  with tempfile.TemporaryDirectory() as folder:
    for name in FAMILIES:
      path = write_tokenizer(pathlib.Path(folder) / name, name)
      golden = {
          which: _golden(name, which, path) for which in ("short", "long")
      }
      lines = ",\n".join(
          f' "{which} {key}": {json.dumps(value, ensure_ascii=False)}'
          for which, fields in golden.items()
          for key, value in fields.items()
      )
      (GOLDEN / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")


if __name__ == "__main__":
  _write()
