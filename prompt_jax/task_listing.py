"""`prompt-jax tasks`: what tasks there are, and what one of them looks like.

    prompt-jax tasks                                 a table of all
    prompt-jax tasks glue_sst2 --rows_dir=DIR        lengths, a few examples

Nothing is downloaded: sizes and examples are those of local rows, or of what
TFDS has prepared on this machine before. Nothing heavy is imported before the
arguments have been read.
"""

import argparse
import ast
from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

# As in runs/common.gin.
LENGTHS = {'inputs': 512, 'targets': 16}
_SHOWN = 12  # tokens of an example
_EXAMPLES = 3


def add_arguments(commands: Any) -> None:
  """Adds the command to argparse's subparsers."""
  sub = commands.add_parser(
    'tasks',
    help='list the tasks, or show examples and lengths of one',
    description='Lists the tasks, or shows examples and lengths of one.',
    epilog=(
      '  --gin.VOCABULARY_PATH=FILE        a SentencePiece model; else bytes\n'
      "  --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 256, 'targets': 8}\""
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  sub.add_argument('name', nargs='?', metavar='NAME', help='e.g. glue_sst2')
  sub.add_argument(
    '--rows_dir', metavar='DIR', help='local rows: DIR/<task>/<split>.jsonl'
  )
  sub.add_argument('--debug', action='store_true', help='show tracebacks')


def show(
  name: str | None, rows_dir: str | None, gin_flags: Sequence[str]
) -> None:
  """Prints the table, or one task.

  Args:
    name: of a task or mixture; None: all.
    rows_dir: folder of local rows; None: TFDS's.
    gin_flags: as given, --gin.NAME=value.

  Raises:
    ValueError: no such task, or a flag or local row is wrong.
  """
  path, lengths = _settings(gin_flags)
  from prompt_jax import tasks
  from prompt_jax import vocabularies

  vocabulary = vocabularies.bytes_vocabulary()
  if path is not None:
    vocabulary = vocabularies.sentencepiece(path)
  names = tasks.register(vocabulary)
  if name is None:
    print(table(names, rows_dir))
    return
  unit = 'tokens' if path else 'bytes (--gin.VOCABULARY_PATH=... for tokens)'
  print(describe(name, rows_dir, lengths, unit))


def _settings(flags: Sequence[str]) -> tuple[str | None, dict[str, int]]:
  """The vocabulary's file and the lengths."""
  path, lengths = None, LENGTHS
  for flag in flags:
    name, _, value = flag.removeprefix('--gin.').partition('=')
    if name == 'VOCABULARY_PATH':
      path = value.strip('\'"')
    elif name == 'TASK_FEATURE_LENGTHS':
      try:
        lengths = {k: int(v) for k, v in ast.literal_eval(value).items()}
      except (ValueError, SyntaxError, AttributeError, TypeError):
        lengths = {}
      if set(lengths) != set(LENGTHS) or min(lengths.values()) < 1:
        raise ValueError(
          "TASK_FEATURE_LENGTHS must be such as {'inputs': 512, 'targets': "
          f'16}}, got {value}.'
        )
    else:
      raise ValueError(
        f'--gin.{name} says nothing about tasks: there are VOCABULARY_PATH and '
        'TASK_FEATURE_LENGTHS.'
      )
  return path, lengths


# ---- all tasks ---------------------------------------------------------------


def table(names: Sequence[str], rows_dir: str | None = None) -> str:
  """All tasks but for their taskless forms, as text."""
  import seqio
  from tabulate import tabulate

  from prompt_jax import tasks

  sources = tasks.sources
  rows, mixtures, twins = [], [], set(names)
  for name in names:
    if name.removeprefix(sources.TASKLESS) in twins - {name}:
      continue
    if name in seqio.MixtureRegistry.names():
      parts = [
        t.name for t in seqio.get_subtasks(seqio.MixtureRegistry.get(name))
      ]
      mixtures.append((name, ', '.join(parts)))
      continue
    task = seqio.TaskRegistry.get(name)
    metrics = ', '.join(fn.__name__ for fn in task.metric_fns) or '-'
    sizes = _sizes(task, rows_dir)
    splits = ', '.join(f'{s} {_count(n)}' for s, n in sizes.items())
    rows.append((name, splits, metrics, _origin(task, rows_dir)))
  headers = ('task', 'splits and rows', 'metrics', 'source')
  both = [
    tabulate(rows, headers, maxcolwidths=[None, 40, 30, 40]),
    tabulate(mixtures, ('mixture', 'its tasks'), maxcolwidths=[None, 90]),
    'Each is there as taskless_<name>, too, without its name in the inputs; '
    'plain text (_span_corruption, _prefix_lm, _lm) is not.',
  ]
  return '\n\n'.join(both)


def _count(number: int | None) -> str:
  return '-' if number is None else f'{number:,}'


def _local(name: str, rows_dir: str | None) -> dict[str, pathlib.Path]:
  """Local files of a task; none where there are none."""
  from prompt_jax import tasks

  sources = tasks.sources
  if rows_dir is None or name not in sources.names():
    return {}
  try:
    return sources.local_files(name, rows_dir)
  except sources.NoLocalRows:
    return {}


def _sizes(task: Any, rows_dir: str | None) -> dict[str, int | None]:
  """Rows of each split, None where they cannot be known here."""
  files = _local(task.name, rows_dir)
  if files:
    return {split: _lines(path) for split, path in files.items()}
  found = _prepared(task)
  if found is not None:
    return {split: found.get(split) for split in task.splits}
  import seqio

  if isinstance(task.source, seqio.TfdsDataSource):
    return dict.fromkeys(task.splits)
  return {s: task.source.num_input_examples(s) for s in task.splits}


def _lines(path: pathlib.Path) -> int:
  """Rows of a file, unread: a grouped row counts once."""
  with path.open('rb') as lines:
    return sum(1 for line in lines if line.strip()) - (path.suffix != '.jsonl')


def _prepared(task: Any) -> dict[str, int] | None:
  """Rows of what TFDS has on this machine; None if it has not."""
  name = getattr(task.source, 'tfds_dataset', None)
  name = getattr(name, 'name', None)
  if not name:
    return None
  root = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  folder = pathlib.Path(root).expanduser() / name.replace(':', '/')
  info = folder / 'dataset_info.json'
  if not info.is_file():
    return None
  splits = json.loads(info.read_text())['splits']
  return {s['name']: sum(map(int, s['shardLengths'])) for s in splits}


def _origin(task: Any, rows_dir: str | None) -> str:
  """Where the rows come from, in words."""
  from prompt_jax import tasks

  sources = tasks.sources
  files = _local(task.name, rows_dir)
  if files:
    return str(next(iter(files.values())).parent)
  if task.name not in sources.names():
    return 'made here'
  data = sources.data_set(task.name)
  return f'TFDS {data.tfds}' if data.tfds else f'--rows_dir, {data.folders[0]}/'


# ---- one task ----------------------------------------------------------------


def describe(
  name: str,
  rows_dir: str | None = None,
  lengths: Mapping[str, int] = LENGTHS,
  unit: str = 'tokens',
) -> str:
  """Lengths and examples of a task, or of each task of a mixture, as text.

  Args:
    name: of a task or mixture that is registered.
    rows_dir: folder of local rows.
    lengths: of inputs and targets, for the share that would be cut off.
    unit: of the lengths.

  Raises:
    ValueError: no such task, or its rows are wrong.
  """
  from prompt_jax import datasets
  from prompt_jax import tasks

  provider = datasets.find_task(name)
  if rows_dir is not None:
    tasks.use_rows_dir(name, rows_dir)
  parts = []
  for task in datasets.subtasks(datasets.find_task(provider.name)):
    parts.append(_described(task, rows_dir, lengths, unit))
  return '\n\n'.join(parts)


def _described(
  task: Any, rows_dir: str | None, lengths: Mapping[str, int], unit: str
) -> str:
  from prompt_jax import tasks

  head = [f'{task.name}: rows of {_origin(task, rows_dir)}']
  texts = tasks.LABELS.get(task.name)
  if texts:
    head.append(
      'Labels: ' + ', '.join(f'{i} = {t}' for i, t in enumerate(texts))
    )
  names = ', '.join(fn.__name__ for fn in task.metric_fns)
  head.append(f'Metrics: {names or "none of its own"}')
  absent = _absent(task, rows_dir)
  if absent:
    return '\n'.join([*head, absent])
  return '\n'.join(
    [*head, '', _lengths(task, lengths, unit), '', _examples(task, lengths)]
  )


def _absent(task: Any, rows_dir: str | None) -> str:
  """Why there are no rows to show; '' if there are."""
  import seqio

  from prompt_jax import tasks

  sources = tasks.sources
  if rows_dir is not None or task.name not in sources.names():
    return ''
  data = sources.data_set(task.name)
  local = not isinstance(task.source, seqio.TfdsDataSource)
  if not local and _prepared(task) is not None:
    return ''
  return (
    'Its rows are not on this machine. '
    + ('' if local else 'A run downloads them; ')
    + f'--rows_dir=DIR reads {sources.expected(data, data.splits)}.'
  )


def _lengths(task: Any, lengths: Mapping[str, int], unit: str) -> str:
  """p50, p95 and longest of each split, and what would be cut off."""
  from tabulate import tabulate

  from prompt_jax import datasets
  from prompt_jax import tasks

  sources = tasks.sources
  if task.name in sources.names() and sources.data_set(task.name).tokens:
    return f'Its text is cut into pieces that fit {dict(lengths)}.'
  rows, complete = [], True
  for split in task.splits:
    report = datasets.length_report(task.name, split, lengths)
    complete &= report.complete
    for feature, f in report.features.items():
      cut = f'{f.num_longer} ({f.share_longer:.1%})'
      rows.append((split, feature, f.n, f.p50, f.p95, f.max, f.limit, cut))
  headers = (
    'split',
    'feature',
    'rows',
    'p50',
    'p95',
    'max',
    'limit',
    'cut off',
  )
  note = '' if complete else ' Of a longer split its first rows are counted.'
  return f'Lengths in {unit}, EOS included.{note}\n' + tabulate(rows, headers)


def _examples(task: Any, lengths: Mapping[str, int]) -> str:
  """The first examples of the first split, as text and as tokens."""
  split = next(iter(task.splits))
  ds = task.get_dataset(
    dict(lengths), split=split, shuffle=False, seed=0, try_in_mem_cache=False
  )
  out = [f'The first examples of {split}:']
  for i, example in enumerate(ds.take(_EXAMPLES).as_numpy_iterator()):
    out.append('')
    for feature in ('inputs', 'targets'):
      ids = [int(x) for x in example[feature] if x]
      vocabulary = task.output_features[feature].vocabulary
      text = example.get(f'{feature}_pretokenized')
      text = vocabulary.decode(ids) if text is None else text.decode()
      pieces = [f'{x} {vocabulary.decode([x])!r}' for x in ids[:_SHOWN]]
      dots = ', ...' if len(ids) > _SHOWN else ''
      out.append(f'[{i}] {feature}: {text}')
      out.append(f'    {len(ids)} tokens: {", ".join(pieces)}{dots}')
  return '\n'.join(out)
