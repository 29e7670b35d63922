"""Runs that share a base and shapes, trained as one program.

The frozen weights are shared; train states, batches and learning rates have a
leading axis of K runs, over which `trainer.train_step` is mapped: all at once
(`jax.vmap`), which keeps an accelerator busy, or one after the other, which
keeps what a CPU works on in its caches (`benchmarks/sweep.py`). Either way a
sweep over tasks, seeds and learning rates is one compilation. Each run sees the
batches and draws the numbers that it would alone.

Data stay on the devices, so this is for data sets that fit there. Not for one
run, nor for large ones that must go on where they were stopped (`alone.py`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import evaluation
from prompt_jax import feeds
from prompt_jax import optimizers
from prompt_jax import run as run_lib
from prompt_jax import trainer
from prompt_jax.study import costs
from prompt_jax.study import ranking
from prompt_jax.study.ranking import map_runs

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Member:
  """In what one of the runs differs from the others.

  Attributes:
    task: name of its seqio task.
    seed: of its initial values, dropout and order of data.
    learning_rate_scale: times the common learning rate.
  """

  task: str
  seed: int = 0
  learning_rate_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of one of the runs.

  Attributes:
    run: its configuration.
    trainable: of the best evaluation, on the host.
    step: of the best evaluation.
    metrics: of the best evaluation, 'validation', and of the 'test'.
    history: (step, mean loss since the last one, metric) of each evaluation;
      None for the metric where only the loss is looked at.
    finite: False if a loss, gradient or update was not; training of this run
      ended there.
  """

  run: run_lib.Run
  trainable: Any
  step: int
  metrics: Mapping[str, Metrics]
  history: Sequence[tuple[int, float, float | None]]
  finite: bool


def train(
  run: run_lib.Run,
  members: Sequence[Member],
  *,
  total_steps: int,
  batch_size: int,
  optimizer: Any,
  learning_rate_fn: Any,
  eval_config: evaluation.EvalConfig | None,
  test_split: str | None = None,
  eval_period: int = 1000,
  best_metric: str = 'rank_accuracy',
  resident_rows: int = 1 << 20,
  at_once: int | None = None,
) -> tuple[list[Outcome], run_lib.Base, costs.Cost]:
  """Trains the members and tests the best of each on its own task.

  Args:
    run: what they have in common; its task and seed do not count.
    members: what they have not.
    total_steps: to train; 0 where there is nothing to train.
    batch_size: B, of each run.
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`.
    eval_config: how to choose the best evaluation, by its split; None: by the
      mean training loss, for tasks without labels.
    test_split: for the final metrics of the best; None for none, as without
      `eval_config`.
    eval_period: steps between evaluations.
    best_metric: of `ranking.metrics`.
    resident_rows: rows of a task at most.
    at_once: runs of one `jax.vmap`; None: one on a CPU, all elsewhere.

  Returns:
    What came of each, the base, and what it took.

  Raises:
    ValueError: a task that is not known, is too large, is random, or has no
      labels to choose from.
  """
  runs = [
    dataclasses.replace(run, mixture_or_task_name=m.task, seed=m.seed)
    for m in members
  ]
  with run.partitioner.activate():
    run = runs[0]
    for one in {m.task: r for m, r in zip(members, runs, strict=True)}.values():
      one.register_tasks()
    base = run.load()
    state = _init(runs, base, optimizer)
    best = _Best(runs, base, eval_config, best_metric)
    clock = _Clock()
    finite = np.ones(len(runs), bool)
    if total_steps:
      flops = costs.flops_of_step(run, optimizer, learning_rate_fn, batch_size)
      feed = _feed(
        runs,
        members,
        batch_size,
        resident_rows,
        at_once,
        functools.partial(
          trainer.train_step,
          model=run.model,
          optimizer=optimizer,
          learning_rate_fn=learning_rate_fn,
        ),
      )
      step, losses = 0, []
      while step < total_steps:
        due = min(eval_period - step % eval_period, total_steps - step)
        with clock.steps():
          done = feed(state, base.frozen, due)
          state, found = done.state, jax.device_get(done.metrics)
        clock.count(done.count)
        step += done.count
        finite &= found['finite'][: done.count].all(axis=0)
        losses.append(found['loss'][: done.count])
        if done.count == due:
          best.update(step, state.trainable, np.concatenate(losses), finite)
          losses = []
    else:
      flops = 0.0
      best.update(0, state.trainable, np.zeros((1, len(runs))), finite)
    outcomes = best.outcomes(test_split, finite)
  return outcomes, base, clock.cost(flops and flops * total_steps)


def _init(runs: Sequence[run_lib.Run], base: run_lib.Base, optimizer: Any):
  """The states of all runs before the first step, [K, ...] each."""
  init = functools.partial(
    trainer.init_state, model=runs[0].model, optimizer=optimizer
  )
  rngs = jnp.stack([run.init_rng() for run in runs])
  state = jax.jit(jax.vmap(init, (0, None)))(rngs, base.params)
  # As `train.train` does.
  return state.replace(
    opt_state=optimizers.start_at(state.opt_state, base.step)
  )


