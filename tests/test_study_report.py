"""From a ledger to numbers, tables and pictures, with sums done by hand."""

import json
import math
import pathlib

import made_up_study
from made_up_study import results_of
import pytest

from prompt_jax import checkpoints
from prompt_jax.study import ledger
from prompt_jax.study import plots
from prompt_jax.study import published
from prompt_jax.study import report
from prompt_jax.study import results as results_lib
from prompt_jax.study import tables


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('study')
  made_up_study.write(path)
  return path


@pytest.fixture(scope='module')
def results(directory):
  return results_lib.load(str(directory))


@pytest.fixture(scope='module')
def three_bases(tmp_path_factory):
  path = tmp_path_factory.mktemp('three')
  made_up_study.write(path, base_seeds=(0, 1, 2))
  return results_lib.load(str(path))


# ---- which runs count --------------------------------------------------------


def test_chosen_on_mean_validation_never_on_test():
  results = results_of(
    [
      # Best on test, and best single run on validation.
      ({'LEARNING_RATE': 0.1, 'seed': 0}, 99.0, 95.0),
      ({'LEARNING_RATE': 0.1, 'seed': 1}, 99.0, 81.0),
      ({'LEARNING_RATE': 0.3, 'seed': 0}, 70.0, 89.0),
      ({'LEARNING_RATE': 0.3, 'seed': 1}, 72.0, 90.0),
    ]
  )
  (choice,) = results.choices
  assert choice.hyperparameters == {'LEARNING_RATE': 0.3}
  assert (choice.tried, choice.validation) == (2, 89.5)
  score = results.score('fine_tune', 'd8', 'mood')
  assert score.values == {(0, 0): 70.0, (0, 1): 72.0}


@pytest.mark.parametrize('rates', [(0.3, 0.1), (0.1, 0.3)])
def test_of_equals_the_first_in_the_study_is_chosen(rates):
  results = results_of([({'LEARNING_RATE': r}, 1.0, 90.0) for r in rates])
  assert results.choices[0].hyperparameters == {'LEARNING_RATE': rates[0]}


def test_what_diverged_is_not_chosen():
  results = results_of([({'R': 1}, 99.0, math.nan), ({'R': 2}, 50.0, 40.0)])
  assert results.choices[0].hyperparameters == {'R': 2}


def test_chosen_for_each_base_seed_by_itself():
  results = results_of(
    [
      ({'R': r, 'base_seed': base}, 0.0, 90.0 if r == base else 80.0)
      for base in (0, 1)
      for r in (0, 1)
    ]
  )
  assert [c.hyperparameters['R'] for c in results.choices] == [0, 1]


def test_deviation_is_of_means_over_tasks():
  results = results_of(
    [
      ({'task': task, 'seed': seed}, test, None)
      for task, tests in (('mood', (90.0, 92.0)), ('agent', (70.0, 60.0)))
      for seed, test in enumerate(tests)
    ]
  )
  score = results.score('fine_tune', 'd8')
  assert score.values == {(0, 0): 80.0, (0, 1): 76.0}
  assert score.mean == 78.0
  assert score.deviation == pytest.approx(math.sqrt(8))  # n - 1
  assert score.seeds == (1, 2)
  assert results.score('fine_tune', 'd8', 'agent').mean == 65.0
  assert results.score('fine_tune', 'd8', None, 'accuracy').mean == 39.0


def test_no_mean_where_a_task_is_missing():
  results = results_of(
    [
      ({'task': 'mood', 'seed': 0}, 90.0, None),
      ({'task': 'mood', 'seed': 1}, 80.0, None),
      ({'task': 'agent', 'seed': 1}, 60.0, None),
    ]
  )
  score = results.score('fine_tune', 'd8')
  assert score.values == {(0, 1): 70.0}
  assert math.isnan(score.deviation)
  assert results.score('soft_prompt', 'd8') is None


