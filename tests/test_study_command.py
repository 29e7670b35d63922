"""What `prompt-jax study` does before and after its cells are run."""

import pathlib

import pytest
import toy_study

from prompt_jax import checkpoints
from prompt_jax.study import command
from prompt_jax.study import ledger
from prompt_jax.study import plan
from prompt_jax.study import progress


@pytest.mark.parametrize('name', ['pocket', 'docstrings'])
@pytest.mark.slow
def test_study_goes_on_as_it_was_given(tmp_path, name):
  """Sizes stand in the order of size, which is not that of the alphabet."""
  given = command.load([f'studies/{name}.gin'], ['plan.Study.seeds=(0,)'])
  assert list(given.sizes) != sorted(given.sizes)
  (tmp_path / 'study.gin').write_text(command._source())
  found = command.load([str(tmp_path / 'study.gin')], [])
  assert found == given and found.seeds == (0,)
  for field in ('sizes', 'methods', 'tasks'):
    assert list(getattr(found, field)) == list(getattr(given, field))
  for name, recipe in given.methods.items():
    assert list(found.methods[name].grid) == list(recipe.grid)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({}, 'No study: give its gin file, .*/study.gin is not there'),
    ({'num_workers': -1}, '--workers is to be 0 or more, got -1'),
    ({'shard': '2/2'}, "--shard is to be 'i/n'"),
  ],
)
def test_what_is_refused(tmp_path, flags, message):
  with pytest.raises(plan.StudyError, match=message):
    command.study([], [], tmp_path / 'new', **flags)
  assert not list(tmp_path.iterdir())


def test_listing():
  study = toy_study.made()
  jobs = plan.jobs(study)
  keys = [cell.key for cell in jobs[0].cells]
  found = {
    keys[0]: {'status': 'done', 'cost': {'wall_seconds': 12.34}},
    keys[1]: {'status': 'failed'},
    'other': {'status': 'done'},
  }
  lines = progress.listing(study, jobs, found).splitlines()
  assert lines[-1] == (
    '12 cells in 4 jobs: 1 done, 11 to run. In the ledger, but not in this '
    'study or shard: 1.'
  )
  row = [word for word in lines[4].split('  ') if word.strip()]
  assert [word.strip() for word in row[:5]] == [
    *('soft_prompt on a, base 0: 4 runs', '4', '1', '1', '2')
  ]
  assert row[-1].strip() == 'seed: 0, 1; LEARNING_RATE: 0.1, 0.3'
  assert '12.3' in lines[4]


def test_report_that_cannot_be_written_hides_no_failure(tmp_path, monkeypatch):
  def full(directory: str) -> None:
    raise checkpoints.CheckpointError(f'{directory}/curve.png: disk full')

  monkeypatch.setattr('prompt_jax.study.report.report', full)
  study = toy_study.made()
  jobs = plan.jobs(study)
  book = ledger.Ledger(tmp_path / 'results.jsonl')
  cells = [cell for job in jobs for cell in job.cells]
  records = [{'key': c.key, 'status': 'done'} for c in cells]
  error = 'results.jsonl could not be written.'
  book.append([*records[1:], records[0] | {'status': 'failed', 'error': error}])
  with pytest.raises(command.StudyFailed, match=f'1 of 12 .*{error} See '):
    command._finish(study, jobs, book, pathlib.Path(tmp_path), 1.0)
  book.append(records[:1])
  with pytest.raises(checkpoints.CheckpointError, match='disk full'):
    command._finish(study, jobs, book, pathlib.Path(tmp_path), 1.0)
