"""A study file's cells, their keys and how they are put together."""

import collections
import dataclasses

import pytest
import toy_study

from prompt_jax.study import configurations
from prompt_jax.study import plan
from prompt_jax.study import workers


def test_cells_of_a_study():
  study = toy_study.made()
  cells = plan.cells(study)
  assert len(cells) == 2 * (2 * 2 + 2)
  assert len({cell.key for cell in cells}) == len(cells)
  first = cells[0]
  assert first.settings == {
    'method': 'soft_prompt',
    'size': 'a',
    'task': 'toy',
    'seed': 0,
    'base_seed': 0,
    'LEARNING_RATE': 0.1,
  }
  assert first.gin_files == (
    'models/tiny.gin',
    'methods/soft_prompt.gin',
    'runs/study.gin',
  )
  assert first.bindings['INITIAL_CHECKPOINT_PATH'] == '/a'
  assert 'LEARNING_RATE=0.1' in first.flags()
  assert "MIXTURE_OR_TASK_NAME='glue_sst2'" in first.flags()
  assert plan.cells(study) == cells


def _keys(**fields):
  return [cell.key for cell in plan.cells(toy_study.made(**fields))]


def test_key_changes_with_what_decides_the_result(monkeypatch):
  before = _keys()
  # What does not: the order and number of the others, words for people.
  assert set(_keys(seeds=(1, 0, 2))) > set(before)
  assert _keys(title='Another', note='Another') == before
  # What does.
  for other in (
    {'seeds': (5, 6)},
    {'base_seeds': (1,)},
    {'bindings': {'BATCH_SIZE': 3}},
    {'task_files': ('glue.py',)},
    {'checkpoints': {'a': '/c', 'b': '/d'}},
  ):
    assert not set(_keys(**other)) & set(before), other
  monkeypatch.setattr('prompt_jax.__version__', '99.0')
  assert not set(_keys()) & set(before)


def test_contents_of_files_are_in_the_key(tmp_path):
  path = tmp_path / 'train.jsonl'

  def keys(text):
    path.write_text(text)
    configurations._resolved.cache_clear()
    return _keys(bindings={'TRAIN_DATA': str(path)})

  assert keys('a') == keys('a')
  assert not set(keys('a')) & set(keys('b'))


def test_jobs_share_base_and_shapes():
  study = toy_study.made()
  jobs = plan.jobs(study)
  assert [len(job.cells) for job in jobs] == [4, 2, 4, 2]
  for job in jobs:
    settings = [cell.settings for cell in job.cells]
    assert len({(s['size'], s['method']) for s in settings}) == 1
  # The larger model is the heavier one.
  assert jobs[2].weight > jobs[0].weight
  recipe = dataclasses.replace(study.methods['soft_prompt'], together=3)
  methods = {**study.methods, 'soft_prompt': recipe}
  jobs = plan.jobs(toy_study.made(methods=methods))
  assert [len(job.cells) for job in jobs] == [3, 1, 2, 3, 1, 2]
  # By itself: with checkpoints, so another configuration and key.
  assert not any(job.alone for job in jobs)
  recipe = dataclasses.replace(recipe, together=1)
  methods = {**study.methods, 'soft_prompt': recipe}
  found = plan.jobs(toy_study.made(methods=methods))
  assert [job.alone for job in found] == [True] * 4 + [False] + [True] * 4 + [
    False
  ]
  assert found[0].cells[0].gin_files[-1] == 'runs/study_alone.gin'
  assert found[0].cells[0].key not in {c.key for job in jobs for c in job.cells}
  # Another prompt length is another program.
  grid = {'PROMPT_LENGTH': (5, 20)}
  recipe = dataclasses.replace(recipe, grid=grid, together=3)
  methods = {**study.methods, 'soft_prompt': recipe}
  jobs = plan.jobs(toy_study.made(methods=methods))
  assert [len(job.cells) for job in jobs] == [2, 2, 2, 2, 2, 2]


