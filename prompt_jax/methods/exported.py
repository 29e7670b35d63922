"""What a method has come to: its deltas, and nothing that made them.

`prompt-jax export` writes them where they do not depend on the batch: a prompt
without the network that reparameterised it, prefixes as plain keys and values.
"""

import dataclasses
import functools
import json
import os
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax.deltas.hooks import RANKS
from prompt_jax.methods import base

_PAIRS = ('low_rank', 'prefix')
_ADAPTERS = ('bottleneck', 'parallel')
FILE = 'trainable.safetensors'


class Exported(nn.Module):
  """The deltas of a file.

  Attributes:
    directory: what `prompt-jax export` wrote, or the file in it.

  Raises:
    CheckpointError: the file is not there, not whole, or no such export.
    ValueError: packed rows, for prefixes that precede the text.
  """

  directory: str

  @property
  def soft_tokens(self) -> tuple[int, int] | None:
    """(groups, rows of one group), for the data side; None without rows."""
    found = _read(self.directory)[1]['soft_tokens']
    return tuple(found) if found else None

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return (self.directory,)

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the file's deltas on the network."""
    arrays, header = _read(self.directory)
    if context.packed and any(
      p.endswith('/preceding') for p in header['deltas']
    ):
      raise ValueError(
        f'{self.directory}: prefixes that precede the text cannot be used on '
        'packed rows, whose examples begin anywhere: take PACK = False.'
      )
    found = base.params_at(
      self,
      {
        path: (lambda *_, x=x: x, x.shape, (None,) * x.ndim)
        for path, x in arrays.items()
      },
    )
    out: deltas.Deltas = {}
    for path, fields in header['deltas'].items():
      parts = [f'{path}/{leaf}' for leaf in fields['leaves']]
      out[path] = _delta(path, [found[p] for p in parts], fields, context)
    return out


def pack(
  laid: deltas.Deltas, soft_rows: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Deltas as arrays by name, and the header that says how to read them.

  Args:
    laid: what a method returned, on the host.
    soft_rows: which row of `rows` is soft token j of task g, [G, P].

  Raises:
    ValueError: some of them depend on the batch.
  """
  arrays, fields = {}, {}
  for path, delta in laid.items():
    if delta.group is not None:
      raise ValueError(
        f'{path} depends on the inputs, so the method cannot be exported; its '
        'trainable.safetensors is what it needs.'
      )
    if path.endswith('/rows'):
      rows = delta.table[:, soft_rows.ravel()]
      delta = dataclasses.replace(delta, table=rows)
    leaves = jax.tree_util.tree_leaves_with_path(delta.table)
    names = [jax.tree_util.keystr(p, simple=True) or 'table' for p, _ in leaves]
    for name, (_, x) in zip(names, leaves, strict=True):
      arrays[f'{path}/{name}'] = np.asarray(x, np.float32)
    fields[path] = {
      'leaves': names,
      'dropout_rate': delta.dropout_rate,
      'activation': getattr(delta.table, 'activation', None),
    }
  shape = soft_rows.shape if soft_rows.size else None
  return arrays, {'deltas': fields, 'soft_tokens': shape}


def _delta(
  path: str, leaves: list[Any], fields: Any, context: base.Context
) -> deltas.Routed:
  kind = path.rsplit('/', 1)[-1]
  table = leaves[0]
  if kind in _PAIRS:
    table = tuple(leaves)
  elif kind in _ADAPTERS:
    named = dict(zip(fields['leaves'], leaves, strict=True))
    table = deltas.Adapter(**named, activation=fields['activation'])
  lead = leaves[0].shape[: leaves[0].ndim - RANKS[kind]]
  routed = context.route(table, lead)
  return dataclasses.replace(routed, dropout_rate=fields['dropout_rate'])


@functools.lru_cache(maxsize=4)
def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  file = os.path.join(path, FILE) if os.path.isdir(path) else path
  arrays, header = checkpoints.load_trainable(file)
  if 'exported' not in header:
    raise checkpoints.CheckpointError(
      f'{file} holds the parameters of a method, not its deltas: write those '
      'by `prompt-jax export --model_dir=RUN --output=DIR`.'
    )
  own = {
    name.removeprefix('method/'): x
    for name, x in arrays.items()
    if name.startswith('method/')
  }
  return own, json.loads(header['exported'])
