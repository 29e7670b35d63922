"""Tasks whose rows are arrays of ids, of one length with padding.

For texts that are made as ids: seqio's preprocessors, one row at a time, would
take longer than all the rest. One core reads about 100,000 rows a second. Not
for texts that a vocabulary is still to encode.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import seqio
import tensorflow as tf

from prompt_jax import feature_converters
from prompt_jax import user_data

Rows = dict[str, np.ndarray]


def add(
  name: str,
  vocabulary: seqio.Vocabulary,
  rows: Callable[[str], Rows],
  sizes: Mapping[str, int],
  postprocess_fn: Callable[..., Any] | None = None,
  metric_fn: Callable[..., Any] | None = None,
) -> str:
  """Registers a task; one of the same name makes room for it.

  Args:
    name: of the task.
    vocabulary: of the ids.
    rows: of a split, 'inputs' [rows, tokens] and 'targets' [rows, tokens].
    sizes: rows of each split.
    postprocess_fn: as seqio's.
    metric_fn: as seqio's.

  Returns:
    The name.
  """
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=cast(Any, _ArraysDataSource(rows, sizes)),
    preprocessors=[],
    postprocess_fn=postprocess_fn,
    metric_fns=[metric_fn] if metric_fn else [],
    output_features=feature_converters.output_features(vocabulary),
    shuffle_buffer_size=None,  # the source shuffles
    task_cls=_PaddedTask,
  )
  return name


class _PaddedTask(seqio.Task):
  """Rows of one length with padding: nothing to trim."""

  def _trim_output_features(
    self, dataset: tf.data.Dataset, sequence_length: Any
  ) -> tf.data.Dataset:
    spec: Any = dataset.element_spec
    for feature, room in (sequence_length or {}).items():
      if feature in spec and room < spec[feature].shape[0]:
        raise ValueError(
          f'{self.name} has {feature} of up to {spec[feature].shape[0]} '
          f'tokens, but TASK_FEATURE_LENGTHS has room for {room}: its texts '
          'would lose their end.'
        )
    return dataset


class _ArraysDataSource(user_data.RowsDataSource):
  """Rows that are made when they are first read, as arrays.

  Args:
    rows: of a split, a column an array.
    sizes: rows of each split.
  """

  def __init__(self, rows: Callable[[str], Rows], sizes: Mapping[str, int]):

    def dataset(
      split: str, shuffle_files: bool, seed: int | None = None
    ) -> tf.data.Dataset:
      columns: Any = rows(split)
      ds = tf.data.Dataset.from_tensor_slices(columns)
      return ds.shuffle(sizes[split], seed=seed) if shuffle_files else ds

    # RowsDataSource would hold the rows as Python's dicts.
    seqio.FunctionDataSource.__init__(
      self, dataset, splits=list(sizes), num_input_examples=sizes
    )
