"""Operations on whole Deltas: combine, check, repeat, fold into weights."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
from typing import Any

from flax import struct
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array

from prompt_jax.deltas.hooks import KINDS
from prompt_jax.deltas.hooks import RANKS
from prompt_jax.deltas.hooks import Deltas
from prompt_jax.deltas.hooks import Routed


@struct.dataclass
class OwnScale(Routed):
  """A `scale` made for the kernel with its method's own change and no other.

  DoRA's: over the column lengths of W + A B. Where another method changes the
  kernel too, those lengths are wrong, so that `combine` refuses it.
  """


def _concatenate(axis: int) -> Callable[[Array, Array], Array]:
  return lambda x, y: jnp.concatenate([x, y], axis)


_JOIN: Mapping[str, Callable[[Any, Any], Any]] = {
  'rows': _concatenate(-2),
  'low_rank': lambda x, y: (
    jnp.concatenate([x[0], y[0]], -1),
    jnp.concatenate([x[1], y[1]], -2),
  ),
  'kernel': jnp.add,
  'scale': jnp.multiply,
  'shift': jnp.add,
  'prefix': lambda x, y: tuple(map(_concatenate(-3), x, y)),
  'preceding': _concatenate(-1),
}


def _groups(path: str, delta: Routed) -> tuple[int, int]:
  """The axis of the groups, and their number G."""
  leaf = jax.tree.leaves(delta.table)[0]
  axis = leaf.ndim - RANKS[path.rsplit('/', 1)[-1]]
  return axis, leaf.shape[axis]


def _repeat(table: Any, times: int, axis: int) -> Any:
  if times == 1:
    return table
  return jax.tree.map(lambda t: jnp.repeat(t, times, axis), table)


def _by_example(delta: Routed, axis: int) -> Routed:
  """The same changes, one for each example of the batch."""
  if delta.group is None:
    return delta
  group = delta.group.reshape(-1, delta.group.shape[-1])[0]  # as in any layer
  table = jax.tree.map(lambda t: jnp.take(t, group, axis=axis), delta.table)
  return dataclasses.replace(delta, table=table, group=None)


def _share_groups(path: str, x: Routed, y: Routed) -> tuple[Any, Any, Any]:
  """Both tables with one G, and their common route."""
  (axis, groups_x), (_, groups_y) = _groups(path, x), _groups(path, y)
  one_route = (x.group is None) != (y.group is None)
  if one_route and (groups_x if x.group is None else groups_y) > 1:
    # One is by task, the other by example: both by example.
    x, y = _by_example(x, axis), _by_example(y, axis)
    groups_x, groups_y = _groups(path, x)[1], _groups(path, y)[1]
  groups = max(groups_x, groups_y)
  if not {groups_x, groups_y} <= {1, groups}:
    raise ValueError(
      f'{path}: two methods set it for {groups_x} and for {groups_y} groups; '
      'they combine where the numbers are equal or one of them is 1.'
    )
  x_table = _repeat(x.table, groups // groups_x, axis)
  y_table = _repeat(y.table, groups // groups_y, axis)
  return x_table, y_table, x.group if y.group is None else y.group


def combine(x: Deltas, y: Deltas) -> Deltas:
  """The change that both make; `{}` is the identity, and it is associative.

  At a path that both set, `low_rank` concatenates over R, `scale` multiplies,
  `shift` adds, `rows` and `prefix` concatenate (x's come first).

  Raises:
    ValueError: both set a kind that does not combine (`bottleneck`: two
      non-linear maps of one output have no order), low ranks of unequal
      dropout, for unequal groups, or a kernel of which the other scales the
      columns by their lengths (`OwnScale`).
  """
  for own, other in ((x, y), (y, x)):
    _check_own_scales(own, other)
  out = {**x, **y}
  for path in x.keys() & y.keys():
    join = _JOIN.get(path.rsplit('/', 1)[-1])
    rate = x[path].dropout_rate
    if join is None or rate != y[path].dropout_rate:
      raise ValueError(
        f'{path}: two methods set it, and it does not combine. Take one '
        'of them off the chain, or give them different targets.'
      )
    table_x, table_y, group = _share_groups(path, x[path], y[path])
    kinds = {type(x[path]), type(y[path])}
    made = OwnScale if OwnScale in kinds else Routed
    out[path] = made(join(table_x, table_y), group, rate)
  return out


def _check_own_scales(own: Deltas, other: Deltas) -> None:
  for path, delta in own.items():
    if not isinstance(delta, OwnScale):
      continue
    site = path.rpartition('/')[0]
    for kind in ('low_rank', 'kernel'):
      if f'{site}/{kind}' in other:
        raise ValueError(
          f'{site}: a method (DoRA) scales the columns of its kernel by their '
          f'lengths, and another changes the same kernel ({kind}), which those '
          'lengths would not count. Take one of them off the chain, or give '
          'them different targets.'
        )


def collection(deltas: Deltas) -> dict[str, Any]:
  """The nested form that linen reads as the collection `deltas`."""
  return traverse_util.unflatten_dict(deltas, sep='/')


def repeat(deltas: Deltas, times: int) -> Deltas:
  """The deltas of a batch whose every example stands `times` times (beams)."""

  def one(path: str, delta: Routed) -> Routed:
    if path.endswith('/hidden'):  # of the encoder, which has no beams
      return delta
    if delta.group is not None:
      return dataclasses.replace(
        delta, group=jnp.repeat(delta.group, times, axis=-1)
      )
    axis, groups = _groups(path, delta)
    if groups == 1:
      return delta
    return dataclasses.replace(delta, table=_repeat(delta.table, times, axis))

  return {path: one(path, delta) for path, delta in deltas.items()}


def near_misses(name: str, names: Iterable[str]) -> str:
  """' Did you mean ...?' for an error message; empty if nothing is near."""
  close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
  return f' Did you mean {" or ".join(map(repr, close))}?' if close else ''


def check(deltas: Deltas, modules: Iterable[str]) -> None:
  """Refuses a delta at a path that the network does not read.

  Args:
    deltas: what a method returned.
    modules: paths of all modules of the network, e.g. `encoder/layers/mlp`.

  Raises:
    ValueError: an unknown module or kind, with what comes near.
  """
  modules = set(modules)
  for path in deltas:
    module, _, kind = path.rpartition('/')
    if kind not in KINDS:
      raise ValueError(
        f'{path}: unknown kind of delta {kind!r}; there are '
        f'{", ".join(KINDS)}.{near_misses(kind, KINDS)}'
      )
    if module not in modules:
      raise ValueError(
        f'{path}: the network has no module {module!r}.'
        f'{near_misses(module, modules)}'
      )


def merge_into_weights(deltas: Deltas, params: Any) -> Any:
  """The same network with its deltas folded into the kernels, for export.

  `(W + W' + A B) * scale`; the result needs no method any more.

  Raises:
    ValueError: a delta that is no change of a weight (`rows`, `prefix`,
      `shift`, `bottleneck`) or that differs between examples.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  for path, delta in sorted(deltas.items()):  # scale comes last
    module, _, kind = path.rpartition('/')
    shared = delta.group is None and _groups(path, delta)[1] == 1
    if not shared or kind not in ('kernel', 'low_rank', 'scale'):
      raise ValueError(
        f'{path}: {kind}{"" if shared else " that differs by example"} cannot '
        'be folded into a weight; export the trainable parameters instead.'
      )
    kernel: Any = flat[f'{module}/kernel']
    if kind == 'kernel':
      kernel = kernel + jnp.squeeze(delta.table, -3)
    elif kind == 'low_rank':
      a, b = (jnp.squeeze(t, -3) for t in delta.table)
      kernel = kernel + a @ b
    else:  # [(L,) 1, E] stands against [(L,) D, E]
      kernel = kernel * delta.table
    flat[f'{module}/kernel'] = kernel
  return traverse_util.unflatten_dict(flat, sep='/')
