"""The tables of a study's report, as rows of strings.

Each function makes one `Table`, which becomes Markdown, HTML or plain text.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import tabulate

from prompt_jax.study import gap
from prompt_jax.study import plots
from prompt_jax.study import results as results_lib
from prompt_jax.study.results import Results

_NOTHING = '-'


@dataclasses.dataclass(frozen=True)
class Table:
  """A title, rows of strings, and what a reader must know of them."""

  title: str
  headers: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ''

  def text(self, style: str) -> str:
    """The rows in one of tabulate's styles: 'simple', 'pipe', 'html'."""
    return str(
      tabulate.tabulate(
        self.rows, self.headers, tablefmt=style, disable_numparse=True
      )
    )


def scores(
  results: Results, task: str | None = None, metric: str | None = None
) -> Table:
  """Mean and deviation over seeds: a row a method, a column a size."""
  study = results.study
  rows = []
  for method, label in study.methods.items():
    found = [results.score(method, s, task, metric) for s in study.sizes]
    rows.append([label, _seeds(found), *(_score(x) for x in found)])
  name = plots.metric_label(metric or study.metric)
  chance = study.chance(task) if metric in (None, study.metric) else None
  note = '' if chance is None else f'Chance: {chance:.1f}.'
  incomplete = any(_NOTHING in row for row in rows)
  if task is None and incomplete:
    note += ' No mean where a task is missing.'
  return Table(
    title=f'{name}, {study.task_label(task)}',
    headers=['method', 'seeds', *study.sizes],
    rows=rows,
    note=note.strip(),
  )


def _percent(share: float) -> str:
  """Two digits; two are too few for a hundred."""
  return f'{share:.0f} %' if share >= 10 else f'{share:.2g} %'


def _score(score: results_lib.Score | None) -> str:
  if score is None:
    return _NOTHING
  if math.isnan(score.deviation):
    return f'{score.mean:.1f}'
  return f'{score.mean:.1f} ± {score.deviation:.1f}'


def _seeds(found: Sequence[results_lib.Score | None]) -> str:
  """Pretraining x tuning seeds; a range where sizes differ."""
  counts = [score.seeds for score in found if score is not None]
  if not counts:
    return _NOTHING
  sides = []
  for side in zip(*counts, strict=True):
    low, high = min(side), max(side)
    sides.append(str(low) if low == high else f'{low}-{high}')
  return ' x '.join(sides)


def gaps(results: Results) -> Table:
  """Reference method minus each other one, on the mean over tasks."""
  study = results.study
  rows = []
  bases: set[int] = set()
  for method, label in study.methods.items():
    if method == study.reference_method:
      continue
    found = [results.gaps(method, size) for size in study.sizes]
    bases |= {base for per_base in found for base in per_base}
    rows.append([label, *(_gap(g) for g in found), _falls(found)])
  several = (
    ' In brackets: each pretraining seed by itself.' if len(bases) > 1 else ''
  )
  return Table(
    title=f'Gap to {study.methods[study.reference_method]}',
    headers=['method', *study.sizes, 'falls at every step'],
    rows=rows,
    note=f'Points of the mean over tasks.{several}',
  )


def _gap(per_base: Mapping[int, float]) -> str:
  if not per_base:
    return _NOTHING
  mean = f'{np.mean(list(per_base.values())):.1f}'
  if len(per_base) == 1:
    return mean
  each = ', '.join(f'{value:.1f}' for _, value in sorted(per_base.items()))
  return f'{mean} ({each})'


def _falls(found: Sequence[Mapping[int, float]]) -> str:
  """Whether the gap falls from size to size on every pretraining seed."""
  bases = sorted(set().union(*found))
  whole = bool(bases) and all(g.keys() >= set(bases) for g in found)
  if len(found) < 2 or not whole:
    return _NOTHING
  lines = [np.diff([g[base] for g in found]) for base in bases]
  falling = sum(bool(np.all(line < 0)) for line in lines)
  if len(bases) == 1:
    return 'yes' if falling else 'no'
  return f'on {falling} of {len(bases)} pretraining seeds'


def closing(results: Results) -> Table:
  """The size at which each method's gap closes."""
  study = results.study
  rows = []
  for method, label in study.methods.items():
    if method != study.reference_method:
      found = gap.closing(results, method)
      rows.append([label, _NOTHING if found is None else str(found)])
  note = (
    'Non-embedding parameters; straight lines between sizes on a logarithmic '
    'axis, no extrapolation; bootstrap over seeds.'
  )
  if results.seeds()[0] == 1:
    note += (
      ' One pretraining seed: the interval is of tuning alone, too narrow.'
    )
  return Table(
    title=f'Where the gap is at most {gap.TOLERANCE:g} point',
    headers=['method', 'size'],
    rows=rows,
    note=note,
  )


