"""One tuning run of a study by itself, in a directory of its own.

It is `train.train`, which saves checkpoints and goes on where it was stopped,
and which may be spread over several processes. What is chosen and tested, and
how, is as in `together.py`: the same cell gives the same result by either.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

from prompt_jax import checkpoints
from prompt_jax import evaluation
from prompt_jax import optimizers
from prompt_jax import reporting
from prompt_jax import run as run_lib
from prompt_jax.study import costs
from prompt_jax.study import processes
from prompt_jax.study import ranking
from prompt_jax.study import together


def train(
  run: run_lib.Run,
  *,
  train_fn: Callable[[run_lib.Run], Any],
  model_dir: str,
  total_steps: int,
  batch_size: int,
  optimizer: Any,
  learning_rate_fn: Any,
  eval_config: evaluation.EvalConfig,
  test_split: str | None = None,
  log_period: int = 1000,
  eval_period: int = 1000,
  best_metric: str = 'rank_accuracy',
) -> tuple[together.Outcome, run_lib.Base, costs.Cost]:
  """Trains, or goes on, and tests the best evaluation.

  Args:
    run: of one task.
    train_fn: `train.train` with all the values below.
    model_dir: of this run alone.
    total_steps: to train; 0 where there is nothing to train.
    batch_size: B.
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`.
    eval_config: how to choose the best evaluation, by its split.
    test_split: for the final metrics of the best; None for none.
    log_period: steps between lines of the log.
    eval_period: steps between evaluations.
    best_metric: of `evaluation.rank_metrics`.

  Returns:
    What came of it, the base, and what it took.

  Raises:
    ValueError: the task is not known or has no labels to choose from, or a
      loss would not be known at an evaluation.
    loop.NonFiniteLoss: a loss, gradient or update was not finite.
  """
  if eval_period % log_period:
    raise ValueError(
      f'EVAL_PERIOD {eval_period} must be a multiple of LOG_PERIOD '
      f'{log_period}: the history has the mean loss between evaluations.'
    )
  task, folder = run.mixture_or_task_name, pathlib.Path(model_dir)
  run.register_tasks()
  # What they refuse is told before anything is trained.
  evaluations = {'validation': evaluation.Evaluation(run, eval_config)}
  if test_split is not None:
    config = dataclasses.replace(eval_config, split=test_split)
    evaluations['test'] = evaluation.Evaluation(run, config)
  for reader in evaluations.values():
    ranking.known_labels(reader, task)

  def rank(split: str) -> dict[str, float]:
    if split not in evaluations:
      return {}
    return _ranked(evaluations[split](trainable, base.frozen)[task])

  if total_steps:
    start = time.monotonic()
    train_fn(run)
    seconds = time.monotonic() - start
    processes.barrier('trained')
  with run.partitioner.activate():
    base = run.load()
    if total_steps:
      file = str(folder / 'trainable.safetensors')
      trainable = run.load_trainable(file, base)
      header = checkpoints.load_trainable(file)[1]
      step = int(header['step'])
      validation = _ranked(json.loads(header['metrics'])[task])
      lines = reporting.read_metrics(folder / 'metrics.jsonl')
      history = _history(lines, best_metric)
      flops = costs.flops_of_step(run, optimizer, learning_rate_fn, batch_size)
      cost = costs.of_log(lines, seconds, flops and flops * total_steps)
    else:
      abstract = run.abstract_state(optimizers.sgd(), base)
      trainable = run.init_state(optimizers.sgd(), base, abstract).trainable
      step, validation = 0, rank('validation')
      history = [(0, 0.0, validation[best_metric])]
      cost = costs.Cost(0.0, 0.0, 0.0, 0.0)
    outcome = together.Outcome(
      run=run,
      trainable=run.partitioner.gather(trainable),
      step=step,
      metrics={'validation': validation, 'test': rank('test')},
      history=history,
      finite=True,  # else it would have been an error
    )
  return outcome, base, cost


def _ranked(found: Mapping[str, float]) -> dict[str, float]:
  """The metrics by which all methods are scored."""
  return {k: v for k, v in found.items() if k.startswith('rank_')}


def _history(
  lines: Sequence[Mapping[str, Any]], metric: str
) -> list[tuple[int, float, float]]:
  """(step, mean loss since the last one, metric) of each evaluation."""
  out, total, count, before = [], 0.0, 0, 0
  for line in lines:
    step = line['step']
    if line['split'] == 'train':
      total += (step - before) * line['loss']
      count, before = count + step - before, step
    else:
      out.append((step, total / count, line[metric]))
      total, count = 0.0, 0
  return out
