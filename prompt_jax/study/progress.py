"""What `prompt-jax study` prints: its cells, what is done, where the time went.

Not for results (`report.py`).
"""

from collections.abc import Sequence
import sys
import time
from typing import Any

from absl import logging
import tabulate

from prompt_jax.study import ledger
from prompt_jax.study import plan


class Progress:
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

  def __enter__(self) -> 'Progress':
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
    [
      'job',
      'cells',
      'done',
      'failed',
      'missing',
      'share of work',
      'seconds',
      'differ in',
    ],
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


def times(
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
