"""What a base checkpoint is, and how it is laid on a model's parameters.

A reader (`t5x.py`, `huggingface.py`) turns files into `Leaf`s: arrays whose
shape is known and whose numbers are not read yet, under T5X's minimal names
(`encoder/layers_0/attention/query/kernel`). `fit` matches them with the names
and shapes that a model expects. Reading slices is left to the leaves, so that a
device reads no more than its shard.

Not for going on with a run (`prompt_jax.checkpoints`), and not for writing.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import difflib
import math
import re

import jax
import numpy as np

Index = tuple[slice, ...]

# Kernels that T5X's scalable network stores with heads and head size apart.
_ATTENTION_KERNEL = re.compile(r'attention/(query|key|value|out)/kernel$')
_LAYER = re.compile(r'(?<=/)layers_(\d+)(?=/)')


class CheckpointError(ValueError):
  """A checkpoint is absent, incomplete, damaged or of an unknown kind."""


class CheckpointMismatch(ValueError):
  """A checkpoint is sound but belongs to another model."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a checkpoint, not yet read.

  Attributes:
    shape: its shape.
    dtype: the type that `read` returns.
    read: from one slice per axis, inside the shape and of step 1, to the
      numbers there; it touches no more of the checkpoint than holds them. Fits
      `jax.make_array_from_callback`.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  def array(self) -> np.ndarray:
    """All of it."""
    return self.read((slice(None),) * len(self.shape))


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """An open checkpoint of a base model.

  Attributes:
    path: the directory that was opened.
    kind: 't5x', 't5x-orbax', 'huggingface' or 'prompt_jax'.
    step: training step, None where the format has none.
    leaves: parameters by their minimal T5X name. Scanned checkpoints are cut
      into layers.
  """

  path: str
  kind: str
  step: int | None
  leaves: Mapping[str, Leaf]


# Lazy views of leaves.


def from_array(array: np.ndarray) -> Leaf:
  """A leaf of numbers that are in memory already."""
  return Leaf(array.shape, array.dtype, lambda index: array[index])


def transpose(leaf: Leaf) -> Leaf:
  """The transpose of a matrix."""
  return Leaf(
    leaf.shape[::-1], leaf.dtype, lambda index: leaf.read(index[::-1]).T
  )


@dataclasses.dataclass(frozen=True)
class _ReadLayer:
  """Reads layer `i` of `parent`, whose layers lie on `axis`."""

  parent: Leaf
  i: int
  axis: int

  def __call__(self, index: Index) -> np.ndarray:
    a, one = self.axis, slice(self.i, self.i + 1)
    return self.parent.read((*index[:a], one, *index[a:])).squeeze(a)


def layer(leaf: Leaf, i: int, axis: int) -> Leaf:
  """Layer `i` of a leaf whose layers lie on `axis`."""
  shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
  return Leaf(shape, leaf.dtype, _ReadLayer(leaf, i, axis))


def stack(leaves: Sequence[Leaf]) -> Leaf:
  """Leaves of one shape on a new axis 0; reads only the layers asked for."""
  shape = (len(leaves), *leaves[0].shape)
  first = leaves[0].read
  if isinstance(first, _ReadLayer) and all(
    leaf.read == _ReadLayer(first.parent, i, first.axis)
    for i, leaf in enumerate(leaves)
  ):
    # Layers of one stored array: cutting them out one by one would read and
    # decompress each of its chunks once a layer.
    parent, a = first.parent, first.axis

    def read(index: Index) -> np.ndarray:
      block = parent.read((*index[1 : a + 1], index[0], *index[a + 1 :]))
      return np.moveaxis(block, a, 0)

  else:

    def read(index: Index) -> np.ndarray:
      return np.stack([leaf.read(index[1:]) for leaf in leaves[index[0]]])

  return Leaf(shape, leaves[0].dtype, read)


def merge(leaf: Leaf, axis: int) -> Leaf:
  """Axes `axis` and `axis + 1` as one, in row-major order; `axis` < -1."""
  a = len(leaf.shape) + axis
  outer, inner = leaf.shape[a], leaf.shape[a + 1]
  shape = (*leaf.shape[:a], outer * inner, *leaf.shape[a + 2 :])

  def read(index: Index) -> np.ndarray:
    start, stop, _ = index[a].indices(outer * inner)
    low, high = start // inner, math.ceil(stop / inner)
    block = leaf.read(
      (*index[:a], slice(low, high), slice(None), *index[a + 1 :])
    )
    merged = block.reshape(*block.shape[:a], -1, *block.shape[a + 2 :])
    cut = slice(start - low * inner, stop - low * inner)
    return merged[(slice(None),) * a + (cut,)]

  return Leaf(shape, leaf.dtype, read)


# Matching.


@dataclasses.dataclass(frozen=True)
class _Row:
  """One name (of the unrolled model) and what was found for it."""

  name: str
  expected: tuple[int, ...] | None
  found: Leaf | None
  status: str  # 'ok', 'missing', 'extra' or 'misshapen'


