"""`prompt-jax study`: runs what is missing of a study, then reports.

The directory of a study holds

    study.gin      the study, by which the same command goes on without a file
    study.json     the cells that are expected, for the report
    results.jsonl  the ledger: a line a cell
    bases/         pretrained models, a directory each
    cells/         what was trained, a .safetensors a cell
    logs/          what the workers said
    claims/        locks
    curve.png, report.html, ...: the report
"""

from collections.abc import Sequence
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any
import uuid

from absl import logging
import tabulate

from prompt_jax import checkpoints
from prompt_jax import gin_utils
from prompt_jax.study import ledger
from prompt_jax.study import plan
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
    num_workers: processes; None: one a core; 0: this one.
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
  files = files or [str(directory / 'study.gin')]
  made = load(files, flags)
  text = gin_utils.config_str()
  jobs = plan.jobs(made)
  part = workers.mine(jobs, workers.Shard.parse(shard or '0/1'))
  if session is not None:
    workers.work(part, directory, session)
    return
  book = ledger.Ledger(directory / 'results.jsonl')
  if dry_run:
    print(listing(made, part, book.latest()))
    return
  checkpoints.check_writable(str(directory))
  _write(directory, made, jobs, text)
  _say_stale(jobs, book.latest())
  command = [sys.executable, '-m', 'prompt_jax.cli', 'study']
  command += [f'--model_dir={directory}', f'--shard={shard or "0/1"}']
  session = uuid.uuid4().hex[:8]
  command += [f'--session={session}']
  if runner == 'slurm':
    _submit(command, directory, num_workers or 1)
    return
  start = time.monotonic()
  progress = _Progress(part, book)
  cores = len(os.sched_getaffinity(0))
  # No more processes than there can be work for at once.
  count = min(cores if num_workers is None else num_workers, len(part))
  if progress.left == 0:
    logging.info('All %d cells are done.', progress.total)
  elif count == 0:
    workers.work(part, directory, session)
  else:
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
  report.report(str(directory))
  print(f'\nWhere the time went ({seconds:.0f} s in all)\n')
  print(_times(made, part, found))
  cells = [cell for job in part for cell in job.cells]
  bad = [c for c in cells if found.get(c.key, {}).get('status') != 'done']
  if bad:
    first = found.get(bad[0].key, {}).get('error') or 'it was not run'
    raise StudyFailed(
      f'{len(bad)} of {len(cells)} cells are not done. The first, '
      f'{dict(bad[0].settings)}: {first} See {directory}/logs; the same '
      'command tries them again.'
    )


# ---- files -------------------------------------------------------------------


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


def _run_local(
  command: list[str],
  directory: pathlib.Path,
  count: int,
  progress: '_Progress',
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


class _Progress:
  """How much is done: a bar on a terminal, otherwise a line at each change."""

  def __init__(self, part: Sequence[plan.Job], book: ledger.Ledger):
    self._part, self._book = part, book
    self.total = sum(len(job.cells) for job in part)
    self._bar: Any = None
    self._start = time.monotonic()
    self._first = self._weight_done()
    self._shown = self._count()

  def _is_done(self, key: str, found: dict[str, ledger.Record]) -> bool:
    return found.get(key, {}).get('status') == 'done'

  def _count(self) -> int:
    found = self._book.latest()
    keys = [cell.key for job in self._part for cell in job.cells]
    return sum(self._is_done(key, found) for key in keys)

  def _weight_done(self) -> float:
    found = self._book.latest()
    weights = [
      job.weight
      for job in self._part
      if all(self._is_done(cell.key, found) for cell in job.cells)
    ]
    return sum(weights) / sum(job.weight for job in self._part)

  @property
  def left(self) -> int:
    """Cells that are not done."""
    return self.total - self._count()

  def __enter__(self) -> '_Progress':
    if sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=self.total, initial=self._shown, unit='cell')
    return self

  def __exit__(self, *_: Any) -> None:
    self.show()
    if self._bar is not None:
      self._bar.close()

  def show(self) -> None:
    """What is done by now, if that has changed."""
    count = self._count()
    if self._bar is not None:
      self._bar.update(count - self._bar.n)
      return
    if count == self._shown:
      return
    self._shown = count
    elapsed, done = time.monotonic() - self._start, self._weight_done()
    rate = (done - self._first) / max(elapsed, 1e-9)
    left = f'about {(1 - done) / rate:.0f} s left' if rate else 'time unknown'
    logging.info(
      '%d of %d cells done after %.0f s, %s', count, self.total, elapsed, left
    )


# ---- what is printed ---------------------------------------------------------


def listing(
  made: plan.Study,
  part: Sequence[plan.Job],
  found: dict[str, ledger.Record],
) -> str:
  """The cells of a study, a line a job, with what is known of their cost."""
  total = sum(job.weight for job in part)
  rows = []
  for job in part:
    cells = job.cells
    states = [found.get(c.key, {}).get('status', 'missing') for c in cells]
    seconds = [
      found[c.key].get('cost', {}).get('wall_seconds')
      for c in cells
      if c.key in found
    ]
    known = [x for x in seconds if x is not None]
    rows.append([
      str(job),
      len(cells),
      states.count('done'),
      states.count('failed'),
      states.count('missing'),
      f'{job.weight / total:.1%}',
      f'{known[0]:.1f}' if known else '-',
      _spread(cells),
    ])  # fmt: skip
  table = tabulate.tabulate(
    rows,
    ['job', 'cells', 'done', 'failed', 'missing', 'share of work', 's', 'over'],
    disable_numparse=True,
  )
  expected = {c.key for job in part for c in job.cells}
  done = sum(found.get(k, {}).get('status') == 'done' for k in expected)
  stale = sum(key not in expected for key in found)
  lines = [
    f'{made.title}. {made.note}',
    '',
    table,
    '',
    f'{len(expected)} cells in {len(part)} jobs: {done} done, '
    f'{len(expected) - done} to run. In the ledger, but not in this study or '
    f'shard: {stale}.',
  ]
  return '\n'.join(lines)


def _spread(cells: Sequence[plan.Cell]) -> str:
  """In which settings the cells of a job differ, and in what."""
  out = []
  for name in cells[0].settings:
    values = list(dict.fromkeys(c.settings[name] for c in cells))
    if len(values) > 1:
      out.append(f'{name}: {", ".join(map(str, values))}')
  return '; '.join(out)


def _times(
  made: plan.Study,
  part: Sequence[plan.Job],
  found: dict[str, ledger.Record],
) -> str:
  """Seconds of process time, by kind of work and size."""
  rows: dict[str, dict[str, float]] = {}
  compiling: dict[str, float] = {}
  for job in part:
    cell = job.cells[0]
    cost = found.get(cell.key, {}).get('cost', {})
    kind = cell.settings.get('method', 'pretraining')
    size = cell.settings['size']
    row = rows.setdefault(kind, dict.fromkeys(made.sizes, 0.0))
    row[size] += cost.get('wall_seconds') or 0.0
    compiling[kind] = compiling.get(kind, 0.0) + (
      cost.get('compile_seconds') or 0.0
    )
  table = [
    [kind, *row.values(), sum(row.values()), compiling[kind]]
    for kind, row in rows.items()
  ]
  sums = [sum(column) for column in list(zip(*table, strict=True))[1:]]
  headers = ['seconds of a process', *made.sizes, 'all', 'before step 2']
  return tabulate.tabulate([*table, ['all', *sums]], headers, floatfmt='.1f')
