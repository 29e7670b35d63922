"""The loop of a training run: steps, logs, evaluations, checkpoints, its end.

Not for building a run from files and flags: that is `train.py`.
"""

import dataclasses
import math
import pathlib
import signal
from typing import Any

from absl import logging
import jax
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import evaluation
from prompt_jax import feeds
from prompt_jax import reporting
from prompt_jax import run as run_lib


class NonFiniteLoss(FloatingPointError):
  """A loss, gradient or update was infinite or NaN; it was not made."""


@dataclasses.dataclass
class Best:
  """The best evaluation so far, by one metric.

  Attributes:
    metric: 'task/name', or 'name' for the mean over tasks; None for none.
    mode: 'max' or 'min'.
    patience: evaluations without a better one after which training ends.
    value: of the best.
    step: of the best.
    since: evaluations after it.
  """

  metric: str | None = None
  mode: str = 'max'
  patience: int | None = None
  value: float | None = None
  step: int | None = None
  since: int = 0

  def __post_init__(self):
    if self.mode not in ('max', 'min'):
      raise ValueError(f"best_mode must be 'max' or 'min', got {self.mode!r}.")
    if self.patience is not None and self.metric is None:
      raise ValueError('Early stopping (patience) needs a best_metric.')

  def update(self, found: evaluation.TaskMetrics, step: int) -> bool:
    """Takes an evaluation in; True if it is the best."""
    if self.metric is None:
      return False
    value = _pick(self.metric, found)
    sign = 1 if self.mode == 'max' else -1
    # NaN is never better, not even than nothing.
    before = -math.inf if self.value is None else sign * self.value
    better = sign * value > before
    if better:
      self.value, self.step, self.since = value, step, 0
    else:
      self.since += 1
    return better

  @property
  def exhausted(self) -> bool:
    """Whether to stop early."""
    return self.patience is not None and self.since >= self.patience

  def saved(self) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {'value': self.value, 'step': self.step, 'since': self.since}


def _pick(metric: str, found: evaluation.TaskMetrics) -> float:
  task, _, name = metric.rpartition('/')
  rows = {k: v for k, v in found.items() if not task or k == task}
  values = [v[name] for v in rows.values() if name in v]
  if not values:
    known = [f'{k}/{m}' for k, v in found.items() for m in v]
    raise ValueError(
      f'best_metric {metric!r} is not among the metrics of the evaluation: '
      f'{", ".join(known)}. A name without a task is the mean over tasks.'
    )
  return float(np.mean(values))


class _Terminated:
  """Whether SIGTERM has come; the loop then saves and leaves."""

  def __init__(self):
    self.flag = False
    self._before = None

  def __enter__(self) -> '_Terminated':
    try:
      self._before = signal.signal(signal.SIGTERM, self._note)
    except ValueError:  # not the main thread (a notebook, a test)
      self._before = None
    return self

  def _note(self, *_: Any) -> None:
    self.flag = True

  def __exit__(self, *_: Any) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def now(self, step: int, period: int) -> bool:
    """The same answer on all processes, at steps on which they agree."""
    if jax.process_count() == 1:
      return self.flag
    if step % period:
      return False
    from jax.experimental import multihost_utils

    flags = multihost_utils.process_allgather(np.array([self.flag]))
    return bool(np.any(flags))