def fit(
  checkpoint: BaseCheckpoint, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Leaf]:
  """Leaves for each expected parameter, of exactly its shape; reads nothing.

  Args:
    checkpoint: an open checkpoint.
    expected: flat names of the model's parameters, unrolled
      (`encoder/layers_0/...`) or scanned (`encoder/layers/...`, layers on axis
      0), with their shapes. Types are not compared: the model has its own.

  Raises:
    CheckpointMismatch: some leaf is missing, extra or of another shape; all of
      them are listed.
  """
  rows = _match(checkpoint, expected)
  if any(row.status != 'ok' for row in rows):
    raise CheckpointMismatch(_explain(checkpoint, rows))
  fitted = {}
  for name, struct in expected.items():
    leaves = [checkpoint.leaves[n] for n, _ in _unrolled(name, struct.shape)]
    leaf = stack(leaves) if _is_scanned(name) else leaves[0]
    fitted[name] = _reshape(leaf, name, struct.shape)
  return fitted


def report(
  checkpoint: BaseCheckpoint, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> str:
  """Table of all leaves: name, found and expected shape, type, verdict."""
  rows = _match(checkpoint, expected)
  bad = collections.Counter(row.status for row in rows if row.status != 'ok')
  verdict = ', '.join(f'{n} {status}' for status, n in bad.items()) or 'fits'
  step = '' if checkpoint.step is None else f', step {checkpoint.step}'
  head = f'{checkpoint.path} ({checkpoint.kind}{step}): {verdict}'
  return '\n'.join([head, *_table(_grouped(rows))])


def _is_scanned(name: str) -> bool:
  return '/layers/' in name


def _unrolled(
  name: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
  """Names and shapes of the layers that a scanned parameter stands for."""
  if not _is_scanned(name):
    return [(name, shape)]
  return [
    (name.replace('/layers/', f'/layers_{i}/', 1), shape[1:])
    for i in range(shape[0])
  ]


def _reshape(leaf: Leaf, name: str, shape: tuple[int, ...]) -> Leaf:
  """Merges heads and head size of an attention kernel if `shape` wants it."""
  kernel = _ATTENTION_KERNEL.search(name)
  if kernel and len(leaf.shape) == len(shape) + 1:
    # [D, H, K] -> [D, H*K]; out: [H, K, D] -> [H*K, D].
    return merge(leaf, -3 if kernel[1] == 'out' else -2)
  return leaf


def _match(
  checkpoint: BaseCheckpoint, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> list[_Row]:
  wanted = {
    name: shape
    for scanned, struct in expected.items()
    for name, shape in _unrolled(scanned, tuple(struct.shape))
  }
  rows = []
  for name, shape in wanted.items():
    leaf = checkpoint.leaves.get(name)
    if leaf is None:
      status = 'missing'
    elif _reshape(leaf, name, shape).shape == shape:
      status = 'ok'
    else:
      status = 'misshapen'
    rows.append(_Row(name, shape, leaf, status))
  rows += [
    _Row(name, None, leaf, 'extra')
    for name, leaf in checkpoint.leaves.items()
    if name not in wanted
  ]
  return rows


def _grouped(rows: Iterable[_Row]) -> list[_Row]:
  """One row for layers that differ in nothing: `layers_{0..11}`."""
  groups = collections.defaultdict(list)
  for row in rows:
    found = row.found and (row.found.shape, row.found.dtype)
    key = (_LAYER.sub('layers_{}', row.name), row.expected, found, row.status)
    groups[key].append(row)
  grouped = []
  for (name, *_), members in groups.items():
    layers = sorted(
      int(match[1]) for row in members if (match := _LAYER.search(row.name))
    )
    if len(layers) > 1:
      first, last = layers[0], layers[-1]
      consecutive = last - first + 1 == len(layers)
      numbers = (
        f'{first}..{last}' if consecutive else ','.join(map(str, layers))
      )
      name = name.replace('{}', f'{{{numbers}}}')
    else:
      name = members[0].name
    grouped.append(dataclasses.replace(members[0], name=name))
  return sorted(grouped, key=lambda row: row.name)


def _table(rows: Sequence[_Row]) -> list[str]:
  cells = [('name', 'found', 'expected', 'dtype', '')]
  for row in rows:
    cells.append(
      (
        row.name,
        str(list(row.found.shape)) if row.found else '-',
        '-' if row.expected is None else str(list(row.expected)),
        str(row.found.dtype) if row.found else '-',
        row.status,
      )
    )
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    '  '.join(
      cell.ljust(w) for cell, w in zip(line, widths, strict=True)
    ).rstrip()
    for line in cells
  ]


def _explain(checkpoint: BaseCheckpoint, rows: Sequence[_Row]) -> str:
  bad = _grouped(row for row in rows if row.status != 'ok')
  names = {
    s: [r.name for r in bad if r.status == s] for s in ('missing', 'extra')
  }
  other = {'missing': names['extra'], 'extra': names['missing']}
  hints = [
    f'  {row.name} ({row.status}): close to {", ".join(near)}'
    for row in bad
    if (near := difflib.get_close_matches(row.name, other.get(row.status, [])))
  ]
  counts = collections.Counter(row.status for row in rows)
  summary = ', '.join(
    f'{counts[s]} {s}' for s in ('missing', 'extra', 'misshapen') if counts[s]
  )
  lines = [
    f'{checkpoint.path} ({checkpoint.kind}) does not fit the model: {summary}; '
    f'{counts["ok"]} leaves fit.',
    *_table(bad),
  ]
  if hints:
    lines += ['Near misses:', *hints]
  lines.append('Take the gin model file that this checkpoint was made for.')
  return '\n'.join(lines)
