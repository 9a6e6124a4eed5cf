"""What a user gets wrong on the command line ends in one message."""

import pytest

from experiments.harness import cli
from rlhf_jax.data import chat
from rlhf_jax.rewards.episodes import RuleError
from tests.experiments import tiny

RLHF = str(tiny.REPO / "configs" / "rlhf.py")


def _message(*argv: str) -> str:
  with pytest.raises(cli.UserError) as error:
    cli.check_config_flags(["program", *argv])
  return str(error.value)


@pytest.mark.parametrize("flag, name, near", [
    ("--config.ppo.kl_coef=0.1", "ppo.kl_coef", "ppo.ppo.kl_coef"),
    ("-config.ppo.ppo.kl_cof", "ppo.ppo.kl_cof", "ppo.ppo.kl_coef"),
    ("--noconfig.sft.loop.wandb", "sft.loop.wandb", "sft.train.loop.wandb"),
    ("--config.pppo.seed=1", "pppo.seed", "ppo.seed"),
    ("--config.ppo.seed.x=1", "ppo.seed.x", "ppo.seed"),
])
def test_an_unknown_field_is_told_with_the_nearest(flag, name, near):
  message = _message(f"--config={RLHF}:smoke", flag)
  assert f"--config.{name}: " in message and "no such field" in message
  assert message.partition("did you mean ")[2].startswith(f"--config.{near}")


def test_all_unknown_fields_are_told_at_once():
  message = _message(
      "--config", RLHF, "--config.ppo.kl_coef=0.1", "--config.zzzzzz=1"
  )
  first, second = message.splitlines()
  assert "--config.ppo.kl_coef" in first and "--config.zzzzzz" in second


def test_fields_that_are_there_pass():
  cli.check_config_flags([
      "program",
      f"--config={RLHF}",
      "--config.ppo.ppo.kl_coef=0.1",
      "--config.evaluate.policies[0]=base=x",
      "--noconfig.ppo.loop.wandb",
      "--config.ppo.seed",
      "3",
      "--workdir=/tmp/x",
  ])
  cli.check_config_flags(["program", "--workdir=/tmp/x"])


def test_a_field_that_must_be_given_is_a_field(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
      "from ml_collections import ConfigDict, config_dict\n"
      "def get_config():\n"
      "  return ConfigDict(\n"
      "      dict(a=config_dict.required_placeholder(int), b=dict(c=1)))\n"
  )
  cli.check_config_flags(["program", f"--config={path}", "--config.a=1"])
  assert "mean --config.b.c?" in _message(f"--config={path}", "--config.c=1")


def test_a_config_file_that_cannot_be_used_is_told(tmp_path):
  path = tmp_path / "config.py"
  assert f"no such config file: '{path}'" in _message(f"--config={path}:smoke")
  path.write_text("x = 1\n")
  assert "no function get_config" in _message(f"--config={path}")
  assert "ends in .py" in _message(f"--config={tiny.REPO}/README.md")
  message = _message(f"--config={RLHF}:smok")
  assert "mini-argument 'smok' is none of full, smoke" in message


@pytest.mark.parametrize("flags, part", [
    ((f"--config={RLHF}", "--config.ppo.kl_coef=0.1"), "config.ppo.ppo.kl_c"),
    (("--config=configs/nosuch.py",), "no such config file"),
])
def test_a_binary_ends_with_one_message(flags, part, tmp_path):
  done = tiny.call("rlhf", RLHF, tmp_path / "run", *flags)
  tiny.assert_one_message(done, part)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied", "/x"),
    FileExistsError(17, "File exists", "/x"),
    IsADirectoryError(21, "Is a directory", "/x"),
    NotADirectoryError(20, "Not a directory", "/x"),
    chat.ChatTemplateError("/x"),
    RuleError("/x"),
])
def test_what_the_user_can_mend_has_no_traceback(error, capsys):
  with pytest.raises(SystemExit) as ended, cli.told_errors():
    raise error
  assert ended.value.code == 1
  assert "/x" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError), cli.told_errors():
    raise ZeroDivisionError


def test_a_workdir_that_is_a_file_is_told(tmp_path):
  workdir = tmp_path / "file"
  workdir.write_text("")
  done = tiny.call("rlhf", f"{RLHF}:smoke", workdir)
  tiny.assert_one_message(done, str(workdir))


def test_flags_of_sample_are_checked():
  done = tiny.sample("--policies=x", "--temperature=0", "--num_prompts=0")
  tiny.assert_one_message(
      done,
      "temperature=0.0 must be greater than 0",
      "num_prompts=0 must be 1 or greater",
  )
