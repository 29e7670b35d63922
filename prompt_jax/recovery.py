"""How much of another method's results a method recovers: E_rel of IPT.

    E_rel = mean over tasks of score(method) / score(reference)

Scores are what `prompt-jax eval` wrote: `eval_<split>.json`, a metric of each
task. Against the dimension of a subspace E_rel is the picture of the paper.
Chance is not taken off: a method that guesses recovers what guessing scores.

Source: Qin et al. 2021, arXiv 2110.07867, as known from the paper.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import re

from absl import logging
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from prompt_jax import deltas
from prompt_jax import outputs
from prompt_jax import paths
from prompt_jax.study import plots

Scores = dict[str, float]
_SEEN, _UNSEEN = 'seen', 'unseen'


@dataclasses.dataclass(frozen=True)
class Recovery:
  """What a method recovers.

  Attributes:
    dimension: of the subspace, or None.
    scores: of each task, (method, reference).
    unseen: those of the tasks that the subspace was not trained on.
  """

  dimension: int | None
  scores: Mapping[str, tuple[float, float]]
  unseen: frozenset[str] = frozenset()

  @property
  def ratios(self) -> Scores:
    """Score of the method over that of the reference, of each task."""
    return {task: mine / its for task, (mine, its) in self.scores.items()}

  def relative(self, which: str | None = None) -> float | None:
    """E_rel over the 'seen' or the 'unseen' tasks, or over all; None of none.

    >>> Recovery(5, {'a': (30.0, 60.0), 'b': (80.0, 80.0)}).relative()
    0.75
    """
    kept = [
      ratio
      for task, ratio in self.ratios.items()
      if which is None or (task in self.unseen) == (which == _UNSEEN)
    ]
    return math.fsum(kept) / len(kept) if kept else None


def read_scores(
  names: Sequence[str], metric: str, split: str = 'validation'
) -> Scores:
  """A metric of each task, of all files together.

  Args:
    names: files of `prompt-jax eval`, or directories of runs that hold one of
      the split.
    metric: its name in them.
    split: of the directories' files.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no such file, a task has no such metric, or two files have
      the same task.
  """
  out: Scores = {}
  for name in names:
    path = pathlib.Path(name)
    if path.is_dir():
      path = path / f'eval_{split}.json'
    if not path.is_file():
      raise FileNotFoundError(
        f'No file {str(path)!r}; `prompt-jax eval` writes it.{paths.near(path)}'
      )
    try:
      found = json.loads(path.read_text())
      tasks = {task: dict(metrics) for task, metrics in found.items()}
    except (ValueError, TypeError, AttributeError) as e:
      raise ValueError(
        f'{path}: expected the metrics of tasks, {{"task": {{"metric": 1.0}}}}.'
      ) from e
    for task, metrics in tasks.items():
      if metric not in metrics:
        near = deltas.near_misses(metric, metrics)
        raise ValueError(
          f'{path}: {task} has no metric {metric!r}.'
          f'{near or f" There are {sorted(metrics)}."}'
        )
      if task in out:
        raise ValueError(f'{path}: {task} has been read from another file.')
      out[task] = float(metrics[metric])
  return out


def compare(
  scores: Scores,
  reference: Scores,
  dimension: int | None = None,
  unseen: Sequence[str] = (),
) -> Recovery:
  """What the scores of a method recover of a reference's.

  Raises:
    ValueError: a task has no reference, or one that is not above 0; an unseen
      task that has no score.
  """
  for task in (*scores, *unseen):
    for what, known in (('reference', reference), ('score', scores)):
      if task not in known:
        raise ValueError(
          f'{task!r} has no {what}.{deltas.near_misses(task, known)} '
          f'Those with one: {", ".join(sorted(known))}.'
        )
    if not reference[task] > 0:
      raise ValueError(
        f'{task!r}: the reference scores {reference[task]:g}; it must be above '
        '0 to be divided by.'
      )
  pairs = {task: (value, reference[task]) for task, value in scores.items()}
  return Recovery(dimension, pairs, frozenset(unseen))


def recovery(
  results: Sequence[str],
  reference: Sequence[str],
  metric: str = 'rank_accuracy',
  split: str = 'validation',
  unseen: Sequence[str] = (),
  output: str | None = None,
) -> list[Recovery]:
  """Prints a table of E_rel, and draws it against the dimension.

  Args:
    results: for each line of the table '5=PATH' or '5=PATH,PATH', where 5 is
      the dimension of the subspace, or PATH without one; a path is a file of
      `prompt-jax eval` or the directory of a run.
    reference: paths of what is to be recovered: prompt tuning, or fine-tuning.
    metric: to compare.
    split: of the files in directories.
    unseen: tasks that the subspace was not trained on; they count apart.
    output: a .png or .svg file to draw, for results with dimensions; the table
      goes beside it, as .tsv and .md.

  Raises:
    ValueError: as `read_scores` and `compare`; an output without dimensions, or
      of another suffix.
  """
  if isinstance(results, str) or not results:
    raise ValueError(f'Expected a list of results, got {results!r}.')
  picture = None if output is None else outputs.check_picture(output)
  known = read_scores(reference, metric, split)
  logging.info('Reference: %s of %d tasks.', metric, len(known))
  found = []
  for text in results:
    dimension, names = _parse(text)
    scores = read_scores(names, metric, split)
    logging.info('%s: %d tasks.', text, len(scores))
    found.append(compare(scores, known, dimension, unseen))
  found.sort(key=lambda r: (r.dimension is None, r.dimension))
  print(table(found, metric))
  if picture is not None:
    outputs.write(picture, draw(found, metric), *_columns(found, metric))
    print(f'See {picture}')
  return found


def _parse(text: str) -> tuple[int | None, list[str]]:
  """'5=a,b' -> (5, ['a', 'b'])."""
  parts = re.fullmatch(r'(?:(\d+)=)?(.+)', text)
  if parts is None or parts[1] == '0':
    raise ValueError(f'Expected a path, or DIMENSION=PATH, got {text!r}.')
  return int(parts[1]) if parts[1] else None, parts[2].split(',')


def table(found: Sequence[Recovery], metric: str) -> str:
  """A line a task and dimension, and E_rel of each dimension.

  >>> made = compare({'a': 60.0, 'b': 90.0}, {'a': 80.0, 'b': 90.0}, 5, ['b'])
  >>> print(table([made], 'accuracy'))
  dimension    task            accuracy    reference    recovered
  -----------  ------------  ----------  -----------  -----------
  5            a                   60.0         80.0        0.750
  5            b, unseen           90.0         90.0        1.000
  5            E_rel                                        0.875
  5            E_rel seen                                   0.750
  5            E_rel unseen                                 1.000
  """
  return outputs.table(*_columns(found, metric))


def _columns(
  found: Sequence[Recovery], metric: str
) -> tuple[outputs.Rows, Sequence[str], Sequence[str]]:
  """The rows of the table, its headers, and how its columns are aligned."""
  rows = []
  for one in found:
    size = '-' if one.dimension is None else str(one.dimension)
    for task, (mine, its) in one.scores.items():
      name = f'{task}, unseen' if task in one.unseen else task
      rows.append(
        (size, name, f'{mine:.1f}', f'{its:.1f}', f'{mine / its:.3f}')
      )
    for which in (None, _SEEN, _UNSEEN) if one.unseen else (None,):
      mean = one.relative(which)
      if mean is not None:
        name = f'E_rel {which or ""}'.strip()
        rows.append((size, name, '', '', f'{mean:.3f}'))
  headers = (
    *('dimension', 'task', metric.replace('_', ' ')),
    *('reference', 'recovered'),
  )
  return rows, headers, ('left', 'left', 'right', 'right', 'right')


def draw(
  found: Sequence[Recovery],
  metric: str,
  others: Mapping[str, Sequence[Recovery]] | None = None,
) -> Figure:
  """E_rel against the dimension; seen and unseen tasks are two lines.

  Args:
    found: of a subspace.
    metric: that the scores are.
    others: label -> of other methods, such as random decoders.

  Raises:
    ValueError: a result without a dimension.
  """
  lines = [(which, r, which) for which, r in _lines(found).items()]
  for label, more in (others or {}).items():
    lines += [(f'{label}, {w}', r, w) for w, r in _lines(more).items()]
  with matplotlib.rc_context(plots._STYLE):
    figure = Figure(figsize=(5.2, 3.6), layout='constrained')
    ax = figure.subplots()
    ticks = sorted({x for _, points, _ in lines for x, _ in points})
    ax.set_xscale('log')
    ax.axhline(1.0, color=plots._GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for i, (label, points, which) in enumerate(lines):
      ax.plot(
        *zip(*points, strict=True),
        label=label,
        color=plots._COLOURS[i % len(plots._COLOURS)],
        marker=plots._MARKERS[i % len(plots._MARKERS)],
        linestyle=':' if which == _UNSEEN else '-',
        markeredgecolor='white',
        markeredgewidth=0.7,
      )
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel('Dimension of the subspace')
    ax.set_ylabel(f'{plots.metric_label(metric)}, relative')
    if len(lines) > 1:
      ax.legend(fontsize=8)
  return figure


def _lines(found: Sequence[Recovery]) -> dict[str, list[tuple[int, float]]]:
  """(dimension, E_rel) of the tasks seen and unseen, where there are any."""
  out: dict[str, list[tuple[int, float]]] = {}
  for one in found:
    if one.dimension is None:
      raise ValueError(
        'A result has no dimension to draw it at: give it as DIMENSION=PATH.'
      )
    for which in (_SEEN, _UNSEEN):
      mean = one.relative(which)
      if mean is not None:
        out.setdefault(which, []).append((one.dimension, mean))
  return out
