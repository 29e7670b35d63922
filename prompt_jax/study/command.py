"""`prompt-jax study`: runs what is missing of a study, then reports.

The directory of a study holds

    study.gin      the study, by which the same command goes on without a file
    study.json     the cells that are expected, for the report
    results.jsonl  the ledger: a line a cell
    bases/         pretrained models, a directory each
    cells/         what was trained, a .safetensors a cell; and a directory of
                   each that trains by itself
    logs/          what the workers said
    claims/        locks
    curve.png, report.html, ...: the report
"""

from collections.abc import Sequence
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any
import uuid

from absl import logging

from prompt_jax import checkpoints
from prompt_jax import gin_utils
from prompt_jax import partitioning
from prompt_jax.study import ledger
from prompt_jax.study import plan
from prompt_jax.study import processes
from prompt_jax.study import progress as progress_lib
from prompt_jax.study import published
from prompt_jax.study import workers

_PROGRESS_SECONDS = 1.0


class StudyFailed(ValueError):
  """Some cells could not be run."""


def load(files: Sequence[str], flags: Sequence[str]) -> plan.Study:
  """The study that gin files bind."""
  gin_utils.parse(files, flags)
  return gin_utils.build('@plan.Study()')


def study(
  files: Sequence[str],
  flags: Sequence[str],
  directory: pathlib.Path,
  num_workers: int | None = None,
  shard: str | None = None,
  runner: str = 'local',
  dry_run: bool = False,
  session: str | None = None,
) -> None:
  """Runs a study, or what is missing of it.

  Args:
    files: gin files; none: `study.gin` of the directory.
    flags: bindings over them.
    directory: of the study.
    num_workers: processes; None: one a core; 0: this one, which may be one of
      several that run one program (`partitioning.initialize_distributed`).
    shard: 'i/n', to run a part only.
    runner: 'local', or 'slurm', which submits and does not wait.
    dry_run: only lists the cells, their costs, and what is done.
    session: of a worker that another process has started; it runs jobs until
      there are none and reports nothing.

  Raises:
    StudyFailed: cells failed or are missing at the end.
    plan.StudyError: the study cannot be what it says.
    LedgerError: the ledger cannot be read or written.
  """
  own = workers.Shard.parse(shard or '0/1')
  if (num_workers or 0) < 0:
    raise plan.StudyError(f'--workers is to be 0 or more, got {num_workers}.')
  if num_workers == 0 and not dry_run:
    partitioning.initialize_distributed()
  made = load(files or [_known(directory)], flags)
  text = _source()
  jobs = plan.jobs(made)
  part = workers.mine(jobs, own)
  if session is not None:
    workers.work(part, directory, session)
    return
  book = ledger.Ledger(directory / 'results.jsonl')
  if dry_run:
    print(progress_lib.listing(made, part, book.latest()))
    return
  checkpoints.check_writable(str(directory))
  if num_workers == 0 and not processes.is_first():
    logging.set_verbosity(logging.WARNING)  # the first one does all the rest
    workers.work(part, directory)
    return
  _write(directory, made, jobs, text)
  _say_stale(jobs, book.latest())
  session = uuid.uuid4().hex[:8]
  command = _worker(directory, shard, session)
  if runner == 'slurm':
    _submit(command, directory, num_workers or 1)
    return
  start = time.monotonic()
  progress = progress_lib.Progress(part, book)
  if progress.left == 0:
    logging.info('All %d cells are done.', progress.total)
  if num_workers == 0:  # in any case: the other processes wait for a word
    workers.work(part, directory, session)
  elif progress.left:
    cores = len(os.sched_getaffinity(0))
    count = min(num_workers or cores, len(part))
    _run_local(command, directory, count, progress)
  _finish(made, part, book, directory, time.monotonic() - start)


def _finish(
  made: plan.Study,
  part: Sequence[plan.Job],
  book: ledger.Ledger,
  directory: pathlib.Path,
  seconds: float,
) -> None:
  from prompt_jax.study import report

  found = book.latest()
  cells = [cell for job in part for cell in job.cells]
  bad = [c for c in cells if found.get(c.key, {}).get('status') != 'done']
  try:
    report.report(str(directory))
  except checkpoints.CheckpointError as error:
    if not bad:
      raise
    logging.error('No report: %s', error)  # what is below comes first
  print(f'\nWhere the time went ({seconds:.0f} s in all)\n')
  print(progress_lib.times(made, part, found))
  if bad:
    first = found.get(bad[0].key, {}).get('error') or 'it was not run.'
    raise StudyFailed(
      f'{len(bad)} of {len(cells)} cells are not done. The first, '
      f'{dict(bad[0].settings)}: {first} See {directory}/logs; the same '
      'command tries them again.'
    )


