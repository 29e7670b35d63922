"""Deltas: what a method lays on the frozen network, keyed by where it acts.

A delta lives in the linen collection `deltas` at the path of the module that it
changes, just as a decoding cache lives in `cache`.  The network calls one of
four hooks where a frozen transformer can be changed at all; a hook looks at its
own module's path and is the identity where nothing is there, so that with no
deltas the traced program is that of a network without hooks.

| kind | acts on | table |
|---|---|---|
| `rows` | the token embedding: ids >= V | [G, R, D], G is 1 or B |
| `low_rank` | a projection: y + x A B | ([(L,) G, D, R], [(L,) G, R, E]) |
| `scale`, `shift` | a projection: y * scale + shift | [(L,) G, E] |
| `prefix` | an attention's keys and values | 2 x [(L,) G, P, H, K] |
| `bottleneck` | a sublayer's output: y + relu(y A) B | as `low_rank`, E = D |

Axis letters, here and everywhere: B batch, T input length, U target length,
P prompt length, D emb_dim, F mlp_dim, H heads, K head_dim, E any output width,
R rank or rows, G groups (tasks), L layers (a leading axis at the sites of
scanned layers, which `nn.scan` removes), V vocabulary (embedding rows).

This file knows nothing of methods; methods are in `prompt_jax/methods`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
from typing import Any

from flax import linen as nn
from flax import struct
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Axes of a table from the groups on; what stands in front are the layers.
_RANKS = {
  'rows': 3,
  'low_rank': 3,
  'scale': 2,
  'shift': 2,
  'prefix': 4,
  'bottleneck': 3,
}
KINDS = tuple(_RANKS)


@struct.dataclass
class Routed:
  """A table of one change a group, and the group that each example uses."""

  table: Any  # one array or a tuple of arrays, [(L,) G, ...]
  group: Any = None  # [(L,) B] int32; None where G is 1 (shared) or B

  def select(self) -> Any:
    """The change of each example, [1 or B, ...], a leaf for each array.

    The gather stands inside the layer, so no [L, B, ...] copy ever exists.
    """
    if self.group is None:
      return self.table
    return jax.tree.map(lambda t: jnp.take(t, self.group, axis=0), self.table)


Deltas = dict[str, Routed]  # 'encoder/layers/attention/query/low_rank' -> ...


def _read(module: nn.Module, kind: str) -> Any:
  found = module.get_variable('deltas', kind)
  return None if found is None else found.select()


def _two_factors(
  x: Array,
  a: Float[Array, 'G D R'],
  b: Float[Array, 'G R E'],
  between: Callable[[Array], Array] = lambda h: h,
) -> Array:
  """`between(x A) B`, each example by its own pair where G is not 1."""
  a, b = a.astype(x.dtype), b.astype(x.dtype)
  if a.shape[0] == 1:
    return between(x @ a[0]) @ b[0]
  h = between(jnp.einsum('btd,bdr->btr', x, a))
  return jnp.einsum('btr,bre->bte', h, b)


# ---- hooks, called by the network ------------------------------------------


def adapt_embedding(
  module: nn.Module,
  lookup: Callable[[Int[Array, 'B T']], Float[Array, 'B T D']],
  tokens: Int[Array, 'B T'],
  vocab_size: int,
) -> Float[Array, 'B T D']:
  """Embeds `tokens`: id V + j is row j of the `rows` delta."""
  rows = _read(module, 'rows')
  if rows is None:
    return lookup(tokens)
  soft = tokens >= vocab_size
  row = jnp.where(soft, tokens - vocab_size, 0)
  if rows.shape[0] == 1:
    extra = jnp.take(rows[0], row, axis=0)  # NaN for a row that is not there
  else:
    extra = jnp.take_along_axis(rows, row[..., None], axis=1)
  x = lookup(jnp.where(soft, 0, tokens))
  return jnp.where(soft[..., None], extra.astype(x.dtype), x)


def adapt_projection(
  module: nn.Module,
  x: Float[Array, 'B T D'],
  y: Float[Array, 'B T E'],
) -> Float[Array, 'B T E']:
  """`y = x W` becomes `(y + x A B) * scale + shift`."""
  if (factors := _read(module, 'low_rank')) is not None:
    y = y + _two_factors(x, *factors)
  if (scale := _read(module, 'scale')) is not None:
    y = y * scale[:, None].astype(y.dtype)
  if (shift := _read(module, 'shift')) is not None:
    y = y + shift[:, None].astype(y.dtype)
  return y


def adapt_keys_values(
  module: nn.Module,
  key: Float[Array, 'B T H K'],
  value: Float[Array, 'B T H K'],
  bias: Float[Array, '#B H U T'] | None,
  mask: Any,
) -> tuple[Array, Array, Array | None, Any]:
  """Puts prefix keys and values in front; every query sees them, bias 0."""
  prefix = _read(module, 'prefix')
  if prefix is None:
    return key, value, bias, mask
  shape = key.shape[:1] + prefix[0].shape[1:]
  prefix = [jnp.broadcast_to(p, shape).astype(key.dtype) for p in prefix]
  key = jnp.concatenate([prefix[0], key], axis=1)
  value = jnp.concatenate([prefix[1], value], axis=1)
  pad = ((0, 0), (0, 0), (0, 0), (shape[1], 0))
  if bias is not None:
    bias = jnp.pad(bias, pad)
  if mask is not None:
    mask = jnp.pad(mask, pad, constant_values=True)
  return key, value, bias, mask


def adapt_sublayer(
  module: nn.Module, y: Float[Array, 'B T D']
) -> Float[Array, 'B T D']:
  """`y` becomes `y + relu(y A) B`."""
  factors = _read(module, 'bottleneck')
  return (
    y
    if factors is None
    else y + _two_factors(y, factors[0], factors[1], nn.relu)
  )


# ---- operations on whole Deltas --------------------------------------------


def _concatenate(axis: int) -> Callable[[Array, Array], Array]:
  return lambda x, y: jnp.concatenate([x, y], axis)


_JOIN: Mapping[str, Callable[[Any, Any], Any]] = {
  'rows': _concatenate(-2),
  'low_rank': lambda x, y: (
    jnp.concatenate([x[0], y[0]], -1),
    jnp.concatenate([x[1], y[1]], -2),
  ),
  'scale': jnp.multiply,
  'shift': jnp.add,
  'prefix': lambda x, y: tuple(map(_concatenate(-3), x, y)),
}


def _groups(path: str, delta: Routed) -> tuple[int, int]:
  """The axis of the groups, and their number G."""
  leaf = jax.tree.leaves(delta.table)[0]
  axis = leaf.ndim - _RANKS[path.rsplit('/', 1)[-1]]
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
  return Routed(
    jax.tree.map(lambda t: jnp.take(t, group, axis=axis), delta.table)
  )


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
      non-linear maps of one output have no order), or for unequal groups.
  """
  out = {**x, **y}
  for path in x.keys() & y.keys():
    join = _JOIN.get(path.rsplit('/', 1)[-1])
    if join is None:
      raise ValueError(
        f'{path}: two methods set it, and it does not combine. Take one '
        'of them off the chain, or give them different targets.'
      )
    table_x, table_y, group = _share_groups(path, x[path], y[path])
    out[path] = Routed(join(table_x, table_y), group)
  return out


