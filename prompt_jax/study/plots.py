"""The pictures of a study: a metric against size, one line a method.

The same results give the same bytes: no dates, no random names. Points laid
over a study (`overlay`) have total parameters, so that a study that has some is
drawn against those; any other against non-embedding parameters, which is what
grows when an embedding table does not. Interactive pictures are the job of
`page.py`.
"""

from collections.abc import Sequence
import io
import math
import pathlib
import textwrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from prompt_jax import checkpoints
from prompt_jax.study.results import Results

AXES = {
  'non_embedding': 'Non-embedding parameters of the model',
  'total': 'Parameters of the model',
  'trained': 'Trained parameters',
  'train_flops': 'FLOPs of tuning',
}

# Okabe and Ito's colours, which the colour-blind can tell apart.
_REFERENCE = '#333333'
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
_MARKERS = 'osD^vP'
_GREY = '#777777'

_STYLE: dict[Any, Any] = {
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#999999',
  'axes.linewidth': 0.8,
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'axes.axisbelow': True,
  'grid.color': '#e8e8e8',
  'xtick.color': '#555555',
  'ytick.color': '#555555',
  'axes.labelcolor': '#333333',
  'legend.frameon': False,
  'svg.hashsalt': 'prompt_jax',
}


def colours(results: Results) -> dict[str, str]:
  """The colour of every method, the same in every picture."""
  study = results.study
  others = [m for m in study.methods if m != study.reference_method]
  found = {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(others)}
  return {m: found.get(m, _REFERENCE) for m in study.methods}


def points(
  results: Results,
  method: str,
  task: str | None = None,
  metric: str | None = None,
) -> list[dict[str, Any]]:
  """What a line goes through, smallest size first.

  Returns:
    For each size that has a score: size, mean, deviation (None for one seed),
    base_seeds, seeds, and a number or None for each of `AXES`.
  """
  out = []
  for size in results.study.sizes:
    score = results.score(method, size, task, metric)
    if score is None:
      continue
    budget = results.budget(method, size)
    base_seeds, seeds = score.seeds
    deviation = score.deviation
    out.append(
      {
        'size': size,
        'mean': score.mean,
        'deviation': None if math.isnan(deviation) else deviation,
        'base_seeds': base_seeds,
        'seeds': seeds,
        # Nothing trained has no place on a logarithmic axis.
        **{axis: budget.get(axis) or None for axis in AXES},
      }
    )
  return out


def metric_label(metric: str) -> str:
  """As it stands at an axis."""
  return metric.replace('_', ' ').capitalize()


def caption(results: Results) -> str:
  """What stands behind the points; for below every picture."""
  base_seeds, seeds = results.seeds()
  text = (
    f'Test split; mean ± standard deviation over {count(base_seeds)} '
    f'pretraining seed{"s"[: base_seeds != 1]} with {count(seeds)} tuning '
    f'seed{"s"[: seeds != 1]}{" each" if base_seeds > 1 else ""}'
  )
  fewer = []
  for method, label in results.study.methods.items():
    found = {len(c.records) for c in results.choices if c.method == method}
    if found and max(found) < seeds:
      fewer.append(f'{label}: {count(max(found))}')
  text += f' ({"; ".join(fewer)}). ' if fewer else '. '
  text += 'Hyperparameters chosen on validation.'
  lost = len(results.missing) + len(results.failed)
  if lost:
    text += (
      f' {lost} of {len(results.study.cells)} cells are missing or failed.'
    )
  return f'{text} {results.study.note}'.strip()


def count(number: int) -> str:
  """Small numbers as words."""
  words = ('no', 'one', 'two', 'three', 'four', 'five', 'six')
  return words[number] if number < len(words) else str(number)


def curve(results: Results) -> Figure:
  """The mean over tasks against size: the picture of the study."""
  study = results.study
  axis = 'total' if study.overlay else 'non_embedding'
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(6.4, 4.6), layout='constrained')
    ax = figure.subplots()
    _draw(ax, results, None, axis)
    _draw_overlay(ax, results)
    figure.suptitle(
      study.title, x=0.01, ha='left', fontweight='bold', fontsize=11
    )
    ax.set_xlabel(AXES[axis])
    ax.set_ylabel(f'{metric_label(study.metric)}, {study.task_label(None)} (%)')
    # As the lines lie at most sizes: what tunes most on top.
    if ax.get_legend_handles_labels()[0]:  # some method has all tasks
      ax.legend(loc='upper left', bbox_to_anchor=(1.01, 1.0), reverse=True)
    _write_note(figure, results, width=122)
  return figure