def test_pretraining_comes_first():
  pretraining = plan.Recipe(
    'pretraining',
    ('methods/fine_tune.gin', 'runs/train.gin'),
    {'TRAIN_STEPS': 5, 'VOCABULARY_PATH': ''},
    of_size={'b': {'LEARNING_RATE': 0.5}},
    task_name='glue_mnli',
  )
  study = toy_study.made(
    pretraining=pretraining, checkpoints={}, base_seeds=(0, 7)
  )
  cells = plan.cells(study)
  bases = [cell for cell in cells if cell.stage == 'pretrain']
  assert len(bases) == 4
  assert bases[-1].bindings['SEED'] == 7
  assert bases[-1].bindings['LEARNING_RATE'] == 0.5
  assert 'LEARNING_RATE' not in bases[0].bindings
  count = collections.Counter(cell.base for cell in cells)
  assert count == {None: 4, **{base.key: 6 for base in bases}}


def test_shards_are_all_of_it():
  pretraining = plan.Recipe(
    'pretraining',
    ('methods/fine_tune.gin', 'runs/train.gin'),
    {'TRAIN_STEPS': 5, 'VOCABULARY_PATH': ''},
    task_name='glue_mnli',
  )
  study = toy_study.made(pretraining=pretraining, checkpoints={})
  jobs = plan.jobs(study)
  parts = [workers.mine(jobs, workers.Shard(i, 3)) for i in range(3)]
  tuning = [
    job.key for part in parts for job in part if job.cells[0].stage == 'tune'
  ]
  assert sorted(tuning) == sorted(
    job.key for job in jobs if job.cells[0].stage == 'tune'
  )
  for part in parts:  # each has the bases that it needs
    made = {job.cells[0].key for job in part}
    assert all(job.base is None or job.base in made for job in part)
  assert sorted(
    job.key for job in workers.mine(jobs, workers.Shard())
  ) == sorted(job.key for job in jobs)
  assert workers.Shard.parse('1/3') == workers.Shard(1, 3)
  for text in ('3/3', '1', 'a/b', '-1/2'):
    with pytest.raises(plan.StudyError, match="is to be 'i/n'"):
      workers.Shard.parse(text)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'sizes': {}}, 'no sizes'),
    ({'seeds': ()}, 'no seeds'),
    ({'reference_method': 'fine_tun'}, "no 'fine_tun'. Did you mean fine_tune"),
    ({'checkpoints': {'a': '/a'}}, "no checkpoint of size 'b'"),
    ({'overlay': ('lester_2012',)}, 'Did you mean lester_2021'),
    (
      {'methods': {'fine_tune': plan.Recipe('', grid={'SEED': ()})}},
      'the grid of SEED is empty',
    ),
    (
      {'methods': {'fine_tune': plan.Recipe('', together=0)}},
      'fine_tune: together is to be at least 1, got 0',
    ),
    (
      {'methods': {'fine_tune': plan.Recipe('', grid={'SEED': 3})}},
      'a list of values, got 3',
    ),
    (
      {'methods': {'fine_tune': plan.Recipe('', of_size={'c': {}})}},
      "of_size of fine_tune: no 'c'",
    ),
    ({'pretraining': plan.Recipe('', grid={'SEED': (1,)})}, 'has a grid'),
  ],
)
def test_studies_that_cannot_be(fields, message):
  with pytest.raises(plan.StudyError, match=message):
    toy_study.made(**fields)


def test_cells_that_cannot_be():
  with pytest.raises(plan.StudyError, match='Two cells of the study are the s'):
    plan.cells(toy_study.made(seeds=(1, 1)))
  task = plan.Task('toy', 50.0, 'pocket{base_sed}_mood')
  with pytest.raises(plan.StudyError, match="'base_sed'. Did you mean base_se"):
    plan.cells(toy_study.made(tasks={'toy': task}))
  with pytest.raises(ValueError, match='no_model.gin'):
    plan.cells(toy_study.made(sizes={'a': ('models/no_model.gin',)}))
