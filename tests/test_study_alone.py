"""Cells that train by themselves are the cells that train together."""

import os
import pathlib
import signal
import socket

import commands
import numpy as np
import pytest
import toy_study

from prompt_jax import checkpoints
from prompt_jax.study import command
from prompt_jax.study import ledger
from prompt_jax.study import plan

pytestmark = pytest.mark.slow

# Prompt tuning at two rates, and prompt design, which trains nothing, on one
# size and one seed.
SMALL = (
  'plan.Study.seeds=(0,)',
  "plan.Study.reference_method='soft_prompt'",
  "plan.Study.methods={'soft_prompt': @prompt/plan.Recipe(), "
  "'prompt_design': @design/plan.Recipe()}",
)
ALONE = (
  'prompt/plan.Recipe.together=1',
  'design/plan.Recipe.together=1',
  "prompt/plan.Recipe.bindings={'TRAIN_STEPS': 6, 'EVAL_PERIOD': 3, "
  "'PROMPT_LENGTH': 3, 'TEST_SPLIT': 'validation', 'CHECKPOINT_PERIOD': 2}",
)
# Dies at a line of the log, once a checkpoint before it is whole.
KILLED = """
import os, signal
from prompt_jax import checkpoints, reporting
made = []
init, train = checkpoints.Checkpointer.__init__, reporting.Reporter.train
def note(self, *args, **kwargs):
  init(self, *args, **kwargs)
  made.append(self)
def die(self, step, window):
  train(self, step, window)
  if 'cells' in str(self.directory) and step == 6:
    made[-1].wait()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.Checkpointer.__init__, reporting.Reporter.train = note, die
"""


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  return toy_study.write(tmp_path_factory.mktemp('toy'))


@pytest.fixture(scope='module')
def flags(file):
  size = f"plan.Study.sizes={{'a': ('{file.parent / 'A.gin'}',)}}"
  return (size, *SMALL)


@pytest.fixture(scope='module')
def together(file, flags, tmp_path_factory):
  folder = tmp_path_factory.mktemp('together')
  commands.done(*arguments(file, folder, flags))
  return folder


def arguments(file, folder, flags):
  own = (f'--gin.{flag}' for flag in flags)
  return ['study', str(file), f'--model_dir={folder}', '--workers=0', *own]


def start_with_base(together: pathlib.Path, folder: pathlib.Path) -> None:
  """The directory of a study that has its pretraining."""
  os.symlink(together / 'bases', folder / 'bases')
  base = [r for r in toy_study.records(together) if r['stage'] == 'pretrain']
  ledger.Ledger(folder / 'results.jsonl').append(base)


@pytest.fixture(scope='module')
def alone(file, flags, together, tmp_path_factory):
  folder = tmp_path_factory.mktemp('alone')
  start_with_base(together, folder)
  commands.done(*arguments(file, folder, (*flags, *ALONE)))
  return folder


def tuned(folder):
  """The records of tuning by their settings."""
  found = [r for r in toy_study.records(folder) if r['stage'] == 'tune']
  return {tuple(r['settings'].items()): r for r in found}


def trained(folder, record):
  path = folder / 'cells' / f'{record["key"]}.safetensors'
  return checkpoints.load_trainable(str(path))


def test_same_result(together, alone):
  """The data are resident in both cases, so their order is the same."""
  want, got = tuned(together), tuned(alone)
  assert len(want) == 3 and got.keys() == want.keys()
  for settings, a in want.items():
    b = got[settings]
    # Another configuration, so another cell.
    assert a['key'] != b['key'] and b['status'] == 'done'
    for name in ('stage', 'error', 'settings', 'parameters'):
      assert a[name] == b[name]
    for name in ('validation', 'test'):
      assert a['metrics'][name] == pytest.approx(b['metrics'][name])
    assert len(a['history']) == (2 if b['cost']['steps'] else 1)
    np.testing.assert_allclose(a['history'], b['history'], rtol=1e-5)
    assert a['cost'].keys() == b['cost'].keys()
    for name in ('steps', 'best_step', 'train_flops'):
      assert a['cost'][name] == b['cost'][name]
    assert b['cost']['runs_together'] == 1
    assert a['origin'].keys() == b['origin'].keys()
    assert a['origin']['base'] == b['origin']['base']
    (x, header), (y, other) = trained(together, a), trained(alone, b)
    assert x.keys() == y.keys() and header.keys() == other.keys()
    for name, array in x.items():
      np.testing.assert_allclose(array, y[name], atol=2e-5, err_msg=name)
    assert header['step'] == other['step']


