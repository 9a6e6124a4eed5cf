"""Stages that train adapters, from a base to a folder of peft's."""

import gc
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export, ppo, reward, sft
from experiments.harness import adapters, cli, models, preflight, value_network
from experiments.harness.config import ConfigError, from_config
from rlhf_jax import checkpoint
from rlhf_jax.models import functions, lora
from rlhf_jax.models.families.hf_config import FamilyError
from tests.experiments import tiny

LORA = dict(rank=2, alpha=4.0, targets=("attention/.*", "feed_forward/up"))


def _stage(binary, run, folder, **changes):
  """Runs a stage with an adapter; changes with __ for sections."""
  settings = tiny.stage(binary.__name__.rpartition(".")[2], run)
  settings.lora.update(LORA)
  for name, value in changes.items():
    section = settings
    *parents, last = name.split("__")
    for parent in parents:
      section = section[parent]
    section[last] = value
  binary.run(from_config(binary.Config, settings), str(folder))
  return folder


@pytest.fixture(scope="module")
def promoted():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def sft_run(finished_run, tmp_path_factory, promoted):
  folder = tmp_path_factory.mktemp("lora") / "sft"
  loop = tiny.loop(4, eval_every=2, checkpoint_every=2)
  return _stage(
      sft, finished_run, folder, lora__dropout=0.2, train__loop=loop_of(loop)
  )


def loop_of(changes):
  settings = tiny.pipeline().sft.train.loop
  settings.update(changes)
  return settings


@pytest.fixture(scope="module")
def reward_run(finished_run, tmp_path_factory, promoted):
  folder = tmp_path_factory.mktemp("lora") / "reward"
  return _stage(reward, finished_run, folder, lora__dropout=0.2)


@pytest.fixture(scope="module")
def ppo_run(finished_run, reward_run, tmp_path_factory, promoted):
  folder = tmp_path_factory.mktemp("lora") / "ppo"
  return _stage(ppo, finished_run, folder, **_ppo_changes(reward_run))


def _ppo_changes(reward_run):
  loop = tiny.pipeline().ppo.loop
  loop.update(tiny.loop(4, eval_every=2, checkpoint_every=2))
  return dict(reward_model=str(reward_run), loop=loop)


def _differences(folder, base):
  """Names of the params in which a stage's model differs from its base."""
  found, wanted = tiny.model_arrays(folder), tiny.model_arrays(base)
  assert found.keys() >= wanted.keys()
  return {x for x in wanted if not np.array_equal(found[x], wanted[x])}


def _kernels(*names):
  return {
      "['trunk']['layers']" + "".join(f"['{x}']" for x in (*name.split("/"),
                                                         "kernel"))
      for name in names
  }


ATTENTION = tuple(f"attention/{x}" for x in ("query", "key", "value", "out"))


def test_sft_moves_the_targets_and_nothing_else(sft_run, finished_run):
  assert _differences(sft_run, finished_run / "pretrain") == _kernels(
      *ATTENTION, "feed_forward/up"
  )
  losses = [
      row["eval/loss"]
      for row in tiny.read_jsonl(sft_run / "metrics.jsonl")
      if "eval/loss" in row
  ]
  assert losses[-1] < losses[0]


def test_model_is_base_and_adapter_merged(sft_run, finished_run):
  adapter = adapters.load(sft_run)
  assert adapter.config.rank == 2 and adapter.head is None
  base = models.load_policy(str(finished_run / "pretrain"))
  merged = lora.merge(base.params, adapter.params, adapter.config.scale)
  jax.tree.map(
      np.testing.assert_array_equal,
      merged,
      models.load_policy(str(sft_run)).params,
  )


@pytest.mark.parametrize("name", ["sft_run", "ppo_run"])
def test_checkpoints_hold_no_base_and_are_places(name, request):
  run = request.getfixturevalue(name)
  saved = tiny.last_checkpoint(run)
  assert not [x for x in saved if "kernel" in x and "head" not in x]
  assert not [x for x in saved if "embedding" in x]
  assert any("lora_a" in x for x in saved)
  jax.tree.map(
      np.testing.assert_array_equal,
      models.load_policy(f"{run}@last").params,
      models.load_policy(str(run)).params,
  )


