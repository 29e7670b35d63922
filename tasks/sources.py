"""Data sets as seqio tasks: an entry of a table, and where its rows come from.

A `DataSet` says all that is particular to one set; `add` registers it, with
rows from TFDS, which downloads them. The same task reads local files instead
after `use_rows_dir`: `glue_sst2` and `taskless_glue_sst2` both read

    <rows_dir>/glue_sst2/train.jsonl    (or .csv, .tsv)
    <rows_dir>/glue_sst2/validation.jsonl

with TFDS's names of the columns. A set that TFDS lacks is read there only.

Not for your own data in a form of your own: `prompt_jax.user_data`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, cast

import seqio

from prompt_jax import deltas
from prompt_jax import feature_converters
from prompt_jax import row_files
from prompt_jax import user_data
from prompt_jax.row_files import UserDataError

Row = dict[str, Any]
SPLITS = ('train', 'validation', 'test')
TASKLESS = 'taskless_'
LABEL = 'label'  # TFDS's usual name of the column
_SUFFIXES = ('.jsonl', '.csv', '.tsv')


@dataclasses.dataclass(frozen=True)
class DataSet:
  """One data set as text to text.

  Attributes:
    tfds: data set, config and version in TFDS's catalog; None: local rows only.
    splits: what it has; named here so that asking for them needs no download.
    columns: those that are read, and of which kind: str, int, float, a list of
      one of these ([str]), a dict of columns, or the texts of a label (a
      tuple), which a row names by its text or its number.
    texts: dataset preprocessors, from rows to `inputs` and `targets`.
    postprocess_fn: seqio's.
    metric_fns: seqio's.
    labels: the texts that an answer is chosen from; () where it is free.
    tokens: dataset preprocessors of the tokens.
    folders: of local rows, the first that is there; (): the task's name.
    files: file of each split, without its ending, where its name is not the
      split's; a folder may then hold files of other tasks.
    expand: from a row of a file, and its split, to rows with `columns`, where
      files hold another form than TFDS.
  """

  tfds: str | None
  columns: Mapping[str, Any]
  texts: Sequence[Callable[..., Any]]
  postprocess_fn: Callable[..., Any] | None = None
  metric_fns: Sequence[Callable[..., Any]] = ()
  labels: tuple[str, ...] = ()
  splits: tuple[str, ...] = SPLITS
  tokens: Sequence[Callable[..., Any]] = ()
  folders: tuple[str, ...] = ()
  files: Mapping[str, str] | None = None
  expand: Callable[[Row, str], Iterable[Row]] | None = None


# What `add` and `add_mixture` have registered, by name.
_data_sets: dict[str, DataSet] = {}
_mixtures: dict[str, tuple[str, ...]] = {}


def add(name: str, data: DataSet, vocabulary: seqio.Vocabulary) -> str:
  """Registers a task in place of its namesake; gives its name."""
  folders = data.folders or (name.removeprefix(TASKLESS),)
  data = dataclasses.replace(data, folders=folders)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=cast(Any, _source(name, data)),
    preprocessors=[
      *data.texts,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      *data.tokens,
      feature_converters.trim_and_append_eos,
    ],
    postprocess_fn=data.postprocess_fn,
    metric_fns=list(data.metric_fns),
    output_features=feature_converters.output_features(vocabulary),
  )
  _data_sets[name] = data
  return name


def register(
  data_sets: Mapping[str, Callable[[str], DataSet]],
  vocabulary: seqio.Vocabulary,
) -> list[str]:
  """Registers a table of sets in both forms; gives the tasks' names.

  Args:
    data_sets: name of a task, and the set by what stands first in its inputs:
      the name, or '' in the taskless form.
    vocabulary: of inputs and targets.
  """
  return [
    add(f'{form}{name}', data_set('' if form else name), vocabulary)
    for form in ('', TASKLESS)
    for name, data_set in data_sets.items()
  ]


def add_mixture(name: str, tasks: Sequence[str]) -> str:
  """Registers a mixture of equal rates in place of its namesake."""
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add(name, list(tasks), default_rate=1.0)
  _mixtures[name] = tuple(tasks)
  return name


def mapped(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
  """A dataset preprocessor from a function of one row."""

  def preprocessor(dataset: Any) -> Any:
    return dataset.map(
      lambda row: function(row, **kwargs), num_parallel_calls=-1
    )

  return preprocessor


def labels(
  data_sets: Mapping[str, Callable[[str], DataSet]],
) -> dict[str, tuple[str, ...]]:
  """The label texts of those tasks of a table that have labels."""
  found = {name: data_set(name).labels for name, data_set in data_sets.items()}
  return {
    f'{form}{name}': texts
    for form in ('', TASKLESS)
    for name, texts in found.items()
    if texts
  }


def names() -> list[str]:
  """The registered tasks that have an entry."""
  return list(_data_sets)


def data_set(name: str) -> DataSet:
  """The entry of a task.

  Raises:
    ValueError: no task of that name reads rows.
  """
  if name not in _data_sets:
    raise ValueError(
      f'{name!r} has no rows to read from files.'
      f'{deltas.near_misses(name, list(_data_sets))} Local rows are for the '
      'benchmark sets (`prompt-jax tasks` lists them); your own data has '
      '--train_data and --eval_data.'
    )
  return _data_sets[name]


def _source(name: str, data: DataSet) -> Any:
  if data.tfds is not None:
    return seqio.TfdsDataSource(tfds_name=data.tfds, splits=list(data.splits))

  def missing(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    del shuffle_files, seed
    raise UserDataError(
      f'{name!r} is not in TFDS: give --rows_dir=DIR with '
      f'{expected(data, [split])}.'
    )

  return seqio.FunctionDataSource(missing, splits=list(data.splits))


def expected(data: DataSet, splits: Iterable[str]) -> str:
  """The local files that a task looks for, in words."""
  stems = [(data.files or {}).get(split, split) for split in splits]
  files = ', '.join(f'DIR/{data.folders[0]}/{stem}.jsonl' for stem in stems)
  columns = ', '.join(map(_described, data.columns.items()))
  return f'{files} (or .csv, .tsv; columns: {columns})'


def _described(column: tuple[str, Any]) -> str:
  name, kind = column
  if isinstance(kind, dict):
    return f'{name} with {" and ".join(kind)}'
  if isinstance(kind, tuple):
    return f'{name}: {_numbered(kind)}'
  return f'{name} (a list)' if isinstance(kind, list) else name


def _numbered(texts: tuple[str, ...]) -> str:
  return ', '.join(f'{i} = {text}' for i, text in enumerate(texts))


# ---- local rows --------------------------------------------------------------


def local_files(
  name: str, rows_dir: str | pathlib.Path
) -> dict[str, pathlib.Path]:
  """The files of a task's splits below a folder.

  Raises:
    UserDataError: the folder, the task's folder or its files are not there, or
      a file is no split's.
  """
  data = data_set(name)
  root = pathlib.Path(rows_dir)
  if not root.is_dir():
    raise UserDataError(f'--rows_dir: there is no folder {root}.')
  folder = next((f for f in data.folders if (root / f).is_dir()), None)
  if folder is None:
    others = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise UserDataError(
      f'{root} has no folder {data.folders[0]!r} for the task {name!r}.'
      f'{deltas.near_misses(data.folders[0], others)} Expected: '
      f'{expected(data, data.splits)}.'
    )
  found: dict[str, list[pathlib.Path]] = {}
  for path in sorted((root / folder).iterdir()):
    if path.suffix in _SUFFIXES:
      found.setdefault(path.stem, []).append(path)
  stems = _stems(data)
  strange = [stem for stem in found if stem not in stems.values()]
  if strange and data.files is None:
    raise UserDataError(
      f'{found[strange[0]][0]} is no split of {name!r}.'
      f'{deltas.near_misses(strange[0], list(stems))} The files may be called '
      f'{", ".join(stems)}.'
    )
  files = {split: found[stem] for split, stem in stems.items() if stem in found}
  twice = [paths for paths in files.values() if len(paths) > 1]
  if twice:
    raise UserDataError(
      f'{" and ".join(map(str, twice[0]))} are the same split: keep one.'
    )
  if not files:
    raise UserDataError(
      f'{root / folder} has no files of {name!r}. Expected: '
      f'{expected(data, data.splits)}.'
    )
  return {split: paths[0] for split, paths in files.items()}


def _stems(data: DataSet) -> dict[str, str]:
  """Names of files by split, without their endings."""
  if data.files is not None:
    return dict(data.files)
  # A sample of a set may have been cut into other splits than TFDS's.
  return {split: split for split in dict.fromkeys((*data.splits, *SPLITS))}


def read_rows(
  name: str, files: Mapping[str, str | pathlib.Path]
) -> dict[str, list[Row]]:
  """The rows of a task's files as TFDS has them, by split.

  Raises:
    UserDataError: a file or row is wrong, with file and line.
  """
  data = data_set(name)
  out: dict[str, list[Row]] = {}
  for split, path in files.items():
    rows = out[split] = []
    for line, row in row_files.read_rows(path):
      where = f'{path}, line {line}'
      try:
        for one in data.expand(row, split) if data.expand else (row,):
          rows.append(_checked(data, one, where, len(rows), split))
      except (KeyError, TypeError, AttributeError) as error:
        # Of `expand`, which trusts the form that a folder's README states.
        raise UserDataError(
          f'{where}: not a row of {name!r} ({error!r}). Its columns: '
          f'{", ".join(row)}.'
        ) from error
    if not rows:
      raise UserDataError(f'{path}: no rows.')
  return out


def _checked(
  data: DataSet, row: Row, where: str, number: int, split: str
) -> Row:
  """The columns that are read, with TFDS's types."""
  out = {}
  for column, kind in data.columns.items():
    if column in row:
      out[column] = _value(row[column], kind, f'{where}: {column}')
    elif kind is int and column == 'idx':
      out[column] = number
    elif split.startswith('test') and isinstance(kind, tuple):
      out[column] = -1  # TFDS's rows without a label
    elif split.startswith('test') and kind is float:
      out[column] = -1.0
    else:
      raise UserDataError(
        f'{where}: no column {column!r}.'
        f'{deltas.near_misses(column, list(row))} The columns: '
        f'{", ".join(row) or "none"}.'
      )
  return out


