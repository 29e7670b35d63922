"""Runs the jobs of a study: here, in processes of this machine, or on Slurm.

There is no master. A worker takes the heaviest job that can be run, holds a
lock on it while it runs (the kernel takes the lock away from a process that is
killed), and appends what came of it to the ledger. Any number of workers may
join or leave at any time, on all machines that share the study's directory.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import time
import traceback
import uuid

from absl import logging

from prompt_jax.study import ledger
from prompt_jax.study import plan

_POLL_SECONDS = 0.3
_FAILED = 'failed'


@dataclasses.dataclass(frozen=True)
class Shard:
  """The i-th of n parts of a study's jobs."""

  i: int = 0
  n: int = 1

  @classmethod
  def parse(cls, text: str) -> 'Shard':
    """From 'i/n', i from 0.

    Raises:
      StudyError: not such a text.
    """
    try:
      i, n = map(int, text.split('/'))
    except ValueError:
      i, n = -1, 0
    if not 0 <= i < n:
      raise plan.StudyError(
        f"--shard is to be 'i/n' with i from 0 to n - 1, got {text!r}."
      )
    return cls(i, n)


def mine(jobs: list[plan.Job], shard: Shard) -> list[plan.Job]:
  """The jobs of a shard, and the pretraining that they need."""
  tuning = [job for job in jobs if job.cells[0].stage != 'pretrain']
  pretraining = [job for job in jobs if job.cells[0].stage == 'pretrain']
  chosen = tuning[shard.i :: shard.n]
  needed = {job.base for job in chosen}
  if not tuning:
    return pretraining[shard.i :: shard.n]
  return [
    job for job in pretraining if job.cells[0].key in needed or shard.n == 1
  ] + chosen


def work(
  jobs: list[plan.Job], directory: pathlib.Path, session: str | None = None
) -> None:
  """Runs jobs until none is left that could be run.

  Several processes of one program (`processes.py`) run each job together.

  Args:
    jobs: all of the study or of a shard.
    directory: of the study.
    session: of workers that are started together: a job that has failed in a
      session is not tried again in it.

  Raises:
    StudyError: several processes, and cells that train together.
    LedgerError: the ledger cannot be read or written.
  """
  from prompt_jax.study import processes  # imports JAX

  session = session or uuid.uuid4().hex[:8]
  book = ledger.Ledger(directory / 'results.jsonl')
  _check_alone(jobs)
  while True:
    with contextlib.ExitStack() as claims:
      index = -1
      if processes.is_first():
        index = _next(jobs, directory, book, session, claims)
      index = processes.agree(index)
      if index < 0:
        return
      _run(jobs[index], directory, book, session)


def _check_alone(jobs: list[plan.Job]) -> None:
  import jax

  count = jax.process_count()
  for job in jobs:
    if count > 1 and not job.alone:
      raise plan.StudyError(
        f'{count} processes run one program here, which trains one cell at a '
        f'time, but there is {job}: give that recipe together = 1.'
      )


def _next(
  jobs: list[plan.Job],
  directory: pathlib.Path,
  book: ledger.Ledger,
  session: str,
  claims: contextlib.ExitStack,
) -> int:
  """Waits for a job that can be run and claims it; -1 if none will come."""
  while True:
    state = _State(jobs, book.latest(), session)
    for job in state.ready:
      claim = contextlib.ExitStack()
      claimed = claim.enter_context(_claim(directory, job))
      # Another one may have finished it since.
      if claimed and not _State([job], book.latest(), session).is_over(job):
        claims.push(claim)
        return jobs.index(job)
      claim.close()
    if not state.ready and not (state.waiting and state.may_come):
      return -1
    time.sleep(_POLL_SECONDS)


