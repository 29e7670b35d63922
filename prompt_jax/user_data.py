"""A task from your own rows: JSON lines, CSV or TSV.

    user_data.register(
        'reviews', train_data='train.jsonl', eval_data='dev.csv',
        inputs='review: {text} It was <soft:0> .', targets='{label}',
        labels=('negative', 'positive'), vocabulary=vocabulary)

registers a `seqio.Task` with splits `train` and `validation`; the language of
the templates is in `templates/language.py`. All rows are read and checked at
once, and what is wrong names the file and the line. Not for files that do not
fit into memory.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any, cast

from absl import logging
import seqio
import tensorflow as tf

from prompt_jax import feature_converters
from prompt_jax import row_files
from prompt_jax.row_files import Row
from prompt_jax.row_files import UserDataError
from prompt_jax.templates import files as template_files
from prompt_jax.templates import fitting
from prompt_jax.templates import language
from prompt_jax.templates import masks


@dataclasses.dataclass(frozen=True)
class UserTask:
  """What `register` made.

  Attributes:
    name: the task's name in seqio's registry.
    num_rows: rows used of each split.
    num_skipped: bad rows left out of each split.
    label_texts: the target text of each label, for rank classification.
  """

  name: str
  num_rows: Mapping[str, int]
  num_skipped: Mapping[str, int]
  label_texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class UserData:
  """The arguments of `register` as a configuration; see there.

  Attributes:
    train_data: file of split `train`, or None.
    eval_data: file of split `validation`, or None.
    inputs: template of the inputs, or `@file:name`.
    targets: template of the targets; None for those of `@file:name`.
    labels: the classes of a classification; None: the choices of the targets,
      if they are `{column: bad | good}`.
    skip_bad_rows: leave bad rows out, counted, instead of stopping.
    task_id: the number of these data among the tasks of a method that keeps
      several apart.
  """

  train_data: str | None = None
  eval_data: str | None = None
  inputs: str | None = None
  targets: str | None = None
  labels: Sequence[str] | None = None
  skip_bad_rows: bool = False
  task_id: int | None = None

  def __post_init__(self):
    if self.given and self.labels is None:
      object.__setattr__(self, 'labels', self._own_labels or None)

  @property
  def _own_labels(self) -> tuple[str, ...]:
    """The labels that the templates say themselves."""
    if self._lacks_templates:
      return ()
    return _prompt(self.inputs or '', self.targets).label_texts

  @property
  def label_texts(self) -> tuple[str, ...]:
    """The whole targets of the labels, among which evaluation chooses."""
    if not self.labels or self._lacks_templates:
      return tuple(self.labels or ())
    targets = _prompt(self.inputs or '', self.targets).targets
    if targets.choices or len(targets.fields) != 1:
      return tuple(self.labels)  # what is wrong with them `register` says
    [field] = targets.fields
    return tuple(targets.render({field: label}) for label in self.labels)

  @property
  def _lacks_templates(self) -> bool:
    named = template_files.is_reference(self.inputs)
    return self.inputs is None or (self.targets is None and not named)

  @property
  def given(self) -> bool:
    """Whether there are any files, or templates for a benchmark task."""
    return self._files or bool(self.inputs or self.targets)

  @property
  def _files(self) -> bool:
    return bool(self.train_data or self.eval_data)

  def register(self, name: str, vocabulary: seqio.Vocabulary) -> UserTask:
    """Registers the files as the task `name`, or a benchmark's rows anew.

    Raises:
      UserDataError: a template is missing, or as `register`.
    """
    if self.inputs is None or self._lacks_templates:
      raise UserDataError(
        "Data of your own need --inputs='...' and --targets='...', templates "
        'with the names of columns in braces.'
      )
    from prompt_jax import benchmark_templates

    if not self._files and not self.labels:
      found = benchmark_templates.own_labels(name, self.inputs, self.targets)
      object.__setattr__(self, 'labels', found or None)
    more: Any = {
      'inputs': self.inputs,
      'targets': self.targets,
      'labels': None if self.labels == self._own_labels else self.labels,
      'vocabulary': vocabulary,
      'task_id': self.task_id,
    }
    if not self._files:
      return benchmark_templates.register(name, **more)
    return register(
      name,
      train_data=self.train_data,
      eval_data=self.eval_data,
      skip_bad_rows=self.skip_bad_rows,
      **more,
    )


_registered: set[str] = set()


def register(
  name: str,
  *,
  train_data: str | pathlib.Path | None,
  eval_data: str | pathlib.Path | None,
  inputs: str,
  targets: str | None = None,
  labels: Sequence[str] | None = None,
  vocabulary: seqio.Vocabulary,
  skip_bad_rows: bool = False,
  metric_fns: Sequence[Callable[..., Any]] | None = None,
  task_id: int | None = None,
) -> UserTask:
  """Registers a task made of the rows of two files.

  Args:
    name: of the task; a task that `register` made before is replaced.
    train_data: .jsonl, .csv or .tsv, UTF-8; CSV and TSV start with the names of
      the columns, and TSV has no quotes. None: no split `train`.
    eval_data: the same for split `validation`; None: no such split.
    inputs: template, plain text with `{column}`; `{{` and `}}` are braces, and
      `<soft:k>` is soft token k. Or `@file:name`, a line of a file.
    targets: template of the targets; None for those of `@file:name`.
    labels: the classes, if it is a classification. The one column of `targets`
      then holds a label or, counted from 0, its number. Not for targets that
      choose their words themselves, `{column: bad | good}`.
    vocabulary: of inputs and targets.
    skip_bad_rows: whether to leave bad rows out, counted and logged, instead of
      stopping at the first.
    metric_fns: seqio metrics; None: accuracy with labels, else exact match.
    task_id: gives every example this `task_ids`, for methods with one prompt a
      task.

  Raises:
    UserDataError: a file, template or row is wrong, or no good row is left.
  """
  if name in seqio.TaskRegistry.names() and name not in _registered:
    raise UserDataError(
      f'{name!r} is the name of a task that exists: choose another.'
    )
  render = _Renderer(_prompt(inputs, targets), labels, vocabulary)
  files = {'train': train_data, 'validation': eval_data}
  examples, skipped = {}, {}
  for split, path in files.items():
    if path is not None:
      examples[split], skipped[split] = _load(path, render, skip_bad_rows)

  if metric_fns is None:
    metric_fns = _default_metrics(render.label_texts)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=cast(Any, RowsDataSource(examples)),
    preprocessors=preprocessors(render, task_id),
    postprocess_fn=_stripped,
    metric_fns=list(metric_fns),
    output_features=feature_converters.output_features(
      vocabulary, task_ids=task_id is not None
    ),
    shuffle_buffer_size=None,  # the source shuffles
  )
  _registered.add(name)
  num_rows = {split: len(rows) for split, rows in examples.items()}
  return UserTask(name, num_rows, skipped, render.label_texts)


def preprocessors(render: Any, task_id: int | None) -> list[Any]:
  """Those of rendered rows: fitting, tokens, the task's number, EOS."""
  number = [] if task_id is None else [feature_converters.add_task_id(task_id)]
  return [
    *render.fitting,
    seqio.preprocessors.tokenize,
    *number,
    feature_converters.trim_and_append_eos,
  ]


