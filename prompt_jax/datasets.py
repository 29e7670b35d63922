"""From a task or mixture to batches, in an order that can be resumed.

The order of a run is a function of its seed alone: `tf.data` runs in its
deterministic mode, and a run that stopped after n batches goes on with batch n.
Every process builds the same global batch and the trainer takes its rows, so
that the batches do not depend on the number of processes.

A task that shuffles itself (`user_data.py`) gives a new permutation every
epoch. For the others seqio shuffles through a buffer of 1000 examples after it
repeats them, so that neighbouring epochs blend at their border.

Not for tasks themselves (`prompt_jax.tasks`, `user_data.py`) nor for putting
batches on devices.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import re
from typing import Any

from absl import logging
import numpy as np
import seqio
import tensorflow as tf

from prompt_jax import cached_tokens

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """Which examples, how long, in what order; names as in T5X.

  Attributes:
    mixture_or_task_name: a name in seqio's registries.
    task_feature_lengths: most tokens of `inputs` and `targets`, EOS included,
      soft tokens not (`feature_converters.py`).
    split: a split of the task.
    batch_size: examples (packed: rows) in a global batch.
    shuffle: whether to shuffle.
    seed: of the shuffling, the mixing and random preprocessors.
    pack: whether several examples share a row; as in the converter.
    use_cached: whether to read seqio's offline cache.
    num_epochs: passes over the examples; None: without end, for training.
    subtask: of a mixture the one task to read, as the mixture has it.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  split: str = 'train'
  batch_size: int = 32
  shuffle: bool = True
  seed: int = 0
  pack: bool = False
  use_cached: bool = False
  num_epochs: int | None = None
  subtask: str | None = None


def get_dataset(
  config: DatasetConfig,
  converter: seqio.FeatureConverter,
  drop_remainder: bool = True,
) -> tf.data.Dataset:
  """Batches of model features.

  Iterate over the result once: a second pass shuffles anew. To begin again,
  build it again.

  Args:
    config: what to read.
    converter: turns a task's features into the model's.
    drop_remainder: whether to leave out a last batch that is not full. Only
      matters for a finite number of epochs.

  Raises:
    ValueError: no such task, mixture or split; no example in it, or fewer than
      one batch; `pack` differs between config and converter.
  """
  _leave_accelerators_to_jax()
  if config.pack != converter.pack:
    raise ValueError(
      f'pack is {config.pack} in the dataset config and {converter.pack} in '
      'the feature converter: set both to the same.'
    )
  provider = find_task(config.mixture_or_task_name)
  if config.subtask is not None:
    provider = {t.name: t for t in subtasks(provider)}[config.subtask]
  check_split(provider, config.split)
  _check_not_empty(provider, config, converter, drop_remainder)
  examples = None
  if config.use_cached:
    examples = cached_tokens.read(
      provider,
      config.task_feature_lengths,
      config.split,
      config.shuffle,
      config.seed,
      config.num_epochs,
    )
  if examples is None:
    examples = provider.get_dataset(
      config.task_feature_lengths,
      split=config.split,
      use_cached=config.use_cached,
      shuffle=config.shuffle,
      seed=config.seed,
      num_epochs=config.num_epochs,
      # A cache before the shuffling would give every epoch the same order.
      try_in_mem_cache=False,
    )
  ds = converter(examples, config.task_feature_lengths)
  ds = ds.batch(config.batch_size, drop_remainder=drop_remainder)
  options = tf.data.Options()
  options.deterministic = True
  return ds.with_options(options).prefetch(tf.data.AUTOTUNE)