def test_missing_failed_and_stale(directory, tmp_path):
  lines = (directory / 'results.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  gone = records.pop(-1)
  bad = {**records.pop(-1), 'status': 'failed', 'error': 'it burnt'}
  study = json.loads((directory / 'study.json').read_text())
  stale = study['cells'].pop(0)
  (tmp_path / 'study.json').write_text(json.dumps(study))
  ledger.Ledger(tmp_path / 'results.jsonl').append([*records, bad])
  results = results_lib.load(str(tmp_path))
  assert [c['key'] for c in results.missing] == [gone['key']]
  assert [r['error'] for r in results.failed] == ['it burnt']
  assert [r['key'] for r in results.stale] == [stale['key']]
  rows = tables.unfinished(results).rows
  assert [row[0] for row in rows] == ['missing', 'failed', 'stale']
  text = report.summary(results)
  assert '105 of 107 cells are done, 1 missing, 1 failed; 1 in the' in text
  assert f'failed: {bad["key"]}: it burnt' in text
  assert '2 of 107 cells are missing or failed' in plots.caption(results)


# ---- tables ------------------------------------------------------------------


def test_table_of_scores(results):
  table = tables.scores(results)
  assert table.rows == [
    ['Prompt design', '1 x 1', '40.0', '42.0', '44.0', '46.0'],
    [
      'Prompt tuning',
      '1 x 3',
      '56.0 ± 1.0',
      '76.0 ± 1.0',
      '90.0 ± 1.0',
      '95.5 ± 1.0',
    ],
    ['Model tuning', '1 x 3', *['96.0 ± 1.0'] * 4],
  ]
  assert table.note == 'Chance: 40.0.'
  assert tables.scores(results, 'agent').note == 'Chance: 30.0.'
  assert tables.scores(results, None, 'accuracy').note == ''


def test_table_of_budgets(results):
  table = tables.budget(results)
  found = {tuple(row[:2]): row[2:] for row in table.rows}
  assert len(found) == 12
  assert found['d8', 'Prompt tuning'] == [
    '56.0 ± 1.0',
    '256',
    '2.3 %',  # of 10,928
    '600',
    '3.23e+09',
    '4.00 ms',
    '3.0 MiB',
    '1.0 KiB',
    '12',
  ]
  assert found['d64', 'Prompt design'][1:5] == ['0', '0 %', '600', '-']


def test_tables_of_bases_and_choices(three_bases):
  assert tables.bases(three_bases).rows[0] == [
    'd8',
    '10,928',
    '3,232',
    '3',
    '91.00',
  ]
  rows = tables.chosen(three_bases).rows
  assert len(rows) == 4 * 3 * 3 * 2
  assert [
    'Prompt tuning',
    'd8',
    'mood',
    '1',
    'LEARNING_RATE=0.3',
    '2',
    '58.0',
    'tune-sof, tune-sof, tune-sof',  # keys here begin alike
  ] in rows


def test_before_anything_is_tuned(tmp_path, capsys):
  made_up_study.write(tmp_path)
  path = tmp_path / 'results.jsonl'
  bases = [x for x in path.read_text().splitlines() if 'pretrain-' in x[:20]]
  for records, rows in (([], 0), (bases, 4)):
    path.write_text(''.join(f'{x}\n' for x in records))
    report.report(str(tmp_path))
    out = capsys.readouterr().out
    assert f'Nothing to score yet. {rows} of 108 cells are done' in out
    assert not list(tmp_path.glob('*.png'))
    text = (tmp_path / 'report.md').read_text()
    assert text.count('| missing |') == 108 - rows
    assert ('Pretrained models' in text) == bool(rows)


# ---- pictures ----------------------------------------------------------------


def test_curve_draws_the_means(results):
  ax = plots.curve(results).axes[0]
  lines = {line.get_label(): line for line in ax.get_lines()}
  tuned = lines['Prompt tuning']
  assert list(tuned.get_xdata()) == list(made_up_study.SIZES.values())
  assert list(tuned.get_ydata()) == [56.0, 76.0, 90.0, 95.5]
  assert ax.get_xscale() == 'log'
  assert [40.0, 40.0] in [list(line.get_ydata()) for line in ax.get_lines()]


def test_tasks_draws_a_panel_each(results):
  axes = plots.tasks(results).axes
  assert [ax.get_title(loc='left') for ax in axes] == ['mood', 'agent']
  lines = {line.get_label(): line for line in axes[1].get_lines()}
  assert list(lines['Prompt design'].get_ydata()) == [30.0, 32.0, 34.0, 36.0]


def test_legend_of_long_names_has_room(directory, tmp_path):
  study = json.loads((directory / 'study.json').read_text())
  study['methods'] = {name: 32 * name[0] for name in study['methods']}
  (tmp_path / 'study.json').write_text(json.dumps(study))
  (tmp_path / 'results.jsonl').symlink_to(directory / 'results.jsonl')
  figure = plots.tasks(results_lib.load(str(tmp_path)))
  figure.draw_without_rendering()
  [legend] = figure.legends
  assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_overlay_is_drawn_against_all_parameters(directory, tmp_path):
  study = json.loads((directory / 'study.json').read_text())
  study['overlay'] = published.LESTER_2021
  text = json.dumps(study)
  (tmp_path / 'study.json').write_text(text)
  (tmp_path / 'results.jsonl').symlink_to(directory / 'results.jsonl')
  ax = plots.curve(results_lib.load(str(tmp_path))).axes[0]
  drawn = {line.get_label().replace('\n', ' '): line for line in ax.get_lines()}
  assert drawn['Prompt tuning'].get_xdata()[0] == 10_928
  star = drawn['Lester et al. 2021, mean of 5 prompts']
  assert star.get_xydata().tolist() == [[11_135_332_352, 90.5]]


def test_same_results_give_the_same_files(directory, tmp_path):
  for name in ('a', 'b'):
    made_up_study.write(tmp_path / name)
    paths = report.write_report(str(tmp_path / name))
  for path in paths:
    other = pathlib.Path(str(path).replace('/b/', '/a/'))
    assert path.read_bytes() == other.read_bytes(), path.name
  text = (tmp_path / 'a' / 'curve.svg').read_text()
  assert 'Nothing here was measured.' in text  # the note is on the picture
  assert '<dc:date>' not in text


# ---- the command -------------------------------------------------------------


def test_report_writes_and_says_where(tmp_path, capsys):
  made_up_study.write(tmp_path)
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert 'Prompt tuning  1 x 3    56.0 ± 1.0  76.0 ± 1.0' in out
  assert '108 of 108 cells are done.' in out
  for name in ('curve.png', 'curve.svg', 'tasks.png', 'report.md'):
    assert str(tmp_path / name) in out
    assert (tmp_path / name).stat().st_size > 1000
  text = (tmp_path / 'report.md').read_text()
  assert '| Prompt tuning | 1 x 3   | 56.0 ± 1.0 |' in text
  assert '## Missing, failed and stale cells\n\nNone.' in text
  assert not list(tmp_path.glob('.*'))  # nothing half written stays


def test_report_without_plotly(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report, '_has_plotly', lambda: False)
  made_up_study.write(tmp_path)
  report.report(str(tmp_path))
  assert "pip install 'prompt_jax[report]'" in capsys.readouterr().out
  assert not (tmp_path / 'report.html').exists()


def test_report_of_a_study_that_has_hardly_begun(tmp_path, capsys):
  made_up_study.write(tmp_path)
  path = tmp_path / 'results.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.unlink()
  report.report(str(tmp_path))
  assert '0 of 108 cells are done, 108 missing' in capsys.readouterr().out
  assert not (tmp_path / 'curve.png').exists()
  path.write_text(''.join(lines[:3]))  # one task of one method
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert '3 of 108 cells are done' in out
  assert (tmp_path / 'tasks.png').exists()


def test_one_task_is_its_own_mean(tmp_path, capsys):
  cell = made_up_study.cell(
    method='fine_tune', size='d8', task='mood', base_seed=0, seed=0
  )
  study = made_up_study.study(
    [cell], sizes=['d8'], tasks={'mood': made_up_study.TASKS['mood']}
  )
  (tmp_path / 'study.json').write_text(json.dumps(study))
  book = ledger.Ledger(tmp_path / 'results.jsonl')
  book.append([made_up_study.record(cell, 90.0)])
  report.report(str(tmp_path))
  assert 'Rank accuracy, mood\n' in capsys.readouterr().out
  assert (tmp_path / 'report.md').read_text().count('## Rank accuracy') == 1


def test_file_that_cannot_be_written(tmp_path):
  made_up_study.write(tmp_path)
  (tmp_path / 'curve.png').mkdir()
  with pytest.raises(
    checkpoints.CheckpointError, match=r'curve\.png could not'
  ):
    report.write_report(str(tmp_path))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'cells': None}, r'study\.json lacks cells'),
    ({'reference_method': 'fine_tun'}, 'Did you mean fine_tune'),
    ({'sizes': ['d8']}, "unknown size 'd16'"),
    ({'metric': 'rank_acuracy'}, 'Did you mean rank_accuracy'),
  ],
)
def test_study_that_does_not_fit(directory, tmp_path, change, message):
  study = json.loads((directory / 'study.json').read_text()) | change
  study = {k: v for k, v in study.items() if v is not None}
  (tmp_path / 'study.json').write_text(json.dumps(study))
  (tmp_path / 'results.jsonl').symlink_to(directory / 'results.jsonl')
  with pytest.raises(results_lib.StudyError, match=message):
    results_lib.load(str(tmp_path))


def test_directory_of_no_study(tmp_path):
  with pytest.raises(results_lib.StudyError, match='prompt-jax study'):
    results_lib.load(str(tmp_path))
  (tmp_path / 'study.json').write_text('{')
  with pytest.raises(results_lib.StudyError, match='is not JSON'):
    results_lib.load(str(tmp_path))
