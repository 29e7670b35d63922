r"""SeqIO's offline cache, written without Apache Beam.

    prompt-jax cache ... --gin_file=runs/cache.gin --output=/data/cache
    prompt-jax train ... --gin.USE_CACHED_TASKS=True \
      --gin.CACHE_DIRS="('/data/cache',)"

or, from Python, `caching.cache('glue_mnli', '/data/cache')`, and in every
program `seqio.add_global_cache_dirs(['/data/cache'])`; then
`datasets.DatasetConfig(..., use_cached=True)` reads what was tokenized. The
files are those of `seqio_cache_tasks`, which large sets may use instead.
What stands behind a task's `CacheDatasetPlaceholder` runs when it is read, so
that a cache serves all lengths. Not for tasks without that placeholder.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import seqio
from seqio import utils
import tensorflow as tf

from prompt_jax import datasets
from prompt_jax import vocabularies

# Of whose tokens a cache is; `seqio_cache_tasks` does not say it.
_VOCABULARY = 'vocabulary.txt'


def cache(
  name: str,
  folder: str | pathlib.Path,
  splits: Sequence[str] | None = None,
  num_shards: int = 1,
) -> dict[str, int]:
  """Writes the preprocessed examples of a task, or of a mixture's tasks.

  Args:
    name: of a registered task or mixture.
    folder: of all caches; a task gets its own in it.
    splits: which; None: all that a task has.
    num_shards: files of a split.

  Returns:
    Examples of each split, of all tasks together.

  Raises:
    ValueError: no such task or split, one that cannot be cached, a split
      without examples, or a cache that is there already.
  """
  sizes: dict[str, int] = {}
  for task in datasets.subtasks(datasets.find_task(name)):
    for split in splits or task.splits:
      datasets.check_split(task, split)
    if not task.supports_caching:
      raise ValueError(
        f'{task.name!r} has no CacheDatasetPlaceholder among its '
        'preprocessors, so nothing of it can be cached.'
      )
    place = os.path.join(folder, utils.get_task_dir_from_name(task.name))
    done = pathlib.Path(place) / 'COMPLETED'
    if done.exists():
      raise ValueError(
        f'A cache of {task.name!r} is there already: remove {place} to make '
        'it anew.'
      )
    done.parent.mkdir(parents=True, exist_ok=True)
    for split in splits or task.splits:
      count = _write(task, split, place, num_shards)
      sizes[split] = sizes.get(split, 0) + count
    (done.parent / _VOCABULARY).write_text(_fingerprint(task))
    done.write_text('')
  return sizes


def write(
  run: Any,
  *,
  output: str | None,
  splits: Sequence[str] | None = None,
  num_shards: int = 1,
) -> dict[str, int]:
  """`prompt-jax cache`: a run's task or mixture, by its vocabulary.

  Args:
    run: whose tasks; its method and its lengths do not matter.
    output: the folder of all caches.
    splits: as `cache`.
    num_shards: as `cache`.

  Raises:
    ValueError: no folder, or as `cache`.
  """
  if output is None:
    raise ValueError('Give --output=DIR, the folder of caches.')
  run.register_tasks()
  sizes = cache(run.mixture_or_task_name, output, splits, num_shards)
  counts = ', '.join(f'{split} {size:,}' for split, size in sizes.items())
  print(f'{output}: {run.mixture_or_task_name}, examples of {counts}')
  return sizes


def use(
  provider: seqio.Task | seqio.Mixture, folders: Sequence[str | pathlib.Path]
) -> None:
  """Makes seqio look for caches in folders, and checks that all are there.

  Raises:
    ValueError: a task has no cache, or was cached with another vocabulary.
  """
  known = list(utils.get_global_cache_dirs())
  places = [str(f) for f in folders if str(f) not in known]
  seqio.set_global_cache_dirs([*places, *known])
  for task in datasets.subtasks(provider):
    if not task.supports_caching or task.cache_dir is None:
      raise ValueError(
        f'USE_CACHED_TASKS: there is no cache of {task.name!r} in CACHE_DIRS = '
        f'{[*places, *known]}. `prompt-jax cache` writes one of a benchmark '
        'task; your own rows need none.'
      )
    path = pathlib.Path(task.cache_dir) / _VOCABULARY
    if path.exists() and path.read_text() != _fingerprint(task):
      raise ValueError(
        f'The cache of {task.name!r} in {task.cache_dir} has the tokens of '
        'another vocabulary: remove it and write it anew.'
      )


def _fingerprint(task: seqio.Task) -> str:
  return vocabularies.fingerprint(task.output_features['targets'].vocabulary)


@contextlib.contextmanager
def caches(*folders: str | pathlib.Path) -> Iterator[None]:
  """Folders in which seqio looks for caches, in a `with` block only."""
  before = utils.get_global_cache_dirs()
  seqio.set_global_cache_dirs([str(f) for f in (*folders, *before)])
  try:
    yield
  finally:
    seqio.set_global_cache_dirs(before)


def _write(task: seqio.Task, split: str, place: str, num_shards: int) -> int:
  """The files of one split, in the order of the source."""
  ds = task.source.get_dataset(split=split, shuffle=False, seed=0)
  ds = task.preprocess_precache(ds, seed=0)
  prefix = utils.get_cached_tfrecord_prefix(place, split)
  count, tokens = 0, {}
  with contextlib.ExitStack() as stack:
    files = [
      stack.enter_context(
        tf.io.TFRecordWriter(f'{prefix}-{i:05d}-of-{num_shards:05d}')
      )
      for i in range(num_shards)
    ]
    for example in ds.as_numpy_iterator():
      record = utils.dict_to_tfexample(dict(example))
      files[count % num_shards].write(record.SerializeToString())
      count += 1
      for key in task.output_features:
        if key in example:
          tokens.setdefault(key, []).append(np.size(example[key]))
  if not count:
    raise ValueError(f'Split {split!r} of {task.name!r} has no examples.')
  spec: Any = ds.element_spec
  info = {
    'num_shards': num_shards,
    'features': {
      key: {'shape': found.shape.as_list(), 'dtype': found.dtype.name}
      for key, found in spec.items()
    },
    'seqio_version': seqio.__version__,
  }
  stats = {'examples': count}
  for key, sizes in tokens.items():
    stats |= {f'{key}_tokens': sum(sizes), f'{key}_max_tokens': max(sizes)}
  _json(utils.get_cached_info_path(place, split), info)
  _json(utils.get_cached_stats_path(place, split), stats)
  return count


def _json(path: str, content: Any) -> None:
  pathlib.Path(path).write_text(json.dumps(content, default=int))
