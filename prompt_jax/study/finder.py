"""A learning rate for a method and a task: short runs over a grid of rates.

All runs, and one more at rate 0, which shows what no training gives, are one
program (`together.py`). What is suggested is the middle of the plateau:

*   A rate whose loss is not finite, or higher than without training, is out.
*   The *gain* of a rate is how much better it is than no training: in the
    validation metric, or in the loss, where there are no labels or where no
    rate gains 5 points, which a small validation set may show by chance. The
    loss is the mean over the second half of the steps.
*   The plateau is the best rate with its neighbours of at least 95 % of its
    gain. Of two rates in the middle it is the one with the lower loss.

A few steps favour high rates; a plateau that reaches an end of the grid tells
nothing of what lies beyond. Not for choosing by full runs: that is what the
grid of a study is for (`plan.py`).
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from absl import logging
from matplotlib.figure import Figure
import tabulate

from prompt_jax import checkpoints
from prompt_jax import datasets
from prompt_jax import evaluation
from prompt_jax import run as run_lib
from prompt_jax import schedules
from prompt_jax.study import plots
from prompt_jax.study import together

_LEAST_GAIN = 5.0  # points of the metric
_PLATEAU = 0.95  # of the best gain
_RED, _BLUE, _GREY = '#D55E00', '#0072B2', '#777777'


@dataclasses.dataclass(frozen=True)
class Trial:
  """A short run.

  Attributes:
    rate: of learning.
    loss: mean over the second half of the steps; None if it was not finite.
    metric: of validation, after the last step, in per cent; None without one.
  """

  rate: float
  loss: float | None
  metric: float | None


@dataclasses.dataclass(frozen=True)
class Suggestion:
  """What the trials say.

  Attributes:
    rate: suggested; None if no rate is better than no training.
    plateau: its lowest and its highest rate.
    chosen_by: 'loss', or the metric's name.
    text: the same for a reader, and what to do next.
  """

  rate: float | None
  plateau: tuple[float, float] | None
  chosen_by: str
  text: str


def find_lr(
  run: run_lib.Run,
  *,
  model_dir: str,
  learning_rate: float,
  total_steps: int,
  batch_size: int,
  optimizer: Any,
  learning_rate_fn: Any,
  eval_config: evaluation.EvalConfig,
  decades: float = 4.0,
  per_decade: int = 2,
  metric: str = 'rank_accuracy',
) -> Suggestion:
  """Tries the rates; writes `learning_rate.png` and `.json`, prints a table.

  Args:
    run: model, task, base; the same for all rates.
    model_dir: where the files go.
    learning_rate: in the middle of the grid; the one that `learning_rate_fn`
      was made with.
    total_steps: of each run.
    batch_size: of each run.
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`; each run has a multiple of it.
    eval_config: of the validation; without its split or without labels the
      loss alone counts.
    decades: from the lowest to the highest rate.
    per_decade: rates in each.
    metric: to compare rates by.

  Returns:
    The suggestion.

  Raises:
    ValueError: no such grid; or a task that is too large, random or a mixture,
      which runs of one program cannot share.
    FloatingPointError: the loss is not finite without any training.
  """
  rates = grid(learning_rate, decades, per_decade)
  schedules.require(total_steps >= 1, 'TRAIN_STEPS', 'above 0', total_steps)
  checkpoints.check_writable(model_dir)
  directory = pathlib.Path(model_dir)
  run.register_tasks()
  ranked = _has_labels(run, eval_config)
  if not ranked:
    logging.info('No validation split with labels: the loss alone counts.')
  task = run.mixture_or_task_name
  members = [
    together.Member(task, run.seed, rate / learning_rate)
    for rate in (0.0, *rates)
  ]
  outcomes, *_ = together.train(
    run,
    members,
    total_steps=total_steps,
    batch_size=batch_size,
    optimizer=optimizer,
    learning_rate_fn=learning_rate_fn,
    eval_config=eval_config if ranked else None,
    eval_period=-(-total_steps // 2),
    best_metric=metric,
  )
  untrained, *trials = map(_trial, (0.0, *rates), outcomes)
  made = suggest(trials, untrained, metric)
  value = {
    'task': task,
    'method': repr(run.model.method),
    'trainable_patterns': list(run.model.trainable_patterns),
    'base': run.initial_checkpoint_path,
    'steps': total_steps,
    'batch_size': batch_size,
    'seed': run.seed,
    'metric': metric if ranked else None,
    'untrained': dataclasses.asdict(untrained),
    'trials': [dataclasses.asdict(trial) for trial in trials],
    'suggestion': dataclasses.asdict(made),
  }
  text = json.dumps(value, indent=1).encode()
  checkpoints.write_atomically(directory / 'learning_rate.json', text)
  title = f'{task}, {total_steps} steps of {batch_size} examples'
  figure = draw(trials, untrained, made, metric, title)
  plots.save(figure, [directory / 'learning_rate.png'])
  print(table(trials, untrained, made, metric))
  print(f'\n{made.text}\nSee {directory / "learning_rate.png"}')
  return made


def grid(middle: float, decades: float, per_decade: int) -> list[float]:
  """Rates from low to high, three digits each, `middle` in the middle.

  >>> grid(0.3, 2, 2)
  [0.03, 0.0949, 0.3, 0.949, 3.0]

  Raises:
    ValueError: fewer than three rates, or a middle that is not above 0.
  """
  positive = isinstance(middle, int | float) and 0 < middle < math.inf
  schedules.require(positive, 'LEARNING_RATE', 'a number above 0', middle)
  each_side = int(decades * per_decade / 2)
  if each_side < 1:
    raise ValueError(
      f'DECADES = {decades} with RATES_PER_DECADE = {per_decade} is no grid: '
      'their product is to be at least 2.'
    )
  places = range(-each_side, each_side + 1)
  return [float(f'{middle * 10 ** (i / per_decade):.3g}') for i in places]


def _has_labels(run: run_lib.Run, config: evaluation.EvalConfig) -> bool:
  """Whether the task has the split, and strings to choose from."""
  name = run.mixture_or_task_name
  if config.split not in datasets.find_task(name).splits:
    return False
  return bool(evaluation.Evaluation(run, config).labels(name))


def _trial(rate: float, outcome: together.Outcome) -> Trial:
  if not outcome.finite:
    return Trial(rate, None, None)
  _, loss, metric = outcome.history[-1]
  return Trial(rate, loss, metric)


def suggest(
  trials: Sequence[Trial], untrained: Trial, metric: str
) -> Suggestion:
  """The middle of the plateau; the rule is at the top of this module.

  Args:
    trials: from the lowest to the highest rate.
    untrained: the run at rate 0.
    metric: its name.

  Raises:
    FloatingPointError: the run at rate 0 is not finite.
  """
  if untrained.loss is None:
    raise FloatingPointError(
      'The loss is not finite without any training: no learning rate helps. '
      'Look at the base checkpoint and the data.'
    )
  fit = [t for t in trials if not _diverged(t, untrained)]
  by_metric = any(_points(t, untrained) >= _LEAST_GAIN for t in fit)
  chosen_by = metric if by_metric else 'loss'

  def gain(t: Trial) -> float:
    if _diverged(t, untrained):
      return -math.inf
    if by_metric:
      return _points(t, untrained)
    return _loss(untrained) - _loss(t)

  gains = [gain(t) for t in trials]
  best = max(range(len(trials)), key=lambda i: (gains[i], -_loss(trials[i])))
  if gains[best] <= 0:
    text = (
      'No rate is better than no training. Where all diverged, lower '
      'LEARNING_RATE; else raise it, or TRAIN_STEPS.'
    )
    return Suggestion(None, None, chosen_by, text)
  first = last = best
  while first > 0 and gains[first - 1] >= _PLATEAU * gains[best]:
    first -= 1
  while last + 1 < len(trials) and gains[last + 1] >= _PLATEAU * gains[best]:
    last += 1
  middle = trials[(first + last) // 2 : (first + last + 1) // 2 + 1]
  rate = min(middle, key=_loss).rate
  plateau = trials[first].rate, trials[last].rate
  text = (
    f'Suggested: --gin.LEARNING_RATE={rate:g}, the middle of the plateau '
    f'({plateau[0]:g} to {plateau[1]:g}, by {chosen_by.replace("_", " ")}).'
  )
  for i, end in (0, 'lowest'), (len(trials) - 1, 'highest'):
    if i in (first, last):
      text += (
        f' It reaches the {end} rate of the grid: widen it (--gin.DECADES=...) '
        'or move LEARNING_RATE.'
      )
  return Suggestion(rate, plateau, chosen_by, text)


def _loss(trial: Trial) -> float:
  return math.inf if trial.loss is None else trial.loss


def _points(trial: Trial, untrained: Trial) -> float:
  """How much better than no training, by the metric; 0 without one."""
  if trial.metric is None or untrained.metric is None:
    return 0.0
  return trial.metric - untrained.metric


def _diverged(trial: Trial, untrained: Trial) -> bool:
  return _loss(trial) > _loss(untrained)


def table(
  trials: Sequence[Trial], untrained: Trial, made: Suggestion, metric: str
) -> str:
  """A line a rate, the one without training first."""

  def note(t: Trial) -> str:
    if t.loss is None:
      return 'not finite'
    if t is untrained:
      return 'no training'
    if _diverged(t, untrained):
      return 'worse than no training'
    if t.rate == made.rate:
      return 'suggested'
    low, high = made.plateau or (math.inf, -math.inf)
    return 'plateau' if low <= t.rate <= high else ''

  def number(x: float | None, form: str) -> str:
    return '-' if x is None else f'{x:{form}}'

  rows = [
    (f'{t.rate:g}', number(t.loss, '.4g'), number(t.metric, '.1f'), note(t))
    for t in (untrained, *trials)
  ]
  headers = ('learning rate', 'loss', metric.replace('_', ' '), '')
  return tabulate.tabulate(rows, headers, disable_numparse=True)


def draw(
  trials: Sequence[Trial],
  untrained: Trial,
  made: Suggestion,
  metric: str,
  title: str,
) -> Figure:
  """Loss and, if there is one, metric against the rate."""
  names = ['loss'] + ['metric'] * (untrained.metric is not None)
  figure = Figure(figsize=(6, 1 + 2.4 * len(names)), layout='constrained')
  axes = figure.subplots(len(names), 1, sharex=True, squeeze=False).ravel()
  fit = [t for t in trials if not _diverged(t, untrained)]
  bad = [t.rate for t in trials if _diverged(t, untrained)]
  for ax, name in zip(axes, names, strict=True):
    ax.set_xscale('log')
    ax.set_xlim(trials[0].rate / 1.3, trials[-1].rate * 1.3)
    values = [getattr(t, name) for t in fit]
    ax.plot([t.rate for t in fit], values, 'o-', color=_BLUE)
    level = getattr(untrained, name)
    ax.axhline(level, color=_GREY, linestyle='--', label='no training')
    if bad:  # on the edge of what is bad: where they end may be far off
      ax.plot(
        bad, [0.96 if name == 'loss' else 0.04] * len(bad), 'x', color=_RED,
        label='diverged', transform=ax.get_xaxis_transform(),
      )  # fmt: skip
    if made.rate is not None and made.plateau is not None:
      ax.axvspan(*made.plateau, color=_BLUE, alpha=0.08, label='plateau')
      ax.axvline(made.rate, color=_BLUE, alpha=0.5, label=f'{made.rate:g}')
    ax.set_ylabel((metric if name == 'metric' else name).replace('_', ' '))
  axes[0].set_title(title, fontsize=10)
  axes[0].legend(fontsize='small')
  axes[-1].set_xlabel('learning rate')
  return figure