def budget(results: Results) -> Table:
  """What each method costs at each size: the equal-budget table."""
  study = results.study
  rows = []
  for size in study.sizes:
    for method, label in study.methods.items():
      cost = results.budget(method, size)
      if not cost:
        continue
      trained, total = cost.get('trained'), cost.get('total')
      share = None if trained is None or not total else 100 * trained / total
      flops, seconds = cost.get('train_flops'), cost.get('step_seconds')
      rows.append(
        [
          size,
          label,
          _score(results.score(method, size)),
          number(trained),
          _NOTHING if share is None else _percent(share),
          number(cost.get('steps')),
          f'{flops:.2e}' if flops else _NOTHING,
          f'{1000 * seconds:.2f} ms' if seconds else _NOTHING,
          size_of(cost.get('peak_bytes')),
          size_of(cost.get('trained_bytes')),
          number(cost.get('runs_together')),
        ]
      )
  return Table(
    title='Budget of one run',
    headers=[
      'size',
      'method',
      'score',
      'trained parameters',
      'of all',
      'steps',
      'FLOPs',
      'step time',
      'peak memory',
      'on disk',
      'runs together',
    ],
    rows=rows,
    note=(
      'Means over tasks and seeds of the chosen hyperparameters. Step time and '
      'peak memory are of the program, in which so many runs trained together.'
    ),
  )


def number(value: float | None) -> str:
  """A count, or what stands for none."""
  return _NOTHING if value is None else f'{value:,.0f}'


def size_of(count: float | None) -> str:
  """Bytes, for people.

  >>> [size_of(x) for x in (None, 0, 2048, 3 << 20)]
  ['-', '0 B', '2.0 KiB', '3.0 MiB']
  """
  if count is None:
    return _NOTHING
  for power, unit in ((3, 'GiB'), (2, 'MiB'), (1, 'KiB')):
    if count >= 1024**power:
      return f'{count / 1024**power:.1f} {unit}'
  return f'{count:.0f} B'


def bases(results: Results) -> Table:
  """The pretrained models, by size."""
  rows = []
  names: dict[str, None] = {}
  for record in results.bases:
    names |= dict.fromkeys(record['metrics'].get('validation', {}))
  for size in results.study.sizes:
    found = [r for r in results.bases if r['settings'].get('size') == size]
    if not found:
      continue
    parameters = results_lib.mean_values([r['parameters'] for r in found])
    metrics = [r['metrics'].get('validation', {}) for r in found]
    values = results_lib.mean_values(metrics)
    rows.append(
      [
        size,
        number(parameters.get('total')),
        number(parameters.get('non_embedding')),
        str(len({r['settings'].get('base_seed') for r in found})),
        *(_metric(values.get(name)) for name in names),
      ]
    )
  return Table(
    title='Pretrained models',
    headers=['size', 'parameters', 'non-embedding', 'seeds', *names],
    rows=rows,
    note='Metrics of held-out pretraining data; means over seeds.',
  )


def _metric(value: float | None) -> str:
  return _NOTHING if value is None else f'{value:.2f}'


def chosen(results: Results) -> Table:
  """The hyperparameters that validation chose."""
  rows = [
    [
      results.study.methods[c.method],
      c.size,
      results.study.task_label(c.task),
      str(c.base_seed),
      settings(c.hyperparameters) or _NOTHING,
      str(c.tried),
      f'{c.validation:.1f}',
      ', '.join(record['key'][:8] for record in c.records.values()),
    ]
    for c in results.choices
  ]
  return Table(
    title='Chosen hyperparameters',
    headers=[
      'method',
      'size',
      'task',
      'pretraining seed',
      'chosen',
      'tried',
      'validation',
      'cells',
    ],
    rows=rows,
    note=(
      'Of each tuning seed the beginning of the key of its cell, for '
      '`prompt-jax compare`; what it trained is in `cells/`.'
    ),
  )


def settings(values: Mapping[str, Any]) -> str:
  """Settings in a line."""
  return ', '.join(f'{name}={value}' for name, value in values.items())


def unfinished(results: Results) -> Table:
  """Cells that are missing, failed or stale."""
  rows = [
    [kind, cell['key'], settings(cell['settings']), cell.get('error') or '']
    for kind, cells in (
      ('missing', results.missing),
      ('failed', results.failed),
      ('stale', results.stale),
    )
    for cell in cells
  ]
  return Table(
    title='Missing, failed and stale cells',
    headers=['', 'key', 'settings', 'error'],
    rows=rows,
    note=(
      'Start the study again to run what is missing or failed. Stale cells are '
      'in the ledger but not in study.json, which has changed since: they are '
      'not in any table.'
    )
    if rows
    else 'None.',
  )
