"""Batches of a few tasks each: how tasks are drawn, and what is read."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_jax import datasets
from prompt_jax import feature_converters
from prompt_jax import task_sampling
from prompt_jax import vocabularies

VOCABULARY = vocabularies.bytes_vocabulary(0)
LENGTHS = {'inputs': 6, 'targets': 4}
SIZES = {'ts_a': 5, 'ts_b': 7, 'ts_c': 9}


def rng(seed=0):
  return np.random.default_rng(seed)


# ---- drawing ---------------------------------------------------------------


def test_exactly_b_examples_of_at_most_k_tasks():
  weights = [5.0, 1.0, 3.0, 0.0, 2.0]
  counts, distinct = [], []
  for seed in range(300):
    pairs = task_sampling.task_sampler(weights, 32, rng(seed))
    tasks, sizes = map(np.array, zip(*pairs, strict=True))
    k = len(pairs)
    assert 2 <= k <= 5 and sizes.sum() == 32
    # All give floor(B / K), one of them the remainder too.
    assert sorted(sizes)[:-1] == [32 // k] * (k - 1)
    assert sizes.max() == 32 // k + 32 % k
    assert 3 not in tasks
    counts.append(k)
    distinct.append(len(set(tasks.tolist())))
  assert set(counts) == {2, 3, 4, 5}
  share = np.bincount(counts)[2:] / len(counts)
  assert abs(share - 0.25).max() < 0.1  # K is uniform
  assert (np.array(distinct) < counts).any()  # with replacement


@pytest.mark.parametrize('batch_size', [32, 5, 2])
def test_frequencies_are_those_of_the_mixture(batch_size):
  weights = np.array([8.0, 1.0, 4.0, 3.0])
  total = np.zeros(4)
  generator = rng(1)
  for _ in range(6000):
    for task, size in task_sampling.task_sampler(
      weights.tolist(), batch_size, generator
    ):
      total[task] += size
  np.testing.assert_allclose(
    total / total.sum(), weights / weights.sum(), atol=0.015
  )


def test_a_small_batch_and_a_single_task():
  for seed in range(30):
    pairs = task_sampling.task_sampler([1.0] * 9, 3, rng(seed))
    assert len(pairs) in (2, 3) and sum(size for _, size in pairs) == 3
  assert task_sampling.task_sampler([2.0], 4, rng()) == [(0, 4)]
  assert task_sampling.task_sampler([0.0, 2.0], 1, rng()) == [(1, 1)]


@pytest.mark.parametrize(
  'weights', [[], [0.0, 0.0], [1.0, -1.0], [1.0, float('nan')], [[1.0, 2.0]]]
)
def test_wrong_weights(weights):
  with pytest.raises(ValueError, match='not all of them 0; got'):
    task_sampling.task_sampler(weights, 4, rng())


def test_wrong_batch_size():
  with pytest.raises(ValueError, match='at least 1 example, got 0'):
    task_sampling.task_sampler([1.0], 0, rng())


# ---- reading ---------------------------------------------------------------


def add_task(name, index, size):
  def rows(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({
      'inputs': [f'{name[-1]}{i}' for i in range(size)],
      'targets': [f'{i}' for i in range(size)],
    })  # fmt: skip

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      rows, splits=['train'], num_input_examples={'train': size}
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      feature_converters.add_task_id(index),
      feature_converters.trim_and_append_eos,
    ],
    output_features=feature_converters.output_features(VOCABULARY, True),
    metric_fns=[lambda targets, predictions: {}],
  )


@pytest.fixture(scope='module', autouse=True)
def mixture():
  for index, (name, size) in enumerate(SIZES.items()):
    add_task(name, index, size)
  seqio.MixtureRegistry.add(
    'ts_all', list(SIZES), default_rate=seqio.mixing_rate_num_examples
  )
  yield
  seqio.MixtureRegistry.remove('ts_all')
  for name in SIZES:
    seqio.TaskRegistry.remove(name)


def iterator(name='ts_all', start=0, **fields):
  config = datasets.DatasetConfig(
    name, LENGTHS, **{'batch_size': 8, 'seed': 3, **fields}
  )
  ids = 300 + np.arange(6, dtype=np.int32).reshape(3, 2)
  converter = feature_converters.EncDecFeatureConverter(
    ids, 300, pack=fields.get('pack', False)
  )
  return task_sampling.TaskSampledIterator(config, converter, start)


def text(row):
  return VOCABULARY.decode([i for i in row.tolist() if 0 < i < 300])


def test_batches_hold_a_few_tasks_in_their_own_order():
  batches = iterator()
  seen = {name: [] for name in SIZES}
  sorted_by_task = 0
  for position in range(30):
    batch = next(batches)
    tasks = batch['task_ids']
    drawn = np.zeros(3, int)  # by the rates, which are the numbers of examples
    for task, count in task_sampling.task_sampler(
      [5.0, 7.0, 9.0], 8, np.random.default_rng([3, position])
    ):
      drawn[task] += count
    assert np.bincount(tasks, minlength=3).tolist() == drawn.tolist()
    sorted_by_task += (np.diff(tasks) >= 0).all()
    for task, tokens in zip(tasks, batch['encoder_input_tokens'], strict=True):
      name = list(SIZES)[task]
      assert tokens[:2].tolist() == [300 + 2 * task, 301 + 2 * task]
      assert text(tokens)[0] == name[-1]
      seen[name].append(text(tokens))
  assert batches.position == 30
  assert sorted_by_task < 15  # a batch is shuffled
  for name, size in SIZES.items():
    assert {len(set(seen[name])), len(seen[name]) > size} == {size, True}


@pytest.mark.slow
def test_goes_on_from_any_position():
  whole = iterator()
  batches = [next(whole) for _ in range(6)]
  rest = iterator(start=4)
  assert rest.position == 4
  for want in batches[4:]:
    got = next(rest)
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_array_equal(got[name], want[name])
  other = next(iterator(seed=4))
  assert any((other[name] != batches[0][name]).any() for name in other)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'name': 'ts_a'}, "from a mixture, but 'ts_a' is one task"),
    ({'name': 'ts_al'}, "Did you mean 'ts_all'"),
    ({'pack': True}, 'pack=False and num_epochs=None, got True and None'),
    ({'num_epochs': 2}, 'pack=False and num_epochs=None, got False and 2'),
    ({'start': -1}, 'start must be a number of batches, got -1'),
    ({'split': 'test'}, "no split 'test'"),
  ],
)
def test_what_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    iterator(**fields)
