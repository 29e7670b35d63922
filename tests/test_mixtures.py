"""Mixtures: their rates by hand, what is held out, and what is refused."""

import json

import commands
import numpy as np
import pytest
import seqio

from prompt_jax import caching
from prompt_jax import datasets
from prompt_jax import feature_converters
from prompt_jax import mixtures
from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.mixtures import Mixture
from prompt_jax.mixtures import MixtureError

LENGTHS = {'inputs': 64, 'targets': 16}
# Rows of the training splits.
SIZES = {'mr': 6, 'cr': 3, 'subj': 12}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """A folder of local rows, and the tasks registered."""
  tmp_path = tmp_path_factory.mktemp('rows')
  tasks.register(vocabularies.bytes_vocabulary())
  for name, size in SIZES.items():
    (tmp_path / name).mkdir()
    for split, count in (('train', size), ('validation', 2)):
      lines = [
        json.dumps({'text': f'{name} {i}', 'label': i % 2})
        for i in range(count)
      ]
      path = tmp_path / name / f'{split}.jsonl'
      path.write_text('\n'.join(lines) + '\n')
  return tmp_path


def rates(mixture):
  """The rate of each task that is trained on."""
  made = mixture.register('mixture')
  return {t.name: made.get_rate(t) for t in made.tasks if 'train' in t.splits}


@pytest.mark.parametrize(
  ('size', 'cap', 'temperature', 'want'),
  [
    (100, None, 1, 100),
    (100, 64, 1, 64),
    (100, 64, 2, 8),
    (27, 64, 3, 3),
    (100, None, float('inf'), 1),
  ],
)
def test_rate_by_hand(size, cap, temperature, want):
  assert mixtures.rate(size, cap, temperature) == pytest.approx(want, 1e-12)


def test_rates_are_sizes_capped_and_tempered(rows):
  want = {'mr': 4**0.5, 'cr': 3**0.5, 'subj': 4**0.5}
  got = rates(Mixture(tuple(SIZES), cap=4, temperature=2.0, rows_dir=str(rows)))
  assert got == pytest.approx(want)


def test_given_rates_stand_in_for_sizes(rows):
  mixture = Mixture(('mr', 'cr'), {'mr': 100}, cap=50, rows_dir=str(rows))
  assert rates(mixture) == {'mr': 50, 'cr': 3}


def test_examples_come_at_their_rates(rows):
  Mixture(('mr', 'subj'), {'mr': 3, 'subj': 1}, rows_dir=str(rows)).register(
    'mixture'
  )
  config = datasets.DatasetConfig('mixture', LENGTHS, batch_size=800, seed=3)
  converter = feature_converters.EncDecFeatureConverter()
  batch = next(datasets.TrainIterator(config, converter))
  letter = batch['encoder_input_tokens'][:, 0]
  share = np.mean(letter == ord('m') + 3)
  # 3 / 4; the standard error is 0.015.
  assert abs(share - 0.75) < 0.045


def test_held_out_task_is_evaluated_and_not_trained_on(rows):
  names = ('mr', 'taskless_mr', 'subj')
  mixture = Mixture(names, holdout=('mr',), rows_dir=str(rows))
  assert set(rates(mixture)) == {'subj'}
  made = datasets.find_task('mixture')
  splits = {t.name: set(t.splits) for t in datasets.subtasks(made)}
  assert splits == {
    'mr': {'validation'},
    'taskless_mr': {'validation'},
    'subj': {'train', 'validation'},
  }
  ds = made.get_dataset(LENGTHS, split='train', shuffle=False, num_epochs=1)
  texts = [bytes(x - 3) for x in map(_text, ds.as_numpy_iterator())]
  assert len(texts) == 12 and all(t.startswith(b'subj') for t in texts)
  # The task itself keeps its split for those who name it.
  assert 'train' in seqio.TaskRegistry.get('mr').splits


def _text(example):
  return example['inputs'][:-1].astype(np.uint8)


def test_clusters_and_mixtures_stand_for_their_tasks(rows):
  assert Mixture(('anli', 'summarization')).expand() == [
    'anli_r1', 'anli_r2', 'anli_r3', 'xsum', 'cnn_dailymail',
  ]  # fmt: skip
  assert Mixture(('taskless_acceptability',)).expand() == ['taskless_glue_cola']
  # ReCoRD is of both.
  both = Mixture(('commonsense', 'reading')).expand()
  assert both.count('super_glue_record') == 1
  own = Mixture(('two',), clusters={'two': ('mr', 'cr')})
  assert own.expand() == ['mr', 'cr']


