"""Reads T5X checkpoints: the legacy (msgpack) form and the Orbax form.

Legacy, `checkpoint_<step>/`: the file `checkpoint` is a msgpack tree {version,
optimizer: {target, state}}; a leaf is an array, or the specification of a zarr
array in a directory beside the file. Orbax, `checkpoint_<step>/state/`: a tree
{target, state} listed in `_METADATA` (early versions: a msgpack file of
placeholders); each leaf is a zarr array, all of them in one OCDBT database or
in a directory each. TensorStore reads the arrays, local or `gs://`.

Not for T5's TensorFlow checkpoints, and not for writing.

Source: google-research/t5x `t5x/checkpoints.py` (`Checkpointer`,
`OrbaxCheckpointManagerInterface`) and `t5x/examples/scalable_t5/network.py`.
"""

from collections.abc import Mapping
import functools
import json
import os
import re
from typing import Any

from absl import logging
from flax import serialization
from flax import traverse_util
import numpy as np
import tensorstore as ts

from prompt_jax.convert import base

# Flat names to a TensorStore specification (a dict) or an array.
Entries = dict[str, Any]

_PLACEHOLDER = 'PLACEHOLDER://'
_CHECKPOINT_DIR = re.compile(r'checkpoint_(\d+)')
_POSITION_TABLE = 'relpos_bias/rel_embedding'


def open_t5x(path: str) -> base.BaseCheckpoint:
  """Opens a T5X checkpoint; see `prompt_jax.convert.open_checkpoint`."""
  path, kind, entries = _find(path)
  target = {
    name.removeprefix('target/'): entry
    for name, entry in entries.items()
    if name.startswith('target/')
  }
  if not target:
    raise base.CheckpointError(
      f'{path} has no `target`, under which T5X keeps the parameters; it has '
      f'{sorted({name.split("/")[0] for name in entries})}.'
    )
  leaves = _share_position_tables(_unscan(_open(target), path), path)
  step = None
  if 'state/step' in entries:
    [leaf] = _open({'state/step': entries['state/step']}).values()
    step = int(leaf.array())
  return base.BaseCheckpoint(path, kind, step, leaves)


def read_t5x_state(path: str) -> dict[str, np.ndarray]:
  """Everything in a T5X checkpoint, under its names there; reads it all.

  Names are `target/...` (parameters), `state/step` and, for Adafactor,
  `state/param_states/<parameter>/{m,v,v_row,v_col}`, where an accumulator that
  is not in use is one zero. Scanned checkpoints stay scanned.

  Raises:
    CheckpointError: as `open_checkpoint`.
  """
  _, _, entries = _find(path)
  return {name: leaf.array() for name, leaf in _open(entries).items()}


# Files, local or in a bucket.


def kvstore_spec(path: str) -> dict[str, str]:
  """TensorStore's specification of a directory, local or `gs://`."""
  bucket = re.fullmatch(r'gs://([^/]+)/*(.*?)/*', path)
  if bucket:
    folder = f'{bucket[2]}/' if bucket[2] else ''
    return {'driver': 'gcs', 'bucket': bucket[1], 'path': folder}
  folder = os.path.abspath(os.path.expanduser(path))
  return {'driver': 'file', 'path': os.path.join(folder, '')}


def _read_file(path: str, name: str) -> bytes | None:
  """Contents of a file, None if there is none."""
  try:
    store = ts.KvStore.open(kvstore_spec(path)).result()
    found = store.read(name).result()
  except ValueError as error:
    raise base.CheckpointError(f'Cannot read {path}/{name}: {error}') from error
  return found.value if found.state == 'value' else None


def _children(path: str) -> set[str]:
  """Names in a directory."""
  if path.startswith('gs://'):
    store = ts.KvStore.open(kvstore_spec(path)).result()
    return {key.decode().split('/')[0] for key in store.list().result()}
  path = os.path.expanduser(path)
  return set(os.listdir(path)) if os.path.isdir(path) else set()


def _find(path: str) -> tuple[str, str, Entries]:
  """Directory, kind and entries of the checkpoint at `path`, or in it."""
  path = path.rstrip('/')
  if os.path.basename(path) == 'checkpoint' and not os.path.isdir(path):
    path = os.path.dirname(path)  # T5X takes the path of the file, too.
  if found := _load(path):
    return path, *found
  children = _children(path)
  matches = map(_CHECKPOINT_DIR.fullmatch, children)
  steps = sorted(int(match[1]) for match in matches if match)
  if steps:
    newest = f'{path}/checkpoint_{steps[-1]}'
    logging.info('%s has steps %s: reading the newest.', path, steps)
    if found := _load(newest):
      return newest, *found
    path, children = newest, _children(newest)
  half = sorted(name for name in children if 'tmp' in name)
  raise base.CheckpointError(
    f'No checkpoint in {path}. Looked for: checkpoint (T5X); state/_METADATA, '
    '_METADATA or state/checkpoint (T5X with Orbax); checkpoint_<step>/ (one or'
    ' several of these); config.json (Hugging Face, local). Found: '
    f'{", ".join(sorted(children)[:20]) or "nothing"}.'
    + (f' Not written to the end: {", ".join(half)}.' if half else '')
  )


