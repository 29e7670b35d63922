"""`prompt-jax compare A B`: what differs between two cells or two studies.

Only what differs is printed. Two cells are compared value by value; of two
studies the cells with the same settings are, whatever their keys.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
import textwrap
from typing import Any

import tabulate

from prompt_jax import gin_rules
from prompt_jax.study import ledger as ledger_lib
from prompt_jax.study import results as results_lib
from prompt_jax.study import tables

Record = ledger_lib.Record

_MOST = 10  # rows of what may go on for pages


class CompareError(ValueError):
  """Two things that cannot be found or compared."""


def compare(a: str, b: str) -> None:
  """Prints what differs.

  Args:
    a: `DIR` of a study, or `DIR:KEY` for a cell of it; the beginning of a key
      is enough.
    b: the same; of a cell of the same study the key alone is enough.

  Raises:
    CompareError: no such directory or cell, or a cell and a study.
    results.StudyError: a directory that is not that of a study.
    ledger.LedgerError: results that cannot be read.
  """
  first, key = _place(a, None)
  second, other_key = _place(b, first if key else None)
  if (key is None) != (other_key is None):
    raise CompareError(
      f'{a!r} and {b!r} are a study and a cell: give two directories, or two '
      'cells as DIR:KEY.'
    )
  if key is None or other_key is None:
    sections = _studies(first, second)
  else:
    cells = _cell(first, key), _cell(second, other_key)
    for name, cell in zip('AB', cells, strict=True):
      text = tables.settings(cell.get('settings', {}))
      print(f'{name}: {cell["key"]} ({cell["status"]}) {text}')
    sections = _cells(*cells)
  for title, text in sections:
    print(f'\n{title}\n{text}')
  if not sections:
    print('No difference.')


def _place(name: str, near: pathlib.Path | None) -> tuple[pathlib.Path, Any]:
  """The directory of a study, and the key in it, if one is given."""
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name), None
  folder, colon, key = name.rpartition(':')
  if colon and not key:
    raise CompareError(
      f'{name!r} has no key after the colon: expected DIR:KEY, or DIR alone '
      'for the study.'
    )
  if not folder and near is not None:
    return near, key
  if not colon or not pathlib.Path(folder).is_dir():
    raise CompareError(
      f'{folder or name!r} is not a directory: expected the directory of a '
      'study, or a cell as DIR:KEY.'
    )
  return pathlib.Path(folder), key


def _cell(directory: pathlib.Path, prefix: str) -> Record:
  """The record whose key begins like that."""
  records = ledger_lib.Ledger(directory / 'results.jsonl').latest()
  found = [key for key in records if key.startswith(prefix)]
  if len(found) == 1 or prefix in records:
    return records[prefix if prefix in records else found[0]]
  if found:
    some = ', '.join(found[:_MOST])
    raise CompareError(
      f'{len(found)} cells of {directory} begin with {prefix!r}: {some}. Give '
      'more of the key.'
    )
  near = gin_rules.meant(prefix, records)
  some = ', '.join(list(records)[:3])
  raise CompareError(
    f'No cell of {directory} begins with {prefix!r}; it has {len(records)} '
    f'finished cells{f", such as {some}" if some else ""}.{near}'
  )


def _cells(a: Record, b: Record) -> list[tuple[str, str]]:
  """Titles and tables of what differs between two records."""
  sections = []
  names = [n for n in {**a, **b} if isinstance({**a, **b}[n], Mapping)]
  apart = (*names, 'key', 'history')
  plain = [{k: r[k] for k in r if k not in apart} for r in (a, b)]
  pairs = [('Record', *plain)]
  pairs += [(n.capitalize(), a.get(n, {}), b.get(n, {})) for n in names]
  pairs.append(('History', _history(a), _history(b)))
  for title, first, second in pairs:
    flat = [ledger_lib.flatten(part) for part in (first, second)]
    differ = ledger_lib.differences(*flat)
    if differ:
      rows = [
        [name, x, y, _change(flat[0].get(name), flat[1].get(name))]
        for name, (x, y) in differ.items()
      ]
      most = _MOST if title == 'History' else len(rows)
      more = f'\n... and {len(rows) - most} more' if len(rows) > most else ''
      sections.append((title, _table(rows[:most]) + more))
  return sections


def _history(record: Record) -> dict[str, Any]:
  """The evaluations of a cell: loss and metric at each."""
  out = {}
  for step, loss, metric in record.get('history', []):
    out |= {f'loss at step {step}': loss, f'metric at step {step}': metric}
  return out


def _change(a: Any, b: Any) -> str:
  """By how much a number went up, or nothing."""
  numbers = all(
    isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)
  )
  return f'{b - a:+.4g}' if numbers else ''


def _table(rows: Sequence[Sequence[str]]) -> str:
  headers = ['', 'A', 'B', 'B - A']
  shown = list(zip(*([headers, *rows]), strict=True))
  if not any(shown[-1][1:]):  # nothing has a difference
    shown.pop()
  headers, *rows = [list(row) for row in zip(*shown, strict=True)]
  return tabulate.tabulate(rows, headers, disable_numparse=True)


# ---- two studies -------------------------------------------------------------


def _studies(a: pathlib.Path, b: pathlib.Path) -> list[tuple[str, str]]:
  """Titles and tables of what differs between two studies."""
  results = [results_lib.load(str(path)) for path in (a, b)]
  records = [
    ledger_lib.Ledger(path / 'results.jsonl').latest() for path in (a, b)
  ]
  done: list[dict[str, Record]] = []
  for found, result in zip(records, results, strict=True):
    cells = {c['key']: _identity(c) for c in result.study.cells}
    done.append(
      {
        cells[key]: record
        for key, record in found.items()
        if key in cells and record['status'] == 'done'
      }
    )
  sections = [
    ('Study', _study(*(result.study for result in results))),
    ('Cells', _expected(*(result.study for result in results))),
    ('Scores', _scores(*results)),
    ('Config of cells with the same settings', _config(*done)),
    ('Origin', _origins(*done)),
    ('Cost of the finished cells', _costs(*done)),
  ]
  return [(title, text) for title, text in sections if text]


def _identity(cell: Mapping[str, Any]) -> str:
  """What a cell is about, the same in every study."""
  return f'{cell["stage"]}: {json.dumps(cell["settings"], sort_keys=True)}'


def _study(a: results_lib.Study, b: results_lib.Study) -> str:
  parts = [
    {k: v for k, v in vars(study).items() if k != 'cells'} for study in (a, b)
  ]
  flat = [ledger_lib.flatten(part) for part in parts]
  differ = ledger_lib.differences(*flat)
  rows = [
    [name, x, y, _change(flat[0].get(name), flat[1].get(name))]
    for name, (x, y) in differ.items()
  ]
  return _table(rows) if rows else ''


def _expected(a: results_lib.Study, b: results_lib.Study) -> str:
  """Cells that only one of the studies has."""
  first, second = ({_identity(c): None for c in s.cells} for s in (a, b))
  lines = []
  for name, mine, other in (('A', first, second), ('B', second, first)):
    only = [cell for cell in mine if cell not in other]
    if only:
      lines.append(f'only in {name}: {len(only)} of {len(mine)}')
      lines += [f'  {cell}' for cell in only[:_MOST]]
      lines += ['  ...'] if len(only) > _MOST else []
  return '\n'.join(lines)


def _scores(a: results_lib.Results, b: results_lib.Results) -> str:
  """The study's metric, on the mean over tasks, of every method and size."""
  rows = []
  for method in {**a.study.methods, **b.study.methods}:
    for size in dict.fromkeys([*a.study.sizes, *b.study.sizes]):
      scores = [r.score(method, size) for r in (a, b)]
      means = [None if score is None else score.mean for score in scores]
      if means[0] != means[1]:
        texts = ['absent' if m is None else f'{m:.2f}' for m in means]
        rows.append([f'{method} {size}', *texts, _change(*means)])
  return _table(rows) if rows else ''


