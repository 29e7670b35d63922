"""The training loop: data in, steps, logs, evaluations, checkpoints.

One step is in `trainer.py`; what is saved is in `checkpoints.py`.  Everything
that the loop needs to go on is saved with the state, so that a run that was
killed at any moment, and started again by the same command, ends with the same
numbers as one that never stopped.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import pathlib
import signal
from typing import Any

from absl import logging
import jax
import numpy as np
import optax

from prompt_jax import checkpoints
from prompt_jax import datasets
from prompt_jax import evaluation
from prompt_jax import fingerprints
from prompt_jax import gin_utils
from prompt_jax import optimizers
from prompt_jax import reporting
from prompt_jax import run as run_lib
from prompt_jax import trainer
from prompt_jax import vocabularies


class NonFiniteLoss(FloatingPointError):
  """A loss or gradient was infinite or NaN; the run stopped before it."""


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
    better = self.value is None or sign * value > sign * self.value
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
  """One training run; `train` builds it, `go` runs it to its end."""

  run: run_lib.Run
  base: run_lib.Base
  step_fn: Callable[..., Any]
  iterator: datasets.TrainIterator
  checkpointer: checkpoints.Checkpointer
  reporter: reporting.Reporter
  evaluate: evaluation.Evaluation | None
  best: Best
  total_steps: int
  log_period: int
  eval_period: int
  checkpoint_period: int
  model_dir: pathlib.Path

  def go(self, state: Any, window: reporting.Window) -> Any:
    """Steps until the end, an early stop, or SIGTERM (then SystemExit)."""
    step = int(state.step)
    pending: list[tuple[int, Any, Any]] = []
    with _Terminated() as terminated, self.reporter.progress(step):
      while step < self.total_steps and not self.best.exhausted:
        batch = next(self.iterator)
        state, metrics = self.step_fn(
          state, self.base.frozen, self.run.partitioner.put_batch(batch)
        )
        pending.append((step, batch, metrics))
        step += 1
        due = self._due(step)
        # Reading the last step but one keeps the devices busy meanwhile.
        while len(pending) > (0 if due else 1):
          self._take(window, *pending.pop(0))
        if step % self.log_period == 0 or step == self.total_steps:
          self.reporter.train(step, window)
        if (due and step % self.eval_period == 0) or step == self.total_steps:
          self._evaluate(step, state)
        leaving = terminated.now(step, self.log_period)
        if leaving:
          self._take_all(window, pending)
        if leaving or step % self.checkpoint_period == 0:
          self._save(state, window)
        if leaving:
          self._leave(step)
    return state

  def _due(self, step: int) -> bool:
    periods = (self.log_period, self.eval_period, self.checkpoint_period)
    return step == self.total_steps or any(step % p == 0 for p in periods)

  def _take_all(self, window: reporting.Window, pending: list[Any]) -> None:
    while pending:
      self._take(window, *pending.pop(0))

  def _take(
    self, window: reporting.Window, step: int, batch: Any, metrics: Any
  ) -> None:
    """One step's metrics from the devices into the log's window."""
    metrics = jax.device_get(metrics)
    if not metrics.pop('finite'):
      path = self.model_dir / f'nonfinite_batch_{step}.npz'
      np.savez(path, **batch)
      self.checkpointer.wait()
      raise NonFiniteLoss(
        f'The loss or its gradient is not finite at step {step} (loss '
        f'{metrics["loss"]}, gradient norm {metrics["grad_norm"]}). The '
        f'batch is in {path}; parameters were not changed by it, and the '
        'last checkpoint is from before. Try a lower learning rate, float32 '
        'or a global_norm_clip_threshold.'
      )
    window.add(metrics, rows=len(next(iter(batch.values()))))
    self.reporter.tick(step + 1)

  def _evaluate(self, step: int, state: Any) -> None:
    if self.evaluate is None:
      return
    found = self.evaluate(state.trainable, self.base.frozen)
    self.reporter.evaluation(step, self.evaluate.config.split, found)
    if self.best.update(found, step):
      self.export(state, 'best.safetensors', found)

  def _save(self, state: Any, window: reporting.Window) -> None:
    host = {
      'data_position': self.iterator.position,
      'window': window.saved(),
      'best': self.best.saved(),
    }
    self.checkpointer.save(state, host)

  def _leave(self, step: int) -> None:
    self.checkpointer.wait()
    logging.warning(
      'SIGTERM: saved step %d; the same command goes on from it.', step
    )
    raise SystemExit(143)

  def export(
    self, state: Any, name: str, found: evaluation.TaskMetrics
  ) -> None:
    """The trained part with its header, small enough to send by mail."""
    if jax.process_index() != 0:
      return
    model = self.run.model
    header = {
      'format': 'prompt_jax',
      'method': repr(model.method),
      'trainable_patterns': list(model.trainable_patterns),
      'config': dataclasses.asdict(model.config),
      'base': self.base.fingerprint,
      'base_digest': fingerprints.digest(self.base.fingerprint),
      'vocabulary': vocabularies.fingerprint(model.vocabulary),
      'step': int(state.step),
      'metrics': found,
      'shapes': jax.tree.map(lambda x: list(x.shape), state.trainable),
    }
    trainable = jax.device_get(state.trainable)
    checkpoints.save_trainable(self.model_dir / name, trainable, header)


def train(
  run: run_lib.Run,
  *,
  model_dir: str,
  total_steps: int,
  batch_size: int,
  optimizer: optax.GradientTransformationExtraArgs,
  learning_rate_fn: Callable[[Any], Any],
  pack: bool = False,
  train_split: str = 'train',
  eval_config: evaluation.EvalConfig | None = None,
  num_microbatches: int = 1,
  log_period: int = 100,
  eval_period: int = 1000,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = 3,
  best_metric: str | None = None,
  best_mode: str = 'max',
  patience: int | None = None,
  restore_optimizer_step: bool = True,
) -> Any:
  """Trains, or goes on where an earlier start of this `model_dir` stopped.

  Args:
    run: model, data, mesh, base checkpoint.
    model_dir: everything is written here.
    total_steps: to train; steps of the base checkpoint are not counted.
    batch_size: examples (packed: rows) of one step, over all devices.
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`.
    pack: several examples in a row.
    train_split: of the task.
    eval_config: how to evaluate; None for no evaluation.
    num_microbatches: parts of a batch whose gradients are added up.
    log_period: steps between lines of the log.
    eval_period: steps between evaluations.
    checkpoint_period: steps between checkpoints.
    keep_checkpoints: how many of the newest stay; None for all.
    best_metric: 'task/metric' or 'metric' (mean over tasks); the best
      evaluation's parameters are kept in `best.safetensors`.
    best_mode: 'max' or 'min'.
    patience: stop after this many evaluations without a better one.
    restore_optimizer_step: start Adafactor's count at the base checkpoint's
      step, as the reference does (its early updates depend on it).

  Returns:
    The last train state.
  """
  _check_periods(
    total_steps=total_steps,
    batch_size=batch_size,
    log_period=log_period,
    eval_period=eval_period,
    checkpoint_period=checkpoint_period,
    num_microbatches=num_microbatches,
  )
  if batch_size % num_microbatches:
    raise ValueError(
      f'BATCH_SIZE {batch_size} cannot be cut into {num_microbatches} equal '
      'microbatches.'
    )
  directory = pathlib.Path(model_dir)
  checkpoints.check_writable(model_dir)
  best = Best(best_metric, best_mode, patience)
  with run.partitioner.activate():
    run.register_tasks()
    base = run.load()
    abstract = run.abstract_state(optimizer, base)
    checkpointer = checkpoints.Checkpointer(
      model_dir, keep_checkpoints, base.fingerprint
    )
    state, host = _start(
      run, base, abstract, optimizer, checkpointer, restore_optimizer_step
    )
    best = dataclasses.replace(best, **host.get('best', {}))
    data = run.dataset_config(
      split=train_split, batch_size=batch_size, shuffle=True, pack=pack
    )
    logging.info('%s', _lengths(run, train_split))
    start = host.get('data_position', 0)
    loop = Loop(
      run=run,
      base=base,
      step_fn=_compile(
        run, abstract, optimizer, learning_rate_fn, num_microbatches
      ),
      iterator=datasets.TrainIterator(data, run.converter(pack), start),
      checkpointer=checkpointer,
      reporter=reporting.Reporter(
        directory, int(state.step), total_steps, run.mixture_or_task_name
      ),
      evaluate=eval_config and evaluation.Evaluation(run, eval_config),
      best=best,
      total_steps=total_steps,
      log_period=log_period,
      eval_period=eval_period,
      checkpoint_period=checkpoint_period,
      model_dir=directory,
    )
    _write_config(directory)
    state = loop.go(state, reporting.Window(**host.get('window', {})))
    _finish(loop, state)
  return state


def _check_periods(**values: int) -> None:
  for name, value in values.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(f'{name} must be a whole number above 0, got {value!r}.')


def _start(
  run: run_lib.Run,
  base: run_lib.Base,
  abstract: Any,
  optimizer: Any,
  checkpointer: checkpoints.Checkpointer,
  restore_optimizer_step: bool,
) -> tuple[Any, dict[str, Any]]:
  """The newest checkpoint's state, or a new one."""
  if checkpointer.latest_step() is not None:
    return checkpointer.restore(abstract)
  state = run.init_state(optimizer, base, abstract)
  adafactor = isinstance(state.opt_state, optimizers.AdafactorState)
  if restore_optimizer_step and base.step and adafactor:
    count = state.opt_state.count
    count = jax.device_put(
      np.asarray(base.step, count.dtype), run.partitioner.replicated
    )
    logging.info("Adafactor starts at the base's step %d.", base.step)
    state = state.replace(opt_state=state.opt_state._replace(count=count))
  return state, {}


def _compile(
  run: run_lib.Run,
  abstract: Any,
  optimizer: Any,
  learning_rate_fn: Any,
  num_microbatches: int,
) -> Any:
  step = functools.partial(
    trainer.train_step,
    model=run.model,
    optimizer=optimizer,
    learning_rate_fn=learning_rate_fn,
    num_microbatches=num_microbatches,
  )
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, run.partitioner.replicated),
  )


def _lengths(run: run_lib.Run, split: str) -> str:
  """How many texts are cut; said once, before the first step."""
  return '\n'.join(
    str(datasets.length_report(name, split, run.task_feature_lengths))
    for name in run.task_names
  )


def _write_config(directory: pathlib.Path) -> None:
  """The configuration as parsed; the run's own commands read it again."""
  text = gin_utils.config_str()
  if text.strip() and jax.process_index() == 0:
    path = directory / 'config.gin'
    checkpoints.write_atomically(path, text.encode())


def _finish(loop: Loop, state: Any) -> None:
  """Saves the end, the trained part, the operative config and the curves."""
  found = loop.reporter.last_evaluation
  if loop.checkpointer.latest_step() != int(state.step):
    loop._save(state, reporting.Window())
  loop.checkpointer.close()
  best = loop.model_dir / 'best.safetensors'
  final = loop.model_dir / 'trainable.safetensors'
  if loop.best.metric is not None and best.exists():
    if jax.process_index() == 0:
      checkpoints.write_atomically(final, best.read_bytes())
  else:
    loop.export(state, final.name, found)
  if jax.process_index() == 0:
    text = gin_utils.operative_config_str()
    path = loop.model_dir / 'operative_config.gin'
    checkpoints.write_atomically(path, text.encode())
  loop.reporter.close()
  step = loop.best.step if loop.best.metric else int(state.step)
  logging.info('Done: %s holds the parameters of step %s.', final, step)
  if not math.isfinite(loop.reporter.last_loss):
    logging.warning('The last loss is not finite.')
