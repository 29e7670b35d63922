"""A cache that is read in blocks gives what seqio's reading of it gives."""

import itertools

import numpy as np
import pytest
import seqio

from prompt_jax import cached_tokens
from prompt_jax import caching
from prompt_jax import datasets
from prompt_jax import feature_converters
from prompt_jax import tasks
from prompt_jax import vocabularies

LENGTHS = {'inputs': 24, 'targets': 10}
# Some longer than the inputs; soft tokens in front, amid and behind the cut.
TEXTS = [
  'short', '<soft:1> a long one that is cut <soft:0>', 'x' * 60, '',
  'cut <soft:2> behind this one, not', 'é and ü',
]  # fmt: skip


@pytest.fixture
def task(tmp_path):
  """A task of 100 rows with its cache of two files; both go again."""
  tasks.register(vocabularies.bytes_vocabulary())
  rows = [
    {'sentence': f'{i} {TEXTS[i % len(TEXTS)]}', 'label': i % 2, 'idx': i}
    for i in range(100)
  ]
  tasks.sources.use_rows('taskless_glue_sst2', {'train': rows}, 'ct_rows')
  caching.cache('ct_rows', tmp_path, num_shards=2)
  with caching.caches(tmp_path):
    yield seqio.TaskRegistry.get('ct_rows')
  seqio.TaskRegistry.remove('ct_rows')


def texts(ds, count):
  found = []
  for row in itertools.islice(ds.as_numpy_iterator(), count):
    # Padding alone may stand behind the text.
    sizes = {key: np.count_nonzero(row[key]) for key in LENGTHS}
    found.append({key: row[key][:n].tolist() for key, n in sizes.items()})
    assert not any(row[key][n:].any() for key, n in sizes.items())
  return found


@pytest.mark.parametrize(
  ('shuffle', 'epochs'), [(False, 1), (True, 1), (True, None)]
)
def test_examples_and_their_order_are_seqios(task, shuffle, epochs):
  # As TFDS's tasks, which shuffle through a buffer.
  task = task.replace(shuffle_buffer_size=30)
  ours = cached_tokens.read(task, LENGTHS, 'train', shuffle, 7, epochs)
  theirs = task.get_dataset(
    LENGTHS, split='train', use_cached=True, shuffle=shuffle, seed=7,
    num_epochs=epochs, try_in_mem_cache=False,
  )  # fmt: skip
  found = texts(ours, 250)
  assert len(found) == (100 if epochs else 250)
  assert found == texts(theirs, 250)


def test_rows_in_memory_are_shuffled_in_each_epoch(task):
  # They shuffle themselves, which seqio does not do when it reads their cache.
  once = cached_tokens.read(task, LENGTHS, 'train', True, 7, 2)
  found = [tuple(one['inputs']) for one in texts(once, 200)]
  first, second = found[:100], found[100:]
  assert sorted(first) == sorted(second) and first != second
  plain = cached_tokens.read(task, LENGTHS, 'train', False, 7, 1)
  assert first != [tuple(one['inputs']) for one in texts(plain, 100)]


@pytest.mark.parametrize('pack', [False, True])
def test_batches_are_those_that_seqio_reads(task, pack, monkeypatch):
  converter = feature_converters.EncDecFeatureConverter(
    np.array([[400, 401, 402]]), 384, pack=pack
  )
  config = datasets.DatasetConfig(
    task.name, LENGTHS, batch_size=8, pack=pack, shuffle=False, num_epochs=1,
    use_cached=True,
  )  # fmt: skip
  ours = list(datasets.TrainIterator(config, converter))
  monkeypatch.setattr(cached_tokens, 'read', lambda *args: None)
  theirs = list(datasets.TrainIterator(config, converter))
  assert len(ours) == len(theirs) > 3
  for one, other in zip(ours, theirs, strict=True):
    for key, x in one.items():
      np.testing.assert_array_equal(x, other[key], key)


def test_what_seqio_has_to_read(task):
  mixture = seqio.Mixture('ct_mixture', [(task, 1.0)])
  assert cached_tokens.read(mixture, LENGTHS, 'train', False, 0, 1) is None
  drawn = seqio.TaskRegistry.get('text_prefix_lm')
  assert cached_tokens.read(drawn, LENGTHS, 'train', False, 0, 1) is None
