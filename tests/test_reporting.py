"""The files that a run writes of itself."""

import json
import pathlib

import pytest
import tensorflow as tf

from prompt_jax import checkpoints
from prompt_jax import reporting

STEP = {
  'loss': 6.0,
  'z_loss': 1.0,
  'correct_tokens': 3.0,
  'target_tokens': 4.0,
  'weight_sum': 4.0,
  'grad_norm': 2.0,
  'learning_rate': 0.5,
}


def window(steps=2):
  found = reporting.Window()
  for _ in range(steps):
    found.add(STEP, rows=8)
  return found


def report(folder, step=0, lines=(), total=10):
  """Opens a reporter at `step` and writes lines up to the steps `lines`."""
  reporter = reporting.Reporter(folder, step, total, 'task')
  with reporter.progress(step):
    for at in lines:
      reporter.train(at, window())
      if at % 4 == 0:
        reporter.evaluation(at, 'validation', {'task': {'accuracy': at / 2}})
  return reporter


def steps(folder, split='train'):
  lines = reporting.read_metrics(folder / 'metrics.jsonl')
  return [line['step'] for line in lines if line['split'] == split]


def events(folder: pathlib.Path):
  """All events, in the order in which TensorBoard reads them."""
  found = []
  for file in sorted((folder / 'tensorboard').iterdir()):
    assert file.name.startswith('events.out.tfevents.')
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
      found.append(tf.compat.v1.Event.FromString(record))
  return found


def test_window_is_means_over_steps_and_tokens():
  found = reporting.Window()
  found.add(STEP, rows=8)
  found.add({**STEP, 'loss': 2.0, 'correct_tokens': 0.0}, rows=8)
  saved = json.loads(json.dumps(found.saved()))
  assert found.means() == {
    'loss': 4.0,
    'z_loss': 1.0,
    'token_accuracy': 37.5,
    'target_tokens': 8.0,
    'grad_norm': 2.0,
    'learning_rate': 0.5,
  }
  assert found == reporting.Window()  # emptied
  # A window may span a stop.
  assert reporting.Window(**saved).means()['loss'] == 4.0


def test_lines(tmp_path):
  report(tmp_path, lines=(2, 4)).close()
  lines = reporting.read_metrics(tmp_path / 'metrics.jsonl')
  assert [(x['step'], x['split'], x['task']) for x in lines] == [
    (2, 'train', 'task'),
    (4, 'train', 'task'),
    (4, 'validation', 'task'),
  ]
  assert lines[0]['loss'] == 6.0
  assert lines[0]['steps_per_second'] > 0
  assert lines[0]['examples_per_second'] == pytest.approx(
    8 * lines[0]['steps_per_second']
  )
  assert lines[2]['accuracy'] == 2.0


def test_resumed_run_cuts_what_lies_after_its_step(tmp_path):
  report(tmp_path, lines=(2, 4, 6, 8))
  again = report(tmp_path, step=4)
  assert steps(tmp_path) == [2, 4]
  assert steps(tmp_path, 'validation') == [4]
  assert again.last_evaluation == {'task': {'accuracy': 2.0}}
  report(tmp_path, step=4, lines=(6,))
  assert steps(tmp_path) == [2, 4, 6]
  report(tmp_path, step=0)
  assert steps(tmp_path) == []


@pytest.mark.parametrize('rest', ['{"step": 6, "spl', '{', '{"step": 6'])
def test_half_a_last_line_is_cut(tmp_path, rest):
  report(tmp_path, lines=(2, 4))
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  path.write_text(whole + rest)
  report(tmp_path, step=4)
  assert path.read_text() == whole


def test_tensorboard_events(tmp_path):
  report(tmp_path, lines=(2, 4)).close()
  found = events(tmp_path)
  assert found[0].file_version == 'brain.Event:2'
  values = {
    (e.step, v.tag): v.simple_value for e in found for v in e.summary.value
  }
  assert values[2, 'train/task/loss'] == 6.0
  assert values[4, 'validation/task/accuracy'] == 2.0


def test_tensorboard_is_told_where_a_run_goes_on(tmp_path):
  report(tmp_path, lines=(2, 4, 6)).close()
  report(tmp_path, step=4, lines=(6,)).close()
  start = tf.compat.v1.SessionLog.START
  starts = [e.step for e in events(tmp_path) if e.session_log.status == start]
  assert starts == [1, 5]
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2


def test_curves_are_drawn(tmp_path):
  report(tmp_path, lines=(2, 4)).close()
  picture = (tmp_path / 'curves.png').read_bytes()
  assert picture.startswith(b'\x89PNG') and len(picture) > 5000
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'curves.png',
    'metrics.jsonl',
    'tensorboard',
  ]


def test_nothing_to_draw(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  reporting.draw(tmp_path / 'metrics.jsonl', tmp_path / 'curves.png')
  assert not (tmp_path / 'curves.png').exists()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  report(tmp_path, lines=(2, 4)).close()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('file', ['metrics.jsonl', 'tensorboard'])
def test_full_disk_is_an_error_with_a_message(tmp_path, monkeypatch, file):
  reporter = report(tmp_path, lines=(2,))
  if file == 'metrics.jsonl':
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
  else:

    class Full:
      def write(self, record):
        raise tf.errors.ResourceExhaustedError(None, None, 'No space left')

    monkeypatch.setattr(reporter._events, '_file', Full())
  with pytest.raises(checkpoints.CheckpointError, match='free some space'):
    reporter.train(4, window())


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(5.9, '5 s'), (65, '1 min 05 s'), (3660, '1 h 01 min')],
)
def test_durations(seconds, text):
  assert reporting._duration(seconds) == text
