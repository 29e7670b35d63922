"""Tasks and mixtures: `prompt_jax.tasks`.

`register(vocabulary)` puts GLUE and SuperGLUE into seqio's registries; nothing
is registered by importing, since a task has a vocabulary and only a model's
file says which. `with_local_source` gives such a task rows from files.

Not for your own data: `prompt_jax.user_data`.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import seqio

from prompt_jax import user_data

from . import glue, super_glue

# Name of a classification task -> texts of its labels, in their order.
LABELS = {**glue.LABELS, **super_glue.LABELS}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers all tasks and mixtures with a vocabulary.

  Calling it again replaces them, so that another vocabulary is the new one's.

  Returns:
    Their names.
  """
  return [*glue.register(vocabulary), *super_glue.register(vocabulary)]


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
    UserDataError: a file or row is wrong.
  """
  # Imported here: a caller of `register` alone needs no datasets.
  from prompt_jax import datasets

  task = datasets.find_task(name)
  labels = LABELS.get(name)
  rows = {
    split: [
      _as_tfds(row, labels, f'{path}, line {line}')
      for line, row in user_data.read_rows(path)
    ]
    for split, path in files.items()
  }
  new_name = new_name or name
  local = task.replace(name=new_name, source=user_data.RowsDataSource(rows))
  local._shuffle_buffer_size = None  # the source shuffles
  seqio.TaskRegistry.remove(new_name)
  seqio.TaskRegistry.add_provider(new_name, local)
  return local
