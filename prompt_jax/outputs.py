"""What a command leaves beside what it prints: a picture and its table."""

from collections.abc import Sequence
import pathlib

from absl import logging
from matplotlib.figure import Figure
import tabulate

from prompt_jax import checkpoints
from prompt_jax.study import plots

Rows = Sequence[Sequence[str]]


def check_picture(output: str) -> pathlib.Path:
  """The path of a picture, in a folder that can be written.

  Raises:
    ValueError: neither .png nor .svg.
    CheckpointError: the folder cannot be made or written.
  """
  path = pathlib.Path(output)
  if path.suffix not in ('.png', '.svg'):
    raise ValueError(f'A picture is .png or .svg, got {output!r}.')
  checkpoints.check_writable(str(path.parent))
  return path


def table(
  rows: Rows, headers: Sequence[str], align: Sequence[str], form: str = 'simple'
) -> str:
  """Lines of text; `align` is 'left' or 'right' of each column."""
  return tabulate.tabulate(
    rows, headers, form, disable_numparse=True, colalign=align
  )


def write(
  picture: pathlib.Path,
  figure: Figure,
  rows: Rows,
  headers: Sequence[str],
  align: Sequence[str],
) -> None:
  """Writes the picture, and the table beside it as .tsv and .md."""
  plots.save(figure, [picture])
  lines = '\n'.join('\t'.join(row) for row in (headers, *rows))
  texts = {'.tsv': lines, '.md': table(rows, headers, align, 'github')}
  for suffix, text in texts.items():
    path = picture.with_suffix(suffix)
    checkpoints.write_atomically(path, f'{text}\n'.encode())
  logging.info('Wrote %s, and the table as .tsv and .md.', picture)
