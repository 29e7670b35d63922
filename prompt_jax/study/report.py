"""`prompt-jax report DIR`: the pictures and tables of a study, so far.

Works on a study that is still running, or that was killed: what is missing is
listed, and drawn when it is there. Writes into DIR

    curve.png, curve.svg   the metric against size, mean over tasks
    tasks.png              the same, a panel a task
    report.md              all tables
    report.html            the curve with values under the pointer, and task,
                           metric and x-axis to switch (needs plotly: the extra
                           `report`)
"""

from collections.abc import Sequence
import importlib.util
import pathlib
import textwrap

from prompt_jax import checkpoints
from prompt_jax.study import page
from prompt_jax.study import plots
from prompt_jax.study import results as results_lib
from prompt_jax.study import tables
from prompt_jax.study.results import Results


def report(directory: str) -> None:
  """Writes a study's report, prints its tables and where the files are.

  Args:
    directory: of the study.

  Raises:
    results.StudyError: it is not that of a study, or contradicts itself.
    ledger.LedgerError: its results cannot be read.
  """
  results = results_lib.load(directory)
  paths = _write(results, pathlib.Path(directory))
  print(summary(results))
  print('\nWritten:')
  for path in paths:
    print(f'  {path}')
  if not _has_plotly():
    print(
      'No report.html: it is made with plotly, which is not installed '
      "(pip install 'prompt_jax[report]')."
    )


def write_report(directory: str) -> list[pathlib.Path]:
  """Writes a study's report without printing it.

  Args:
    directory: of the study.

  Returns:
    The files.

  Raises:
    results.StudyError: it is not that of a study, or contradicts itself.
    ledger.LedgerError: its results cannot be read.
    checkpoints.CheckpointError: a file cannot be written.
  """
  return _write(results_lib.load(directory), pathlib.Path(directory))


def summary(results: Results) -> str:
  """The tables that are worth a terminal."""
  if not results.choices:
    return f'{results.study.title}\n\nNothing to score yet. {_count(results)}'
  shown = [tables.scores(results), tables.gaps(results)]
  shown.append(tables.closing(results))
  parts = [results.study.title]
  for table in shown:
    parts.append(f'{table.title}\n{table.text("simple")}\n{_fill(table.note)}')
  parts += [_fill(plots.caption(results)), _count(results)]
  return '\n\n'.join(part.strip() for part in parts)


def _fill(text: str) -> str:
  return textwrap.fill(text, 80)


def _count(results: Results) -> str:
  """How much of the study is there; what failed, by name."""
  lost = {'missing': results.missing, 'failed': results.failed}
  done = len(results.study.cells) - sum(map(len, lost.values()))
  text = f'{done} of {len(results.study.cells)} cells are done'
  text += ''.join(f', {len(cells)} {k}' for k, cells in lost.items() if cells)
  if results.stale:
    text += f'; {len(results.stale)} in the ledger are stale and left out'
  lines = [f'{text}.']
  for record in results.failed[:5]:
    error = str(record.get('error')).splitlines() or ['']
    lines.append(f'  failed: {record["key"]}: {error[0]}')
  return '\n'.join(lines)


def _tables(results: Results) -> list[tables.Table]:
  """All tables, the most telling first."""
  tasks = [tables.scores(results, task) for task in results.study.tasks]
  tasks = tasks if len(tasks) > 1 else []  # one task is its own mean
  others = [
    tables.scores(results, None, metric) for metric in results.metrics[1:]
  ]
  bases = tables.bases(results)
  if not results.choices:
    return [t for t in (bases,) if t.rows] + [tables.unfinished(results)]
  found = [
    tables.scores(results),
    tables.gaps(results),
    tables.closing(results),
    *tasks,
    *others,
    tables.budget(results),
    bases,
    tables.chosen(results),
  ]
  return [t for t in found if t.rows] + [tables.unfinished(results)]


def _write(results: Results, directory: pathlib.Path) -> list[pathlib.Path]:
  names = ('curve.png', 'curve.svg', 'tasks.png', 'report.md', 'report.html')
  png, svg, tasks, text, html = (directory / name for name in names)
  found = _tables(results)
  checkpoints.write_atomically(text, _markdown(results, found).encode())
  if not results.choices:  # nothing to draw yet
    return [text]
  plots.save(plots.curve(results), [png, svg])
  plots.save(plots.tasks(results), [tasks])
  if not _has_plotly():
    return [png, svg, tasks, text]
  checkpoints.write_atomically(html, page.page(results, found).encode())
  return [png, svg, tasks, text, html]


def _has_plotly() -> bool:
  return importlib.util.find_spec('plotly') is not None


def _markdown(results: Results, found: Sequence[tables.Table]) -> str:
  parts = [f'# {results.study.title}']
  if results.choices:
    parts += [plots.caption(results)]
    parts += ['![curve](curve.png)', '![tasks](tasks.png)']
  for table in found:
    parts.append(f'## {table.title}')
    parts += [table.text('pipe')] if table.rows else []
    parts += [table.note] if table.note else []
  parts.append(_count(results))
  for other in results.study.overlay:
    parts.append(f'{other["label"]}: {other["source"]}.')
  return '\n\n'.join(parts) + '\n'
