"""E_rel: what a method recovers of another's results, by task and dimension."""

import json

import pytest

from prompt_jax import recovery

TUNED = {'mood': 80.0, 'agent': 60.0, 'place': 90.0}


@pytest.fixture
def folder(tmp_path):
  def write(name, scores, metric='rank_accuracy'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({t: {metric: x} for t, x in scores.items()}))
    return str(path)

  write('run/eval_validation.json', TUNED)
  write('3.json', {'mood': 40.0, 'agent': 60.0, 'place': 45.0})
  write('10a.json', {'mood': 80.0})
  write('10b.json', {'agent': 30.0, 'place': 90.0})
  write('loss.json', TUNED, 'loss')
  return tmp_path


def test_equal_scores_recover_all():
  found = recovery.compare(TUNED, TUNED, unseen=['place'])
  assert found.relative() == 1.0
  assert found.relative('seen') == found.relative('unseen') == 1.0
  assert recovery.compare(TUNED, TUNED).relative('unseen') is None


def test_mean_of_the_ratios_not_ratio_of_the_means():
  found = recovery.compare({'mood': 40.0, 'place': 90.0}, TUNED)
  assert found.relative() == (0.5 + 1.0) / 2 != 130 / 170
  assert found.ratios == {'mood': 0.5, 'place': 1.0}


def test_the_command_prints_and_draws(folder, capsys):
  paths = [f'10={folder}/10a.json,{folder}/10b.json', f'3={folder}/3.json']
  picture = folder / 'recovery.png'
  found = recovery.recovery(
    paths, [str(folder / 'run')], unseen=['place'], output=str(picture)
  )
  assert [r.dimension for r in found] == [3, 10]  # in order
  assert found[0].relative() == pytest.approx((0.5 + 1.0 + 0.5) / 3)
  assert found[1].relative('seen') == (1.0 + 0.5) / 2
  said = capsys.readouterr().out
  assert '3            E_rel' in said and '0.667' in said
  assert said.count('place, unseen') == 2
  assert picture.read_bytes()[:4] == b'\x89PNG'
  ax = recovery.draw(found, 'rank_accuracy').axes[0]
  lines = {line.get_label(): line for line in ax.get_lines()}
  assert list(lines['seen'].get_xdata()) == [3, 10]
  assert list(lines['unseen'].get_ydata()) == [0.5, 1.0]


def test_without_dimensions_there_is_a_table_only(folder, capsys):
  [found] = recovery.recovery([str(folder / '3.json')], [str(folder / 'run')])
  assert found.dimension is None
  assert '\n-            E_rel' in capsys.readouterr().out
  with pytest.raises(ValueError, match='give it as DIMENSION=PATH'):
    recovery.recovery(
      [str(folder / '3.json')], [str(folder / 'run')],
      output=str(folder / 'x.png'),
    )  # fmt: skip


@pytest.mark.parametrize(
  ('results', 'options', 'message'),
  [
    (['3=3.json', '5=none.json'], {}, 'No file .*none.json'),
    (['3=3.json,3.json'], {}, 'mood has been read from another file'),
    (['0=3.json'], {}, "Expected a path, or DIMENSION=PATH, got '0=3.json'"),
    ([], {}, 'Expected a list of results'),
    ('3.json', {}, 'Expected a list of results'),
    (['3.json'], {'metric': 'rank_acuracy'}, "Did you mean 'rank_accuracy'"),
    (['3.json'], {'metric': 'f1'}, r"There are \['rank_accuracy'\]"),
    (['3.json'], {'unseen': ['plaice']}, "no reference. Did you mean 'place'"),
    (['10a.json'], {'unseen': ['agent']}, "'agent' has no score"),
    (['3=3.json'], {'output': 'x.pdf'}, r'\.png or \.svg, got'),
  ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, results, options, message):
  monkeypatch.chdir(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    recovery.recovery(results, ['run'], **options)


def test_files_that_are_no_results(folder):
  (folder / 'list.json').write_text('[1, 2]')
  (folder / 'text.json').write_text('{"mood": 3}')
  for name in ('list.json', 'text.json'):
    with pytest.raises(ValueError, match='expected the metrics of tasks'):
      recovery.read_scores([str(folder / name)], 'rank_accuracy')
  with pytest.raises(ValueError, match='reference scores 0; it must be above'):
    recovery.compare({'mood': 1.0}, {'mood': 0.0})
