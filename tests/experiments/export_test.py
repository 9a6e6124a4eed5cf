"""Models taken away in Hugging Face's layout, and brought back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from configs import train_tokenizer as tokenizer_config
from experiments import export, sft
from experiments.harness import cli, models
from experiments.harness.config import from_config
from rlhf_jax.data import chat
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions
from rlhf_jax.models.families import huggingface
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.types import ScoreNormalization
from tests.experiments import tiny
from tests.models.families import bucket, hf_models
from tests.models.small import random_params, small_config


def test_a_trained_policy_comes_back_bitwise_with_its_tokenizer(
    finished_run, tmp_path
):
  folder = tmp_path / "out"
  export.export(str(finished_run / "ppo"), "llama", str(folder), "policy")
  ours = models.load_policy(str(finished_run / "ppo"))
  back = models.load_policy(f"hf:{folder}")
  assert back.config == ours.config
  jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)
  text = "What color is the cat?\n"
  assert back.tokenizer.encode(text) == ours.tokenizer.encode(text)
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"]
  assert config["eos_token_id"] == ours.tokenizer.eos_id
  with pytest.raises(cli.UserError, match="holds config.json, .* already"):
    export.export(str(finished_run / "ppo"), "llama", str(folder), "policy")


def test_a_bucket_holds_a_model_with_its_tokenizer(finished_run, tmp_path):
  with bucket.mocked(tmp_path):
    export.export(
        str(finished_run / "sft"), "llama", "gs://bucket/out", "policy"
    )
    with pytest.raises(cli.UserError, match="holds config.json, .* already"):
      export.export(
          str(finished_run / "sft"), "llama", "gs://bucket/out", "policy"
      )
    back = models.load_policy("hf:gs://bucket/out")
    with pytest.raises(FileNotFoundError, match="gs://bucket/none"):
      models.load_tokenizer("hf:gs://bucket/none")
  ours = models.load_policy(str(finished_run / "sft"))
  jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)
  assert back.tokenizer.encode("a cat\n") == ours.tokenizer.encode("a cat\n")


def test_nothing_of_another_model_is_touched(finished_run, tmp_path):
  place = str(finished_run / "sft")
  for name in ("tokenizer.model", "tokenizer.json", "model-01.safetensors"):
    folder = tmp_path / name.replace(".", "_")
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "notes.txt").write_text("is no part of a model")
    write = [export.export]
    if name.endswith(".safetensors"):
      write.append(export.export_adapter)
    for function in write:
      with pytest.raises(cli.UserError, match=f"holds {name} already"):
        function(place, "llama", str(folder), "policy")
    assert len(list(folder.iterdir())) == 2
    assert (folder / name).read_text() == "mine"
  with bucket.mocked(tmp_path):
    with pytest.raises(cli.UserError, match="holds tokenizer.model already"):
      export.export(place, "llama", "gs://bucket/tokenizer_model", "policy")


@pytest.mark.parametrize(
    "family, message", [("lama", "--family: model_type='lama' is none of"),
                        ("gpt2", "the family cannot express this model: act")]
)
def test_a_family_is_checked_before_anything_is_written(
    finished_run, tmp_path, family, message
):
  out = tmp_path / "out"
  with pytest.raises(huggingface.FamilyError, match=message):
    export.export(str(finished_run / "sft"), family, str(out), "policy")
  assert not out.exists()


def test_a_reward_model_keeps_the_differences_of_its_scores(
    finished_run, tmp_path
):
  folder = tmp_path / "out"
  export.export(
      str(finished_run / "reward"), "llama", str(folder), "reward_model"
  )
  ours = models.load_reward_model(str(finished_run / "reward"))
  back = models.load_reward_model(f"hf:{folder}")
  tokens = np.random.default_rng(0).integers(3, tiny.VOCAB_SIZE, (5, 9))
  rows = jnp.asarray(tokens, jnp.int32)
  raw = [
      functions.make_score_fn(x.config)(x.params, rows, jnp.ones_like(rows))
      for x in (ours, back)
  ]
  scores = raw[0] * float(ours.normalization.gain)
  np.testing.assert_allclose(
      np.diff(raw[1]), np.diff(scores), rtol=1e-4, atol=1e-6
  )
  with pytest.raises(FileNotFoundError, match="a policy is needed here"):
    models.load_policy(f"hf:{folder}")


TALK = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
]
SHAPE = small_config(vocab_size=280, num_layers=1, width=16, ff_dim=24)


def saved_policy(tmp_path, tokenizer) -> str:
  place = tmp_path / "policy"
  params = functions.init_language_model(jax.random.key(0), SHAPE)
  models.save_policy(place, models.Policy(SHAPE, params, tokenizer))
  return str(place)


def test_a_chat_policy_is_asked_by_its_template(tmp_path):
  tokenizer = Tokenizer.train_byte_level_bpe(
      ["Hi Ho"], 280, tokenizer_config.CHAT_TOKENS,
      tokenizer_config.CHAT_TEMPLATE,
  )
  place = saved_policy(tmp_path, tokenizer)
  flags = ["--prompts=Hi", "--max_completion_length=4", f"--policies={place}"]
  done = tiny.sample(*flags, "--chat_template=tokenizer")
  assert done.returncode == 0 and f"[{place}]" in done.stdout, done.stderr
  # As long as the model reads it would be without the template.
  longest = SHAPE.max_length - 4
  done = tiny.sample(
      f"--prompts={'?' * (longest - 6)}", *flags[1:],
      "--chat_template=tokenizer",
  )
  tiny.assert_one_message(done, "is too short for a prompt")


def test_a_chat_template_and_all_ends_travel_along(tmp_path):
  import transformers

  tokenizer = Tokenizer.train_byte_level_bpe(
      ["Hi Ho"], 280, tokenizer_config.CHAT_TOKENS,
      tokenizer_config.CHAT_TEMPLATE,
  )
  assert tokenizer.eos_ids == (1, 4)
  out = tmp_path / "out"
  export.export(saved_policy(tmp_path, tokenizer), "llama", str(out), "policy")
  for name in ("config.json", "generation_config.json"):
    fields = json.loads((out / name).read_text())
    assert fields["eos_token_id"] == [1, 4] and fields["pad_token_id"] == 0
  back = models.load_policy(f"hf:{out}").tokenizer
  assert back.eos_ids == (1, 4) and back.chat_template
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  assert theirs.apply_chat_template(
      TALK[:1], add_generation_prompt=True, return_dict=False
  ) == back.encode_rows(
      [[chat.render_prompt(TALK[:1], back.template("tokenizer"))]]
  )[0][0]


def test_a_sentencepiece_tokenizer_is_the_same_elsewhere(tmp_path):
  import transformers

  (tmp_path / "text").write_text("a little dog\nthe little cat\n" * 9)
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"),
      vocab_size=275, model_type="bpe", byte_fallback=True, minloglevel=2,
      hard_vocab_limit=False,
  )
  tokenizer = Tokenizer.from_sentencepiece(tmp_path / "m.model")
  out = tmp_path / "out"
  export.export(saved_policy(tmp_path, tokenizer), "llama", str(out), "policy")
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  back = models.load_policy(f"hf:{out}").tokenizer
  for text in ("a dog", " a\n cat", "☃"):
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs(text).input_ids == ids
    assert [back.bos_id, *back.encode(text)] == ids
    # As a completion, which goes on, has no space before it.
    assert back.encode(text, continues=True) == (
        tokenizer.encode(text, continues=True)
    )


def exported_reward_model(tmp_path, tokenizer):
  params = small_reward_params()
  one = ScoreNormalization(gain=jnp.float32(2), bias=jnp.float32(0))
  models.save_reward_model(
      tmp_path / "reward", models.RewardModel(SHAPE, params, one, tokenizer)
  )
  out = tmp_path / "out"
  export.export(str(tmp_path / "reward"), "llama", str(out), "reward_model")
  import transformers

  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
      out, attn_implementation="eager"
  )
  return params, theirs, transformers.AutoTokenizer.from_pretrained(out)


def small_reward_params():
  params = random_params(ScalarModel(SHAPE))
  return {**params, "head": {**params["head"], "bias": jnp.zeros(1)}}


TEXTS = ["Hi", "Ho, ho, ho!", "", "Hi Ho"]


def our_scores(params, tokenizer, with_end=True):
  scores = []
  for text in TEXTS:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    ids = jnp.asarray([ids + [tokenizer.eos_id] * with_end], jnp.int32)
    score_fn = functions.make_score_fn(SHAPE)
    scores.append(2 * float(score_fn(params, ids, jnp.ones_like(ids))[0]))
  return scores


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("end", ["<eos>", ""])
def test_torch_scores_padded_batches_of_an_exported_reward_model(
    tmp_path, side, end
):
  torch = pytest.importorskip("torch", reason="compares with torch")
  tokenizer = Tokenizer.train_byte_level_bpe(["Hi Ho"], 270)
  params, theirs, fast = exported_reward_model(tmp_path, tokenizer)
  fast.padding_side = side
  inputs = fast([x + end for x in TEXTS], padding=True, return_tensors="pt")
  assert inputs.attention_mask.min() == 0  # rows are padded
  with torch.no_grad():
    scores = theirs(**inputs).logits[:, 0]
  wanted = our_scores(params, tokenizer, with_end=bool(end))
  np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_no_padding_token_is_told_where_there_is_none_to_spare(
    tmp_path, caplog
):
  """An ordinary token would end rows early, and the end token too."""
  torch = pytest.importorskip("torch", reason="compares with torch")
  whole = Tokenizer.train_byte_level_bpe(["Hi Ho"], 270)
  whole.save(tmp_path / "start")
  path = tmp_path / "start" / "tokenizer_config.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {"pad_token": fields["eos_token"]}))
  for name in ("tokenizer.json", "tokenizer_config.json"):
    path = tmp_path / "start" / name
    path.write_text(path.read_text().replace("<pad>", "<zero>"))
  tokenizer = Tokenizer.from_pretrained_folder(tmp_path / "start")
  assert tokenizer.pad_id == tokenizer.eos_id
  params, theirs, fast = exported_reward_model(tmp_path, tokenizer)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["pad_token_id"] is None and fast.pad_token is None
  assert "no token for padding alone" in caplog.text
  rows = [fast(x + "<eos>", return_tensors="pt") for x in TEXTS]
  with torch.no_grad():
    scores = [float(theirs(**row).logits[0, 0]) for row in rows]
    np.testing.assert_allclose(
        scores, our_scores(params, tokenizer), atol=1e-4
    )
    with pytest.raises(ValueError, match="batch sizes > 1"):
      theirs(torch.zeros((2, 3), dtype=torch.int64))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("gpt_neox", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_sft_of_an_imported_model_and_its_way_back(
    finished_run, tmp_path, name
):
  """Of a golden model's shape, with a vocabulary that a tokenizer has."""
  golden = huggingface.load_folder(hf_models.GOLDEN / name)
  config = dataclasses.replace(golden.config, vocab_size=tiny.VOCAB_SIZE)
  params = functions.init_language_model(jax.random.key(0), config)
  start = tmp_path / "start"
  huggingface.save_folder(start, config, params, family=name)
  tokenizer = models.load_policy(str(finished_run / "sft")).tokenizer
  tokenizer.save(start)

  settings = tiny.stage("sft", finished_run)
  settings.init_from = f"hf:{start}"
  sft.run(from_config(sft.Config, settings), str(tmp_path / "sft"))
  export.export(str(tmp_path / "sft"), name, str(tmp_path / "out"), "policy")
  trained = models.load_policy(str(tmp_path / "sft"))
  back = models.load_policy(f"hf:{tmp_path / 'out'}")
  assert back.config == trained.config == config
  jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)
  first = jax.tree.leaves(params)[0]
  assert not np.array_equal(first, jax.tree.leaves(trained.params)[0])
