"""Studies that are run: as a whole, in parts, killed, failing, changed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import commands
import pytest
import toy_study

from prompt_jax.study import command
from prompt_jax.study import ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  return toy_study.write(tmp_path_factory.mktemp('toy'))


def start(file, folder, *flags):
  """The command in a process of its own."""
  args = [sys.executable, '-m', 'prompt_jax.cli', 'study', str(file)]
  args += [f'--model_dir={folder}', '--workers=2', *flags]
  return subprocess.Popen(
    args,
    env=commands.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, status=0):
  out, _ = process.communicate(timeout=600)
  assert process.returncode == status, out
  return out


@pytest.fixture(scope='module')
def whole(file, tmp_path_factory):
  """The directory of a study that was never stopped, and what it printed."""
  folder = tmp_path_factory.mktemp('whole')
  return folder, finish(start(file, folder))


def results(folder):
  """What the ledger holds, but for what depends on the clock."""
  found = ledger.Ledger(folder / 'results.jsonl').latest()
  return {key: ledger.deterministic(x) for key, x in found.items()}


def assert_same(got, want):
  got, want = results(got), results(want)
  assert got.keys() == want.keys()
  for key, record in want.items():
    assert got[key] == record


def test_whole_study(whole):
  folder, out = whole
  records = toy_study.records(folder)
  assert len(records) == toy_study.NUM_CELLS
  assert {r['status'] for r in records} == {'done'}
  for word in ('Model tuning', 'Where the time went', 'curve.png', 'A toy.'):
    assert word in out
  for name in ('curve.png', 'report.html', 'study.gin', 'study.json'):
    assert (folder / name).stat().st_size
  tuned = [r for r in records if r['stage'] == 'tune']
  for record in tuned:
    assert set(record['metrics']) == {'validation', 'test'}
    assert record['cost']['peak_bytes'] > 0
    file = folder / 'cells' / f'{record["key"]}.safetensors'
    assert file.exists()
    trained = record['parameters']['trained']
    method = record['settings']['method']
    width = {'a': 8, 'b': 16}[record['settings']['size']]
    assert (
      trained
      == {
        'soft_prompt': 3 * width,
        'fine_tune': record['parameters']['total'],
        'prompt_design': 0,
      }[method]
    )
    assert bool(record['cost']['train_flops']) == (method != 'prompt_design')


def test_second_run_does_nothing(file, whole):
  folder, _ = whole
  before = (folder / 'results.jsonl').read_bytes()
  out = finish(start(file, folder))
  assert f'All {toy_study.NUM_CELLS} cells are done' in out
  assert (folder / 'results.jsonl').read_bytes() == before
  # Nor does it need the file.
  args = [sys.executable, '-m', 'prompt_jax.cli', 'study']
  args += [f'--model_dir={folder}', '--dry_run']
  out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
  assert f'{toy_study.NUM_CELLS} done, 0 to run' in out


def test_killed_study_goes_on(file, whole, tmp_path):
  rng = random.Random(0)
  for _ in range(3):
    process = start(file, tmp_path)
    time.sleep(rng.uniform(8, 25))
    process.send_signal(signal.SIGKILL)
    process.wait()
  finish(start(file, tmp_path))
  assert_same(tmp_path, whole[0])


def test_workers_that_die_with_their_study(file, tmp_path):
  process = start(file, tmp_path)
  deadline = time.monotonic() + 120
  while not list(tmp_path.glob('logs/*')) and time.monotonic() < deadline:
    time.sleep(0.2)
  time.sleep(1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  time.sleep(2)
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      found.append(path.read_bytes().decode(errors='replace'))
    except OSError:
      continue  # has ended meanwhile
  assert not [line for line in found if str(tmp_path) in line]


def test_shards_are_the_whole(file, whole, tmp_path):
  out = finish(start(file, tmp_path, '--shard=0/2'))
  assert f'9 of {toy_study.NUM_CELLS} cells are done, 7 missing' in out
  out = finish(start(file, tmp_path, '--shard=1/2'))
  assert f'{toy_study.NUM_CELLS} of {toy_study.NUM_CELLS} cells are done' in out
  assert_same(tmp_path, whole[0])


def test_cells_that_fail_are_told_and_tried_again(file, whole, tmp_path):
  flag = '--gin.model/plan.Recipe.bindings={}'
  values = "'EVAL_PERIOD': 3, 'TEST_SPLIT': 'validation', 'LEARNING_RATE': 1e30"
  broken = flag.format("{'TRAIN_STEPS': 6, " + values + '}')
  out = finish(start(file, tmp_path, broken), 1)
  assert '4 of 16 cells are not done' in out and 'LEARNING_RATE' in out
  assert 'Traceback' not in out
  # The others are there; the mended study has only those four to run.
  out = finish(start(file, tmp_path))
  assert f'4 of {toy_study.NUM_CELLS} cells to run' in out
  assert 'The study has changed: 4 results' in out
  found, want = results(tmp_path), results(whole[0])
  assert {k: found[k] for k in want} == want


def test_ledger_that_is_cut_in_a_line(file, whole, tmp_path):
  text = (whole[0] / 'results.jsonl').read_text()
  lines = text.splitlines(keepends=True)
  (tmp_path / 'results.jsonl').write_text(''.join(lines[:-1]) + lines[-1][:30])
  os.symlink(whole[0] / 'bases', tmp_path / 'bases')
  out = finish(start(file, tmp_path))
  assert f'1 of {toy_study.NUM_CELLS} cells to run' in out
  assert_same(tmp_path, whole[0])


@pytest.mark.parametrize('cluster', ['local', 'debug'])
def test_slurm_runner(file, whole, tmp_path, monkeypatch, cluster):
  pytest.importorskip('submitit')
  monkeypatch.setenv('PROMPT_JAX_SUBMITIT_CLUSTER', cluster)
  out = finish(start(file, tmp_path, '--runner=slurm', '--workers=1'))
  assert 'Submitted 1 workers' in out
  if cluster == 'debug':  # runs when it is asked for its result
    return
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    if len(results(tmp_path)) == toy_study.NUM_CELLS:
      break
    time.sleep(1)
  assert_same(tmp_path, whole[0])


def test_study_that_names_what_is_not_there(file, tmp_path, capsys):
  for flags, message in (
    (['--gin.plan.Study.reference_method=fine_tun'], 'Did you mean fine_tune'),
    (['--gin.plan.Study.seeds=()'], 'no seeds'),
    (['--gin.plan.Study.sizes={"a": ("models/tny.gin",)}'], 'models/tiny.gin'),
  ):
    out = finish(start(file, tmp_path, *flags), 1)
    assert message in out and 'Traceback' not in out
  assert not list(tmp_path.iterdir())


def test_full_disk_loses_nothing(file, whole, tmp_path):
  """With a limit on the size of files, which is an error of the same kind.

  The ledger is the largest file by far, as it may be after many studies, and so
  the only one that meets the limit.
  """
  path, lines = tmp_path / 'results.jsonl', toy_study.records(whole[0])
  bases = [r for r in lines if r['stage'] == 'pretrain']
  other = {**lines[0], 'key': 'other', 'error': 'x' * 2_000_000}
  ledger.Ledger(path).append([other, *bases])
  os.symlink(whole[0] / 'bases', tmp_path / 'bases')
  before = path.read_bytes()
  # Space for any one job, but not for all.
  jobs = (whole[0] / 'results.jsonl').stat().st_size // 2
  shell = f'ulimit -f {(len(before) + jobs) // 1024}; exec "$@"'
  args = [sys.executable, '-m', 'prompt_jax.cli', 'study', str(file)]
  args += [f'--model_dir={tmp_path}', '--workers=0']
  done = subprocess.run(
    ['bash', '-c', shell, 'bash', *args],
    capture_output=True,
    text=True,
    env=commands.environment(),
  )
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert f'prompt-jax study: {path} could not be written: ' in last
  assert 'free some space and start the same command again' in last
  # What was done is whole and kept, and nothing else is run again.
  full = path.read_bytes()
  assert full.startswith(before) and full.endswith(b'\n')
  kept = results(tmp_path)
  want = results(whole[0])
  assert len(bases) < len(kept) - 1 < len(want)
  out = finish(start(file, tmp_path))
  assert f'{len(want) - len(kept) + 1} of {len(want)} cells to run' in out
  assert path.read_bytes().startswith(full)
  found = results(tmp_path)
  assert {key: found[key] for key in want} == want


def test_loading_is_quick_to_fail(file):
  with pytest.raises(ValueError, match='No gin file'):
    command.load(['studies/no_such.gin'], [])
