"""The results of a study: a file to which lines are only ever added.

`results.jsonl` holds one JSON object a line, a finished or failed cell each.
Any number of processes may append to it at once, and any of them may be killed
at any moment: a line that has been written whole is never lost. What the lines
mean for the study is the job of `results.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from absl import logging

Record = dict[str, Any]

# They say how and where a cell was run, not what came out of it.
INCIDENTAL = ('cost', 'origin.time', 'origin.versions', 'origin.device')

_STATUSES = ('done', 'failed')


class LedgerError(ValueError):
  """A ledger that cannot be read or written, or that contradicts itself."""


class Ledger:
  """The ledger of one study."""

  def __init__(self, path: str | os.PathLike[str]):
    """Names the file, which the first `append` makes."""
    self.path = pathlib.Path(path)

  def append(self, records: Iterable[Record]) -> None:
    """Adds records, all or none of them, and waits until the disk has them.

    Half a line that a killed process left at the end is taken away first: its
    cell was never finished as far as any reader knows.

    Args:
      records: as JSON; each has 'key' and 'status' ('done' or 'failed').

    Raises:
      LedgerError: not a record, or the disk is full or refuses; the file then
        holds what it held before.
    """
    records = list(records)
    for record in records:
      problem = _problem(record)
      if problem:
        raise LedgerError(f'This is no record for {self.path}: {problem}.')
    data = ''.join(json.dumps(r) + '\n' for r in records).encode()
    if not data:
      return
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
        self._end_last_line(file)
        _write_all_or_none(file, data)
    except OSError as e:
      raise LedgerError(
        f'{self.path} could not be written: {e.strerror or e}. What it held '
        'before is untouched; free some space and start the same command '
        'again, which goes on with the cells that are not in it.'
      ) from e

  def read(self) -> list[Record]:
    """All records in the order of the file; [] where there is no file.

    Half a line at the end is left out with a warning.

    Raises:
      LedgerError: the file cannot be read, or a line is malformed.
    """
    return [record for _, record in self._numbered()]

  def latest(self) -> dict[str, Record]:
    """The record that counts for every key, in the order of their first lines.

    A 'done' counts, whatever comes before or after it; of several 'failed' the
    last one does.

    Raises:
      LedgerError: as `read`, or two 'done' records of one key have different
        results.
    """
    found: dict[str, tuple[int, Record]] = {}
    for number, record in self._numbered():
      before = found.get(record['key'])
      if before is None or before[1]['status'] == 'failed':
        found[record['key']] = (number, record)
      elif record['status'] == 'done':
        self._check_same(*before, number, record)
    return {key: record for key, (_, record) in found.items()}

  def _check_same(self, a: int, first: Record, b: int, second: Record) -> None:
    differ = differences(deterministic(first), deterministic(second))
    if differ:
      lines = [f'  {k}: {x} and {y}' for k, (x, y) in differ.items()]
      raise LedgerError(
        f'Lines {a} and {b} of {self.path} are results of the same cell '
        f'{first["key"]}, but differ in\n'
        + '\n'.join(lines[:10])
        + ('\n  ...' if len(lines) > 10 else '')
        + '\nThe same cell gives the same results on one kind of machine. '
        'Delete the line that is not to be trusted.'
      )

  def _numbered(self) -> Iterator[tuple[int, Record]]:
    """Records with the numbers of their lines, from 1."""
    try:
      with (
        self._open(os.O_RDONLY) as file,
        open(file, 'rb', closefd=False) as f,
      ):
        lines = f.read().split(b'\n')
    except FileNotFoundError:
      return
    except OSError as e:
      raise LedgerError(
        f'{self.path} could not be read: {e.strerror or e}.'
      ) from e
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      record, problem = _parse(line)
      if not problem:
        yield number, record
      elif number == len(lines):  # no newline after it
        logging.warning(
          '%s: line %d is cut off and left out; its cell counts as not done.',
          self.path,
          number,
        )
      else:
        raise LedgerError(
          f'Line {number} of {self.path} is no record: {problem}. Delete that '
          'line; its cell is then run again.'
        )

  @contextlib.contextmanager
  def _open(self, flags: int) -> Iterator[int]:
    """A descriptor of the file, locked against those of other processes."""
    file = os.open(self.path, flags, 0o666)
    try:
      reading = flags == os.O_RDONLY
      fcntl.flock(file, fcntl.LOCK_SH if reading else fcntl.LOCK_EX)
      yield file
    finally:
      # Closing is not enough where a fork has a copy of the descriptor.
      fcntl.flock(file, fcntl.LOCK_UN)
      os.close(file)

  def _end_last_line(self, file: int) -> None:
    """Leaves a file that is empty or ends in a newline."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b'\n':
      return
    start, tail = size, b''
    while start and b'\n' not in tail:
      step = min(start, 1 << 16)
      start -= step
      tail = os.pread(file, step, start) + tail
    tail = tail[tail.rfind(b'\n') + 1 :]
    if not _parse(tail)[1]:  # whole but for its newline
      _write_all_or_none(file, b'\n')
      return
    os.ftruncate(file, size - len(tail))
    logging.warning(
      '%s: took away a last line that was cut off (%d bytes).',
      self.path,
      len(tail),
    )


def _write_all_or_none(file: int, data: bytes) -> None:
  """One write at the end, on the disk on return; under a lock.

  Raises:
    OSError: it failed, and the file has its old length.
  """
  size = os.fstat(file).st_size
  try:
    written = os.write(file, data)
    if written < len(data):
      raise OSError(
        f'only {written} of {len(data)} bytes could be written (disk full?)'
      )
    os.fsync(file)
  except OSError:
    os.ftruncate(file, size)
    raise


def _parse(line: bytes) -> tuple[Record, str]:
  """A record, and what is wrong with it ('' for nothing)."""
  try:
    record = json.loads(line)
  except ValueError as e:  # also bytes that are no text
    return {}, f'not JSON ({e})'
  return record, _problem(record)


def _problem(record: Any) -> str:
  """What keeps something from being a record; '' for nothing."""
  if not isinstance(record, dict):
    return f'an object was expected, got {type(record).__name__}'
  if not isinstance(record.get('key'), str):
    return f"'key' is to be a string, got {record.get('key')!r}"
  if record.get('status') not in _STATUSES:
    return f"'status' is to be one of {_STATUSES}, got {record.get('status')!r}"
  return ''


def flatten(record: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Values by the dotted names of where they are.

  >>> flatten({'cost': {'steps': 3}, 'key': 'a'})
  {'cost.steps': 3, 'key': 'a'}
  """
  out: dict[str, Any] = {}
  for name, value in record.items():
    if isinstance(value, Mapping):
      out.update(flatten(value, f'{prefix}{name}.'))
    else:
      out[f'{prefix}{name}'] = value
  return out


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
  """The flat part of a record that is the same whenever its cell is run."""
  incidental = tuple(f'{name}.' for name in INCIDENTAL)
  return {
    name: value
    for name, value in flatten(record).items()
    if not f'{name}.'.startswith(incidental)
  }


def differences(
  a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Names whose values differ, with both as JSON, 'absent' where one is not.

  NaN equals NaN here: both runs went wrong in the same way.
  """

  def text(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
      return 'absent'
    return json.dumps(values[name], default=str, sort_keys=True)

  names = [*a, *(name for name in b if name not in a)]
  pairs = {name: (text(a, name), text(b, name)) for name in names}
  return {name: (x, y) for name, (x, y) in pairs.items() if x != y}