class _State:
  """What the ledger says of some jobs."""

  def __init__(
    self, jobs: list[plan.Job], found: dict[str, ledger.Record], session: str
  ):
    self._found, self._session = found, session
    left = [job for job in jobs if not self.is_over(job)]
    bases = {job.cells[0].key: job for job in jobs}
    heavy: dict[str, float] = {}
    for job in left:
      heavy[job.base or ''] = heavy.get(job.base or '', 0.0) + job.weight
    # A base is worth what waits for it, too.
    weight = {
      job.key: job.weight + heavy.get(job.cells[0].key, 0.0) for job in left
    }
    left.sort(key=lambda job: -weight[job.key])
    self.ready = [job for job in left if self._has_base(job)]
    self.waiting = [job for job in left if not self._has_base(job)]
    # Some base that is waited for can still be made, by whomever.
    self.may_come = any(
      job.base not in bases or not self.is_over(bases[job.base])
      for job in self.waiting
      if job.base is not None
    )

  def is_over(self, job: plan.Job) -> bool:
    """Done, or failed in this session."""
    return all(self._is_over(cell.key) for cell in job.cells)

  def _is_over(self, key: str) -> bool:
    record = self._found.get(key)
    if record is None:
      return False
    if record['status'] != _FAILED:
      return True
    return record.get('origin', {}).get('session') == self._session

  def _has_base(self, job: plan.Job) -> bool:
    if job.base is None:
      return True
    record = self._found.get(job.base)
    return record is not None and record['status'] == 'done'


def _run(
  job: plan.Job, directory: pathlib.Path, book: ledger.Ledger, session: str
) -> None:
  from prompt_jax.study import jobs as jobs_lib
  from prompt_jax.study import processes

  logging.info('%s', job)
  start = time.monotonic()
  try:
    records = jobs_lib.run(job, directory)
  except (ledger.LedgerError, KeyboardInterrupt, SystemExit):
    raise
  except Exception as error:
    logging.error('%s failed:\n%s', job, traceback.format_exc())
    text = f'{type(error).__name__}: {error}'
    records = jobs_lib.failed(job, text, session)
  for record in records:
    if record['status'] == _FAILED:
      record['origin']['session'] = session
  if not processes.is_first():
    return
  done = book.latest()
  # Cells that were done before, of a job that has grown since, stay as they
  # are.
  book.append(
    r
    for r in records
    if done.get(r['key'], {'status': _FAILED})['status'] == _FAILED
  )
  logging.info('%s: %.1f s', job, time.monotonic() - start)


@contextlib.contextmanager
def _claim(directory: pathlib.Path, job: plan.Job) -> Iterator[bool]:
  """Whether the job is ours while the context lasts."""
  folder = directory / 'claims'
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / job.key, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    yield True


# ---- processes ---------------------------------------------------------------


def start_local(
  command: list[str], directory: pathlib.Path, count: int
) -> list[subprocess.Popen[bytes]]:
  """Starts workers on this machine, each on cores of its own.

  Args:
    command: of a worker.
    directory: of the study; logs go to its `logs/`.
    count: of workers.
  """
  folder = directory / 'logs'
  folder.mkdir(parents=True, exist_ok=True)
  cores = sorted(os.sched_getaffinity(0))
  out = []
  for i in range(count):
    own = cores[i::count] or [cores[i % len(cores)]]
    with open(folder / f'worker_{i}.log', 'ab') as log:
      out.append(
        subprocess.Popen(
          command,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          preexec_fn=_pinned(own),
        )
      )
  return out


def _pinned(cores: list[int]) -> Callable[[], None]:
  """What a worker does before it starts."""

  def prepare() -> None:
    os.sched_setaffinity(0, cores)
    # Not to outlive whoever started it: PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

  return prepare


def start_slurm(
  function: Callable[[], None],
  directory: pathlib.Path,
  count: int,
  cluster: str | None = None,
  **parameters: object,
) -> list[object]:
  """Submits workers to Slurm through `submitit`.

  Args:
    function: what a worker runs.
    directory: of the study, on a file system that all machines share.
    count: of workers.
    cluster: 'local' or 'debug' for submitit's own executors; None: Slurm.
    **parameters: of `submitit.AutoExecutor.update_parameters`.

  Raises:
    StudyError: submitit is not installed.
  """
  try:
    import submitit  # pyright: ignore[reportMissingImports]
  except ImportError as e:
    raise plan.StudyError(
      "The Slurm runner needs submitit: pip install 'prompt_jax[slurm]'."
    ) from e
  executor = submitit.AutoExecutor(
    folder=directory / 'logs' / '%j', cluster=cluster
  )
  executor.update_parameters(**{'timeout_min': 24 * 60, **parameters})
  return [executor.submit(function) for _ in range(count)]