def collection(deltas: Deltas) -> dict[str, Any]:
  """The nested form that linen reads as the collection `deltas`."""
  return traverse_util.unflatten_dict(deltas, sep='/')


def repeat(deltas: Deltas, times: int) -> Deltas:
  """The deltas of a batch whose every example stands `times` times (beams)."""

  def one(path: str, delta: Routed) -> Routed:
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

  `W' = (W + A B) * scale`; the result needs no method any more.

  Raises:
    ValueError: a delta that is no change of a weight (`rows`, `prefix`,
      `shift`, `bottleneck`) or that differs between examples.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  for path, delta in sorted(deltas.items()):  # low_rank comes before scale
    module, _, kind = path.rpartition('/')
    shared = delta.group is None and _groups(path, delta)[1] == 1
    if not shared or kind not in ('low_rank', 'scale'):
      raise ValueError(
        f'{path}: {kind}{"" if shared else " that differs by example"} cannot '
        'be folded into a weight; export the trainable parameters instead.'
      )
    kernel: Any = flat[f'{module}/kernel']
    if kind == 'low_rank':
      a, b = (jnp.squeeze(t, -3) for t in delta.table)
      kernel = kernel + a @ b
    else:  # [(L,) 1, E] stands against [(L,) D, E]
      kernel = kernel * delta.table
    flat[f'{module}/kernel'] = kernel
  return traverse_util.unflatten_dict(flat, sep='/')
