"""Tasks and mixtures: `prompt_jax.tasks`.

`register(vocabulary)` puts GLUE and SuperGLUE into seqio's registries, and the
tasks of the pocket language or of docstrings if the vocabulary is theirs;
nothing is registered by importing, since a task has a vocabulary and only a
model's file says which. `with_local_source` gives such a task rows from files.

Not for your own data: `prompt_jax.user_data`.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import seqio

from prompt_jax import row_files
from prompt_jax import user_data

from . import docstrings
from . import glue
from . import pocket
from . import super_glue

# Name of a classification task -> texts of its labels, in their order.
LABELS = {
  **glue.LABELS,
  **super_glue.LABELS,
  **pocket.LABELS,
  **docstrings.LABELS,
}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers all tasks and mixtures with a vocabulary.

  Calling it again replaces them, so that another vocabulary is the new one's.

  Returns:
    Their names.
  """
  return [
    *glue.register(vocabulary),
    *super_glue.register(vocabulary),
    *pocket.register(vocabulary),
    *docstrings.register(vocabulary),
  ]


def with_local_source(
  name: str,
  files: Mapping[str, str | pathlib.Path],
  new_name: str | None = None,
) -> seqio.Task:
  """A registered task that reads its rows from local files.

  Texts, metrics and vocabulary stay. Useful where TFDS cannot download, and for
  samples and few-shot sets.

  Args:
    name: a task that `register` made.
    files: .jsonl, .csv or .tsv file of each split, with TFDS's columns; a label
      may be its text instead of its number.
    new_name: name of the new task; None: it replaces `name`.

  Raises:
    ValueError: `name` is no task.
    UserDataError: a file or row is wrong.
  """
  # Imported here: a caller of `register` alone needs no datasets.
  from prompt_jax import datasets

  task = datasets.find_task(name)
  if not isinstance(task, seqio.Task):
    parts = ', '.join(part.name for part in task.tasks)
    raise ValueError(
      f'{name!r} is a mixture: give its tasks local sources: {parts}.'
    )
  labels = LABELS.get(name)
  rows = {
    split: [
      _as_tfds(row, labels, f'{path}, line {line}')
      for line, row in row_files.read_rows(path)
    ]
    for split, path in files.items()
  }
  new_name = new_name or name
  local = task.replace(
    name=new_name,
    source=user_data.RowsDataSource(rows),
    shuffle_buffer_size=None,  # the source shuffles
  )
  seqio.TaskRegistry.remove(new_name)
  seqio.TaskRegistry.add_provider(new_name, local)
  return local


def _as_tfds(
  row: dict[str, Any], labels: tuple[str, ...] | None, where: str
) -> dict[str, Any]:
  """The row with its label as TFDS has it: a number."""
  if 'label' not in row:
    return row
  label = row['label']
  try:
    if labels and str(label) in labels:
      label = labels.index(str(label))
    elif isinstance(label, str):
      label = int(label) if labels else float(label)
    elif isinstance(label, bool):
      label = int(label)
  except ValueError:
    listed = f'one of {", ".join(labels)}' if labels else 'a number'
    raise row_files.UserDataError(
      f'{where}: label {label!r}, expected {listed}.'
    ) from None
  if labels and not -1 <= label < len(labels):
    raise row_files.UserDataError(
      f'{where}: label {label}, expected 0 to {len(labels) - 1}: '
      f'{", ".join(labels)}.'
    )
  return {**row, 'label': label}
