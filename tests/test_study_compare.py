"""What differs between two cells, and between two studies."""

import json

import made_up_study
import pytest

from prompt_jax.study import compare as compare_lib
from prompt_jax.study import ledger
from prompt_jax.study.compare import compare


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('study')
  made_up_study.write(path)
  return path


def lines(capsys):
  """The printed lines, spaces made one."""
  return [' '.join(x.split()) for x in capsys.readouterr().out.splitlines()]


def edited(directory, path, change):
  """A copy of a study whose records went through `change`."""
  path.mkdir()
  text = (directory / 'study.json').read_text()
  (path / 'study.json').write_text(text)
  records = ledger.Ledger(directory / 'results.jsonl').read()
  ledger.Ledger(path / 'results.jsonl').append([change(r) for r in records])
  return path


def test_two_cells(directory, capsys):
  cell = 'tune-soft_prompt-d8-mood-0-0-0.3'
  other = 'tune-soft_prompt-d16-mood-0-1-0.3'
  compare(f'{directory}:{cell}', other)
  out = lines(capsys)
  assert out[0].startswith(f'A: {cell} (done) method=soft_prompt, size=d8')
  assert out[1].startswith(f'B: {other} (done)')
  assert 'size "d8" "d16"' in out
  assert 'seed 0 1 +1' in out
  assert 'T5Config.emb_dim "8" "16"' in out
  assert 'test.rank_accuracy 55.0 76.0 +21' in out
  assert 'non_embedding 3232 12608 +9376' in out
  assert not any(x.startswith(('task', 'versions', 'steps')) for x in out)


def test_histories_are_told_by_step(directory, tmp_path, capsys):
  def studied(loss):
    history = [[step, loss, 50.0] for step in range(100, 2000, 100)]
    path = tmp_path / str(loss)
    return edited(directory, path, lambda r: r | {'history': history})

  cell = 'pretrain-d8-0'
  compare(f'{studied(1.5)}:{cell}', f'{studied(1.0)}:{cell}')
  out = lines(capsys)
  assert out[3] == 'History'
  assert out[6] == 'loss at step 100 1.5 1.0 -0.5'
  assert out[-1] == '... and 9 more' and not any('metric' in x for x in out)


def test_beginning_of_a_key_is_enough(directory, capsys):
  compare(f'{directory}:pretrain-d8', f'{directory}:pretrain-d8-0')
  assert lines(capsys)[-1] == 'No difference.'


def test_cells_of_two_studies(directory, tmp_path, capsys):
  other = edited(
    directory,
    tmp_path / 'other',
    lambda r: r | {'cost': r['cost'] | {'step_seconds': 0.002}},
  )
  compare(f'{directory}:pretrain-d8', f'{other}:pretrain-d8')
  assert 'step_seconds 0.004 0.002 -0.002' in lines(capsys)


def test_same_study(directory, capsys):
  compare(str(directory), str(directory))
  assert lines(capsys) == ['No difference.']


def test_two_studies(directory, tmp_path, capsys):
  def change(record):
    """Another key and version; model tuning two points worse at d64."""
    out = json.loads(json.dumps(record))
    out['config']['RATE'] = '1'
    out['origin']['versions']['jax'] = '0.11.0'
    # One of many: of such a list a line shows the beginning.
    out['origin']['device'] = f'machine {record["key"]}'
    out['cost']['wall_seconds'] = 10.0
    settings = record['settings']
    if settings['size'] == 'd64' and settings.get('method') == 'fine_tune':
      out['metrics']['test']['rank_accuracy'] -= 2
    return out

  other = edited(directory, tmp_path / 'other', change)
  study = json.loads((directory / 'study.json').read_text())
  gone = study['cells'].pop(0)
  study['note'] = 'Another.'
  # Keys are of no account: they change with the code.
  for cell in study['cells']:
    cell['key'] = f'x{cell["key"]}'
  (other / 'study.json').write_text(json.dumps(study))
  path = other / 'results.jsonl'
  path.write_text(path.read_text().replace('{"key": "', '{"key": "x'))
  compare(str(directory), str(other))
  out = lines(capsys)
  assert 'note "Nothing here was measured." "Another."' in out
  assert 'only in A: 1 of 108' in out
  settings = json.dumps(gone['settings'], sort_keys=True)
  assert f'pretrain: {settings}' in out
  assert 'fine_tune d64 96.00 94.00 -2' in out
  assert not any(x.startswith('soft_prompt') for x in out)
  assert 'RATE absent "1" 107 of 107' in out
  assert 'versions.jax ["0.10.2"] ["0.11.0"]' in out
  (device,) = (x for x in out if x.startswith('device '))
  assert device.endswith(' ...') and len(device) < 100
  # 108 and 107 cells, of which 12 each were one program.
  assert 'wall_seconds (sum) 81 89.1667 +8.167' in out


@pytest.mark.parametrize(
  ('a', 'b', 'message'),
  [
    ('{}:tune-soft', 'pretrain-d8', '48 cells of .* begin with .*more of the'),
    ('{}:pretain-d8-0', '{}', 'are a study and a cell'),
    ('{}:pretain-d8-0', 'x', 'Did you mean pretrain-d8-0'),
    ('{}:', '{}:pretrain-d8', 'has no key after the colon'),
    ('{}/nowhere', '{}', 'nowhere.* is not a directory'),
    ('{}', 'pretrain-d8-0', 'is not a directory: expected'),
  ],
)
def test_what_cannot_be_compared(directory, a, b, message):
  with pytest.raises(compare_lib.CompareError, match=message):
    compare(a.format(directory), b.format(directory))
