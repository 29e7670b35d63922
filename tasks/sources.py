"""Data sets as seqio tasks: an entry of a table, and where its rows come from.

A `DataSet` says all that is particular to one set; `add` registers it, with
rows from TFDS, which downloads them. The same task reads local files instead
after `use_rows_dir`: `glue_sst2` and `taskless_glue_sst2` both read

    <rows_dir>/glue_sst2/train.jsonl    (or .csv, .tsv)
    <rows_dir>/glue_sst2/validation.jsonl

with TFDS's names of the columns. A set that TFDS lacks is read there only.

Not for your own data in a form of your own: `prompt_jax.user_data`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, cast

from absl import logging
import seqio

from prompt_jax import deltas
from prompt_jax import feature_converters
from prompt_jax import row_files
from prompt_jax import user_data
from prompt_jax.row_files import UserDataError

from . import columns
from . import tfds_rows

Row = dict[str, Any]
SPLITS = ('train', 'validation', 'test')
TASKLESS = 'taskless_'
LABEL = 'label'  # TFDS's usual name of the column
_SUFFIXES = ('.jsonl', '.csv', '.tsv')


class NoLocalRows(UserDataError):
  """A folder of local rows has none of a task."""


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
    add_eos: whether targets end with EOS; False where `tokens` put theirs.
    folders: of local rows, the first that is there; (): the task's name.
    files: file of each split, without its ending, where its name is not the
      split's; a folder may then hold files of other tasks.
    files_in: the same for some of the folders alone.
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
  add_eos: bool = True
  folders: tuple[str, ...] = ()
  files: Mapping[str, str] | None = None
  files_in: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )
  expand: Callable[[Row, str], Iterable[Row]] | None = None


# What `add` and `add_mixture` have registered, by name.
_data_sets: dict[str, DataSet] = {}
_mixtures: dict[str, tuple[str, ...]] = {}


def add(name: str, data: DataSet, vocabulary: seqio.Vocabulary) -> str:
  """Registers a task in place of its namesake; gives its name."""
  folders = data.folders or (name.removeprefix(TASKLESS),)
  data = dataclasses.replace(data, folders=folders)
  features = feature_converters.output_features(vocabulary)
  targets = dataclasses.replace(features['targets'], add_eos=data.add_eos)
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
    output_features={**features, 'targets': targets},
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
    return tfds_rows.TfdsRows(
      expected(data, data.splits),
      tfds_name=data.tfds,
      splits=list(data.splits),
    )

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
  texts = ', '.join(map(columns.described, data.columns.items()))
  return f'{files} (or .csv, .tsv; columns: {texts})'


# ---- local rows --------------------------------------------------------------


def local_files(
  name: str, rows_dir: str | pathlib.Path
) -> dict[str, pathlib.Path]:
  """The files of a task's splits below a folder.

  Raises:
    NoLocalRows: the task's folder or its files are not there.
    UserDataError: the folder is not there, or a file is no split's.
  """
  data = data_set(name)
  root = pathlib.Path(rows_dir)
  if not root.is_dir():
    raise UserDataError(f'--rows_dir: there is no folder {root}.')
  folder = next((f for f in data.folders if (root / f).is_dir()), None)
  if folder is None:
    others = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise NoLocalRows(
      f'{root} has no folder {data.folders[0]!r} for the task {name!r}.'
      f'{deltas.near_misses(data.folders[0], others)} Expected: '
      f'{expected(data, data.splits)}.'
    )
  found: dict[str, list[pathlib.Path]] = {}
  for path in sorted((root / folder).iterdir()):
    if path.suffix in _SUFFIXES:
      found.setdefault(path.stem, []).append(path)
  own = data.files_in.get(folder, data.files)
  stems = _stems(data) if own is None else own
  strange = [stem for stem in found if stem not in stems.values()]
  if strange and own is None:
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
    raise NoLocalRows(
      f'{root / folder} has no files of {name!r}. Expected: '
      f'{expected(data, data.splits)}.'
    )
  return {split: paths[0] for split, paths in files.items()}


def _stems(data: DataSet) -> dict[str, str]:
  """Names of files by split, without their endings: the splits'."""
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
          rows.append(
            columns.checked(data.columns, one, where, len(rows), split)
          )
      except (KeyError, TypeError, AttributeError) as error:
        # Of `expand`, which trusts the form that a folder's README states.
        raise UserDataError(
          f'{where}: not a row of {name!r} ({error!r}). Its columns: '
          f'{", ".join(row)}.'
        ) from error
    if not rows:
      raise UserDataError(f'{path}: no rows.')
  return out


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

  Of a mixture tasks that are evaluated only may lack them: they are left out.

  Raises:
    ValueError: there is no such task, or it has no rows to read.
    UserDataError: a folder, file or row is wrong.
  """
  from prompt_jax import datasets

  found = datasets.subtasks(datasets.find_task(name))
  parts = _mixtures.get(name, tuple(task.name for task in found))
  needed = set(parts)
  if name in _mixtures:
    needed = {p for p in parts if 'train' in data_set(p).splits} or needed
  without = use_rows_of(parts, rows_dir, needed)
  if name in _mixtures:  # it holds the tasks themselves, not their names
    add_mixture(name, [part for part in parts if part not in without])
    _mixtures[name] = parts


def use_rows_of(
  names: Iterable[str], rows_dir: str | pathlib.Path, needed: Collection[str]
) -> list[str]:
  """Makes tasks read files below a folder.

  Args:
    names: of tasks.
    rows_dir: the folder.
    needed: those of them that must have rows.

  Returns:
    Those of the others that have none; they are left as they are.

  Raises:
    ValueError: a task has no rows to read.
    UserDataError: a folder, file or row is wrong.
  """
  without = []
  for name in names:
    try:
      files = local_files(name, rows_dir)
    except NoLocalRows:
      if name in needed:
        raise
      without.append(name)
      continue
    use_rows(name, read_rows(name, files))
  if without:
    logging.warning(
      'Left out, for %s has no rows of them: %s.', rows_dir, ', '.join(without)
    )
  return without