def test_pretraining_is_counted(together):
  (base,) = [r for r in toy_study.records(together) if r['stage'] == 'pretrain']
  tuning = [r['cost']['train_flops'] for r in tuned(together).values()]
  # All parameters' gradients, and more steps.
  assert base['cost']['train_flops'] > max(tuning) > 0


def test_killed_run_goes_on(file, flags, together, alone, tmp_path):
  start_with_base(together, tmp_path)
  args = arguments(file, tmp_path, (*flags, *ALONE))
  before = set(tuned(tmp_path))
  status, _, err = commands.wait(commands.start(*args, before=KILLED))
  assert status == -signal.SIGKILL, err
  assert set(tuned(tmp_path)) == before
  (folder,) = [p for p in (tmp_path / 'cells').iterdir() if p.is_dir()]
  assert {p.name for p in (folder / 'checkpoints').iterdir()} == {'4'}
  out = commands.done(*args)
  assert f'Restored step 4 from {folder}' in out
  assert 'Traceback' not in out
  want, got = (ledger.Ledger(p / 'results.jsonl') for p in (alone, tmp_path))
  want, got = want.latest(), got.latest()
  assert got.keys() == want.keys()
  for key, record in want.items():
    assert ledger.deterministic(got[key]) == ledger.deterministic(record)
    if record['stage'] == 'tune':
      name = f'cells/{key}.safetensors'
      assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()


def test_two_processes(file, flags, alone, tmp_path):
  """One program over two processes that share the study's directory."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  args = arguments(file, tmp_path, flags)

  def both(*more: str) -> list[tuple[int, str, str]]:
    found = [
      commands.start(
        *args,
        *more,
        JAX_COORDINATOR_ADDRESS=address,
        JAX_NUM_PROCESSES=2,
        JAX_PROCESS_ID=i,
      )
      for i in range(2)
    ]
    return [commands.wait(process) for process in found]

  for status, _, err in both():
    assert status == 1 and 'give that recipe together = 1' in err
  more = [f'--gin.{flag}' for flag in ALONE]
  for status, _, err in both(*more):
    assert status == 0, err
  want, got = tuned(alone), tuned(tmp_path)
  assert got.keys() == want.keys()
  for settings, record in want.items():
    a, b = record['history'], got[settings]['history']
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert got[settings]['metrics']['test'] == record['metrics']['test']
  assert len(toy_study.records(tmp_path)) == len(toy_study.records(alone))
  # All is done: nobody waits for anybody.
  for status, _, err in both(*more):
    assert status == 0, err


def test_what_is_refused(file, flags, together, tmp_path):
  only = "plan.Study.methods={'soft_prompt': @prompt/plan.Recipe()}"
  flags = (*flags, only, *ALONE[::2])
  log = flags[-1].replace(
    "'EVAL_PERIOD': 3", "'EVAL_PERIOD': 3, 'LOG_PERIOD': 2"
  )
  labels = flags[-1].replace(
    "'EVAL_PERIOD'", "'RANK_LABELS': (), 'EVAL_PERIOD'"
  )
  for i, (flag, message) in enumerate(
    (
      (log, 'EVAL_PERIOD 3 must be a multiple of LOG_PERIOD 2'),
      (labels, "'user_data' has no labels to choose from"),
      ('prompt/plan.Recipe.together=0', 'soft_prompt: together is to be at le'),
    )
  ):
    folder = tmp_path / str(i)
    folder.mkdir()
    start_with_base(together, folder)
    with pytest.raises((command.StudyFailed, plan.StudyError), match=message):
      command.study([str(file)], (*flags[:-1], flag), folder, num_workers=0)
