"""The benchmark: its lines, floors, comparisons and missing peers."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import benchmark as configs
from experiments import benchmark as binary
from experiments.harness import (
    benchmark_loads,
    benchmark_peers,
    benchmark_ppo,
    benchmark_programs,
    benchmark_report,
    benchmark_start,
    benchmark_timing,
)
from experiments.harness import config as config_lib
from experiments.harness.benchmark_config import MEASURES, Config
from experiments.harness.benchmark_limits import Limits, Load
from experiments.harness.benchmark_peers import Need, Peer, PeerError, Worker
from experiments.harness.benchmark_timing import Part
from rlhf_jax.losses import language_modeling
from rlhf_jax.models import functions
from rlhf_jax.planning import flops
from rlhf_jax.train_state import create_train_state


def micro(**changes) -> Config:
  """Everything as small as it can be."""
  config = configs.get_config("tiny")
  config.model.update(
      num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8,
      ff_dim=32, vocab_size=32, max_length=32,
  )
  config.update(repeats=2, batch_size=2, num_pairs=1, copy_mib=1)
  config.ppo.rollout_batch_size = 4
  config.ppo.ppo.update(num_epochs=1, num_minibatches=2)
  config.ppo.samples.update(max_prompt_length=4, max_completion_length=4)
  config.update(changes)
  return config_lib.from_config(Config, config)


@pytest.fixture(autouse=True)
def quick_to_compile():
  """What these programs compute is tested elsewhere, and how fast nowhere."""
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


class Rates(Limits):
  """Limits of a machine that is known."""

  bandwidth = 100.0

  def rate(self, shape, layout):
    return {"forward": 10.0, "inputs": 5.0, "weights": 2.0}[layout]


# ---- config ------------------------------------------------------------------


@pytest.mark.parametrize("size", configs.SIZES)
def test_every_size_builds_and_names_every_field(size):
  raw = configs.get_config(size)
  built = config_lib.from_config(Config, raw)
  assert built.size == size
  assert {x.name for x in dataclasses.fields(Config)} == set(raw.keys())
  saved = config_lib.to_dict(built)
  assert config_lib.from_config(Config, saved) == built
  with pytest.raises(ValueError, match="none of tiny, small, gpt2, llama1b"):
    configs.get_config("full")


def test_sizes_are_those_that_are_told():
  shapes = {
      size: configs.get_config(size).model for size in ("tiny", "small", "gpt2")
  }
  assert {
      size: (x.num_layers, x.width, x.num_heads, x.vocab_size)
      for size, x in shapes.items()
  } == {
      "tiny": (4, 128, 4, 512),
      "small": (6, 384, 6, 8192),
      "gpt2": (12, 768, 12, 50257),
  }
  assert configs.get_config("gpt2").ppo.rollout_batch_size == 16
  assert configs.get_config("llama1b").model.dtype == "bfloat16"


def test_an_unknown_measure_names_the_nearest():
  with pytest.raises(config_lib.ConfigError) as error:
    micro(measures=("generaton",))
  assert "'generaton' is unknown; did you mean 'generation'?" in str(
      error.value
  )
  with pytest.raises(config_lib.ConfigError, match="names one twice"):
    micro(measures=("sft", "sft"))


def test_what_floors_do_not_know_is_refused():
  config = configs.get_config("tiny")
  config.ppo.lora.rank = 4
  with pytest.raises(config_lib.ConfigError, match="ppo.lora.rank=4"):
    config_lib.from_config(Config, config)


# ---- a run -------------------------------------------------------------------


def test_every_line_of_a_run_has_its_fields(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
      benchmark_start, "_seconds_to_finish", lambda config, cache: 2.0
  )
  # What the machine can do has a test of its own.
  monkeypatch.setattr(binary, "Limits", Rates)
  out = tmp_path / "out.jsonl"
  options = binary.Options(out=str(out))
  assert not binary.benchmark(micro(), options)
  lines = [json.loads(x) for x in out.read_text().splitlines()]
  assert [x["name"] for x in lines] == [
      "generation", "generation/prefill", "generation/decode", "sft", "reward",
      "dpo", "ppo", "ppo/rollout", "ppo/score", "ppo/update", "startup/cold",
      "startup/warm",
  ]
  for line in lines:
    assert line["by"] == "rlhf_jax" and line["size"] == "tiny"
    assert 0 < line["min"] <= line["value"] <= line["max"]
    assert line["repeats"] == len(line["values"]) == 2
    for name in ("device", "commit", "command", "jax", "time", "driver"):
      assert name in line
    if line["name"].startswith("startup"):
      continue
    assert line["floor"]["seconds"] > 0 and line["floor"]["flops"] > 0
    assert line["share"] == pytest.approx(
        line["floor"]["seconds"] / line["seconds"]
    )
    assert line["share"] >= max(line["matmul_share"], line["memory_share"])
    process = line["process"]
    assert process["compilations"] > 0 and process["compile_seconds"] > 0
    # Whatever has run once runs again as it is.
    assert process["compilations_after_warmup"] == 0
    assert process["peak_bytes"] > 2**20
  by_name = {x["name"]: x for x in lines}
  # Of a sum of its parts: whole and parts are runs of their own.
  assert by_name["ppo"]["floor"]["flops"] == pytest.approx(
      sum(by_name[f"ppo/{x}"]["floor"]["flops"]
          for x in ("rollout", "score", "update"))
  )
  table = capsys.readouterr().out
  assert "| generation/decode" in table and "1 layers of width 16" in table


def test_every_measure_has_a_maker():
  assert set(binary._MAKERS) == set(MEASURES) == set(configs.MEASURES)


def test_a_start_is_timed_until_the_line_that_tells_it_is_finished(monkeypatch):
  told = "import sys, time; sys.stdin.read(); time.sleep(0.2); print({!r})"

  def say(text):
    popen = benchmark_start.subprocess.Popen
    monkeypatch.setattr(
        benchmark_start.subprocess,
        "Popen",
        lambda args, **kwargs: popen([args[0], "-c", told.format(text)],
                                     **kwargs),
    )

  say("finished")
  assert benchmark_start._seconds_to_finish("{}", "cache") > 0.2
  monkeypatch.undo()
  say("no")
  with pytest.raises(benchmark_start.StartError, match="said 'no'"):
    benchmark_start._seconds_to_finish("{}", "cache")


def test_an_iteration_is_of_full_length():
  made = benchmark_ppo.make_iteration(micro())
  step = made.step(made.programs, made.reward_fn)
  _, metrics, evidence = step(made.state, made.batch)
  assert metrics["ppo/ended"].total == 0
  np.testing.assert_array_equal(
      evidence["scored"].rollout.completion_mask, np.ones((4, 4))
  )


def test_a_dpo_step_is_that_of_its_equation():
  config = micro()
  model = functions.make_language_model(config.model)
  params = benchmark_programs.make_params(config, "policy")
  ref_params = benchmark_programs.make_params(config, "policy", seed=1)
  batch = benchmark_programs._pairs(config)
  tokens = batch.tokens[0]

  def loss(params):
    def total(params):
      hidden = model.hidden(params, tokens, jnp.ones_like(tokens))
      logits = model.head(params)(hidden[:, :-1])
      logprobs = language_modeling.selected_logprobs(logits, tokens[:, 1:])
      return logprobs[:, -config.completion_length :].sum(-1)

    score = 0.1 * (total(params) - total(ref_params))
    return jnp.log1p(jnp.exp(score[1] - score[0]))

  tx = optax.sgd(1.0)
  update = benchmark_programs.make_dpo_update(
      model, tx, config.completion_length
  )
  state = create_train_state(params, tx, jax.random.key(0))
  after, _ = jax.jit(update)(state, batch, ref_params)
  grads = jax.jit(jax.grad(loss))(params)
  for old, new, grad in zip(
      *map(jax.tree.leaves, (params, after.params, grads)), strict=True
  ):
    np.testing.assert_allclose(old - new, grad, atol=1e-6)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
  assert largest > 1e-3


# ---- floors ------------------------------------------------------------------


def test_a_floor_is_that_of_a_count_by_hand():
  config = micro()
  rates = Rates("float32", 1)
  # One layer, width 16, feed-forward 32, 32 ids; 4 rows, 1 token, 4 + 2 keys.
  linear = 4 * 16 * 16 + 3 * 16 * 32
  attention = 2 * 16 * 6
  step = 2.0 * 4 * (linear + attention + 16 * 32)
  found = rates.floor([benchmark_loads.decode(config)])
  assert found.flops == 3 * step
  assert found.compute == pytest.approx(3 * step / 10)
  # Weights, what goes in and out of every product, and keys and values.
  activations = 4 * (4 * 32 + 3 * 48) + 2 * 4 * (16 + 6 * 16) + 4 * (16 + 32)
  num_bytes = 4 * (linear + 16 * 32 + activations)
  assert found.bytes == 3 * num_bytes
  assert found.memory == pytest.approx(3 * num_bytes / 100)
  assert found.bound == "compute" and found.seconds == found.compute


def test_training_takes_both_gradients_at_their_own_rates():
  matmul = flops._linear("up", 2, 3, 5)
  found = Rates("float32", 1).floor([Load(matmuls=(matmul,), trained=True)])
  assert found.flops == 3 * 60
  assert found.compute == pytest.approx(60 / 10 + 60 / 5 + 60 / 2)
  assert found.matmul_rate == pytest.approx(180 / found.compute)
  adam = Load(matmuls=(), other_bytes=50.0, times=4)
  assert Rates("float32", 1).floor([adam]).seconds == 2.0


def test_limits_measure_every_layout():
  limits = Limits("float32", 1)
  for layout in ("forward", "inputs", "weights"):
    assert 1e6 < limits.rate((16, 8, 4), layout) < 1e16
  assert 1e6 < limits.bandwidth < 1e14


# ---- comparison --------------------------------------------------------------


def lines(value, low, high, **changes):
  line = dict(
      size="tiny", name="sft", by="rlhf_jax", value=value, min=low, max=high,
      more_is_better=True, skipped="", device="d",
  )
  return [line | changes]


def test_compare_flags_what_is_slower_and_not_noise():
  old = lines(100.0, 95.0, 105.0)
  flagged = lambda *new: benchmark_report.slower(old, lines(*new))
  assert flagged(80.0, 78.0, 82.0) == ["tiny sft: 100 [95, 105] before, 80 "
                                       "[78, 82] now"]
  assert not flagged(80.0, 70.0, 96.0)  # repeats overlap
  assert not benchmark_report.slower(
      lines(100.0, 99.9, 100.1), lines(96.0, 95.9, 96.1)
  )  # apart, and still within the noise
  assert not flagged(120.0, 118.0, 122.0)
  seconds = dict(more_is_better=False)
  assert benchmark_report.slower(
      lines(1.0, 0.9, 1.1, **seconds), lines(1.3, 1.2, 1.4, **seconds)
  )
  assert not benchmark_report.slower(
      lines(1.0, 0.9, 1.1, **seconds), lines(0.7, 0.6, 0.8, **seconds)
  )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"device": "e"}, "on 'd' before and on 'e' now"),
        ({"size": "gpt2"}, r"at \['tiny'\] before and at 'gpt2' now"),
        ({"measures": ("sft", "ppo")}, "not measured before: ppo"),
    ],
)
def test_compare_refuses_at_the_start_what_says_nothing(changes, message):
  old = lines(1.0, 1.0, 1.0)
  now = dict(size="tiny", measures=("sft",), device="d")
  benchmark_report.check_comparable(old, **now)
  with pytest.raises(benchmark_report.CompareError, match=message):
    benchmark_report.check_comparable(old, **now | changes)
  with pytest.raises(benchmark_report.CompareError, match="before"):
    benchmark_report.check_comparable([], **now)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"only_peers": ("trl",)}, "--peer: give it too"),
        ({"peer_python": ("python",)}, "--peer: give it too"),
        ({"peer": True, "only_peers": ("trx",)}, "'trx' is in no peer's name"),
    ],
)
def test_flags_that_would_choose_nothing_are_refused(options, message):
  given = dict(
      peer=False, peer_python=(), only_peers=(), compare="", out=""
  )
  with pytest.raises(PeerError, match=message):
    binary.benchmark(micro(), binary.Options(**given | options))


def test_a_start_up_that_fails_costs_no_other_measure(monkeypatch, tmp_path):
  def fails(config):
    raise benchmark_start.StartError("killed")

  monkeypatch.setitem(binary._MAKERS, "startup", fails)
  out = tmp_path / "out.jsonl"
  options = binary.Options(
      peer=False, peer_python=(), only_peers=(), compare="", out=str(out)
  )
  # It is told at the end, and by the exit code: a gate must not pass by it.
  with pytest.raises(benchmark_start.StartError, match="measured: startup"):
    binary.benchmark(micro(measures=("startup",)), options)
  (line,) = benchmark_report.read_lines(str(out))
  assert line["skipped"] == "killed" and line["value"] is None


def test_a_file_that_is_no_result_is_named_with_its_line(tmp_path):
  path = tmp_path / "old.jsonl"
  path.write_text(json.dumps(lines(1.0, 1.0, 1.0)[0]) + '\n{"a": 1}\n')
  with pytest.raises(benchmark_report.CompareError, match="line 2"):
    benchmark_report.read_lines(str(path))


def test_a_table_tells_how_often_ours_runs_meanwhile():
  part = Part(name="sft", unit="tokens/s", amount=100.0)
  make = lambda by, seconds: benchmark_report.make_line(
      "tiny", by, part, [seconds] * 2
  )
  text = benchmark_report.table([
      make("rlhf_jax", 1.0),
      make("torch", 2.5),
      benchmark_report.skipped("tiny", "TRL", part, "not installed: trl"),
  ])
  assert "2.50x" in text
  assert "- sft by TRL: not installed: trl" in text


# ---- peers -------------------------------------------------------------------


def peer(work: str = "none:x", *needs: Need) -> Peer:
  return Peer(name="a peer", measure="sft", work=work, needs=needs)


def test_a_python_is_chosen_by_what_it_has():
  found = {
      "a": {"trl": "1.16.0"},
      "b": {"trl": "1.12.0", "torch": "2.13.0+cpu"},
  }
  choose = lambda *needs: benchmark_peers.choose_python(
      peer("x:y", *needs), found
  )
  trl = lambda **versions: Need(package="trl", **versions)
  assert choose(trl()) == "a"
  assert choose(trl(below="1.13")) == "b"
  assert choose(trl(least="1.9")) == "a"  # not as text
  with pytest.raises(PeerError, match="not installed: google-tunix; name"):
    choose(Need(package="google-tunix"))
  with pytest.raises(PeerError, match="trl >= 1.16, torch together"):
    choose(trl(least="1.16"), Need(package="torch"))


def test_a_peer_that_is_not_there_is_skipped_with_its_reason(monkeypatch):
  missing = peer("x:y", Need(package="no-such-package"))
  monkeypatch.setattr(benchmark_peers, "PEERS", (missing,))
  config = micro(measures=("sft",), repeats=1)
  compilations = benchmark_timing.Compilations()
  found = binary.measure(
      "sft",
      config,
      Rates("float32", 1),
      compilations,
      benchmark_peers.pythons([]),
  )
  assert [x.by for x in found] == ["rlhf_jax", "a peer"]
  assert "not installed: no-such-package" in found[1].skipped
  assert found[1].value is None


def test_a_worker_that_fails_tells_why():
  with pytest.raises(PeerError, match="ModuleNotFoundError: .*no_such_module"):
    Worker(peer("no_such_module:x"), sys.executable, micro())


@pytest.fixture
def fake_peers(monkeypatch, tmp_path):
  """A folder of peers with the real worker, for what no test has installed."""
  package = tmp_path / "fake_peers"
  package.mkdir()
  real = benchmark_peers._REPO / "experiments/harness/peers"
  for name in ("__init__.py", "worker.py", "turns.py"):
    (package / name).write_text((real / name).read_text())
  monkeypatch.setattr(benchmark_peers, "_WORKER", "fake_peers.worker")
  monkeypatch.setattr(benchmark_peers, "_REPO", tmp_path)
  return package


def test_a_worker_takes_its_turns(fake_peers):
  (fake_peers / "counts.py").write_text(
      "def make(argument, job):\n"
      "  print('noise of a library')\n"
      "  calls = []\n"
      "  def run():\n"
      "    calls.append(0)\n"
      "    if len(calls) > 3: raise ValueError('enough')\n"
      "    return {argument: len(calls) * job['batch_size']}\n"
      "  return run\n"
  )
  one = Worker(peer("counts:sft"), sys.executable, micro())
  # It has warmed up once.
  assert [one.run(), one.run()] == [{"sft": 4}, {"sft": 6}]
  with pytest.raises(PeerError, match="ValueError: enough"):
    one.run()
  one.close()
  assert one._process.returncode == 0


def test_a_worker_that_is_killed_tells_so_and_can_be_closed(fake_peers):
  (fake_peers / "sits.py").write_text(
      "import tempfile\n"
      "def make(argument, job):\n"
      "  open(tempfile.mkdtemp() + '/left', 'w').close()\n"
      "  return lambda: {argument: 1.0}\n"
  )
  one = Worker(peer("sits:sft"), sys.executable, micro())
  folder = pathlib.Path(one._folder.name)
  assert list(folder.glob("*/left"))
  one._process.kill()
  one._process.wait()
  with pytest.raises(PeerError, match="its process ended"):
    one.run()
  one.close()
  assert not folder.exists()


def test_a_trainers_own_loop_takes_its_turns(fake_peers):
  (fake_peers / "trainer.py").write_text(
      "import time\n"
      "from fake_peers.turns import Loop\n"
      "def make(argument, job):\n"
      "  def train():\n"
      "    for step in range(3 + job['warmups']):\n"
      "      loop.wait()\n"
      "      time.sleep(0.1 * step)\n"
      "  loop = Loop(argument, train, lambda: None)\n"
      "  return loop\n"
  )
  one = Worker(peer("trainer:sft"), sys.executable, micro())
  # Step 0 was its warm-up, and 3 has no step after it that would tell its end.
  first, second = one.run()["sft"], one.run()["sft"]
  assert 0.1 <= first < second and second >= 0.2
  with pytest.raises(PeerError, match="its loop has no more steps"):
    one.run()
  one.close()


def test_turns_are_taken_one_by_one_and_a_broken_peer_ends_alone():
  order = []

  class Turn:
    def __init__(self, name, breaks=False):
      self.name, self.breaks = name, breaks

    def run(self):
      order.append(self.name)
      if self.breaks:
        raise PeerError("gone")
      return {"x": 1.0}

  times, failed = binary._take_turns(
      {"a": Turn("a"), "b": Turn("b", breaks=True), "c": Turn("c")}, 2
  )
  assert order == ["a", "b", "c", "a", "c"]
  assert len(times["a"]) == 2 and failed == {"b": "in repeat 1: gone"}


def test_the_models_of_peers_are_of_ours_shapes():
  for size in configs.SIZES:
    config = config_lib.from_config(Config, configs.get_config(size))
    job = benchmark_peers.job(config)
    model, shape = job["model"], config.model
    names = (
        ("n_layer", "n_embd", "n_head")
        if model["model_type"] == "gpt2"
        else ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    assert [model[x] for x in names] == [
        shape.num_layers, shape.width, shape.num_heads
    ]
    assert model["vocab_size"] == shape.vocab_size
    json.dumps(job)
