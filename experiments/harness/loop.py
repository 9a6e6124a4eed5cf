"""The one training loop: resume, step, log, evaluate, save, guard.

  1. Restore: the newest whole checkpoint of this workdir, if there is one; the
     metric files are cut back to its step, the data iterator set to it. If the
     stage's inputs are not those that it was saved with, the run is refused.
  2. Step: while one step runs on the device, the metrics of the one before it
     are fetched.
  3. Guard: an optimizer step that was not finite changed nothing; its batch is
     saved, and after `max_nonfinite_steps` in a row the run stops and names the
     tensor.
  4. Log every `log_every` steps, evaluate every `eval_every` (and at step 0),
     save every `checkpoint_every` and at the end.
  5. Stop: when it is told to (`harness/stopping.py`), it saves where it is,
     with the sums of what is not logged yet.

A stage gives it `step(state, batch) -> (state, metrics, evidence)`, where
`evidence` is the pytree of arrays worth saving should the step go wrong, and
`evaluate(state) -> (numbers, sample rows)`.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import sys
import time
from typing import Any, Literal

from absl import logging
import jax
import numpy as np
import tqdm

from experiments.harness import stopping
from experiments.harness.config import ConfigError
from experiments.harness.fingerprint import fingerprint
from experiments.harness.metric_writer import MetricWriter
from experiments.harness.stage import FREE_FIELDS, is_first
from rlhf_jax import checkpoint, device_mesh
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.updates.gradient import NONFINITE, NONFINITE_STEPS


class NonFiniteError(RuntimeError):
  """Training stopped because losses or gradients were NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
  """How long, and how often what. In steps (PPO: iterations), but for one.

  The stage's model/ is that of the last step; FOLDER@best names the best
  checkpoint, for whatever takes a policy's place.

  best_metric: the evaluation's number by which the best checkpoint is kept,
    '' to keep none.
  max_nonfinite_steps: the run stops at so many in a row, in optimizer steps
    (PPO: minibatches), counted when a step (iteration) ends.
  """

  num_steps: int
  log_every: int
  eval_every: int
  checkpoint_every: int
  keep_checkpoints: int
  best_metric: str
  best_mode: Literal["min", "max"]
  max_nonfinite_steps: int
  tensorboard: bool
  wandb: bool

  def __post_init__(self):
    for name in (
        "num_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_nonfinite_steps",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
    # Averages that span a checkpoint would not survive a kill.
    if self.checkpoint_every % self.log_every:
      raise ValueError(
          f"checkpoint_every={self.checkpoint_every} must be a multiple of "
          f"log_every={self.log_every}"
      )
    if self.best_metric and self.checkpoint_every % self.eval_every:
      raise ValueError(
          f"checkpoint_every={self.checkpoint_every} must be a multiple of "
          f"eval_every={self.eval_every} for best_metric={self.best_metric!r} "
          "to be known when a checkpoint is saved"
      )


@dataclasses.dataclass
class Task:
  """What a stage hands to the loop; see the module's docstring.

  step: its metrics hold 'nonfinite/steps', how many of how many optimizer
    steps were not applied; see `updates/gradient.py`.
  batches: an iterator with get_state() and set_state().
  skipped_steps: how many optimizer steps in a row were not applied.
  unit: what one call of `step` is called.
  inputs: what the stage read from other places, a pytree of arrays under each
    name: data, and models that train others. Places stay what they are when
    their contents change, so a resumed run compares these.
  make_writer: of what takes the lines, as `MetricWriter` does.
  named: what the metrics of a step are called, once they are on the host; of
    several runs in one state, each metric under '<run>/<its name>'.
  """

  name: str
  state: Any
  step: Callable[[Any, Any], tuple[Any, metrics_lib.Metrics, Any]]
  batches: Any
  evaluate: Callable[[Any], tuple[dict[str, float], list[dict]]]
  skipped_steps: Callable[[Any], Any]
  unit: Literal["step", "iteration"] = "step"
  inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
  make_writer: Callable[..., Any] = MetricWriter
  named: Callable[[Any], metrics_lib.Metrics] = lambda metrics: metrics


def run_loop(
    task: Task, cfg: LoopConfig, *, workdir: str, config: dict
) -> Any:
  """Trains to `cfg.num_steps` and returns the final state.

  Args:
    config: the stage's whole config; a checkpoint of another one is refused.

  Raises:
    checkpoint.ConfigMismatch: if the workdir holds a run of another config.
    ConfigError: if it holds a run of other inputs.
    NonFiniteError: after too many steps in a row that were not finite.
    stopping.Stopped: it was told to stop, and has saved.
  """
  writer = task.make_writer(
      workdir, tensorboard=cfg.tensorboard, wandb=cfg.wandb
  )
  checkpointer = checkpoint.Checkpointer(
      pathlib.Path(workdir) / "checkpoints",
      keep_last=cfg.keep_checkpoints,
      best_metric=cfg.best_metric or None,
      best_mode=cfg.best_mode,
      config=config,
      free_fields=FREE_FIELDS,
  )
  fingerprints = {name: fingerprint(x) for name, x in task.inputs.items()}
  try:
    with stopping.between_steps():
      start, totals = _restore(
          task, fingerprints, checkpointer, writer, workdir
      )
      _Loop(
          task, fingerprints, cfg, workdir, writer, checkpointer, totals
      ).run(start)
      checkpointer.wait()
  finally:
    checkpointer.close()
    writer.close()
  return task.state


def _restore(
    task: Task,
    fingerprints: dict[str, str],
    checkpointer: checkpoint.Checkpointer,
    writer: MetricWriter,
    workdir: str,
) -> tuple[int, metrics_lib.Metrics]:
  """The step to go on from, and the sums that its checkpoint had not logged."""
  restored = checkpointer.restore_latest(task.state, donate=True)
  if restored is None:
    writer.truncate_after(-1)
    return 0, {}
  step, task.state, saved = restored
  names = sorted(fingerprints.keys() | saved["inputs"].keys())
  changed = [x for x in names if fingerprints.get(x) != saved["inputs"].get(x)]
  if changed:
    raise ConfigError(
        f"{workdir} cannot go on from step {step}: what {task.name} reads has "
        f"changed since: {', '.join(changed)}. Put back what was there, or "
        "start anew in another --workdir"
    )
  task.batches.set_state(saved["batches"])
  writer.truncate_after(step)
  for name, num_lines in saved["lines"].items():
    if is_first() and writer.num_lines[name] < num_lines:
      # Not by a kill: what is written before a checkpoint is there after it.
      logging.warning(
          "%s has lost lines of steps up to %d: %d of %d are left; the run "
          "goes on, but what they said is gone",
          pathlib.Path(workdir) / name,
          step,
          writer.num_lines[name],
          num_lines,
      )
  logging.info("%s: resumed at step %d", task.name, step)
  return step, {
      name: metrics_lib.Metric(
          total=np.float32(total), count=np.float32(count)
      )
      for name, (total, count) in saved["totals"].items()
  }


class _Loop:
  """The loop's running parts, together only so that methods can share them."""

  def __init__(
      self, task, fingerprints, cfg, workdir, writer, checkpointer, totals
  ):
    self.task, self.cfg, self.workdir = task, cfg, pathlib.Path(workdir)
    self.fingerprints = fingerprints
    self.writer, self.checkpointer = writer, checkpointer
    self.pending = None
    self.totals: metrics_lib.Metrics = totals
    self.saved = -1
    self.evaluated: tuple[int, dict[str, float]] = (-1, {})

  def run(self, start: int) -> None:
    self.saved = start
    if start == 0:
      self._evaluate(0)
    steps = tqdm.tqdm(
        range(start + 1, self.cfg.num_steps + 1),
        initial=start,
        total=self.cfg.num_steps,
        desc=self.task.name,
        file=sys.stderr,
        disable=not is_first(),
        mininterval=1.0 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    clock, clock_step = time.monotonic(), start
    for step in steps:
      self._stop_if_told(step - 1)
      batch = next(self.task.batches)
      self.task.state, metrics, evidence = self.task.step(
          self.task.state, batch
      )
      # A copy: the state is donated to the next step before this is read.
      skipped = self.task.skipped_steps(self.task.state) + 0
      self._flush()
      self.pending = (step, metrics, skipped, evidence)
      if step % self.cfg.log_every == 0 or step == self.cfg.num_steps:
        self._flush()
        steps.set_postfix(self._log(step), refresh=False)
        now = time.monotonic()
        seconds = (now - clock) / (step - clock_step)
        self.writer.timing(step, {"seconds_per_step": seconds})
        clock, clock_step = now, step
      if step % self.cfg.eval_every == 0 or step == self.cfg.num_steps:
        self._evaluate(step)
      if step % self.cfg.checkpoint_every == 0 or step == self.cfg.num_steps:
        self._save(step)
    # The signal may have come since: what is left of the stage can wait.
    self._stop_if_told(self.cfg.num_steps)

  def _flush(self) -> None:
    """Fetches the metrics of the step before; stops the run if they are bad."""
    if self.pending is None:
      return
    step, metrics, skipped, evidence = self.pending
    self.pending = None
    metrics, skipped = jax.device_get((metrics, skipped))
    metrics = self.task.named(metrics)
    # Of several runs these stand behind the run's name.
    culprits = [
        name.replace(NONFINITE, "")
        for name, metric in metrics.items()
        if NONFINITE in name
        and not name.endswith(NONFINITE_STEPS)
        and metric.total > 0
    ]
    kept = {
        name: metric
        for name, metric in metrics.items()
        if (name.endswith(NONFINITE_STEPS) or NONFINITE not in name)
        # What was computed from NaN would hide the mean of what was not.
        and np.isfinite(metric.total)
    }
    self.totals = metrics_lib.add(self.totals, kept)
    if culprits:
      steps = [x for n, x in metrics.items() if n.endswith(NONFINITE_STEPS)]
      num_bad, num_steps = (
          int(sum(x)) for x in zip(*((x.total, x.count) for x in steps))
      )
      what = self._not_applied(step, num_bad, num_steps)
      message = f"{what}: NaN or Inf in {', '.join(culprits)}."
      self._report_nonfinite(step, message, int(np.max(skipped)), evidence)

  def _not_applied(self, step: int, num_bad: int, num_steps: int) -> str:
    name = f"{self.task.unit} {step}"
    if num_steps == 1:
      return f"{name} was not applied"
    return (
        f"{num_bad} of {num_steps} optimizer steps of {name} were not applied"
    )

  def _report_nonfinite(self, step, message, skipped, evidence) -> None:
    folder = self.workdir / "nonfinite"
    path = folder / f"step_{step}.npz"
    arrays = {
        jax.tree_util.keystr(key, simple=True, separator="."): x
        for key, x in jax.tree_util.tree_leaves_with_path(
            device_mesh.to_host(evidence)
        )
    }
    if is_first():
      folder.mkdir(exist_ok=True)
      np.savez(path, **arrays)
    message = f"{self.task.name}: {message} Its batch is in {path}."
    if skipped >= self.cfg.max_nonfinite_steps:
      raise NonFiniteError(
          f"{message} By now {skipped} optimizer steps in a row were not "
          f"applied, and max_nonfinite_steps is "
          f"{self.cfg.max_nonfinite_steps}. Lower the learning rate or look at "
          "that batch."
      )
    logging.warning(message)

  def _log(self, step: int) -> dict[str, str]:
    numbers = metrics_lib.compute(self.totals)
    self.totals = {}
    self.writer.write(step, numbers)
    shown: dict[str, list[float]] = {}
    for name, value in numbers.items():
      last = name.split("/")[-1]
      if last in ("loss", "score", "kl", "accuracy"):
        shown.setdefault(last, []).append(value)
    # Of several runs the mean.
    return {name: f"{np.mean(each):z.3f}" for name, each in shown.items()}

  def _evaluate(self, step: int) -> None:
    numbers, samples = self.task.evaluate(self.task.state)
    self.evaluated = step, numbers
    best = self.cfg.best_metric
    if best and best not in numbers:
      raise ConfigError(
          f"loop.best_metric={best!r} is not among what {self.task.name} "
          f"evaluates: {', '.join(sorted(numbers))}"
      )
    if numbers:
      self.writer.write(step, numbers)
    if samples:
      self.writer.samples(step, samples)

  def _stop_if_told(self, step: int) -> None:
    if not stopping.requested():
      return
    self._flush()
    if step > self.saved:
      self._save(step)
    self.checkpointer.wait()
    where = f"{self.task.name}: stopped by {stopping.name()}"
    if step == 0:
      raise stopping.Stopped(
          f"{where} before its first step; the same command begins anew"
      )
    raise stopping.Stopped(
        f"{where} at step {step} of {self.cfg.num_steps}, which is saved; the "
        "same command goes on from there"
    )

  def _save(self, step: int) -> None:
    evaluated_at, numbers = self.evaluated
    # Mounted buckets keep what is written to themselves until they are told.
    self.writer.sync()
    self.checkpointer.save(
        step,
        self.task.state,
        {
            "batches": self.task.batches.get_state(),
            "inputs": self.fingerprints,
            "lines": self.writer.num_lines,
            "totals": {
                name: [float(metric.total), float(metric.count)]
                for name, metric in self.totals.items()
            },
        },
        # Those of an older state are not this one's.
        metrics=(numbers or None) if evaluated_at == step else None,
    )
    self.saved = step
