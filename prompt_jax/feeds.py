"""Where the batches of a training loop come from, and the steps on them.

A feed is called with the train state and makes at least one step. Two kinds:
`Streamed` reads a batch as it is needed; `Resident` keeps a small data set on
the devices and makes many steps in one dispatch, since there the steps are so
short that dispatching them and reading their batches is what takes the time.
Both give the same batches at the same position whatever happened before, so
that a run can go on from any. They do not give the same order as each other.

Not for reading and converting examples (`datasets.py`) nor for what a step
does (`trainer.py`).
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import seqio

from prompt_jax import datasets
from prompt_jax.datasets import Batch

# Steps of one dispatch at most, and how long it should take: progress is shown
# and signals are heard between dispatches.
MOST_STEPS = 256
_SECONDS = 0.25
_STEPS_OF_PROCESSES = 16  # of one dispatch, where there are several
_COMPARED = 64  # rows that are read twice, to find random preprocessors


class Steps(NamedTuple):
  """What a feed has done.

  Attributes:
    state: after the steps, on the devices.
    metrics: of `trainer.train_step`, a value a step; perhaps more behind them.
    count: steps.
    rows: of a batch.
    batch: the host batch of the i-th of them.
  """

  state: Any
  metrics: Any
  count: int
  rows: int
  batch: Callable[[int], Batch]


@dataclasses.dataclass
class Streamed:
  """One step a call, on a batch that is read while the devices work.

  Attributes:
    iterator: batches, from the one that comes next.
    step_fn: the compiled `trainer.train_step`.
    put: of the partitioner.
  """

  iterator: datasets.TrainIterator
  step_fn: Callable[..., Any]
  put: Callable[[Batch], Any]

  @property
  def position(self) -> int:
    """Batches taken so far."""
    return self.iterator.position

  def __call__(self, state: Any, frozen: Any, most: int) -> Steps:
    """One step."""
    del most
    batch = next(self.iterator)
    state, metrics = self.step_fn(state, frozen, self.put(batch))
    rows = len(next(iter(batch.values())))
    return Steps(state, metrics, 1, rows, lambda _: batch)


@dataclasses.dataclass
class Resident:
  """Steps on a data set that lies on the devices.

  Attributes:
    rows: all examples on the host, [n, ...] each.
    data: the same on the devices.
    step_fn: the compiled `trainer.train_steps`.
    order: from a position and a number of batches to their rows, int32
      [count, B], or [count, K, B] for K runs at once; `functools.partial` of
      the function below, or several of them.
    position: batches taken so far.
    pace: steps of the next call, if they are wanted; it follows the clock,
      which changes no number.
  """

  rows: Batch
  data: Any
  step_fn: Callable[..., Any]
  order: Callable[[int, int], np.ndarray]
  position: int = 0
  pace: int = 1
  _before: float = 0.0

  def __call__(self, state: Any, frozen: Any, most: int) -> Steps:
    """At most `most` steps."""
    self._adapt()
    count = min(most, self.pace)
    taken = self.order(self.position, count)
    padding = ((0, MOST_STEPS - count), *((0, 0),) * (taken.ndim - 1))
    state, metrics = self.step_fn(
      state, frozen, self.data, np.pad(taken, padding), np.int32(count)
    )
    self.position += count
    return Steps(
      state,
      metrics,
      count,
      taken[0].size,
      lambda i: {name: x[taken[i]] for name, x in self.rows.items()},
    )

  def _adapt(self) -> None:
    """Doubles the pace while calls come quickly, halves it when slowly."""
    if jax.process_count() > 1:  # which have to agree, and have other clocks
      self.pace = _STEPS_OF_PROCESSES
      return
    now = time.monotonic()
    elapsed, self._before = now - self._before, now
    if elapsed < _SECONDS:
      self.pace = min(2 * self.pace, MOST_STEPS)
    elif elapsed > 4 * _SECONDS:
      self.pace = max(self.pace // 2, 1)


def order(
  num_rows: int, batch_size: int, seed: int, position: int, count: int
) -> np.ndarray:
  """Rows of the batches from `position` on, int32 [count, batch_size].

  The batches are cut from an endless sequence of permutations, one an epoch.
  """
  first, end = position * batch_size, (position + count) * batch_size
  epochs = range(first // num_rows, -(-end // num_rows))
  drawn = [_permutation(num_rows, seed, epoch) for epoch in epochs]
  start = first - epochs[0] * num_rows
  taken = np.concatenate(drawn)[start : start + count * batch_size]
  return taken.reshape(count, batch_size)


@functools.lru_cache(maxsize=64)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  drawn = np.random.default_rng([seed, epoch]).permutation(num_rows)
  return drawn.astype(np.int32)


def read_rows(
  config: datasets.DatasetConfig, converter: Any, limit: int
) -> Batch | None:
  """All examples of a split, in its order, [n, ...] each; None if they cannot.

  They cannot be kept if there are more than `limit` rows, if the task is a
  mixture (which draws its tasks by their rates), or if two readings with
  different seeds differ: then a preprocessor is random, and every epoch is to
  see other examples.
  """
  provider = datasets.find_task(config.mixture_or_task_name)
  if isinstance(provider, seqio.Mixture):
    return None
  datasets.check_split(provider, config.split)
  examples = provider.num_input_examples(config.split)
  if limit < 1 or (examples is not None and examples > limit):
    return None

  def read(seed: int, batch_size: int) -> Any:
    once = dataclasses.replace(
      config, shuffle=False, num_epochs=1, seed=seed, batch_size=batch_size
    )
    ds = datasets.get_dataset(once, converter, drop_remainder=False)
    return datasets.TrainIterator(ds)

  batches, count = [], 0
  for batch in read(config.seed, 1024):
    batches.append(batch)
    count += len(next(iter(batch.values())))
    if count > limit:
      return None
  rows = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  other = next(iter(read(config.seed + 1, _COMPARED)))
  if any((rows[k][: len(x)] != x).any() for k, x in other.items()):
    logging.info('%s is random: read anew every epoch.', provider.name)
    return None
  return rows
