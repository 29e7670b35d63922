"""Mixtures: their rates by hand, what is held out, and what is refused."""

import json
import re

import commands
import numpy as np
import pytest
import safetensors.numpy
import seqio

from prompt_jax import caching
from prompt_jax import datasets
from prompt_jax import feature_converters
from prompt_jax import mixtures
from prompt_jax import task_sampling
from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.mixtures import Mixture
from prompt_jax.mixtures import MixtureError
from prompt_jax.row_files import UserDataError

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


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_tasks_are_numbered_in_their_order(rows, split):
  names = ('subj', 'mr')
  mixture = Mixture(names, number_tasks=True, rows_dir=str(rows))
  mixture.register('mixture')
  converter = feature_converters.EncDecFeatureConverter(
    np.array([[300, 301], [302, 303]]), 300
  )
  config = datasets.DatasetConfig('mixture', LENGTHS, split, 16, seed=1)
  batch = next(datasets.TrainIterator(config, converter))
  tokens, ids = batch['encoder_input_tokens'], batch['task_ids']
  assert set(ids.tolist()) == {0, 1}
  assert tokens[:, 0].tolist() == (300 + 2 * ids).tolist()
  assert tokens[:, 2].tolist() == [ord(names[i][0]) + 3 for i in ids]


def test_a_task_held_out_has_no_number(rows):
  mixture = Mixture(
    ('mr', 'subj'), holdout=('mr',), number_tasks=True, rows_dir=str(rows)
  )
  with pytest.raises(MixtureError, match="'mr' is held out.*NUMBER_TASKS"):
    mixture.register('mixture')


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


@pytest.mark.parametrize(
  ('names', 'holdout', 'left'),
  [
    (('nli', 'glue_sst2'), 'glue_rte',
     {*mixtures.CLUSTERS['nli'], 'glue_sst2'} - {'glue_rte', 'super_glue_rte'}),
    (('glue_rte', 'taskless_super_glue_rte', 'mr'), 'taskless_glue_rte',
     {'mr'}),
    (('squad', 'mrqa_in_domain', 'mr'), 'reading', {'mr'}),
    (('squad', 'mrqa_squad', 'mrqa_race', 'mr'), 'mrqa_squad',
     {'mrqa_race', 'mr'}),
    (('trec', 'trec_fine', 'glue_sst2', 'sst5', 'mr', 'cr'), 'sst5',
     {'trec', 'trec_fine', 'cr'}),
    # Not in the mixture, but its texts are.
    (('super_glue_rte', 'mr'), 'glue_rte', {'mr'}),
  ],
)  # fmt: skip
def test_the_same_texts_are_held_out_together(rows, names, holdout, left):
  mixture = Mixture(names, holdout=(holdout,))
  found = mixture.expand()
  assert set(found) - set(mixture._held_out(found)) == left


def test_tasks_of_the_same_texts_are_registered(rows):
  for group in mixtures.SAME_TEXTS:
    assert Mixture(group).expand() == list(group)


def test_texts_that_are_the_same_are_there_twice_in_real_rows(shared):
  def texts(name, split):
    files = tasks.sources.local_files(name, shared / 'data')
    column = 'sentence' if name == 'glue_sst2' else 'text'
    rows = tasks.sources.read_rows(name, {split: files[split]})[split]
    return {''.join(row[column].lower().split()) for row in rows}

  tested = texts('glue_sst2', 'validation')
  for name in ('sst5', 'mr'):
    trained = texts(name, 'train') | texts(name, 'validation')
    assert len(tested & trained) > 0.5 * len(tested)
  assert not tested & texts('cr', 'train')


def test_a_cluster_stands_for_its_tasks_that_have_rows(rows, caplog):
  mixture = Mixture(('sentiment', 'subj'), rows_dir=str(rows))
  with caplog.at_level('WARNING'):
    assert rates(mixture) == {'mr': 6, 'cr': 3, 'subj': 12}
  assert 'no rows of them: glue_sst2, imdb, sst5, mpqa' in caplog.text
  with pytest.raises(UserDataError, match="no folder 'imdb'"):
    rates(Mixture(('subj', 'imdb'), rows_dir=str(rows)))
  with pytest.raises(UserDataError, match="no folder 'glue_mnli'"):
    rates(Mixture(('glue_mnli_and_dev', 'subj'), rows_dir=str(rows)))


