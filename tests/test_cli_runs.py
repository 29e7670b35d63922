"""Whole runs in processes of their own: killed, on meshes, on a full disk."""

import json
import os
import shutil
import signal
import socket
import subprocess

import commands
import numpy as np
import pytest
import runs

from prompt_jax import cli

# A start of the program takes seconds: `make slow`.
pytestmark = pytest.mark.slow

# Sends a signal to the process at a step: when it logs it, or when it has begun
# to save it, which goes on in the background.
STOP = """
import os, signal
from prompt_jax import checkpoints, reporting
def stop_in(cls, name, step, number):
  before = getattr(cls, name)
  def stop(self, *args):
    before(self, *args)
    if int(getattr(args[0], 'step', args[0])) == step:
      os.kill(os.getpid(), number)
  setattr(cls, name, stop)
"""
LOGGED = STOP + 'stop_in(reporting.Reporter, "train", {}, signal.{})'
SAVING = STOP + 'stop_in(checkpoints.Checkpointer, "save", {}, signal.{})'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  runs.write_data(folder)
  return folder


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
  """The directory of a run that was never stopped."""
  folder = tmp_path_factory.mktemp('whole')
  commands.done(*commands.train(data, model_dir=folder))
  return folder


def steps(folder):
  """Of the checkpoints that are whole."""
  names = [p.name for p in (folder / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def assert_same_run(got, want):
  assert runs.metrics(got) == runs.metrics(want)
  assert runs.trained(got) == runs.trained(want)
  assert steps(got) == steps(want)


# ---- stopped -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('before', 'saved'),
  [
    (LOGGED.format(6, 'SIGKILL'), ([],)),
    # The checkpoint of step 16 waits for that of 8, and nobody for it.
    (SAVING.format(16, 'SIGKILL'), ([8], [8, 16])),
    (LOGGED.format(21, 'SIGKILL'), ([8], [8, 16])),
  ],
  ids=['before_a_checkpoint', 'while_saving', 'after_one'],
)
def test_killed_run_goes_on(data, whole, tmp_path, before, saved):
  args = commands.train(data, model_dir=tmp_path)
  status, *_ = commands.wait(commands.start(*args, before=before))
  assert status == -signal.SIGKILL
  assert steps(tmp_path) in saved
  assert not (tmp_path / 'trainable.safetensors').exists()
  assert 'Traceback' not in commands.done(*args)
  assert_same_run(tmp_path, whole)


def test_sigterm_saves_and_leaves(data, whole, tmp_path):
  args = commands.train(data, model_dir=tmp_path)
  before = LOGGED.format(9, 'SIGTERM')
  status, _, err = commands.wait(commands.start(*args, before=before))
  assert status == 143 and 'Traceback' not in err
  last = steps(tmp_path)[-1]
  assert 9 < last < 24
  assert f'SIGTERM: saved step {last}; the same command goes on' in err
  # A run that has not ended has no trained part but its checkpoints'.
  where = f'--model_dir={tmp_path}'
  status, _, err = commands.wait(commands.start('eval', where))
  assert status == 1 and 'the run has not ended. Give --step' in err
  out = commands.done('eval', where, f'--step={last}')
  assert 'user_data (validation) loss_per_token: ' in out
  commands.done(*args)
  assert runs.metrics(tmp_path) == runs.metrics(whole)
  assert runs.trained(tmp_path) == runs.trained(whole)


# ---- several devices and processes -------------------------------------------


def assert_close(got, want):
  want = runs.losses(want)
  got = runs.losses(got)
  assert list(got) == list(want)
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def test_mesh(data, whole, tmp_path):
  args = commands.train(data, model_dir=tmp_path, DATA_AXIS=2, MODEL_AXIS=4)
  commands.done(*args, JAX_NUM_CPU_DEVICES=8)
  assert_close(tmp_path, whole)


def test_two_processes(data, whole, tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  args = [
    *commands.train(data, model_dir=tmp_path),
    f'--coordinator_address={address}',
    '--num_processes=2',
  ]
  both = [commands.start(*args, f'--process_id={i}') for i in range(2)]
  for process in both:
    status, _, err = commands.wait(process)
    assert status == 0, err
  assert_close(tmp_path, whole)


# ---- decoding ----------------------------------------------------------------


@pytest.fixture
def infer(whole, tmp_path, monkeypatch):
  """The lines of `prompt-jax infer`, run in this process."""
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)

  def call(*args):
    output = tmp_path / 'out.jsonl'
    where = f'--model_dir={whole}', f'--output={output}'
    assert commands.here('infer', *where, *args) == 0
    return [json.loads(line) for line in output.open()]

  return call


def test_beam_search_on_other_data(infer, tmp_path):
  other = tmp_path / 'other.jsonl'
  rows = [{'text': 'lovely', 'label': 'yes'}, {'text': 'dull', 'label': 'no'}]
  other.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  got = infer(
    f'--eval_data={other}',
    '--gin.DECODE_FN=@decoding.beam_search',
    '--gin.NUM_DECODES=3',
    '--gin.decoding.beam_search.alpha=0.0',
    '--step=16',
  )
  assert [x['targets'] for x in got] == ['yes', 'no']
  for line in got:
    assert line['inputs'].endswith(('review: lovely', 'review: dull'))
    assert len(line['predictions']) == len(line['scores']) == 3
    assert line['scores'] == sorted(line['scores'], reverse=True)


def test_sampling(infer):
  args = ('--gin.DECODE_FN=@decoding.temperature_sample', '--gin.NUM_DECODES=2')
  hot = '--gin.decoding.temperature_sample.temperature=2.0'
  one = infer(*args, hot)
  again = infer(*args, hot)
  assert one == again
  assert len({x['prediction'] for x in one}) > 5
  cold = '--gin.decoding.temperature_sample.topk=1'
  for line in infer(*args, cold):
    assert len(set(line['predictions'])) == 1


# ---- a disk that is full -----------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
  """A file system of a few megabytes."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder]
  if shutil.which('mount') is None or os.geteuid() != 0:
    pytest.skip('only root can mount a file system')
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a file system is not allowed here')
  yield folder
  subprocess.run(['umount', folder], check=True)


def fill(folder, left):
  """Leaves so many bytes of a disk; the file that takes the others."""
  ballast = folder / 'ballast'
  ballast.unlink(missing_ok=True)
  size = shutil.disk_usage(folder).free - left
  ballast.write_bytes(bytes(size))
  return ballast


def test_full_disk(data, whole, small_disk):
  folder = small_disk / 'run'
  args = commands.train(data, model_dir=folder)
  status, *_ = commands.wait(
    commands.start(*args, before=LOGGED.format(18, 'SIGKILL'))
  )
  assert status == -signal.SIGKILL
  saved = steps(folder)
  assert saved in ([8], [8, 16])
  # Enough for what is written at the start, not for a checkpoint; then nothing.
  for left, message in (
    (40 * 1024, 'free some space and start'),
    (0, f"MODEL_DIR '{folder}' cannot be written: No space left"),
  ):
    ballast = fill(small_disk, left)
    status, _, err = commands.wait(commands.start(*args))
    assert status == 1 and message in err
    assert 'Traceback' not in err and err.count('prompt-jax train: ') == 1
    assert set(saved) <= set(steps(folder))
  ballast.unlink()
  commands.done(*args)
  assert_same_run(folder, whole)