def test_the_same_seed_is_bitwise_the_same_and_a_resumed_run_too(
    sft_run, finished_run, tmp_path
):
  loop = loop_of(tiny.loop(4, eval_every=2, checkpoint_every=2))
  for folder in (_cut(sft_run, tmp_path), tmp_path / "again"):
    _stage(sft, finished_run, folder, lora__dropout=0.2, train__loop=loop)
    _assert_same_run(folder, sft_run)


def test_ppo_resumes_with_both_adapters(
    ppo_run, reward_run, finished_run, tmp_path
):
  cut = _cut(ppo_run, tmp_path)
  assert any("value.adapter" in x for x in tiny.last_checkpoint(cut))
  _stage(ppo, finished_run, cut, **_ppo_changes(reward_run))
  _assert_same_run(cut, ppo_run)


def _cut(run, tmp_path):
  """As a run that was killed after its checkpoint of step 2."""
  cut = shutil.copytree(run, tmp_path / "cut")
  (cut / "finished.json").unlink(missing_ok=True)
  for name in ("model", "adapter", "checkpoints/step_00000004"):
    shutil.rmtree(cut / name)
  assert tiny.last_checkpoint(cut)["step"] == 2
  return cut


def _assert_same_run(found, wanted):
  tiny.assert_bitwise(tiny.model_arrays(found), tiny.model_arrays(wanted))
  tiny.assert_bitwise(
      tiny.last_checkpoint(found), tiny.last_checkpoint(wanted)
  )
  for name in ("metrics.jsonl", "samples.jsonl"):
    assert (found / name).read_bytes() == (wanted / name).read_bytes()


def test_another_base_in_place_is_noticed(sft_run, finished_run, tmp_path):
  base = shutil.copytree(finished_run / "pretrain", tmp_path / "pretrain")
  loop = loop_of(tiny.loop(4, eval_every=2, checkpoint_every=2))
  changes = dict(init_from=str(base), train__loop=loop)
  run = _stage(sft, finished_run, tmp_path / "sft", **changes)
  (run / "finished.json").unlink()
  policy = models.load_policy(str(base))
  models.save_policy(
      base,
      models.Policy(
          policy.config,
          jax.tree.map(lambda x: x * 1.01, policy.params),
          policy.tokenizer,
      ),
  )
  with pytest.raises(ConfigError, match="changed since: base model"):
    _stage(sft, finished_run, tmp_path / "sft", **changes)
  # Ended, by the adapter's folder; and not, by the checkpoint.
  message = "trained an adapter on .*pretrain, whose weights are others"
  for place in (run, _cut(run, tmp_path)):
    with pytest.raises(checkpoint.CheckpointError, match=message):
      models.load_policy(f"{place}@last")
  models.save_policy(base, policy)
  models.load_policy(f"{tmp_path / 'cut'}@last")


def test_checkpoints_are_computed_with_as_in_their_stage(
    finished_run, tmp_path
):
  run = _stage(
      sft,
      finished_run,
      tmp_path / "sft",
      compute__dtype="bfloat16",
      compute__param_dtype="bfloat16",
  )
  ended = models.load_policy(str(run))
  last = models.load_policy(f"{run}@last")
  assert last.config == ended.config and last.config.dtype == "bfloat16"
  jax.tree.map(np.testing.assert_array_equal, last.params, ended.params)
  for name in ("model", "adapter"):
    shutil.rmtree(run / name)
  # As of another machine, whose attention this one does not have.
  path = run / "config.json"
  path.write_text(path.read_text().replace('"auto"', '"cudnn"'))
  last = models.load_policy(f"{run}@last")
  assert last.config.param_dtype == last.config.dtype == "bfloat16"
  jax.tree.map(np.testing.assert_array_equal, last.params, ended.params)


def test_reward_model_is_a_head_and_an_adapter(reward_run, finished_run):
  differ = _differences(reward_run, finished_run / "reward")
  assert differ  # of the same start, but trained whole
  adapter = adapters.load(reward_run)
  assert set(adapter.head) == {"kernel", "bias"}
  base = models.load_policy(str(finished_run / "sft"))
  model = models.load_reward_model(str(reward_run))
  merged = lora.merge(base.params, adapter.params, adapter.config.scale)
  jax.tree.map(
      np.testing.assert_array_equal, model.params["trunk"], merged["trunk"]
  )