def test_every_task_of_a_cluster_is_registered(rows):
  for name in mixtures.CLUSTERS:
    found = Mixture((name,)).expand()
    assert found == list(mixtures.CLUSTERS[name])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'tasks': ()}, 'empty'),
    ({'tasks': ('mr', 'mr')}, "'mr' is twice"),
    ({'tasks': ('mr', 'sentiment')}, "'mr' is twice"),
    ({'tasks': ('mrr',)}, r"'mrr' is no task, .*Did you mean"),
    ({'tasks': ('sentimnt',)}, 'sentiment'),
    ({'rates': {'mr': 0}}, "'mr': A rate must be above 0, got 0"),
    ({'rates': {'mr': -1.0}}, "'mr': A rate must be above 0, got -1"),
    ({'rates': {'cx': 1}}, r"'cx', which is not in the mixture"),
    ({'cap': 0}, 'cap must be above 0'),
    ({'temperature': 0.0}, 'temperature must be above 0'),
    ({'holdout': ('mr', 'cr')}, 'Nothing is left to train on'),
    ({'holdout': ('subj',)}, "'subj' is to be held out, but nothing of it"),
    ({'holdout': ('sub',)}, "'sub' is no task"),
    ({'clusters': {'a': ('mrr',)}, 'tasks': ('a',)}, "'mrr' of the cluster"),
  ],
)
def test_refuses(rows, fields, message):
  with pytest.raises(MixtureError, match=message):
    Mixture(
      **{'tasks': ('mr', 'cr'), 'rows_dir': str(rows), **fields}
    ).register('mixture')


def test_refuses_a_text_for_names_and_the_name_of_a_task(rows):
  with pytest.raises(MixtureError, match=r"must be names, as in \('mr',\)"):
    Mixture('mr')
  with pytest.raises(MixtureError, match='another MIXTURE_OR_TASK_NAME'):
    Mixture(('mr',), rows_dir=str(rows)).register('cr')


# ---- offline cache -----------------------------------------------------------


def test_cached_task_reads_the_same_rows(rows, tmp_path):
  for name in ('mr', 'subj'):
    tasks.use_rows_dir(name, rows)
  folder = tmp_path / 'cache'
  assert caching.cache('subj', folder) == {'train': 12, 'validation': 2}
  with pytest.raises(ValueError, match='is there already'):
    caching.cache('subj', folder)
  task = seqio.TaskRegistry.get('subj')

  def read(use_cached):
    ds = task.get_dataset(
      LENGTHS, split='train', shuffle=False, use_cached=use_cached
    )
    return list(ds.as_numpy_iterator())

  with caching.caches(folder):
    cached, fresh = read(True), read(False)
  assert len(cached) == 12
  for a, b in zip(cached, fresh, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  assert task.get_cached_stats('train')['examples'] == 12


def test_cache_holds_what_does_not_depend_on_lengths(rows, tmp_path):
  tasks.use_rows_dir('mr', rows)
  caching.cache('mr', tmp_path / 'cache')
  with caching.caches(tmp_path / 'cache'):
    task = seqio.TaskRegistry.get('mr')
    ds = task.get_dataset(
      {'inputs': 3, 'targets': 2}, split='train', use_cached=True, shuffle=False
    )
    found = next(ds.as_numpy_iterator())
  assert len(found['inputs']) == 3 and found['inputs'][-1] == 1


# ---- the command -------------------------------------------------------------


@pytest.mark.slow
def test_trains_on_a_mixture_from_gin(rows, tmp_path):
  args = commands.train(
    rows,
    train_data=None,
    eval_data=None,
    inputs=None,
    targets=None,
    labels=None,
    rows_dir=rows,
    model_dir=tmp_path / 'run',
    TRAIN_STEPS=2,
    EVAL_PERIOD=2,
    MIXTURE_TASKS=('mr', 'cr', 'subj'),
    HOLDOUT=('cr',),
    TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16},
  )
  args = [a.replace('runs/train.gin', 'runs/mixture.gin') for a in args]
  assert commands.here(*args) == 0
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  evaluated = {line['task'] for line in lines if 'rank_accuracy' in line}
  assert evaluated == {'mr', 'cr', 'subj'}