class TrainIterator:
  """Batches as numpy arrays, and how many have been taken.

  To resume: `TrainIterator(config, converter, start=position)`. The skipped
  batches are read and thrown away, which takes their preprocessing time and
  makes the rest exactly what it would have been.

  Attributes:
    dataset: the whole dataset, from batch 0.
    position: batches taken so far, those before `start` included.

  Args:
    source: a config, or a dataset of batches that nothing has iterated over.
    converter: the feature converter, with a config.
    start: batches to skip.

  Raises:
    ValueError: while iterating, what a feature converter finds wrong with an
      example.
  """

  def __init__(
    self,
    source: DatasetConfig | tf.data.Dataset,
    converter: seqio.FeatureConverter | None = None,
    start: int = 0,
  ):
    if start < 0:
      raise ValueError(f'start must be a number of batches, got {start}.')
    if isinstance(source, DatasetConfig):
      if converter is None:
        raise ValueError('A DatasetConfig needs a feature converter.')
      source = get_dataset(source, converter)
    self.dataset = source
    self.position = start
    # tf.data itself skips by index where it can.
    rest = source.skip(start) if start else source
    self._iterator: Iterator[Any] = iter(rest.as_numpy_iterator())

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    try:
      batch = next(self._iterator)
    except tf.errors.InvalidArgumentError as error:
      raise ValueError(_assertion(error)) from error
    self.position += 1
    return batch


def find_task(name: str) -> seqio.Task | seqio.Mixture:
  """The mixture or task of that name.

  Raises:
    ValueError: there is none; near misses are listed.
  """
  names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  if name in names:
    return seqio.get_mixture_or_task(name)
  own = re.match('pocket|docstrings', name)
  if own and not any(other.startswith(own[0]) for other in names):
    raise ValueError(
      f'{name!r} is there for models with its vocabulary only: give '
      f'--gin_file=models/{own[0]}_*.gin and no other of models/.'
    )
  raise ValueError(
    f'No task or mixture is called {name!r}.{_near(name, names)} '
    f'{len(names)} are registered. GLUE and SuperGLUE are after '
    'prompt_jax.tasks.register(vocabulary), your own data after '
    'prompt_jax.user_data.register(...).'
  )


