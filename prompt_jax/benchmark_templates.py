"""A benchmark task in the words of a template of one's own.

    prompt-jax train ... --gin.MIXTURE_OR_TASK_NAME=glue_sst2 \
      --inputs='{sentence|cut} It was <mask>.' \
      --targets='<mask> {label: terrible | great}'

The rows of the task, from TFDS or local ones, are rendered by the template in
place of the task's own form, and keep its name and, where the targets say the
label, its metrics. They are held in memory.

Not for rows of your own: `user_data.py`.
"""

from collections.abc import Sequence
from typing import Any

from absl import logging
import seqio

from prompt_jax import deltas
from prompt_jax import feature_converters
from prompt_jax import user_data
from prompt_jax.row_files import UserDataError


def label_column(columns: Any) -> str | None:
  """The column of the label among those of a `DataSet`, if there is one."""
  found = (name for name, kind in columns.items() if isinstance(kind, tuple))
  return next(found, None)


def own_labels(task: str, inputs: str, targets: str | None) -> tuple[str, ...]:
  """The task's own labels where targets hold its label as it is; else ()."""
  from prompt_jax import tasks

  if task not in tasks.sources.names():
    return ()
  data = tasks.sources.data_set(task)
  prompt = user_data._prompt(inputs, targets)
  fields = (label_column(data.columns),)
  if prompt.targets.choices or prompt.targets.fields != fields:
    return ()
  return data.labels


def register(
  name: str,
  *,
  inputs: str,
  targets: str | None = None,
  labels: Sequence[str] | None = None,
  vocabulary: seqio.Vocabulary,
  task_id: int | None = None,
) -> user_data.UserTask:
  """Registers a benchmark task in place of itself, in other words.

  Rows without a label are left out, and so are splits that have no other ones.

  Args:
    name: of the task.
    inputs: as `user_data.register`, of the columns that the task reads.
    targets: as `user_data.register`.
    labels: words in place of the task's labels, in their order.
    vocabulary: as `user_data.register`.
    task_id: as `user_data.register`.

  Raises:
    UserDataError: the name is no benchmark task's, or a template is wrong.
  """
  from prompt_jax import tasks
  from prompt_jax.instructions import rows as rows_lib

  known = [x for x in tasks.sources.names() if x not in _plain_text()]
  if name not in known:
    raise UserDataError(
      '--inputs and --targets are for --train_data and --eval_data, or for the '
      f'rows of a benchmark task, and {name!r} is none.'
      f'{deltas.near_misses(name, known)}'
    )
  data = tasks.sources.data_set(name)
  prompt = user_data._prompt(inputs, targets)
  render = user_data._Renderer(prompt, labels, vocabulary)
  label = label_column(data.columns)
  task = seqio.TaskRegistry.get(name)
  examples, skipped = {}, {}
  for split in task.splits:
    rows = rows_lib.read_task(name, split)
    kept = [row for row in rows if label is None or row[label] != -1]
    if not kept:
      logging.info('%s: no row of %s has a label.', name, split)
      continue
    skipped[split] = len(rows) - len(kept)
    examples[split] = _rendered(kept, render, f'{name} ({split})')
  said = render.label_texts if prompt.targets.fields == (label,) else ()
  by_number = type(data.postprocess_fn) is tasks.postprocessors.LabelId
  scored = bool(said) and by_number
  features = feature_converters.output_features(
    vocabulary, task_ids=task_id is not None
  )
  made = task.replace(
    source=user_data.RowsDataSource(examples),
    preprocessors=user_data.preprocessors(render, task_id),
    postprocess_fn=_numbered(said) if scored else user_data._stripped,
    metric_fns=list(
      data.metric_fns
      if scored
      else user_data._default_metrics(render.label_texts)
    ),
    output_features=features,
    shuffle_buffer_size=None,  # the source shuffles
  )
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add_provider(name, made)
  sizes = {split: len(rows) for split, rows in examples.items()}
  return user_data.UserTask(name, sizes, skipped, render.label_texts)


def _rendered(
  rows: Sequence[user_data.Row], render: user_data._Renderer, where: str
) -> list[user_data.Row]:
  out = []
  for i, row in enumerate(rows):
    try:
      out.append(render(row))
    except UserDataError as error:
      raise UserDataError(f'{where}, row {i}: {error}') from None
  return out


def _plain_text() -> set[str]:
  """Tasks that cut text into pieces, which are no rows."""
  from prompt_jax import tasks

  sources = tasks.sources
  return {x for x in sources.names() if sources.data_set(x).tokens}


def _numbered(texts: Sequence[str]) -> Any:
  """From what a model says to the number of a label, soft tokens aside."""
  from prompt_jax import tasks

  number = tasks.postprocessors.LabelId([user_data._stripped(t) for t in texts])
  return lambda text, **unused: number(user_data._stripped(text))