def tasks(results: Results) -> Figure:
  """A panel for each task."""
  study = results.study
  names = list(study.tasks)
  columns = next((n for n in (3, 2) if len(names) % n == 0), 3)
  columns = min(columns, len(names))
  rows = -(-len(names) // columns)
  axis = 'total' if study.overlay else 'non_embedding'
  with matplotlib.rc_context(_STYLE):
    figure = Figure(
      figsize=(max(3.1 * columns, 5.0), 2.5 * rows + 1.1), layout='constrained'
    )
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.ravel())
    for ax, name in zip(panels, names, strict=False):
      _draw(ax, results, name, axis)
      ax.set_title(study.task_label(name), loc='left', fontsize=10)
    for ax in panels[len(names) :]:
      ax.set_axis_off()
    for ax in panels[: len(names)][-columns:]:  # the lowest of each column
      ax.set_xlabel(AXES[axis])
    for row in grid:
      row[0].set_ylabel(f'{metric_label(study.metric)} (%)')
    for ncols in range(max(3, 2 * columns), 0, -1):  # as many as have room
      legend = figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc='outside upper left',
        ncols=ncols,
        title=study.title,
        title_fontproperties={'weight': 'bold', 'size': 11},
        alignment='left',
        borderpad=0.0,
      )
      if legend.get_window_extent().width <= figure.bbox.width:
        break
      legend.remove()
    _write_note(figure, results, width=max(90, 58 * columns))
  return figure


def _draw(ax: Axes, results: Results, task: str | None, axis: str) -> None:
  """The lines of all methods, and chance."""
  study = results.study
  ticks: dict[float, str] = {}
  for i, (method, colour) in enumerate(colours(results).items()):
    found = [p for p in points(results, method, task) if p[axis]]
    if not found:
      continue
    ticks |= {p[axis]: f'{short(p[axis])}\n{p["size"]}' for p in found}
    x, y = [p[axis] for p in found], [p['mean'] for p in found]
    # Where a method meets the reference, it is the method that is seen.
    layer = 2 if method == study.reference_method else 3
    ax.errorbar(
      x,
      y,
      yerr=[p['deviation'] or 0.0 for p in found],
      fmt='none',
      ecolor=colour,
      elinewidth=1.0,
      capsize=3.5,
      zorder=layer,
    )
    ax.plot(
      x,
      y,
      label=study.methods[method],
      color=colour,
      marker=_MARKERS[i % len(_MARKERS)],
      markersize=6,
      markeredgecolor='white',
      markeredgewidth=0.7,
      linewidth=1.6,
      zorder=layer,
    )
  ax.set_xscale('log')
  chance = study.chance(task)
  if chance is not None:
    ax.axhline(chance, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.annotate(
      'chance',
      (1.0, chance),
      xycoords=('axes fraction', 'data'),
      xytext=(3, 0),
      textcoords='offset points',
      va='center',
      color=_GREY,
      fontsize=8,
    )
  if ticks:
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()


def _draw_overlay(ax: Axes, results: Results) -> None:
  ticks = dict(zip(ax.get_xticks(), ax.get_xticklabels(), strict=True))
  names = {x: label.get_text() for x, label in ticks.items()}
  for i, other in enumerate(results.study.overlay):
    x, y = zip(*other['points'], strict=True)
    names |= {value: short(value) for value in x if value not in names}
    ax.plot(
      x,
      y,
      label=textwrap.fill(other['label'], 24),
      color='#999999',
      marker='*Xh'[i % 3],
      markersize=8,
      linestyle=':',
    )
  if results.study.overlay:
    ax.set_xticks(list(names), list(names.values()))


def _write_note(figure: Figure, results: Results, width: int) -> None:
  """Small print below the picture."""
  figure.supxlabel(
    textwrap.fill(caption(results), width),
    x=0.01,
    ha='left',
    fontsize=7,
    color=_GREY,
  )


def short(number: float) -> str:
  """A number of parameters for an axis.

  >>> [short(x) for x in (12, 3232, 49664, 11_135_332_352)]
  ['12', '3.2K', '50K', '11B']
  """
  for factor, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if number >= factor:
      value = number / factor
      return f'{value:.1f}{unit}' if value < 9.95 else f'{value:.0f}{unit}'
  return f'{number:.0f}'


def save(figure: Figure, paths: Sequence[pathlib.Path]) -> None:
  """Writes a picture in the formats of the paths (.png, .svg).

  Raises:
    checkpoints.CheckpointError: a file cannot be written.
  """
  backend_agg.FigureCanvasAgg(figure)
  # What would say when, or by which version, it was drawn.
  metadata = {
    '.svg': {'Date': None, 'Creator': None},
    '.png': {'Software': None},
  }
  with matplotlib.rc_context(_STYLE):
    for path in paths:
      picture = io.BytesIO()
      figure.savefig(
        picture,
        dpi=200,
        format=path.suffix[1:],
        metadata=metadata[path.suffix],
      )
      checkpoints.write_atomically(path, picture.getvalue())
