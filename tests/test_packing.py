"""Packed rows: by hand, and id for id those of seqio."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_jax import feature_converters
from prompt_jax import packing


def test_a_row_ends_where_any_feature_has_no_room():
  sizes = np.array([[3, 1], [2, 1], [4, 1], [1, 3], [1, 1]])
  rows, starts = packing.places(sizes, [6, 4])
  # 3 + 2 fit into 6, then 4 do not; then 1 fits, but 1 + 3 + 1 targets do not.
  assert rows.tolist() == [0, 0, 1, 1, 2]
  assert starts.tolist() == [[0, 0], [3, 1], [0, 0], [4, 1], [0, 0]]


def test_by_hand():
  inputs = np.array([[7, 8, 1], [9, 1, 0], [4, 1, 0]], np.int32)
  targets = np.array([[3, 1], [5, 1], [6, 1]], np.int32)
  found = packing.pack([inputs, targets], [6, 4])
  assert [x.tolist() for x in found] == [
    [[7, 8, 1, 9, 1, 0], [4, 1, 0, 0, 0, 0]],
    [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]],
    [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]],
    [[3, 1, 5, 1], [6, 1, 0, 0]],
    [[0, 1, 0, 1], [0, 1, 0, 0]],
    [[1, 1, 2, 2], [1, 1, 0, 0]],
  ]
  assert all(x.dtype == np.int32 for x in found)


def dataset(seed, count, lengths):
  """Texts of all lengths from 0, some with id 0 in their middle."""
  rng = np.random.default_rng(seed)
  rows = [
    {key: rng.integers(0 if i % 7 == 0 else 2, 90, rng.integers(0, n + 1))
     for key, n in lengths.items()}
    for i in range(count)
  ]  # fmt: skip
  spec = tf.TensorSpec([None], tf.int32)
  return tf.data.Dataset.from_generator(
    lambda: rows, output_signature=dict.fromkeys(lengths, spec)
  )


@pytest.mark.parametrize(
  ('inputs', 'targets'), [(12, 6), (5, 9), (40, 3), (1, 1)]
)
def test_rows_are_seqios(inputs, targets):
  lengths = {'inputs': inputs, 'targets': targets}
  ds = dataset(inputs, 150, lengths)  # several blocks, the last not full
  ours = feature_converters.EncDecFeatureConverter(pack=True)
  theirs = seqio.EncDecFeatureConverter(pack=True)
  found, expected = (
    list(converter(ds, lengths).as_numpy_iterator())
    for converter in (ours, theirs)
  )
  assert len(found) == len(expected) > 3
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for key, x in one.items():
      assert x.dtype == other[key].dtype
      np.testing.assert_array_equal(x, other[key], key)


def test_an_example_that_is_too_long_is_an_error():
  ds = dataset(0, 20, {'inputs': 9, 'targets': 4})
  converter = feature_converters.EncDecFeatureConverter(pack=True)
  with pytest.raises(
    tf.errors.InvalidArgumentError,
    match='inputs may have 5 tokens, but an example has [6-9]',
  ):
    list(converter(ds, {'inputs': 5, 'targets': 4}).as_numpy_iterator())