class RowsDataSource(seqio.FunctionDataSource):
  """A seqio source of rows in memory: a new permutation every epoch.

  Args:
    rows: the rows of each split, dicts with equal keys.
  """

  def __init__(self, rows: Mapping[str, Sequence[Row]]):

    def dataset(
      split: str, shuffle_files: bool, seed: int | None = None
    ) -> tf.data.Dataset:
      columns = _columns(rows[split])
      ds = tf.data.Dataset.from_tensor_slices(columns)
      if shuffle_files:
        ds = ds.shuffle(len(rows[split]), seed=seed)
      return ds

    sizes = {split: len(some) for split, some in rows.items()}
    super().__init__(dataset, splits=list(rows), num_input_examples=sizes)

  @property
  def performs_internal_shuffling(self) -> bool:
    """True: seqio need not shuffle through a buffer."""
    return True

  def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
    """As seqio's, whose warning about poor shuffling is not about rows."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
      return super().get_dataset(*args, **kwargs)
    finally:
      logging.set_verbosity(level)


def _prompt(inputs: str, targets: str | None) -> template_files.Prompt:
  """The templates, from a file or as they are.

  Raises:
    UserDataError: one of them is wrong, or there are no targets.
  """
  found: dict[str, language.Template] = {}
  for key, text in (('inputs', inputs), ('targets', targets)):
    if text is not None and template_files.is_reference(text):
      prompt = template_files.find(text)
      found.setdefault('targets', prompt.targets)
      found[key] = getattr(prompt, key)
    elif text is not None:
      found[key] = language.Template(text)
  if 'targets' not in found:
    raise UserDataError('There is no template of the targets.')
  return template_files.Prompt('', found['inputs'], found['targets'])


class _Renderer:
  """Turns a row into the texts of an example."""

  def __init__(
    self,
    prompt: template_files.Prompt,
    labels: Sequence[str] | None,
    vocabulary: seqio.Vocabulary,
  ):
    self.templates = {'inputs': prompt.inputs, 'targets': prompt.targets}
    self.masks = {
      key: masks.texts(vocabulary, template.num_masks)
      for key, template in self.templates.items()
    }
    self.labels = None if labels is None else tuple(labels)
    self.label_texts = prompt.label_texts
    if self.labels is None:
      return
    targets = prompt.targets
    if len(targets.fields) != 1:
      raise UserDataError(
        'With labels the targets template has the one column that holds the '
        f'label, as in "{{label}}"; got {targets.text!r}.'
      )
    if targets.choices:
      raise UserDataError(
        f'The targets {targets.text!r} say what the labels are: give no labels '
        'beside it.'
      )
    if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
      raise UserDataError(f'labels must be two or more, got {self.labels}.')
    [self.label_field] = targets.fields
    self.label_texts = tuple(
      targets.render({self.label_field: label}) for label in self.labels
    )

  def __call__(self, row: Row) -> Row:
    """The example of a row; if it is bad, an error without file and line."""
    example: Row = {}
    for key, template in self.templates.items():
      template.check_columns(row)
      if key == 'targets' and self.labels is not None:
        field = self.label_field
        index = language.chosen(row[field], self.labels, field)
        row = {**row, field: self.labels[index]}
      parts = template.parts(row, self.masks[key])
      example[key] = ''.join(text for text, _ in parts)
      if template.needs_fitting:
        texts, rules = zip(*parts, ('', language.FIXED), strict=True)
        example[f'{key}/parts'] = list(texts)
        example[f'{key}/rules'] = list(rules)
    return example

  @property
  def fitting(self) -> list[Any]:
    """A preprocessor for texts that trimming at the end would spoil."""
    found = {k: t.text for k, t in self.templates.items() if t.needs_fitting}
    return [fitting.Fitting(found)] if found else []


def _load(
  path: str | pathlib.Path, render: _Renderer, skip_bad_rows: bool
) -> tuple[list[Row], int]:
  """The examples of a file, and how many bad rows were left out."""
  path = pathlib.Path(path)
  examples, skipped = [], 0
  first: UserDataError | None = None
  for line, row in row_files.rows_and_errors(path):
    try:
      if isinstance(row, UserDataError):
        raise row
      try:
        examples.append({**render(row), 'line': line})
      except UserDataError as error:
        raise UserDataError(f'{path}, line {line}: {error}') from None
    except UserDataError as error:
      if not skip_bad_rows:
        raise
      first = first or error
      skipped += 1
      logging.warning('Skipped: %s', error)
  if not examples:
    reason = f' The first of {skipped} bad rows: {first}' if first else ''
    raise UserDataError(f'{path}: no rows.{reason}')
  if skipped:
    logging.warning(
      '%s: skipped %d bad rows of %d.', path, skipped, skipped + len(examples)
    )
  return examples, skipped


def _columns(rows: Sequence[Row]) -> Any:
  """Rows to one tensor a column, ragged where the rows hold lists."""
  columns = {}
  for key, value in rows[0].items():
    values = [row[key] for row in rows]
    if isinstance(value, dict):
      columns[key] = _columns(values)
    elif isinstance(value, list):
      columns[key] = tf.ragged.constant(values, ragged_rank=1)
    else:
      columns[key] = tf.constant(values)
  return columns


def _default_metrics(labels: Sequence[str]) -> list[Callable[..., Any]]:
  from prompt_jax import metrics

  return [metrics.accuracy if labels else metrics.exact_match]


def _stripped(text: str, **unused: Any) -> str:
  """Text to compare; soft tokens and blanks are not part of the answer."""
  return re.sub(r'<(soft:|extra_id_)\d+>', '', text).strip()