def _load(path: str) -> tuple[str, Entries] | None:
  """Kind and entries of the checkpoint in this directory, if there is one."""
  for folder in (f'{path}/state', path):
    if (data := _read_file(folder, '_METADATA')) is not None:
      return 't5x-orbax', _orbax_entries(folder, data)
  for folder in (f'{path}/state', path):
    if (data := _read_file(folder, 'checkpoint')) is not None:
      return _msgpack_entries(folder, data)
  return None


# From a directory to entries.


def _orbax_entries(folder: str, metadata: bytes) -> Entries:
  try:
    tree = json.loads(metadata)
    names = [
      [part['key'] for part in leaf['key_metadata']]
      for leaf in tree['tree_metadata'].values()
      if not leaf['value_metadata'].get('skip_deserialize')
    ]
  except (ValueError, KeyError, TypeError) as error:
    raise base.CheckpointError(
      f'{folder}/_METADATA is damaged: {error!r}.'
    ) from error
  driver = 'zarr3' if tree.get('use_zarr3') else 'zarr'
  kvstore = _orbax_kvstore(folder)
  return {
    '/'.join(name): _array_spec(driver, kvstore, '.'.join(name))
    for name in names
  }


def _orbax_kvstore(folder: str) -> dict[str, Any]:
  if _read_file(folder, 'manifest.ocdbt') is None:
    return kvstore_spec(folder)
  return {'driver': 'ocdbt', 'base': kvstore_spec(folder), 'path': ''}


def _array_spec(
  driver: str, kvstore: Mapping[str, Any], name: str
) -> dict[str, Any]:
  """Specification of the array `name` (a directory, in effect) in a store."""
  path = f'{kvstore["path"]}{name.rstrip("/")}/'
  return {
    'driver': driver,
    'kvstore': {**kvstore, 'path': path},
    # Nobody writes these arrays without their zeros: a chunk that is not there
    # was lost, and would otherwise be read as zero.
    'fill_missing_data_reads': False,
  }


def _msgpack_entries(folder: str, data: bytes) -> tuple[str, Entries]:
  file = f'{folder}/checkpoint'
  if data.startswith(b'model_checkpoint_path'):
    raise base.CheckpointError(
      f'{file} belongs to a TensorFlow checkpoint of T5; convert it with T5X.'
    )
  try:
    tree: Any = serialization.msgpack_restore(data)
    version = tree.get('version')
    tree = tree if version is None else tree['optimizer']
    flat = traverse_util.flatten_dict(tree, is_leaf=_is_leaf, sep='/')
  except Exception as error:  # Bytes at random raise any of a dozen types.
    raise base.CheckpointError(
      f'{file} ({len(data)} bytes) is damaged or cut off: {error!r}.'
    ) from error
  if version is not None and version not in (2, 3):
    raise base.CheckpointError(f'{file} has version {version}, not 2 or 3.')
  orbax = functools.cache(functools.partial(_orbax_kvstore, folder))
  entries = {}
  for name, value in flat.items():
    if isinstance(value, dict):
      entries[name] = _from_placeholder(folder, name, value)
    elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
      stored = value.removeprefix(_PLACEHOLDER)
      entries[name] = _array_spec('zarr', orbax(), stored)
    elif value is not None:
      entries[name] = np.asarray(value)
  return ('t5x-orbax' if version is None else 't5x'), entries


def _is_leaf(_: Any, value: Any) -> bool:
  keys = {'driver', 'kvstore', 'metadata'}
  return not isinstance(value, dict) or keys <= value.keys()


def _from_placeholder(
  folder: str, name: str, value: Mapping[str, Any]
) -> dict[str, Any]:
  """The specification in a legacy checkpoint, at the place where it now is.

  The drivers `gfile`, `file` and `gcs` (with a dummy bucket) all mean beside
  the checkpoint, wherever that has been moved to.
  """
  kvstore = value['kvstore']
  # Before TensorStore 0.1.14 the path stood outside `kvstore`.
  path = kvstore.get('path', value.get('path'))
  if (
    value['driver'] != 'zarr'
    or kvstore['driver'] not in ('gfile', 'file', 'gcs')
    or path is None
  ):
    raise base.CheckpointError(
      f'{folder}/checkpoint stores {name} in an unknown way: {value}.'
    )
  if path.startswith(('/', 'gs://')):
    spec = _array_spec('zarr', kvstore_spec(path), '')
  else:
    spec = _array_spec('zarr', kvstore_spec(folder), path)
  # TensorStore compares it with the array's own.
  return {**spec, 'metadata': {'shape': value['metadata']['shape']}}