def subtasks(provider: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
  """The tasks of a mixture; a task is its own."""
  return list(seqio.get_subtasks(provider))


def check_split(provider: seqio.Task | seqio.Mixture, split: str) -> None:
  """Checks that a task has a split.

  Raises:
    ValueError: it has not; those that it has are listed.
  """
  splits = [str(name) for name in provider.splits]
  if split not in splits:
    raise ValueError(
      f'{provider.name!r} has no split {split!r}.{_near(split, splits)} '
      f'Its splits: {", ".join(splits)}.'
    )


@dataclasses.dataclass(frozen=True)
class FeatureLengths:
  """Token counts of one feature, EOS included.

  Attributes:
    n: examples counted.
    p50: half of them have at most this many tokens.
    p95: 95 % of them have at most this many.
    max: the longest.
    limit: the length that they are trimmed to.
    num_longer: examples that are trimmed.
  """

  n: int
  p50: int
  p95: int
  max: int
  limit: int
  num_longer: int

  @property
  def share_longer(self) -> float:
    """Share of the examples that are trimmed, 0 to 1."""
    return self.num_longer / self.n


@dataclasses.dataclass(frozen=True)
class LengthReport:
  """How a task's texts fit `task_feature_lengths`; `str()` says it in words."""

  task: str
  split: str
  features: Mapping[str, FeatureLengths]
  complete: bool

  def __str__(self) -> str:
    n = next(iter(self.features.values())).n
    which = f'{n} examples' if self.complete else f'the first {n} examples'
    parts = [f'Lengths in tokens of {which} of {self.task} ({self.split}).']
    for name, f in self.features.items():
      fate = (
        f'{f.num_longer} ({f.share_longer:.1%}) are longer and lose their end'
        if f.num_longer
        else 'none is longer'
      )
      parts.append(
        f'{name}: half have at most {f.p50}, 95 % at most {f.p95}, the longest '
        f'{f.max}; the limit is {f.limit}: {fate}.'
      )
    return ' '.join(parts)


def length_report(
  task: str,
  split: str,
  lengths: Mapping[str, int],
  limit: int = 10_000,
  use_cached: bool = False,
) -> LengthReport:
  """Counts tokens, so that trimming is known and not silent.

  Args:
    task: name of a task or mixture.
    split: one of its splits.
    lengths: the length of each feature to report on, `task_feature_lengths`.
    limit: examples to count at most.
    use_cached: whether to count those of seqio's offline cache.

  Raises:
    ValueError: no such task, split or feature, or no examples.
  """
  _leave_accelerators_to_jax()
  provider = find_task(task)
  check_split(provider, split)
  unknown = [key for key in lengths if key not in provider.output_features]
  if unknown:
    raise ValueError(
      f'{task!r} has no feature {unknown[0]!r}. '
      f'Its features: {", ".join(provider.output_features)}.'
    )
  # Text that a task cuts into pieces of the lengths has none before.
  functions = [fn for t in subtasks(provider) for fn in t.preprocessors]
  cuts = any(getattr(fn, 'cuts_to_lengths', False) for fn in functions)
  ds = provider.get_dataset(
    dict(lengths) if cuts else None,
    split=split,
    use_cached=use_cached,
    shuffle=False,
    num_epochs=1,
    try_in_mem_cache=False,
  )
  # One more than the limit tells whether there were more.
  counts = ds.take(limit + 1).map(
    lambda example: {
      # Padding, id 0, is no token.
      key: tf.math.count_nonzero(example[key])
      for key in lengths
    }
  )
  rows = list(counts.as_numpy_iterator())
  if not rows:
    raise ValueError(f'Split {split!r} of {task!r} has no examples.')
  features = {}
  for key, length in lengths.items():
    sizes = np.array([row[key] for row in rows[:limit]])
    p50, p95 = np.percentile(sizes, [50, 95], method='higher')
    features[key] = FeatureLengths(
      n=len(sizes),
      p50=int(p50),
      p95=int(p95),
      max=int(sizes.max()),
      limit=length,
      num_longer=int((sizes > length).sum()),
    )
  return LengthReport(task, split, features, complete=len(rows) <= limit)


def _check_not_empty(
  provider: seqio.Task | seqio.Mixture,
  config: DatasetConfig,
  converter: seqio.FeatureConverter,
  drop_remainder: bool,
) -> None:
  """Reads, unshuffled, as many examples as a first batch needs."""
  # Without end, a few examples fill a batch by being repeated.
  full = drop_remainder and config.num_epochs is not None
  needed = config.batch_size if full else 1
  ds = provider.get_dataset(
    config.task_feature_lengths,
    split=config.split,
    use_cached=config.use_cached,
    shuffle=False,
    seed=config.seed,
    num_epochs=config.num_epochs or 1,
    try_in_mem_cache=False,
  )
  if full and config.pack:
    ds = converter(ds, config.task_feature_lengths)
  found = sum(1 for _ in ds.take(needed))
  name = f'Split {config.split!r} of {config.mixture_or_task_name!r}'
  if not found:
    raise ValueError(f'{name} has no examples.')
  if found < needed:
    raise ValueError(
      f'{name} has {found} examples in {config.num_epochs} epochs, fewer than '
      f'one batch of {config.batch_size}: use a smaller batch_size, more '
      'epochs, or num_epochs=None to repeat without end.'
    )


def _leave_accelerators_to_jax() -> None:
  try:
    tf.config.set_visible_devices([], 'GPU')
  except RuntimeError:  # TensorFlow has started, perhaps with all the memory
    if tf.config.get_visible_devices('GPU'):
      logging.warning(
        'TensorFlow has taken hold of the GPUs. Call '
        "tf.config.set_visible_devices([], 'GPU') before anything else uses "
        'TensorFlow.'
      )


def _near(name: str, names: list[str]) -> str:
  close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
  return f' Did you mean {" or ".join(map(repr, close))}?' if close else ''


def _assertion(error: Any) -> str:
  """The words of a failed assertion, without TensorFlow's around them."""
  found = re.search(r"assertion failed: \[b?'?(.*?)'?\]\s*(\[|\n|$)",
                    error.message, re.DOTALL)  # fmt: skip
  return found[1] if found else error.message
