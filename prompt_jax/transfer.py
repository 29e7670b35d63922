"""`prompt-jax spot`: which prompts of a bank lie near a target's.

What is near is worth starting at: `methods/spot.gin` does it in training, by
the same ranking (`methods/spot.py`). Not for choosing by results: train from
several of the nearest, and evaluate.
"""

from collections.abc import Sequence
import os
from typing import NamedTuple

from absl import logging
import matplotlib
from matplotlib.figure import Figure

from prompt_jax import outputs
from prompt_jax.methods import saved_prompts
from prompt_jax.methods import spot as spot_lib
from prompt_jax.study import plots

_MOST = 30  # prompts in the picture


class Near(NamedTuple):
  """A prompt of the bank.

  Attributes:
    path: its file; of a file of several tasks with `#` and the task's number.
    similarities: to the target's, by the names of `spot.SIMILARITIES`.
  """

  path: str
  similarities: dict[str, float]


def spot(
  target_prompt: str,
  bank: str | Sequence[str],
  similarity: str = 'average_tokens',
  output: str | None = None,
) -> list[Near]:
  """Prints the ranking of a bank, and draws it.

  Args:
    target_prompt: the target task's own prompt: the directory of a run or an
      export, or a file, as `saved_prompts.read` takes it.
    bank: folders, directories of runs, or files, as `spot.ranking` takes them.
    similarity: which of the similarities ranks; all are shown.
    output: a .png or .svg file to draw; the table goes beside it, as .tsv and
      .md.

  Returns:
    The bank, the nearest first.

  Raises:
    ValueError: as `spot.ranking`; an output of another suffix.
    FileNotFoundError: as `spot.ranking`.
    CheckpointError: as `spot.ranking`, or the output cannot be written.
  """
  picture = None if output is None else outputs.check_picture(output)
  ranked = spot_lib.ranking(target_prompt, bank, similarity)
  logging.info('Read %d prompts.', len(ranked))
  own = saved_prompts.read(target_prompt).prompts[0]
  found = [
    Near(
      one.path,
      {
        kind: spot_lib.similarity(one.prompt, own, kind)
        for kind in spot_lib.SIMILARITIES
      },
    )
    for one in ranked
  ]
  columns = _columns(found)
  print(outputs.table(*columns))
  if picture is not None:
    outputs.write(picture, draw(found), *columns)
    print(f'See {picture}')
  return found


def _columns(
  found: Sequence[Near],
) -> tuple[outputs.Rows, Sequence[str], Sequence[str]]:
  """The rows of the table, its headers, and how its columns are aligned."""
  kinds = tuple(spot_lib.SIMILARITIES)
  rows = [
    (str(i), *(f'{one.similarities[k]:.4f}' for k in kinds), one.path)
    for i, one in enumerate(found, 1)
  ]
  headers = ('rank', *(k.replace('_', ' ') for k in kinds), 'prompt')
  return rows, headers, ('right', *('right' for _ in kinds), 'left')


def draw(found: Sequence[Near]) -> Figure:
  """Both similarities of the nearest prompts as bars, the nearest on top."""
  shown = found[:_MOST]
  kinds = tuple(spot_lib.SIMILARITIES)
  height = 0.8 / len(kinds)
  with matplotlib.rc_context({**plots._STYLE, 'axes.grid.axis': 'x'}):
    figure = Figure(
      figsize=(6.4, 1.2 + 0.32 * len(shown)), layout='constrained'
    )
    ax = figure.subplots()
    for n, kind in enumerate(kinds):
      ax.barh(
        [i + (n - (len(kinds) - 1) / 2) * height for i in range(len(shown))],
        [one.similarities[kind] for one in shown],
        height,
        label=kind.replace('_', ' '),
        color=plots._COLOURS[n],
      )
    ax.axvline(0.0, color=plots._GREY, linewidth=0.9)
    ax.set_yticks(range(len(shown)), _labels([one.path for one in shown]))
    ax.invert_yaxis()
    ax.set_xlabel("Similarity to the target's prompt")
    figure.legend(loc='outside upper right', ncols=len(kinds), fontsize=8)
    if len(found) > len(shown):
      ax.set_title(f'The nearest {len(shown)} of {len(found)}', loc='left')
  return figure


def _labels(paths: Sequence[str]) -> list[str]:
  """Paths without the folder that they share and the name of a run's file.

  >>> _labels(['bank/rte/trainable.safetensors', 'bank/cb.safetensors#1'])
  ['rte', 'cb.safetensors#1']
  >>> _labels(['rte/trainable.safetensors#0'])
  ['rte#0']
  """
  named = [path.replace(f'/{saved_prompts.FILE}', '') for path in paths]
  shared = os.path.commonpath([os.path.dirname(path) for path in named])
  return [os.path.relpath(path, shared or '.') for path in named]
