"""One program an iteration gives what three give, to the last bit."""

import dataclasses

import pytest

from experiments import ppo
from experiments.harness.config import ConfigError, from_config
from rlhf_jax.data import tokenizer
from tests.experiments import tiny


def _run(finished_run, workdir, **changes):
  """A PPO stage of three iterations: its metrics by step."""
  config = tiny.stage("ppo", finished_run)
  config.loop.update(tiny.loop(3, eval_every=3, checkpoint_every=3))
  config.optimizer.learning_rate = 0.01
  config.mesh.data = 2
  config.update(changes)
  ppo.run(from_config(ppo.Config, config), str(workdir))
  rows = tiny.read_jsonl(workdir / "metrics.jsonl")
  return [row for row in rows if "ppo/score" in row]


def test_equals_the_programs_apart_bitwise(finished_run, tmp_path):
  with_ptx = dict(
      ppo=dict(ptx_coef=0.5),
      ptx_documents=tiny.stage("pretrain", finished_run).documents,
      ptx_batch_size=8,
      ptx_seq_len=16,
  )
  wanted = _run(finished_run, tmp_path / "apart", **with_ptx)
  found = _run(
      finished_run, tmp_path / "fused", fuse_iteration=True, **with_ptx
  )
  assert len(found) == len(wanted) == 3
  for row, other in zip(found, wanted):
    names = [name for name in other if name.startswith("ppo/")]
    assert "ppo/ptx_loss" in names
    assert [row[x] for x in names] == [other[x] for x in names]
  for read in (tiny.model_arrays, tiny.last_checkpoint):
    tiny.assert_bitwise(read(tmp_path / "fused"), read(tmp_path / "apart"))


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {
                "reward_rule": "any:rule",
                "reward_model": "",
                "value_init": "policy",
            },
            "fuse_iteration=True with reward_rule='any:rule': a rule reads",
        ),
        (
            {"overlap": 1, "ppo": {"importance_correction": True}},
            "fuse_iteration=True with overlap=1",
        ),
        (
            {"placement": {"reward_model": {"devices": 2}}},
            "fuse_iteration=True with placement=.*one mesh",
        ),
        ({"parallelism": "pmap"}, "True with parallelism='pmap'"),
    ],
)
def test_what_cannot_be_one_program_is_refused(finished_run, changes, message):
  config = tiny.stage("ppo", finished_run)
  config.fuse_iteration = True
  config.update(changes)
  with pytest.raises(ConfigError, match=message):
    from_config(ppo.Config, config)


def test_a_reward_model_of_another_tokenizer_is_refused(
    finished_run, tmp_path, monkeypatch
):
  load = ppo.models.load_reward_model

  def loaded(*args):
    model = load(*args)
    other = tokenizer.Tokenizer.train_byte_level_bpe(["ab"], 300)
    return dataclasses.replace(model, tokenizer=other)

  monkeypatch.setattr(ppo.models, "load_reward_model", loaded)
  with pytest.raises(ConfigError, match="another tokenizer.*fuse_iteration"):
    _run(
        finished_run, tmp_path, fuse_iteration=True, value_init="policy"
    )
