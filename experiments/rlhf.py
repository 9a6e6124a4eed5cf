"""The whole of RLHF, from text to a better policy and a report of it.

    python -m experiments.rlhf --config=configs/rlhf.py --workdir=runs/first

  1. pretrain      text -> base model
  2. sft           demonstrations -> policy
  3. preferences   completions of that policy, compared by annotators
  4. reward        comparisons -> reward model
     judge         likewise, an independent one for evaluation (optional)
  5. ppo           policy and reward model -> better policy
  6. evaluate      base, sft and ppo on the same held-out prompts
  7. report        DIR/report.html, and its headline here

Each stage has its own folder in DIR and its own binary. A finished stage is
skipped, an unfinished one resumes; --reuse=RUN links what another run has done
alike. A stage that the config leaves out (None) is
one that another run, or a model on disk, stands in for. `@run/` in a place or
source stands for DIR.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import time
from typing import Any

from absl import flags, logging

from experiments import evaluate, ppo, preferences, pretrain, reward, sft
from experiments.harness import (
    cli,
    evaluator,
    language_model,
    models,
    preflight,
    stage,
)
from experiments.harness.config import ConfigError

STAGES = {
    "pretrain": pretrain.run,
    "sft": sft.run,
    "preferences": preferences.run,
    "reward": reward.run,
    "judge": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
}

_START_AT = flags.DEFINE_string(
    "start_at",
    "",
    f"Passes over the stages before this one ({', '.join(STAGES)}); what it "
    "reads must be there.",
)

_REUSE = flags.DEFINE_string(
    "reuse",
    "",
    "The workdir of another run: its finished stages are linked, up to the "
    "first that this config would run otherwise.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A config for each stage; None leaves it out."""

  pretrain: pretrain.Config | None
  sft: sft.Config | None
  preferences: preferences.Config | None
  reward: reward.Config | None
  judge: reward.Config | None
  ppo: ppo.Config | None
  evaluate: evaluate.Config | None

  def __post_init__(self):
    self._check_lengths()
    controller = self.ppo and self.ppo.ppo
    if (
        self.evaluate
        and controller
        and controller.kl_controller == "adaptive"
        and self.evaluate.kl_target != controller.kl_target
    ):
      raise ValueError(
          f"evaluate.kl_target={self.evaluate.kl_target} must be the adaptive "
          f"controller's ppo.ppo.kl_target={controller.kl_target}"
      )

  def _check_lengths(self) -> None:
    if self.pretrain is None:
      return
    max_length = self.pretrain.model.max_length
    too_long = [
        f"{name}={length}"
        for stage_name in STAGES
        for name, length in self._lengths(stage_name)
        if length > max_length
    ]
    if too_long:
      raise ValueError(
          f"longer than pretrain.model.max_length={max_length}: "
          f"{', '.join(too_long)}"
      )

  def _lengths(self, name: str) -> Iterator[tuple[str, int]]:
    """(field path, tokens) of what a stage has models of this run read."""
    section = getattr(self, name)
    if section is None:
      return
    samplers, scorers = _readers(name, section)
    trained = getattr(section, "init_from", f"{models.RUN}{name}")
    is_own = self._has_own_length(trained)
    is_sampled = any(self._has_own_length(x) for x in samplers)
    is_scored = any(self._has_own_length(x) for x in scorers)
    for path, value in _sections(name, section):
      if isinstance(value, evaluator.SampleConfig):
        length = value.max_prompt_length + value.max_completion_length
        path = f"{path}.max_prompt_length + {path}.max_completion_length"
        if is_scored:
          yield f"{path} + 1 (an end token, to be scored)", length + 1
        elif is_sampled:
          yield path, length
      elif is_own and isinstance(value, reward.Config):
        yield (
            f"{path}.max_prompt_length + {path}.max_completion_length",
            value.max_prompt_length + value.max_completion_length,
        )
      elif is_own and isinstance(value, language_model.LanguageModelConfig):
        yield f"{path}.seq_len", value.seq_len
      elif is_own and isinstance(value, ppo.Config) and value.ppo.ptx_coef:
        yield f"{path}.ptx_seq_len", value.ptx_seq_len

  def _has_own_length(self, place: str) -> bool:
    """Whether the model at `place` will have the pretrained one's shape."""
    seen = set()
    while place.startswith(models.RUN) and place not in seen:
      seen.add(place)  # places that name one another in a ring
      name = place.removeprefix(models.RUN).partition("@")[0].strip("/")
      if name == "pretrain":
        return True
      place = getattr(getattr(self, name, None), "init_from", "")
    return False


