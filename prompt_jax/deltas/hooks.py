"""Deltas: what a method lays on the frozen network, keyed by where it acts.

A delta lives in the linen collection `deltas` at the path of the module that it
changes, just as a decoding cache lives in `cache`.  The network calls one of
six hooks where a frozen transformer can be changed at all; a hook looks at its
own module's path and is the identity where nothing is there, so that with no
deltas the traced program is that of a network without hooks.

| kind | acts on | table |
|---|---|---|
| `rows` | the token embedding: ids >= V | [G, R, D], G is 1 or B |
| `low_rank` | a projection: y + x A B | ([(L,) G, D, R], [(L,) G, R, E]) |
| `kernel` | a projection: x (W + W') | [(L,) G, D, E] |
| `scale`, `shift` | a projection: y * scale + shift | [(L,) G, E] |
| `prefix` | an attention's keys and values | 2 x [(L,) G, P, H, K] |
| `preceding` | a stack's position bias: P slots before the text | [G, P] |
| `bottleneck` | a sublayer's output: y + f(y A + a) B + b | an `Adapter` |
| `parallel` | a sublayer beside it: y + f(x A + a) B + b | an `Adapter` |
| `hidden` | a layer's input: x * gate + value | [(L,) G, 1], [(L,) G, D] |

Axis letters, here and everywhere: B batch, T input length, U target length,
P prompt length, D emb_dim, F mlp_dim, H heads, K head_dim, E any output width,
R rank or rows, G groups (tasks), L layers (a leading axis at the sites of
scanned layers, which `nn.scan` removes), V vocabulary (embedding rows).

This file knows nothing of methods; methods are in `prompt_jax/methods`.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

# Axes of a table from the groups on; what stands in front are the layers.
RANKS = {
  'rows': 3,
  'low_rank': 3,
  'kernel': 3,
  'scale': 2,
  'shift': 2,
  'prefix': 4,
  'preceding': 2,
  'bottleneck': 3,
  'parallel': 3,
  'hidden': 2,
}
KINDS = tuple(RANKS)
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
  'gelu': functools.partial(nn.gelu, approximate=True),
  'relu': nn.relu,
  'silu': nn.silu,
  'linear': lambda x: x,
}


@struct.dataclass
class Adapter:
  """A bottleneck `f(x A + a) B + b`; a constant factor belongs to B and b.

  Attributes:
    down: A, [(L,) G, D, R].
    down_bias: a, [(L,) G, R].
    up: B, [(L,) G, R, D].
    up_bias: b, [(L,) G, D].
    activation: f, a name of `ACTIVATIONS`.
  """

  down: Any
  down_bias: Any
  up: Any
  up_bias: Any
  activation: str = struct.field(pytree_node=False, default='relu')


@struct.dataclass
class Routed:
  """A table of one change a group, and the group that each example uses.

  Attributes:
    table: an array or a tree of arrays, [(L,) G, ...].
    group: int32 [(L,) B], of `hidden` [(L,) B, T]: each position has its own;
      None where G is 1 (shared) or B.
    dropout_rate: of the x in `low_rank`, in training.
  """

  table: Any
  group: Any = None
  dropout_rate: float = struct.field(pytree_node=False, default=0.0)

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


def _product(x: Array, a: Float[Array, 'G D E']) -> Array:
  """`x A`, each example by its own A where G is not 1."""
  a = a.astype(x.dtype)
  if a.shape[0] == 1:
    return x @ a[0]
  return jnp.einsum('btd,bde->bte', x, a)


def _bottleneck(x: Array, adapter: Adapter) -> Array:
  """`f(x A + a) B + b`."""
  h = _product(x, adapter.down) + adapter.down_bias[:, None].astype(x.dtype)
  y = _product(ACTIVATIONS[adapter.activation](h), adapter.up)
  return y + adapter.up_bias[:, None].astype(x.dtype)


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
  kernel: Float[Array, 'D E'],
  product: Callable[[Any, Any], Array],
) -> Float[Array, 'B T E']:
  """`x W` becomes `(x (W + W') + drop(x) A B) * scale + shift`."""
  change = _read(module, 'kernel')
  if change is not None and change.shape[0] == 1 and x.dtype == jnp.float32:
    # One product in place of two, in each direction. With fewer digits W + W'
    # would lose a small W'.
    kernel, change = kernel + change[0], None
  y = product(x, kernel)
  if change is not None:
    y = y + _product(x, change).astype(y.dtype)
  if (low_rank := module.get_variable('deltas', 'low_rank')) is not None:
    a, b = low_rank.select()
    if low_rank.dropout_rate and module.has_rng('dropout'):
      keep = 1.0 - low_rank.dropout_rate
      kept = jax.random.bernoulli(module.make_rng('dropout'), keep, x.shape)
      x = jnp.where(kept, x / np.asarray(keep, x.dtype), 0)
    y = y + _product(_product(x, a), b).astype(y.dtype)
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
  """Puts prefix keys and values in front; every query sees them.

  Their position bias is 0, unless `preceding` has given them one.
  """
  prefix = _read(module, 'prefix')
  if prefix is None:
    return key, value, bias, mask
  shape = key.shape[:1] + prefix[0].shape[1:]
  prefix = [jnp.broadcast_to(p, shape).astype(key.dtype) for p in prefix]
  key = jnp.concatenate([prefix[0], key], axis=1)
  value = jnp.concatenate([prefix[1], value], axis=1)
  pad = ((0, 0), (0, 0), (0, 0), (shape[1], 0))
  if bias is not None and bias.shape[-1] != key.shape[1]:
    if bias.shape[-1] + shape[1] != key.shape[1]:
      raise ValueError(
        f'{"/".join(module.path)}: a prefix of {shape[1]} on a position bias '
        f'that has {bias.shape[-1]} keys for {key.shape[1]}: of several '
        'prefixes all must precede the text, or none.'
      )
    bias = jnp.pad(bias, pad)
  if mask is not None:
    mask = jnp.pad(mask, pad, constant_values=True)
  return key, value, bias, mask


def slots_before_text(module: nn.Module) -> int:
  """How many prefix slots a stack's position bias counts before key 0."""
  preceding = module.get_variable('deltas', 'preceding')
  return 0 if preceding is None else preceding.table.shape[-1]


def adapt_sublayer(
  module: nn.Module, x: Float[Array, 'B T D'], y: Float[Array, 'B T D']
) -> Float[Array, 'B T D']:
  """Of the sublayer `y = g(x)`: adds `parallel(x)`, then `bottleneck(y)`."""
  if (parallel := _read(module, 'parallel')) is not None:
    y = y + _bottleneck(x, parallel)
  if (after := _read(module, 'bottleneck')) is not None:
    y = y + _bottleneck(y, after)
  return y


def adapt_layer_input(
  module: nn.Module, x: Float[Array, 'B T D']
) -> Float[Array, 'B T D']:
  """`x` becomes `x * gate + value`, by the group of each position."""
  hidden = _read(module, 'hidden')
  if hidden is None:
    return x
  gate, value = (table.astype(x.dtype) for table in hidden)
  return x * gate + value