def test_ppo_starts_at_its_reference_and_moves_the_targets(
    ppo_run, finished_run
):
  rows = tiny.read_jsonl(ppo_run / "metrics.jsonl")
  by_name = lambda name: [row[name] for row in rows if name in row]
  assert by_name("ppo/kl_exact")[0] == 0 and by_name("eval/kl")[0] == 0
  assert by_name("eval/kl")[-1] != 0
  assert _differences(ppo_run, finished_run / "sft") == _kernels(
      *ATTENTION, "feed_forward/up"
  )


def _ppo_start(finished_run, **changes):
  settings = tiny.stage("ppo", finished_run)
  settings.lora.update(LORA)
  settings.lora.alpha = 3.0  # another than the reward model's
  settings.update(changes)
  config = from_config(ppo.Config, settings)
  policy = models.load_policy(config.init_from)
  reward_model = models.load_reward_model(config.reward_model)
  started = value_network.init_params(
      config, policy, reward_model, jax.random.key(0)
  )
  return policy, reward_model, *started


def test_value_network_from_a_reward_model_on_the_same_base(
    reward_run, finished_run
):
  policy, reward_model, value_config, params, frozen = _ppo_start(
      finished_run, reward_model=str(reward_run)
  )
  assert params["value"].keys() == {"adapter", "head"}
  model = functions.make_policy_value(policy.config, value_config)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(3, tiny.VOCAB_SIZE, (2, 9)), jnp.int32)
  ones = jnp.ones_like(tokens)
  _, values = model.hidden_and_values(frozen | params, tokens, ones, 9)
  score = functions.make_score_fn(reward_model.config)(
      reward_model.params, tokens, ones
  )
  gain, bias = reward_model.normalization.gain, reward_model.normalization.bias
  np.testing.assert_allclose(values[:, -1], gain * score + bias, atol=1e-4)


def test_value_network_from_a_reward_model_on_other_weights_is_refused(
    finished_run,
):
  with pytest.raises(ConfigError, match="has no adapter on the weights of .*s"):
    _ppo_start(finished_run)


@pytest.mark.parametrize(
    "value_network",
    [pytest.param("separate", marks=pytest.mark.slow), "shared"],
)
def test_ppo_with_other_value_networks_and_devices(
    finished_run, tmp_path, value_network
):
  run = _stage(
      ppo,
      finished_run,
      tmp_path / "ppo",
      value_network=value_network,
      value_init="zero",
      mesh__data=2,
      ppo__num_microbatches=2,
  )
  row = tiny.read_jsonl(run / "metrics.jsonl")[1]
  assert row["ppo/value"] == 0 and row["ppo/first_ratio_gap"] < 1e-5


def num_words(prompt, completion):
  """A reward rule, so that no reward model's weights are there."""
  del prompt
  return float(len(completion.split()))


def test_a_whole_ppo_stage_holds_one_embedding(
    finished_run, tmp_path, monkeypatch
):
  found = []

  def look(task, cfg, **_):
    shape = (tiny.VOCAB_SIZE, 16)
    task.evaluate(task.state)
    task.state, _, _ = task.step(task.state, next(task.batches))
    gc.collect()
    alive = [x for x in jax.live_arrays() if id(x) not in others]
    found.append({
        x.unsafe_buffer_pointer()
        for x in alive
        if x.shape == shape and not x.is_deleted()
    })
    return task.state

  monkeypatch.setattr(ppo.loop, "run_loop", look)
  rule = dict(
      reward_model="", reward_rule=f"{__name__}:num_words", value_init="zero"
  )
  gc.collect()
  before = jax.live_arrays()  # kept, so that no id is given anew
  others = {id(x) for x in before}
  _stage(ppo, finished_run, tmp_path / "lora", **rule)
  _stage(ppo, finished_run, tmp_path / "whole", **rule, lora__rank=0)
  # Whole: the policy, the value network, two moments of each, the reference.
  assert [len(x) for x in found] == [1, 7]


def test_ppo_with_dropout_is_refused(finished_run):
  settings = tiny.stage("ppo", finished_run)
  settings.lora.update(LORA, dropout=0.1)
  with pytest.raises(ConfigError, match="lora.dropout=0.1.*set it to 0"):
    from_config(ppo.Config, settings)
  settings.lora.rank = 0  # says nothing of an adapter that is not there
  from_config(ppo.Config, settings)


def test_target_that_is_not_there_is_told(finished_run, tmp_path):
  with pytest.raises(ConfigError, match="lora.targets: 'q_proj' is none of"):
    _stage(sft, finished_run, tmp_path, lora__targets=("q_proj",))