def test_the_mixture_of_the_docs_has_real_rows(shared):
  vocabulary = vocabularies.bytes_vocabulary()
  tasks.register(vocabulary)
  folder = str(shared / 'data')
  mixture = Mixture(('nli', 'glue_sst2'), rows_dir=folder)
  assert set(rates(mixture)) == {
    'glue_mnli', 'glue_qnli', 'glue_rte', 'glue_wnli', 'snli', 'super_glue_cb',
    'glue_sst2',
  }  # fmt: skip
  tasks.use_rows_dir('glue_mnli_and_dev', folder)
  found = seqio.MixtureRegistry.get('glue_mnli_and_dev').tasks
  assert [(t.name, list(t.splits)) for t in found] == [
    ('glue_mnli', ['train', 'validation'])
  ]
  tasks.register(vocabulary)


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
    ({'rates': {'mr': 'x'}}, "'mr': Rates, cap .* numbers, got 'x'"),
    ({'temperature': 'a'}, "temperature must be numbers, got 'a'"),
    ({'temperature': None}, 'must be numbers, got None'),
    ({'rates': (1, 2)}, r'rates must be by task, .*got \(1, 2\)'),
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


def test_a_cache_is_checked_before_it_is_read(rows, tmp_path):
  tasks.use_rows_dir('mr', rows)
  task = seqio.TaskRegistry.get('mr')
  with caching.caches(tmp_path):
    with pytest.raises(ValueError, match=r"no cache of 'mr' in CACHE_DIRS = "):
      caching.use(task, [])
    caching.cache('mr', tmp_path)
    caching.use(task, [tmp_path])
    tasks.register(vocabularies.bytes_vocabulary(7))
    with pytest.raises(ValueError, match='tokens of another vocabulary'):
      caching.use(seqio.TaskRegistry.get('mr'), [])
  tasks.register(vocabularies.bytes_vocabulary())


# ---- the command -------------------------------------------------------------


def trained(rows, model_dir, method='soft_prompt', **changes):
  """Two steps on a mixture; the tasks that were evaluated."""
  args = commands.train(
    rows,
    train_data=None,
    eval_data=None,
    inputs=None,
    targets=None,
    labels=None,
    rows_dir=rows,
    model_dir=model_dir,
    TRAIN_STEPS=2,
    EVAL_PERIOD=2,
    MIXTURE_TASKS=('mr', 'cr', 'subj'),
    TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16},
    **changes,
  )
  args = [a.replace('runs/train.gin', 'runs/mixture.gin') for a in args]
  args = [a.replace('soft_prompt.gin', f'{method}.gin') for a in args]
  assert commands.here(*args) == 0
  text = (model_dir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return {line['task'] for line in lines if 'rank_accuracy' in line}


@pytest.mark.slow
def test_trains_on_a_mixture_from_gin(rows, tmp_path):
  evaluated = trained(rows, tmp_path / 'run', HOLDOUT=('cr',))
  assert evaluated == {'mr', 'cr', 'subj'}


@pytest.mark.slow
def test_trains_a_method_that_keeps_tasks_apart(rows, tmp_path, monkeypatch):
  sampled = []

  class Spy(task_sampling.TaskSampledIterator):
    def __next__(self):
      batch = super().__next__()
      sampled.append(batch['task_ids'])
      return batch

  monkeypatch.setattr(task_sampling, 'TaskSampledIterator', Spy)
  few = {'NUM_TASKS': 3, 'LOG_PERIOD': 1}
  evaluated = trained(
    rows, tmp_path / 'run', 'mpt_source', NUMBER_TASKS=True, **few
  )
  assert evaluated == {'mr', 'cr', 'subj'}
  assert len(sampled) >= 2
  assert set(np.concatenate(sampled).tolist()) <= {0, 1, 2}
  # What is a task's own moved for the tasks that were sampled alone.
  file = safetensors.numpy.load_file(tmp_path / 'run/trainable.safetensors')
  seen = set(np.concatenate(sampled[:2]).tolist())
  for name in ('method/u', 'method/v'):
    moved = {i for i, x in enumerate(file[name]) if (x != 1).any()}
    assert moved == seen, name


@pytest.mark.slow
def test_trains_on_a_cache_that_a_command_has_written(rows, tmp_path, capsys):
  cache = tmp_path / 'cache'
  args = commands.train(
    rows,
    train_data=None,
    eval_data=None,
    inputs=None,
    targets=None,
    labels=None,
    MIXTURE_OR_TASK_NAME='subj',
    TRAIN_STEPS=2,
    EVAL_PERIOD=2,
    TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16},
  )
  others = re.compile('--gin_file=methods/|--gin.(EVAL_|PROMPT_)')
  before = commands.without_training(args, 'cache')
  before = [a for a in before if not others.match(a)] + [f'--rows_dir={rows}']
  assert commands.here(*before) == 1
  assert 'Give --output=DIR' in capsys.readouterr().err
  assert commands.here(*before, f'--output={cache}') == 0
  assert 'subj, examples of train 12, validation 2' in capsys.readouterr().out
  cached = ('--gin.USE_CACHED_TASKS=True', f'--gin.CACHE_DIRS={[str(cache)]}')
  with caching.caches():
    # Without rows: the cache is all there is.
    run = tmp_path / 'run'
    assert commands.here(*args, *cached, f'--model_dir={run}') == 0
  assert 'rank_accuracy' in (run / 'metrics.jsonl').read_text()
