"""Reading a task's offline cache many examples at a time.

What `seqio.Task.get_dataset(use_cached=True)` gives, in the same order, of the
features that models read. seqio parses, trims and maps the examples one by one;
most of that time is TensorFlow's, between them.

Not for writing caches: `caching.py`.
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from prompt_jax import feature_converters
from prompt_jax.vocabularies import SOFT_BASE

_BLOCK = 64  # examples that are parsed together
_FEATURES = {'inputs', 'targets'}


def read(
  task: seqio.Task | seqio.Mixture,
  lengths: Mapping[str, int],
  split: str,
  shuffle: bool,
  seed: int | None,
  num_epochs: int | None,
) -> tf.data.Dataset | None:
  """Inputs and targets, trimmed, with EOS and perhaps padding behind it.

  Args:
    task: whose cache is in one of seqio's folders.
    lengths: most tokens of each feature, EOS included.
    split: of the task.
    shuffle: whether to, as seqio; rows of a task that shuffles itself in a new
      order every epoch.
    seed: of the shuffling.
    num_epochs: passes; None: without end.

  Returns:
    None where seqio has to read it: a mixture, or a task that does more to its
    tokens than to trim them.
  """
  if not isinstance(task, seqio.Task) or not _only_trims(task):
    return None
  source: Any = task._get_cached_source(split)
  # The files in seqio's order, but their records as they are.
  source._reader = tf.data.TFRecordDataset
  ds = source.get_dataset(split=split, shuffle=shuffle, seed=seed)
  buffer = task._shuffle_buffer_size
  if shuffle and buffer is None:  # rows in memory shuffle themselves: so here
    ds = ds.shuffle(source.num_input_examples(split), seed=seed)
  if num_epochs != 1:
    ds = ds.repeat(num_epochs)
  described = {key: tf.io.RaggedFeature(tf.int64) for key in _FEATURES}

  def parse(records: tf.Tensor) -> dict[str, tf.Tensor]:
    found = tf.io.parse_example(records, described)
    out = {}
    for key, feature in task.output_features.items():
      tokens = _trimmed(tf.cast(found[key], tf.int32), lengths[key] - 1)
      eos = tf.fill([tf.size(records), 1], feature.vocabulary.eos_id)
      out[key] = tf.concat([tokens, eos], axis=1).to_tensor()
    return out

  ds = ds.batch(_BLOCK).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
  ds = ds.unbatch()
  if shuffle and buffer is not None:
    ds = ds.shuffle(buffer, seed=seed)
  return ds.prefetch(tf.data.AUTOTUNE)


def _trimmed(tokens: Any, length: int) -> Any:
  """Ragged [N, length] as `trim_and_append_eos` cuts each row, without EOS."""
  values, rows = tokens.flat_values, tokens.value_rowids()
  soft = values >= SOFT_BASE
  text = tf.cast(tf.logical_not(soft), tf.int32)
  num_soft = tf.math.segment_sum(tf.cast(soft, tf.int32), rows)
  # The number of this text token in its row, from 1.
  before = tf.concat([[0], tf.cumsum(text)], axis=0)
  number = before[1:] - tf.gather(before, tf.gather(tokens.row_starts(), rows))
  kept = soft | (number <= length - tf.gather(num_soft, rows))
  return tf.ragged.boolean_mask(tokens, tokens.with_flat_values(kept))


def _only_trims(task: seqio.Task) -> bool:
  """Whether all that a task does to cached tokens is to trim them."""
  if not task.supports_caching:
    return False
  placeholder: Any = task._cache_step_idx
  after = list(task.preprocessors)[placeholder + 1 :]
  features = task.output_features
  return (
    after == [feature_converters.trim_and_append_eos]
    and set(features) == _FEATURES
    and all(feature.add_eos for feature in features.values())
  )