@dataclasses.dataclass
class Loop:
  """One training run; `train` builds it.

  Attributes:
    run: model, data, mesh, base checkpoint.
    base: on the devices.
    feed: makes steps on the batches from the one that comes next.
    checkpointer: of the run's directory.
    reporter: of the run's directory.
    window: sums over the steps since the last line of the log.
    evaluate: the evaluation; None for none.
    best: the best evaluation so far.
    total_steps: at which the run ends.
    log_period: steps between lines of the log.
    eval_period: steps between evaluations.
    checkpoint_period: steps between checkpoints.
    model_dir: everything is written here.
  """

  run: run_lib.Run
  base: run_lib.Base
  feed: feeds.Streamed | feeds.Resident
  checkpointer: checkpoints.Checkpointer
  reporter: reporting.Reporter
  window: reporting.Window
  evaluate: evaluation.Evaluation | None
  best: Best
  total_steps: int
  log_period: int
  eval_period: int
  checkpoint_period: int
  model_dir: pathlib.Path

  def go(self, state: Any) -> Any:
    """Steps until the end, an early stop, or SIGTERM (then SystemExit)."""
    step = int(state.step)
    pending: list[tuple[int, feeds.Steps]] = []
    with _Terminated() as terminated, self.reporter.progress(step):
      while step < self.total_steps and not self.best.exhausted:
        done = self.feed(state, self.base.frozen, self._steps_until_due(step))
        pending.append((step, done))
        state = done.state
        step += done.count
        leaving = terminated.now(step, self.log_period)
        due = leaving or self._due(step)
        # Reading the last steps but one keeps the devices busy meanwhile.
        while len(pending) > (0 if due else 1):
          self._take(*pending.pop(0))
        last = step == self.total_steps
        if step % self.log_period == 0 or last:
          self.reporter.train(step, self.window)
        if step % self.eval_period == 0 or last:
          self._evaluate(step, state)
        if leaving or step % self.checkpoint_period == 0:
          self._save(state)
        if leaving and not last:
          self._leave(step)
    return state

  def finish(self, state: Any) -> None:
    """Saves the end, writes `trainable.safetensors`, draws the curves."""
    step = int(state.step)
    if self.checkpointer.latest_step() != step:
      self._save(state)
    self.checkpointer.wait()
    best = self.model_dir / 'best.safetensors'
    final = self.model_dir / 'trainable.safetensors'
    if self.best.step is None:
      self._export(state, final, self.reporter.last_evaluation)
    else:
      step = self.best.step
      if jax.process_index() == 0:
        checkpoints.write_atomically(final, best.read_bytes())
    self.reporter.close()
    logging.info('Done: %s holds the parameters of step %s.', final, step)

  @property
  def _periods(self) -> tuple[int, ...]:
    return self.log_period, self.eval_period, self.checkpoint_period

  def _due(self, step: int) -> bool:
    return step == self.total_steps or any(step % p == 0 for p in self._periods)

  def _steps_until_due(self, step: int) -> int:
    left = [self.total_steps - step, *(p - step % p for p in self._periods)]
    return min(left)

  def _take(self, step: int, done: feeds.Steps) -> None:
    """The metrics of some steps from the devices into the log's window."""
    found = jax.device_get(done.metrics)
    values = {name: np.reshape(x, -1) for name, x in found.items()}
    finite = values.pop('finite')
    for i in range(done.count):
      if not finite[i]:
        self._stop(
          step + i, done.batch(i), {k: v[i] for k, v in values.items()}
        )
      self.window.add({k: v[i] for k, v in values.items()}, done.rows)
    self.reporter.tick(step + done.count)

  def _stop(self, step: int, batch: Any, metrics: Any) -> None:
    """Saves the batch of a step that was not finite."""
    path = self.model_dir / f'nonfinite_batch_{step}.npz'
    if jax.process_index() == 0:
      np.savez(path, **batch)
    self.checkpointer.wait()
    raise NonFiniteLoss(
      f'The loss, its gradient or its update is not finite at step {step} '
      f'(loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]}). The '
      f'batch is in {path}; parameters were not changed by it, and the '
      'last checkpoint is from before. Try a lower learning rate, float32 '
      'or a global_norm_clip_threshold.'
    )

  def _evaluate(self, step: int, state: Any) -> None:
    if self.evaluate is None:
      return
    found = self.evaluate(state.trainable, self.base.frozen)
    self.reporter.evaluation(step, self.evaluate.config.split, found)
    if self.best.update(found, step):
      self._export(state, self.model_dir / 'best.safetensors', found)

  def _save(self, state: Any) -> None:
    host = {
      'data_position': self.feed.position,
      'window': self.window.saved(),
      'best': self.best.saved(),
    }
    self.checkpointer.save(state, host)

  def _leave(self, step: int) -> None:
    self.checkpointer.wait()
    logging.warning(
      'SIGTERM: saved step %d; the same command goes on from it.', step
    )
    raise SystemExit(143)

  def _export(
    self, state: Any, path: pathlib.Path, found: evaluation.TaskMetrics
  ) -> None:
    """The trained part with its header, small enough to send by mail."""
    trainable = self.run.partitioner.gather(state.trainable)
    if jax.process_index() == 0:
      self.run.export(path, trainable, self.base, int(state.step), found)