def _config(a: Mapping[str, Record], b: Mapping[str, Record]) -> str:
  """Values that differ, and in how many cells."""
  counts: dict[tuple[str, str, str], int] = {}
  both = [cell for cell in a if cell in b]
  for cell in both:
    configs = (r.get('config', {}) for r in (a[cell], b[cell]))
    for name, (x, y) in ledger_lib.differences(*configs).items():
      counts[name, x, y] = counts.get((name, x, y), 0) + 1
  rows = [[*key, f'{n} of {len(both)}'] for key, n in counts.items()]
  text = tabulate.tabulate(
    rows[:_MOST], ['', 'A', 'B', 'cells'], disable_numparse=True
  )
  more = f'\n... and {len(rows) - _MOST} more' if len(rows) > _MOST else ''
  return text + more if rows else ''


def _origins(a: Mapping[str, Record], b: Mapping[str, Record]) -> str:
  """Versions, devices and fingerprints, all that occur; not the times."""
  sides = [_occurring(side.values()) for side in (a, b)]
  # A study has as many bases as sizes and seeds: a line does not hold them all.
  rows = [
    [name, *(textwrap.shorten(x, 60, placeholder=' ...') for x in both), '']
    for name, both in ledger_lib.differences(*sides).items()
  ]
  return _table(rows) if rows else ''


def _occurring(records: Iterable[Record]) -> dict[str, list[str]]:
  found: dict[str, set[str]] = {}
  for record in records:
    for name, value in ledger_lib.flatten(record.get('origin', {})).items():
      if name != 'time':
        found.setdefault(name, set()).add(str(value))
  return {name: sorted(values) for name, values in found.items()}


def _costs(a: Mapping[str, Record], b: Mapping[str, Record]) -> str:
  """Sums, and the largest where a sum says nothing.

  Seconds are of the program in which cells trained together: a share is each's.
  """
  rows = []
  for name, total in (
    ('train_flops', sum),
    ('train_seconds', sum),
    ('wall_seconds', sum),
    ('peak_bytes', max),
  ):
    values = []
    for side in (a, b):
      costs = [r.get('cost', {}) for r in side.values()]
      known = [
        c[name] / (c.get('runs_together', 1) if 'seconds' in name else 1)
        for c in costs
        if c.get(name) is not None
      ]
      values.append(total(known) if known else None)
    if values[0] != values[1]:
      texts = ['absent' if v is None else f'{v:.6g}' for v in values]
      rows.append([f'{name} ({total.__name__})', *texts, _change(*values)])
  return _table(rows) if rows else ''
