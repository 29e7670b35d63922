"""Scores of held-out data sets over their prompts: table and picture.

Of each data set the median and the quartiles over its prompts, as T0 reports,
the mean, as FLAN does, and the least and most. All prompts count the same.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import matplotlib.figure
import numpy as np
from tabulate import tabulate

from prompt_jax import checkpoints
from prompt_jax.instructions.prompted import Heldout

# Data set -> prompt -> score; two of them where there is an untrained model.
Scores = Mapping[str, Mapping[str, float]]
HEADERS = (
  'data set', 'prompts', 'metric', 'untrained median', 'median', 'quartiles',
  'mean', 'least', 'most',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
  """Statistics over prompts; quartiles are numpy's, linear.

  Attributes:
    count: prompts.
    median: of the scores.
    low: lower quartile.
    high: upper quartile.
    mean: of the scores.
    least: of the scores.
    most: of the scores.
  """

  count: int
  median: float
  low: float
  high: float
  mean: float
  least: float
  most: float


def summary(scores: Sequence[float]) -> Summary:
  """The statistics of a data set's prompts.

  Raises:
    ValueError: no scores.
  """
  if not len(scores):
    raise ValueError('There are no scores of any prompt.')
  low, median, high = np.percentile(scores, [25, 50, 75])
  return Summary(
    len(scores),
    float(median),
    float(low),
    float(high),
    float(np.mean(scores)),
    float(min(scores)),
    float(max(scores)),
  )


def by_data_set(
  found: Mapping[str, Mapping[str, float]], about: Mapping[str, Heldout]
) -> dict[str, dict[str, float]]:
  """An evaluation's metrics of tasks as scores of data sets and prompts."""
  out: dict[str, dict[str, float]] = {}
  for task, task_is in about.items():
    score = found[task][task_is.metric]
    out.setdefault(task_is.data_set, {})[task_is.prompt] = score
  return out


def rows(
  scores: Scores, before: Scores, about: Mapping[str, Heldout]
) -> list[list[str]]:
  """The table's rows, one a data set, and the mean over them last."""
  metrics = {a.data_set: a.metric for a in about.values()}
  out, medians, untrained = [], [], []
  for data_set, prompts in scores.items():
    s = summary(list(prompts.values()))
    medians.append((s.median, s.mean))
    old = before.get(data_set)
    untrained.append(summary(list(old.values())).median if old else np.nan)
    out.append(
      [
        data_set,
        str(s.count),
        metrics.get(data_set, ''),
        _number(untrained[-1]),
        _number(s.median),
        f'{_number(s.low)} to {_number(s.high)}',
        _number(s.mean),
        _number(s.least),
        _number(s.most),
      ]
    )
  if len(out) > 1:
    median, mean = np.mean(medians, axis=0)
    old = _number(float(np.mean(untrained)))
    out.append(
      ['mean', '', '', old, _number(median), '', _number(mean), '', '']
    )
  return out


def write(
  scores: Scores,
  before: Scores,
  about: Mapping[str, Heldout],
  directory: pathlib.Path,
  title: str,
) -> list[pathlib.Path]:
  """Prints the table; writes prompts.tsv, prompts.md and prompts.png.

  Args:
    scores: of the trained model.
    before: of the untrained one; {} if it was not evaluated.
    about: of the held-out tasks.
    directory: of the run.
    title: what was trained.
  """
  cells = rows(scores, before, about)
  keep = [i for i in range(len(HEADERS)) if before or i != 3]
  headers = [HEADERS[i] for i in keep]
  cells = [[row[i] for i in keep] for row in cells]
  print(tabulate(cells, headers, disable_numparse=True))
  each = [
    [data_set, prompt, _number(before.get(data_set, {}).get(prompt, np.nan)),
     _number(score)]
    for data_set, prompts in scores.items()
    for prompt, score in prompts.items()
  ]  # fmt: skip
  single = ['data set', 'prompt', 'untrained', 'score']
  md = (
    f'# {title}\n\nScores in per cent over prompts.\n\n'
    f'{tabulate(cells, headers, "github", disable_numparse=True)}\n\n'
    '## Each prompt\n\n'
    f'{tabulate(each, single, "github", disable_numparse=True)}\n'
  )
  paths = [directory / f'prompts.{end}' for end in ('tsv', 'md', 'png')]
  tsv = '\n'.join('\t'.join(row) for row in [single, *each]) + '\n'
  checkpoints.write_atomically(paths[0], tsv.encode())
  checkpoints.write_atomically(paths[1], md.encode())
  _draw(scores, before, paths[2], title)
  return paths


def _number(value: float) -> str:
  return '-' if np.isnan(value) else f'{value:.2f}'


def _draw(
  scores: Scores, before: Scores, path: pathlib.Path, title: str
) -> None:
  """A point a prompt, a line at the median, for each data set."""
  from prompt_jax.study import plots

  figure = matplotlib.figure.Figure(
    (2.0 + 0.9 * len(scores), 3.4), layout='constrained'
  )
  ax = figure.add_subplot()
  series = [(before, -0.18, '0.6', 'untrained')] if before else []
  series.append((scores, 0.18 if before else 0.0, 'C0', 'trained'))
  for found, shift, colour, label in series:
    for i, data_set in enumerate(scores):
      values = list(found.get(data_set, {}).values())
      if not values:
        continue
      # Spread, so that equal scores are seen.
      x = i + shift + np.linspace(-0.1, 0.1, len(values))
      name = label if i == 0 else None
      ax.plot(x, values, 'o', color=colour, ms=3.5, alpha=0.7, label=name)
      middle = float(np.median(values))
      ax.hlines(middle, i + shift - 0.15, i + shift + 0.15, color=colour)
  ax.set_xticks(range(len(scores)), list(scores), rotation=30, ha='right')
  ax.set_ylabel('score over prompts (%)')
  ax.set_title(title, fontsize=9)
  if before:
    ax.legend(frameon=False, fontsize=8)
  plots.save(figure, [path])
