"""Batches of a few tasks each: stochastic task sampling of a mixture.

A mixture draws every example's task anew, so that a batch holds a bit of all
tasks. Here a batch draws first how many tasks it holds, then which, and takes
as many examples of each. Source: Wang et al. 2023, arXiv 2303.02861, section
3.3, as known from the paper and the author's public loader.

Not for evaluation, nor for how a task is read (`datasets.py`).
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np
import seqio

from prompt_jax import datasets
from prompt_jax.datasets import Batch


def task_sampler(
  weights: Sequence[float], batch_size: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
  """Draws the tasks of one batch, and how many examples each of them gives.

  Of S tasks, K is drawn uniformly from 2 .. S (1 if there is one task, and no
  more than `batch_size`), then K tasks with replacement by their weights. Each
  gives floor(batch_size / K) examples, one of them the remainder too.

  Args:
    weights: of each task, at least 0, of any sum.
    batch_size: B.
    rng: of numpy.

  Returns:
    K pairs (task, examples) whose examples sum to B; a task may be drawn twice.

  Raises:
    ValueError: weights that are negative or all 0; a batch size below 1.
  """
  shares = np.asarray(weights, np.float64)
  good = shares.ndim == 1 and np.isfinite(shares).all() and (shares >= 0).all()
  if not good or not shares.sum() > 0:
    raise ValueError(
      'The weights of tasks must be numbers of at least 0, not all of them 0; '
      f'got {weights}.'
    )
  if batch_size < 1:
    raise ValueError(f'A batch needs at least 1 example, got {batch_size}.')
  most = len(shares)
  count = int(rng.integers(2, most + 1)) if most > 1 else 1
  count = min(count, batch_size)
  tasks = rng.choice(most, size=count, p=shares / shares.sum())
  sizes = np.full(count, batch_size // count)
  sizes[rng.integers(count)] += batch_size % count
  return list(zip(tasks.tolist(), sizes.tolist(), strict=True))


class TaskSampledIterator:
  """Batches of a mixture, each of the tasks that `task_sampler` draws.

  Stands where a `datasets.TrainIterator` does. A batch depends on the seed and
  its number alone, so a run goes on from any position; each task is read in its
  own shuffled order, of which the examples are taken one after another.

  Attributes:
    position: batches taken so far, those before `start` included.

  Args:
    config: of a mixture, whose rates are the weights. (For the paper's,
      `seqio.mixing_rate_num_examples` with a `maximum` of 2**18.)
    converter: the feature converter.
    start: batches to skip.

  Raises:
    ValueError: a task in place of a mixture; packing, since rows of several
      examples are of no one task; a finite number of epochs; or as
      `datasets.get_dataset`.
  """

  def __init__(
    self,
    config: datasets.DatasetConfig,
    converter: seqio.FeatureConverter,
    start: int = 0,
  ):
    provider = datasets.find_task(config.mixture_or_task_name)
    if not isinstance(provider, seqio.Mixture):
      raise ValueError(
        f'Tasks are sampled from a mixture, but {provider.name!r} is one task.'
      )
    if config.pack or config.num_epochs is not None:
      raise ValueError(
        'Sampling tasks by the batch needs pack=False and num_epochs=None, got '
        f'{config.pack} and {config.num_epochs}.'
      )
    if start < 0:
      raise ValueError(f'start must be a number of batches, got {start}.')
    tasks = datasets.subtasks(provider)
    self.position = start
    self._config = config
    self._weights = [provider.get_rate(task) for task in tasks]
    taken = np.zeros(len(tasks), np.int64)
    for position in range(start):
      for task, count in self._draw(position)[0]:
        taken[task] += count
    self._examples = []
    for task, skipped in zip(tasks, taken.tolist(), strict=True):
      one = dataclasses.replace(config, subtask=task.name)
      examples = datasets.get_dataset(one, converter).unbatch()
      self._examples.append(datasets.TrainIterator(examples, start=skipped))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    pairs, rng = self._draw(self.position)
    rows = [
      next(self._examples[task]) for task, count in pairs for _ in range(count)
    ]
    order = rng.permutation(len(rows))
    self.position += 1
    return {name: np.stack([rows[i][name] for i in order]) for name in rows[0]}

  def _draw(
    self, position: int
  ) -> tuple[list[tuple[int, int]], np.random.Generator]:
    """The tasks of a batch, and the numbers that are drawn after them."""
    rng = np.random.default_rng([self._config.seed, position])
    return task_sampler(self._weights, self._config.batch_size, rng), rng
