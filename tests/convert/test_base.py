import itertools

import jax
import numpy as np
import pytest

from prompt_jax import convert
from prompt_jax.convert import base


def unreadable(shapes: dict[str, tuple[int, ...]]) -> convert.BaseCheckpoint:
  """A checkpoint whose arrays must not be read."""

  def read(index):
    raise AssertionError('read')

  leaves = {
    name: convert.Leaf(shape, np.dtype(np.float32), read)
    for name, shape in shapes.items()
  }
  return convert.BaseCheckpoint('somewhere', 't5x', 5, leaves)


class TestFit:
  def test_reads_only_the_layers_asked_for(self):
    reads = []

    def leaf(i):
      def read(index):
        reads.append((i, index))
        return np.full((4,), i)[index]

      return convert.Leaf((4,), np.dtype(int), read)

    leaves = {f'encoder/layers_{i}/x/scale': leaf(i) for i in range(12)}
    checkpoint = convert.BaseCheckpoint('', 't5x', None, leaves)
    name = 'encoder/layers/x/scale'
    expected = {name: jax.ShapeDtypeStruct((12, 4), np.float32)}
    fitted = convert.fit(checkpoint, expected)[name]
    assert not reads
    found = fitted.read(np.s_[9:11, 1:3])
    np.testing.assert_array_equal(found, [[9, 9], [10, 10]])
    assert reads == [(9, np.s_[1:3,]), (10, np.s_[1:3,])]

  def test_heads_apart(self):
    query = np.arange(40.0).reshape(4, 2, 5)
    out = np.arange(40.0).reshape(2, 5, 4)
    leaves = {
      'encoder/layers_0/attention/query/kernel': base.from_array(query),
      'encoder/layers_0/attention/out/kernel': base.from_array(out),
    }
    checkpoint = convert.BaseCheckpoint('', 't5x', None, leaves)
    shapes = [(4, 10), (10, 4)]
    expected = {
      name: jax.ShapeDtypeStruct(shape, np.float32)
      for name, shape in zip(leaves, shapes, strict=True)
    }
    query_leaf, out_leaf = convert.fit(checkpoint, expected).values()
    query, out = query.reshape(4, 10), out.reshape(10, 4)
    for start, stop in itertools.combinations(range(11), 2):
      index = np.s_[1:3, start:stop]
      np.testing.assert_array_equal(query_leaf.read(index), query[index])
      index = index[::-1]
      np.testing.assert_array_equal(out_leaf.read(index), out[index])

  def test_lists_everything_at_once(self):
    checkpoint = unreadable(
      {
        'encoder/layers_0/mlp/wi/kernel': (4, 8),
        'encoder/layers_1/mlp/wi/kernel': (4, 8),
        'encoder/layers_0/mlp/wo/kernel': (8, 4),
        'encoder/layers_1/mlp/wo/kernel': (16, 4),
        'token_embedder/embedding': (100, 4),
        'encoder/encoder_norm/scale': (4,),
        'encoder/prompt/prompt/prompt': (5, 4),
      }
    )
    expected = {
      'encoder/layers/mlp/wi_0/kernel': (2, 4, 8),
      'encoder/layers/mlp/wo/kernel': (2, 8, 4),
      'token_embedder/embedding': (128, 4),
      'encoder/encoder_norm/scale': (4,),
      'decoder/decoder_norm/scale': (4,),
    }
    expected = {
      name: jax.ShapeDtypeStruct(shape, np.float32)
      for name, shape in expected.items()
    }
    with pytest.raises(convert.CheckpointMismatch) as error:
      convert.fit(checkpoint, expected)
    lines = [' '.join(line.split()) for line in str(error.value).splitlines()]
    assert lines == [
      'somewhere (t5x) does not fit the model: 3 missing, 3 extra, '
      '2 misshapen; 2 leaves fit.',
      'name found expected dtype',
      'decoder/decoder_norm/scale - [4] - missing',
      'encoder/layers_1/mlp/wo/kernel [16, 4] [8, 4] float32 misshapen',
      'encoder/layers_{0..1}/mlp/wi/kernel [4, 8] - float32 extra',
      'encoder/layers_{0..1}/mlp/wi_0/kernel - [4, 8] - missing',
      'encoder/prompt/prompt/prompt [5, 4] - float32 extra',
      'token_embedder/embedding [100, 4] [128, 4] float32 misshapen',
      'Near misses:',
      'encoder/layers_{0..1}/mlp/wi/kernel (extra): close to '
      'encoder/layers_{0..1}/mlp/wi_0/kernel',
      'encoder/layers_{0..1}/mlp/wi_0/kernel (missing): close to '
      'encoder/layers_{0..1}/mlp/wi/kernel',
      'Take the gin model file that this checkpoint was made for.',
    ]
    report = convert.report(checkpoint, expected)
    assert report.startswith('somewhere (t5x, step 5): 3 missing, ')
    assert len(report.splitlines()) == 2 + 8

  def test_more_and_fewer_layers(self):
    shapes = {f'decoder/layers_{i}/x/scale': (4,) for i in range(3)}
    name = 'decoder/layers/x/scale'
    for length, message in (
      (2, 'layers_2/.* extra'),
      (4, 'layers_3/.* missin'),
    ):
      expected = {name: jax.ShapeDtypeStruct((length, 4), np.float32)}
      with pytest.raises(convert.CheckpointMismatch, match=message):
        convert.fit(unreadable(shapes), expected)

  def test_only_attention_kernels_are_reshaped(self):
    name = 'encoder/layers_0/mlp/wi/kernel'
    expected = {name: jax.ShapeDtypeStruct((4, 10), np.float32)}
    with pytest.raises(convert.CheckpointMismatch, match='misshapen'):
      convert.fit(unreadable({name: (4, 2, 5)}), expected)

  def test_layers_of_one_array_are_read_once(self):
    reads = []

    def read(index):
      reads.append(index)
      return np.arange(24.0).reshape(2, 3, 4)[index]

    parent = base.Leaf((2, 3, 4), np.dtype(np.float64), read)
    stacked = base.stack([base.layer(parent, i, 1) for i in range(3)])
    found = stacked.read(np.s_[1:3, 0:1, 2:4])
    expected = np.moveaxis(np.arange(24.0).reshape(2, 3, 4), 1, 0)
    np.testing.assert_array_equal(found, expected[1:3, 0:1, 2:4])
    assert reads == [np.s_[0:1, 1:3, 2:4]]

  def test_layers_of_several_arrays(self):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, 3, 4))
    leaves = [
      base.layer(base.from_array(array), i, 1)
      for array, i in ((one, 0), (one, 2), (other, 1))
    ]
    expected = np.stack([one[:, 0], one[:, 2], other[:, 1]])
    np.testing.assert_array_equal(base.stack(leaves).array(), expected)
    np.testing.assert_array_equal(base.stack(leaves[:2]).array(), expected[:2])