# ---- files -------------------------------------------------------------------


def _known(directory: pathlib.Path) -> str:
  """The study that a directory is of."""
  path = directory / 'study.gin'
  if not path.is_file():
    raise plan.StudyError(
      f'No study: give its gin file, e.g. studies/pocket.gin. Without one, '
      f'--model_dir is to be the directory of a study, but {path} is not there.'
    )
  return str(path)


def _source() -> str:
  """What has been parsed, as a gin file that names all in the same order.

  gin's own text would have dicts sorted, and so sizes, methods and jobs.
  """
  lines = gin_utils.config_str().splitlines()
  imports = [x for x in lines if x.startswith(('from ', 'import '))]
  # Values have modules in full.
  imports += [
    re.sub(r'^from (\S+) import (\w+)$', r'import \1.\2', line)
    for line in imports
    if '__gin__' not in line
  ]
  bound = [f'{b.key} = {b.value}' for b in gin_utils.resolved() if '.' in b.key]
  return '\n'.join([*dict.fromkeys(imports), '', *bound, ''])


def _write(
  directory: pathlib.Path,
  made: plan.Study,
  jobs: Sequence[plan.Job],
  text: str,
) -> None:
  checkpoints.write_atomically(directory / 'study.gin', text.encode())
  value = {
    'name': made.name,
    'title': made.title,
    'note': made.note,
    'metric': made.metric,
    'reference_method': made.reference_method,
    'methods': {name: m.label for name, m in made.methods.items()},
    'sizes': list(made.sizes),
    'tasks': {
      name: {'label': t.label, 'chance': t.chance}
      for name, t in made.tasks.items()
    },
    'overlay': [x for name in made.overlay for x in published.CURVES[name]],
    'cells': [
      {'key': c.key, 'stage': c.stage, 'settings': dict(c.settings)}
      for job in jobs
      for c in job.cells
    ],
  }
  data = json.dumps(value, indent=1).encode()
  checkpoints.write_atomically(directory / 'study.json', data)


def _say_stale(
  jobs: Sequence[plan.Job], found: dict[str, ledger.Record]
) -> None:
  expected = {cell.key for job in jobs for cell in job.cells}
  stale = [r for key, r in found.items() if key not in expected]
  if stale:
    logging.warning(
      'The study has changed: %d results in the ledger are of cells that it no '
      'longer has, and do not count; the first is %s.',
      len(stale),
      stale[0].get('settings'),
    )


# ---- processes ---------------------------------------------------------------


def _worker(
  directory: pathlib.Path, shard: str | None, session: str
) -> list[str]:
  """The command of a worker."""
  command = [sys.executable, '-m', 'prompt_jax.cli', 'study']
  command += [f'--model_dir={directory}', f'--shard={shard or "0/1"}']
  return [*command, f'--session={session}']


def _run_local(
  command: list[str],
  directory: pathlib.Path,
  count: int,
  progress: progress_lib.Progress,
) -> None:
  """Starts workers and waits for them, showing what is done."""
  logging.info(
    '%d of %d cells to run in %d processes; their logs are in %s.',
    progress.left,
    progress.total,
    count,
    directory / 'logs',
  )
  before = signal.signal(signal.SIGTERM, _terminate)
  running = workers.start_local(command, directory, count)
  try:
    with progress:
      while any(p.poll() is None for p in running):
        time.sleep(_PROGRESS_SECONDS)
        progress.show()
  finally:
    signal.signal(signal.SIGTERM, before)
    for process in running:
      process.terminate()
    for process in running:
      _wait(process)
  for i, process in enumerate(running):
    if process.returncode:
      log = directory / 'logs' / f'worker_{i}.log'
      lines = log.read_text(errors='replace').splitlines()
      logging.error(
        'Worker %d ended with status %d. The end of %s:\n%s',
        i,
        process.returncode,
        log,
        '\n'.join(lines[-5:]),
      )


def _terminate(*_: Any) -> None:
  raise SystemExit(143)


def _wait(process: subprocess.Popen[bytes]) -> None:
  try:
    process.wait(timeout=20)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def _submit(command: list[str], directory: pathlib.Path, count: int) -> None:
  run: Any = functools.partial(subprocess.run, command, check=True)
  cluster = os.environ.get('PROMPT_JAX_SUBMITIT_CLUSTER')
  submitted = workers.start_slurm(run, directory, count, cluster)
  names = ', '.join(str(getattr(job, 'job_id', job)) for job in submitted)
  logging.info(
    'Submitted %d workers: %s. prompt-jax report %s shows what is done.',
    count,
    names,
    directory,
  )