def _value(value: Any, kind: Any, where: str) -> Any:
  """A value of the kind; text of CSV files becomes numbers."""
  if isinstance(kind, tuple):
    return _label(value, kind, where)
  if isinstance(kind, list) and isinstance(value, list):
    return [_value(one, kind[0], where) for one in value]
  if isinstance(kind, dict) and isinstance(value, dict):
    missing = [key for key in kind if key not in value]
    if missing:
      raise UserDataError(f'{where} has no {missing[0]!r}: {str(value)[:60]}.')
    return {k: _value(value[k], one, where) for k, one in kind.items()}
  if kind is str and isinstance(value, str):
    return value
  if kind in (int, float) and not isinstance(value, list | dict | None):
    try:
      return kind(value)
    except ValueError:
      pass
  expected = {str: 'text', int: 'a whole number', float: 'a number'}
  wanted = 'a list' if isinstance(kind, list) else 'an object'
  wanted = expected.get(kind, wanted) if isinstance(kind, type) else wanted
  raise UserDataError(f'{where} holds {str(value)[:40]!r}, expected {wanted}.')


def _label(value: Any, texts: tuple[str, ...], where: str) -> int:
  """The number of a label; -1, of a row without one, stays."""
  text = str(value)
  if text in texts:
    return texts.index(text)
  try:
    number = int(value)
  except (TypeError, ValueError):
    number = len(texts)
  if not -1 <= number < len(texts):
    raise UserDataError(
      f'{where}: label {value!r}, expected 0 to {len(texts) - 1} or its text: '
      f'{_numbered(texts)}.{deltas.near_misses(text, texts)}'
    )
  return number


def use_rows(
  name: str, rows: Mapping[str, Sequence[Row]], new_name: str | None = None
) -> seqio.Task:
  """The task with rows in memory, by split, under its or a new name."""
  new_name = new_name or name
  local = seqio.TaskRegistry.get(name).replace(
    name=new_name,
    source=user_data.RowsDataSource(rows),
    shuffle_buffer_size=None,  # the source shuffles
  )
  seqio.TaskRegistry.remove(new_name)
  seqio.TaskRegistry.add_provider(new_name, local)
  return local


def use_rows_dir(name: str, rows_dir: str | pathlib.Path) -> None:
  """Makes a task, or all tasks of a mixture, read files below a folder.

  Raises:
    ValueError: there is no such task, or it has no rows to read.
    UserDataError: a folder, file or row is wrong.
  """
  from prompt_jax import datasets

  for task in datasets.subtasks(datasets.find_task(name)):
    files = local_files(task.name, rows_dir)
    use_rows(task.name, read_rows(task.name, files))
  if name in _mixtures:  # it holds the tasks themselves, not their names
    add_mixture(name, _mixtures[name])
