"""Contestants in processes of their own, and how to talk to them.

A worker builds its contestant once, keeps it in memory and does one thing on
each request, so that contestants in different frameworks can take turns on one
machine. Requests and replies are lines of JSON on stdin and stdout. Not for
choosing what is measured (`train_step.py`) nor for the contestants themselves
(`ours.py`, `peft_torch.py`).

A contestant has `info` (a dict), `step(count)` (does that many steps and
returns when they are finished), `finish(directory)` (a dict: what it saves, and
what would disturb the measurement if it were asked before).
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np


def random_batch(
  rows: int, inputs: int, targets: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Ids [rows, inputs] and [rows, targets]: no padding, EOS at the end.

  The same for every contestant, and full, so that the arithmetic is too.
  """
  rng = np.random.default_rng(0)
  high = min(vocab_size, 32000)  # T5's sentinels are not text
  found = [
    rng.integers(2, high, (rows, length), dtype=np.int32)
    for length in (inputs, targets)
  ]
  for ids in found:
    ids[:, -1] = 1
  return found[0], found[1]


def resident_bytes() -> int:
  """Memory that this process holds now; 0 where /proc does not say."""
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return 0
  return pages * resource.getpagesize()


def size_of(directory: str | pathlib.Path) -> int:
  """Bytes of all files below a directory."""
  files = pathlib.Path(directory).rglob('*')
  return sum(f.stat().st_size for f in files if f.is_file())


# ---- in the worker ---------------------------------------------------------


def serve(make: Callable[[], Any]) -> None:
  """Answers requests until stdin ends."""
  # Libraries print to stdout; replies must not mix with that.
  replies = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  contestant = make()
  print(json.dumps(contestant.info), file=replies)
  for line in sys.stdin:
    request = json.loads(line)
    if request['do'] == 'step':
      reply = _timed(contestant.step, request['count'])
    else:  # the peak first: what follows may raise it
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
      reply = {'peak_bytes': peak, **contestant.finish(request['directory'])}
    print(json.dumps(reply), file=replies)


def _timed(step: Callable[[int], None], count: int) -> dict[str, float]:
  """Seconds and page faults of one of `count` steps.

  CPU seconds are those of all threads of the process, the kernel's included.
  """

  def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

  before = time.perf_counter(), time.process_time(), faults()
  step(count)
  after = time.perf_counter(), time.process_time(), faults()
  spent = [(y - x) / count for x, y in zip(before, after, strict=True)]
  return dict(zip(('wall', 'cpu', 'faults'), spent, strict=True))


# ---- in the script that measures -------------------------------------------


class WorkerError(RuntimeError):
  """A worker ended; the message holds the end of what it wrote."""


class Worker:
  """A contestant in another process.

  Attributes:
    name: of the contestant.
    info: what it said when it was ready.

  Args:
    name: see there.
    command: starts `serve` for this contestant.
    env: variables of its environment, besides this process's.
  """

  def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]):
    self.name = name
    self._log = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env={**os.environ, **env},
    )
    self.info = self._read()

  def step(self, count: int) -> dict[str, float]:
    """`wall` and `cpu` seconds and page `faults` of a step."""
    return self._ask(do='step', count=count)

  def finish(self) -> dict[str, Any]:
    """What there is to say after the last step; ends the process."""
    with tempfile.TemporaryDirectory() as directory:
      found = self._ask(do='finish', directory=directory)
    self.close()
    return found

  def close(self) -> None:
    """Ends the process."""
    if self._process.stdin is not None:
      self._process.stdin.close()
    self._process.wait()
    self._log.close()

  def _ask(self, **request: Any) -> dict[str, Any]:
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # it has ended: reading says so, and why
    return self._read()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      self._log.seek(0)
      end = ''.join(self._log.readlines()[-15:])
      raise WorkerError(f'{self.name} ended with status {code}:\n{end}')
    return json.loads(line)