def _feed(
  runs: Sequence[run_lib.Run],
  members: Sequence[Member],
  batch_size: int,
  resident_rows: int,
  at_once: int | None,
  step_fn: Any,
) -> feeds.Resident:
  """The rows of all tasks, one after the other, and each run's own order."""
  rows, places, count = [], {}, 0
  for run in runs:
    name = run.mixture_or_task_name
    if name in places:
      continue
    config = run.dataset_config(split='train', batch_size=batch_size)
    found = feeds.read_rows(config, run.converter(), resident_rows)
    if found is None:
      raise ValueError(
        f'{name!r} cannot be trained together with other runs: it must be a '
        f'task of at most {resident_rows} rows without random preprocessors.'
      )
    rows.append(found)
    n = len(next(iter(found.values())))
    places[name], count = (count, n), count + n
  scales = jnp.array([m.learning_rate_scale for m in members], jnp.float32)

  def all_runs(state, frozen, batch):
    return map_runs(
      lambda x: step_fn(x[0], frozen, x[1], x[2]),
      (state, batch, scales),
      at_once,
    )

  def order(position: int, count: int) -> np.ndarray:
    taken = []
    for run in runs:
      start, n = places[run.mixture_or_task_name]
      own = feeds.order(n, batch_size, run.seed, position, count)
      taken.append(start + own)
    return np.stack(taken, axis=1)

  all_rows = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
  return feeds.Resident(
    rows=all_rows,
    data=jax.device_put(all_rows, runs[0].partitioner.replicated),
    step_fn=jax.jit(
      functools.partial(trainer.train_steps, step_fn=all_runs),
      donate_argnums=0,
    ),
    order=order,
  )


class _Best:
  """The best evaluation of each run."""

  def __init__(
    self,
    runs: Sequence[run_lib.Run],
    base: run_lib.Base,
    config: evaluation.EvalConfig | None,
    metric: str,
  ):
    self._runs, self._base, self._config = runs, base, config
    self._metric = metric
    self._rank = config and ranking.Ranking(runs, config)
    self._value = np.full(len(runs), -np.inf)
    self._step = np.zeros(len(runs), int)
    self._found: list[Metrics] = [{} for _ in runs]
    self._history: list[list[tuple[int, float, float | None]]] = [
      [] for _ in runs
    ]
    self._trainable: Any = None

  def update(
    self, step: int, trainable: Any, losses: np.ndarray, finite: np.ndarray
  ) -> None:
    """Evaluates all runs; `losses` [steps, K] are those since the last time."""
    means = losses.mean(axis=0)
    if self._rank is None:
      what, shown, value = 'loss', means, -means
      found: list[Metrics] = [{} for _ in self._runs]
    else:
      found = self._rank(trainable, self._base.frozen)
      value = np.array([one[self._metric] for one in found])
      what, shown = self._metric, value
    better = finite & (value > self._value)
    if self._trainable is None:
      self._trainable = jax.tree.map(jnp.copy, trainable)
    self._trainable = _choose(better, trainable, self._trainable)
    for k in np.flatnonzero(better):
      self._value[k], self._step[k] = value[k], step
      self._found[k] = found[k]
    for k, history in enumerate(self._history):
      history.append((step, float(means[k]), found[k].get(self._metric)))
    logging.info(
      'step %d: %s of %d runs %.4g to %.4g, mean %.4g',
      step, what, len(shown), shown.min(), shown.max(), shown.mean(),
    )  # fmt: skip

  def outcomes(self, test_split: str | None, finite: np.ndarray):
    """What came of each run, tested if there is a split for that."""
    tested: list[Metrics] = [{} for _ in self._runs]
    if test_split is not None and self._config is not None:
      config = dataclasses.replace(self._config, split=test_split)
      rank = ranking.Ranking(self._runs, config)
      tested = rank(self._trainable, self._base.frozen)
    host = jax.device_get(self._trainable)
    return [
      Outcome(
        run=run,
        trainable=jax.tree.map(lambda x, k=k: x[k], host),
        step=int(self._step[k]),
        metrics={'validation': self._found[k], 'test': tested[k]},
        history=self._history[k],
        finite=bool(finite[k]),
      )
      for k, run in enumerate(self._runs)
    ]


@jax.jit
def _choose(better: Any, new: Any, old: Any) -> Any:
  """Of each run the new parameters where they are better, [K] booleans."""

  def one(x: Any, y: Any) -> Any:
    return jnp.where(better.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

  return jax.tree.map(one, new, old)


class _Clock:
  """Time of steps alone; the first call, which compiles, counts apart."""

  def __init__(self):
    self._calls: list[float] = []
    self._steps: list[int] = []
    self._start = 0.0

  def steps(self) -> '_Clock':
    return self

  def __enter__(self) -> None:
    self._start = time.monotonic()

  def __exit__(self, *_: Any) -> None:
    self._calls.append(time.monotonic() - self._start)

  def count(self, steps: int) -> None:
    self._steps.append(steps)

  def cost(self, flops: float | None) -> costs.Cost:
    first, rest = sum(self._calls[:1]), sum(self._calls[1:])
    step = rest / max(sum(self._steps[1:]), 1)
    return costs.Cost(first, rest, step, flops)