def test_adapter_that_is_not_there_is_missed_before_anything_runs(
    finished_run, tmp_path
):
  settings = tiny.stage("sft", finished_run)
  base = finished_run / "pretrain"  # has a config.json too
  settings.init_from = f"peft:{tmp_path}:hf:{base}"
  config = from_config(sft.Config, settings)
  [problem] = preflight.problems("sft", config)
  assert problem.startswith("sft.init_from: ")
  assert "adapter_config.json': no such file" in problem


# ---- Away, and back ----------------------------------------------------------


@pytest.fixture(scope="module")
def exported(sft_run, finished_run, tmp_path_factory, promoted):
  """(the base's folder, the adapter's)."""
  folder = tmp_path_factory.mktemp("export")
  export.export(
      str(finished_run / "pretrain"), "llama", str(folder / "base"), "policy"
  )
  adapter = str(folder / "adapter")
  export.export_adapter(str(sft_run), "llama", adapter, "policy")
  return folder / "base", folder / "adapter"


def test_exported_adapter_comes_back_as_the_same_model(exported, sft_run):
  base, adapter = exported
  again = models.load_policy(f"peft:{adapter}:hf:{base}")
  ours = models.load_policy(str(sft_run))
  jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
  config = json.loads((adapter / "adapter_config.json").read_text())
  assert config["target_modules"] == [
      "q_proj", "k_proj", "v_proj", "o_proj", "up_proj"
  ]
  assert config["base_model_name_or_path"] is None


def test_imported_adapter_is_a_start_for_another(
    exported, finished_run, tmp_path
):
  base, adapter = exported
  place = f"peft:{adapter}:hf:{base}"
  run = _stage(sft, finished_run, tmp_path / "sft", init_from=place)
  with pytest.raises(FamilyError, match="nothing/config.json: No such file"):
    models.load_policy(f"peft:{adapter}:hf:{tmp_path}/nothing")
  # The base's place is written down where peft looks for it.
  again = _stage(
      sft, finished_run, tmp_path / "other", init_from=f"hf:{base}"
  )
  export.export_adapter(str(again), "llama", str(tmp_path / "out"), "policy")
  config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str(base)
  # Beside the stage, it is written down as @run/base.
  beside = shutil.copytree(base, tmp_path / "base")
  last = _stage(
      sft, finished_run, tmp_path / "third", init_from=f"hf:{beside}"
  )
  export.export_adapter(str(last), "llama", str(tmp_path / "near"), "policy")
  config = json.loads((tmp_path / "near" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str(beside)
  assert (run / "adapter").is_dir()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.skipif(
    any(importlib.util.find_spec(x) is None for x in ("torch", "peft")),
    reason="loads it with peft: pip install -e '.[torch]'",
)
def test_exported_adapter_is_the_same_model_under_peft(exported, sft_run):
  import peft
  import torch
  import transformers

  base, adapter = exported
  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  model = peft.PeftModel.from_pretrained(model, adapter).eval()
  ours = models.load_policy(str(sft_run))
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, tiny.VOCAB_SIZE, (2, 9))
  with torch.no_grad():
    theirs = model(input_ids=torch.as_tensor(tokens)).logits.numpy()
  rows = jnp.asarray(tokens, jnp.int32)
  logits = functions.make_logits_fn(ours.config)(
      ours.params, rows, jnp.ones_like(rows)
  )
  np.testing.assert_allclose(logits, theirs, atol=1e-4)


def test_what_cannot_be_exported_alone_is_told(
    sft_run, reward_run, finished_run, exported, tmp_path
):
  write = lambda place, kind="policy": export.export_adapter(
      str(place), "llama", str(tmp_path / "out"), kind
  )
  with pytest.raises(FileNotFoundError, match="trained no|holds no adapter"):
    write(finished_run / "sft")
  with pytest.raises(cli.UserError, match="adapter of a reward model"):
    write(reward_run)
  with pytest.raises(cli.UserError, match="@last: with --adapter, name the"):
    write(f"{sft_run}@last")
  with pytest.raises(FileNotFoundError, match="variable NO_SUCH is not set"):
    write("${NO_SUCH}/sft")
  with pytest.raises(cli.UserError, match="holds adapter_config.json, .*ad"):
    export.export_adapter(str(sft_run), "llama", str(exported[1]), "policy")
