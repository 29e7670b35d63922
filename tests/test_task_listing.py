"""`prompt-jax tasks`: the table, one task, and what is wrong with a flag."""

import json

import commands
import pytest

from prompt_jax import task_listing
from prompt_jax import tasks
from prompt_jax import vocabularies


@pytest.fixture
def rows(tmp_path):
  """Two rows of SST-2, one of them of 25 bytes."""
  folder = tmp_path / 'rows' / 'glue_sst2'
  folder.mkdir(parents=True)
  made = [{'sentence': 'good', 'label': 1}, {'sentence': 'b' * 8, 'label': 0}]
  text = '\n'.join(json.dumps(row) for row in made) + '\n'
  (folder / 'train.jsonl').write_text(text)
  (folder / 'validation.csv').write_text('sentence,label\na,0\n')
  return tmp_path / 'rows'


def test_the_table(rows, tmp_path, monkeypatch):
  prepared = tmp_path / 'tfds' / 'glue' / 'cola' / '2.0.0'
  prepared.mkdir(parents=True)
  info = {'splits': [{'name': 'train', 'shardLengths': ['8000', '551']}]}
  (prepared / 'dataset_info.json').write_text(json.dumps(info))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  names = tasks.register(vocabularies.bytes_vocabulary())
  table = task_listing.table(names, str(rows))
  lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
  assert 'train 2, validation 1' in lines['glue_sst2']
  assert str(rows)[:20] in table
  assert 'train 8,551, validation -, test -' in lines['glue_cola']
  assert 'TFDS glue/cola:2.0.0' in lines['glue_cola']
  assert 'train -, validation -, test -' in lines['sst5']
  assert '--rows_dir, sst5/' in lines['sst5'] and 'accuracy' in lines['sst5']
  assert 'glue_mrpc_from_qqp, glue_qqp' in table
  assert not any(line.startswith('taskless_') for line in lines)
  listed = {name for name in names if not name.startswith('taskless_')}
  assert listed <= set(lines)


def test_one_task(rows):
  tasks.register(vocabularies.bytes_vocabulary())
  lengths = {'inputs': 22, 'targets': 16}
  text = task_listing.describe('glue_sst2', str(rows), lengths, 'bytes')
  assert 'Labels: 0 = negative, 1 = positive' in text
  assert 'Metrics: accuracy' in text
  lines = [line.split() for line in text.splitlines()]
  # 'sst2 sentence: good' has 19 bytes and EOS, the other 23: one is cut.
  assert 'train inputs 2 24 24 24 22 1 (50.0%)'.split() in lines
  assert 'train targets 2 9 9 9 16 0 (0.0%)'.split() in lines
  assert 'validation inputs 1 17 17 17 22 0 (0.0%)'.split() in lines
  assert '[0] inputs: sst2 sentence: good' in text
  assert "20 tokens: 118 's', 118 's', 119 't'" in text
  assert '[1] targets: negative' in text


def test_a_mixture_and_plain_text(tmp_path):
  tasks.register(vocabularies.bytes_vocabulary())
  for name in ('glue_qqp', 'glue_mrpc'):
    (tmp_path / name).mkdir()
    row = dict.fromkeys(
      ('question1', 'question2', 'sentence1', 'sentence2'), 'x'
    )
    text = json.dumps({**row, 'label': 1})
    (tmp_path / name / 'validation.jsonl').write_text(text)
  text = task_listing.describe('glue_mrpc_to_qqp', str(tmp_path))
  assert '[0] targets: equivalent' in text
  assert 'glue_qqp_from_mrpc: rows of' in text
  (tmp_path / 'text').mkdir()
  text = json.dumps({'text': 'many words ' * 9})
  (tmp_path / 'text' / 'train.jsonl').write_text(text)
  lengths = {'inputs': 32, 'targets': 16}
  said = task_listing.describe('text_span_corruption', str(tmp_path), lengths)
  assert "cut into pieces that fit {'inputs': 32, 'targets': 16}" in said
  assert '32 tokens' in said


def test_without_rows_nothing_is_downloaded(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  tasks.register(vocabularies.bytes_vocabulary())
  text = task_listing.describe('c4_lm')
  assert 'not on this machine. A run downloads them; --rows_dir=DIR' in text
  text = task_listing.describe('mpqa')
  assert 'not on this machine. --rows_dir=DIR reads DIR/mpqa/train' in text


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--gin.TASK_FEATURE_LENGTHS=3', 'must be such as .* got 3'),
    ("--gin.TASK_FEATURE_LENGTHS={'inputs': 3}", 'must be such as'),
    ("--gin.TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 1}", 'must be'),
    ('--gin.BATCH_SIZE=3', 'says nothing about tasks'),
  ],
)
def test_bad_flags(flag, message):
  with pytest.raises(ValueError, match=message):
    task_listing.show(None, None, [flag])


def test_the_command(rows, capsys):
  lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 22, 'targets': 16}"
  assert commands.here('tasks', 'glue_sst2', f'--rows_dir={rows}', lengths) == 0
  out = capsys.readouterr().out
  assert '1 (50.0%)' in out and 'Lengths in bytes' in out
  assert commands.here('tasks', 'glue_sst') == 1
  assert "Did you mean 'glue_sst2'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_reads_local_rows(rows, tmp_path, capsys):
  flags = {
    'train_data': None, 'eval_data': None, 'inputs': None, 'targets': None,
    'labels': None, 'rows_dir': rows, 'MIXTURE_OR_TASK_NAME': 'glue_sst2',
    'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 16}, 'BATCH_SIZE': 8,
    'TRAIN_STEPS': 2, 'EVAL_PERIOD': 2, 'CHECKPOINT_PERIOD': 2,
    'LOG_PERIOD': 1,
  }  # fmt: skip
  model = f'--model_dir={tmp_path / "run"}'
  args = [*commands.train(tmp_path, **flags), model]
  assert commands.here(*args) == 0
  # The run knows its rows: its directory is enough.
  assert commands.here('eval', model) == 0
  assert 'rank_accuracy' in capsys.readouterr().out
  (rows / 'glue_sst2').rename(rows / 'glue_sst3')
  assert commands.here('eval', model) == 1
  assert "no folder 'glue_sst2'" in capsys.readouterr().err


def test_local_rows_and_data_of_ones_own(rows, tmp_path, capsys):
  model = f'--model_dir={tmp_path / "run"}'
  assert commands.here(*commands.train(tmp_path, rows_dir=rows), model) == 1
  assert 'give one of the two' in capsys.readouterr().err