def _sections(path: str, section: Any) -> Iterator[tuple[str, Any]]:
  """The section and all sections in it, each with its path."""
  if dataclasses.is_dataclass(section):
    yield path, section
    for field in dataclasses.fields(section):
      inner = getattr(section, field.name)
      yield from _sections(f"{path}.{field.name}", inner)


def _readers(name: str, section: Any) -> tuple[list[str], list[str]]:
  """Places of the policies that read a stage's samples, and of the scorers."""
  if name == "pretrain":
    return [f"{models.RUN}pretrain"], []
  if name == "evaluate":
    return list(section.places.values()), _scorers(section)
  policies = [section.init_from, getattr(section, "ref_policy", "")]
  if name in ("reward", "judge"):
    # The reward model that is trained has the length of its beginning.
    return policies, [section.init_from] if section.ref_policy else []
  return policies, _scorers(section) if name == "ppo" else []


def _scorers(section: ppo.Config | evaluate.Config) -> list[str]:
  judge = section.judge
  is_model = judge.startswith(evaluator.REWARD_MODEL)
  return [
      section.reward_model,
      judge.removeprefix(evaluator.REWARD_MODEL) if is_model else "",
  ]


def run(
    config: Config, workdir: str, start_at: str = "", reuse: str = ""
) -> None:
  """Runs all stages, or those from `start_at` on, or that `reuse` has not."""
  if start_at and start_at not in STAGES:
    raise cli.UserError(
        f"--start_at={start_at!r} is none of {', '.join(STAGES)}"
    )
  names = list(STAGES)
  names = names[names.index(start_at) if start_at else 0 :]
  if reuse and not pathlib.Path(reuse).is_dir():
    raise cli.UserError(f"--reuse={reuse}: no such run")
  _check_inputs(config, workdir, names)
  out = stage.Stage(workdir, config, is_run=True)
  if reuse and stage.is_first():
    _link_finished(config, out.dir, pathlib.Path(reuse).resolve())
  stage.barrier("linked")
  for name in names:
    stage_config = getattr(config, name)
    if stage_config is None:
      continue
    logging.info("rlhf: %s", name)
    start = time.monotonic()
    STAGES[name](in_run(stage_config, workdir), str(out.dir / name))
    logging.info("rlhf: %s took %.1f s", name, time.monotonic() - start)
  # Only now: matplotlib takes a second that a wrong config need not wait for.
  from rlhf_jax.evaluation import report  # pylint: disable=g-import-not-at-top

  if stage.is_first():
    path = report.write_report(out.dir)
    print(report.summary_text(out.dir))
    print(f"\nreport: {path}")
  stages = [x for x in STAGES if getattr(config, x) is not None]
  # --start_at may have passed over some that were never run.
  is_whole = all((out.dir / x / "finished.json").exists() for x in stages)
  if is_whole and not out.finished:
    # Whoever started the run from afar looks here, and for nothing else.
    out.finish({"stages": stages})


def _link_finished(
    config: Config, workdir: pathlib.Path, other: pathlib.Path
) -> None:
  """Links the stages of `other` that this config would only repeat.

  Up to the first that it would not: those after it read what is new.
  """
  for name in STAGES:
    section, mine = getattr(config, name), workdir / name
    if section is None or mine.is_symlink():
      continue
    same = stage.is_done(other / name, in_run(section, str(other)))
    if mine.exists() or not same:
      logging.info("rlhf: nothing is reused from %s on", name)
      return
    mine.symlink_to(other / name, target_is_directory=True)
    logging.info("rlhf: %s is that of %s", name, other)


def _check_inputs(config: Config, workdir: str, names: list[str]) -> None:
  """What a late stage reads and is not there is missed at the start."""
  problems = [
      problem
      for name in names
      if getattr(config, name) is not None
      # A finished stage reads nothing more.
      and not (pathlib.Path(workdir) / name / "finished.json").exists()
      for problem in preflight.problems(name, getattr(config, name))
  ]
  if problems:
    raise ConfigError(
        "what stages are to read is not there:\n  " + "\n  ".join(problems)
    )


def in_run(value: Any, workdir: str) -> Any:
  """The same config with `@run/` made into the run's own folder."""
  if isinstance(value, str):
    # Resolved, so that another spelling of the folder is no other config.
    return value.replace(models.RUN, f"{pathlib.Path(workdir).resolve()}/")
  if isinstance(value, tuple):
    return tuple(in_run(item, workdir) for item in value)
  if dataclasses.is_dataclass(value):
    return dataclasses.replace(
        value,
        **{
            field.name: in_run(getattr(value, field.name), workdir)
            for field in dataclasses.fields(value)
        },
    )
  return value


if __name__ == "__main__":
  cli.launch(
      Config,
      lambda config, workdir: run(
          config, workdir, _START_AT.value, _REUSE.value
      ),
  )