# From entries to leaves.


def _open(entries: Entries) -> dict[str, base.Leaf]:
  """A leaf for each entry; opens all arrays at once, since a bucket is slow."""
  futures = {
    name: ts.open(entry, open=True, read=True)
    for name, entry in entries.items()
    if isinstance(entry, dict)
  }
  leaves = {}
  for name, entry in entries.items():
    if name not in futures:
      leaves[name] = base.from_array(_as_bfloat16(entry))
      continue
    where = f'{name} ({_place(entry)})'
    try:
      leaves[name] = _from_store(futures[name].result(), where)
    except ValueError as error:
      raise base.CheckpointError(
        f'Cannot open {where}: {_short(error)}'
      ) from error
  return leaves


def _place(spec: Mapping[str, Any]) -> str:
  kvstore = spec['kvstore']
  parent = kvstore.get('base', {})
  bucket = parent.get('bucket', kvstore.get('bucket'))
  path = f'{parent.get("path", "")}{kvstore["path"]}'
  return f'gs://{bucket}/{path}' if bucket else path


def _short(error: Exception) -> str:
  """TensorStore's message without the specification, which we name better."""
  return str(error).partition(' [tensorstore_spec=')[0]


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
  # Version 2 stored the bytes of bfloat16 as uint16; no leaf is one otherwise.
  return array.view(np.dtype('bfloat16')) if array.dtype == np.uint16 else array


def _from_store(store: Any, where: str) -> base.Leaf:
  def read(index: base.Index) -> np.ndarray:
    try:
      return _as_bfloat16(np.asarray(store[index].read().result()))
    except ValueError as error:
      raise base.CheckpointError(
        f'Cannot read {where}: {_short(error)}'
      ) from error

  dtype = _as_bfloat16(np.empty(0, store.dtype.numpy_dtype)).dtype
  return base.Leaf(tuple(store.shape), dtype, read)


# From T5X's scalable network to its minimal one.


def _unscan(leaves: Mapping[str, base.Leaf], path: str) -> dict[str, base.Leaf]:
  """Cuts `encoder/encoder/...`, layers on axis 1, into `encoder/layers_i/...`.

  Raises:
    CheckpointError: the leaves of a stack differ in their number of layers.
  """
  cut = {}
  lengths = {}
  for name, leaf in leaves.items():
    stack, _, rest = name.partition('/')
    if stack not in ('encoder', 'decoder') or not rest.startswith(f'{stack}/'):
      cut[name] = leaf
      continue
    length = leaf.shape[1] if len(leaf.shape) > 1 else None
    if length is None or lengths.setdefault(stack, length) != length:
      raise base.CheckpointError(
        f'{path}: {name} has shape {list(leaf.shape)}; expected '
        f'{lengths.get(stack, "the")} layers of the {stack} on axis 1.'
      )
    rest = rest.removeprefix(f'{stack}/')
    for i in range(length):
      cut[f'{stack}/layers_{i}/{rest}'] = base.layer(leaf, i, axis=1)
  return cut


def _share_position_tables(
  leaves: dict[str, base.Leaf], path: str
) -> dict[str, base.Leaf]:
  """One relative position table a stack where each layer has its own.

  This reads the tables, some kilobytes.

  Raises:
    CheckpointError: the tables differ: this T5 shares one.
  """
  for stack in ('encoder', 'decoder'):
    pattern = re.compile(rf'{stack}/layers_(\d+)/{_POSITION_TABLE}')
    names = {
      int(match[1]): name
      for name in leaves
      if (match := pattern.fullmatch(name))
    }
    tables = {i: leaves.pop(name) for i, name in sorted(names.items())}
    if not tables:
      continue
    arrays = {i: t.array().astype(np.float32) for i, t in tables.items()}
    first = next(iter(arrays))
    far, worst = max(
      (float(np.abs(a - arrays[first]).max()), i) for i, a in arrays.items()
    )
    if far > 0:
      raise base.CheckpointError(
        f'{path}: the relative position tables of the {stack} differ from layer'
        f' to layer (layers {first} and {worst} by up to {far:.6g}), as in a '
        'network that was trained with a table a layer. This T5 has one table '
        'for all layers of a stack, so such a model cannot be represented.'
      )
    leaves[f'{stack}/{_POSITION_TABLE}'] = tables[first]
  return leaves
