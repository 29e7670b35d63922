"""What every method is written against: Context, Site and Chain.

A method is a linen module whose `__call__(context)` returns `deltas.Deltas`.
It owns the trainable parameters and nothing else: it never subclasses, wraps
or patches the network.  Beside that it may

-   have a property `soft_tokens`, (number of groups, rows of one group), if its
    deltas hold `rows`: the data side learns the ids of the soft tokens from it;
-   hold arrays that are not trained in the collection `constants`
    (`self.variable('constants', name, read)`): they are made once, when the
    base is loaded, and are an argument of the step like the frozen weights;
-   add to the loss: `self.sow('losses', name, value)`; or, where that needs the
    network's outputs, by an attribute `auxiliary_loss` (see `mpt.py`), a mean
    over target tokens;
-   draw, in training only: `self.has_rng('dropout')` says whether;
-   read files of other runs: a property `source_files`, of the method or of an
    initial value in it, lists them, and the run compares them with its base.

A method that is a network of its own beside the frozen one is a `SideNetwork`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from flax import linen as nn
from flax import struct
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import deltas
from prompt_jax.network.layers import T5Config

# Parameters that a side network and the frozen one have in common.
SHARED = re.compile(r'((decoder/)?token_embedder|decoder/logits_dense)/.*')


@struct.dataclass
class Site:
  """A module of the frozen network that holds a kernel."""

  path: str = struct.field(pytree_node=False)
  shape: tuple[int, ...] = struct.field(pytree_node=False)  # ((L,) D, E)
  axes: tuple[str | None, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Context:
  """What a method may look at.

  Attributes:
    embedding: the network's token embedding, [V, D].
    params: all parameters of the network.
    tokens: input ids of the batch, [B, T]; None while parameters are made and
      where deltas are exported.
    task_ids: the task of each example, [B], if the data have tasks.
    packed: rows of the batch hold several examples.
    exporting: the deltas are to be kept, with tables of all tasks.
    soft_tokens_before: those of the methods before this one in a chain.
    config: of the network.
    sites: the network's projections.
    modules: paths of all modules of the network.
  """

  embedding: Any
  params: Any = None
  tokens: Any = None
  task_ids: Any = None
  packed: bool = struct.field(pytree_node=False, default=False)
  exporting: bool = struct.field(pytree_node=False, default=False)
  soft_tokens_before: int = struct.field(pytree_node=False, default=0)
  config: Any = struct.field(pytree_node=False, default=None)
  sites: tuple[Site, ...] = struct.field(pytree_node=False, default=())
  modules: tuple[str, ...] = struct.field(pytree_node=False, default=())

  @property
  def embedder(self) -> str:
    """Path of the token embedding, where `rows` are laid."""
    return next(m for m in self.modules if m.endswith('token_embedder'))

  @property
  def first_soft_id(self) -> int:
    """The id of the method's own soft token 0."""
    return self.config.vocab_size + self.soft_tokens_before

  def parameter(self, path: str) -> Any:
    """A parameter of the network, to which no gradient flows."""
    found = self.params
    for name in path.split('/'):
      found = found[name]
    return jax.lax.stop_gradient(found)

  def match(self, pattern: str) -> list[Site]:
    """The sites whose whole path the pattern matches.

    Raises:
      ValueError: none; with the paths that come near.
    """
    found = [s for s in self.sites if re.fullmatch(pattern, s.path)]
    if not found:
      paths = [s.path for s in self.sites]
      near = deltas.near_misses(pattern, paths)
      raise ValueError(
        f'No projection of the network matches {pattern!r}.'
        f'{near or f" Paths look like {paths[0]!r}."}'
      )
    return found

  def route(self, table: Any, layers: Sequence[int] = ()) -> deltas.Routed:
    """A table [(L,) G, ...]: shared where G is 1, else by `task_ids`.

    Raises:
      ValueError: G > 1 and the batch has no `task_ids` (packed rows hold
        several examples, so they have none).
    """
    groups = jax.tree.leaves(table)[0].shape[len(layers)]
    if groups == 1 or self.exporting or self.tokens is None:
      return deltas.Routed(table)
    if self.task_ids is None:
      raise ValueError(
        f'A method keeps {groups} tasks apart, but the batch has no '
        '`task_ids` [B]. Give the tasks a `task_ids` feature, and do not '
        'pack: a packed row holds examples of several tasks.'
      )
    group = jnp.broadcast_to(self.task_ids, (*layers, *self.task_ids.shape))
    return deltas.Routed(table, group)


def params_at(
  module: nn.Module,
  specs: Mapping[str, tuple[Any, Sequence[int], Sequence[str | None]]],
) -> dict[str, Any]:
  """Float32 parameters with paths of the network: 'encoder/layers/.../lora_a'.

  Args:
    module: the method that they belong to.
    specs: path -> (initializer, shape, logical names of the axes).

  Returns:
    path -> array. The method's tree is nested as the network's is.
  """
  flat: dict[str, dict[str, Any]] = {}
  for path, spec in specs.items():
    top, _, rest = path.partition('/')
    flat.setdefault(top, {})[rest] = spec

  def init(rng: Any, own: dict[str, Any]) -> Any:
    made = {}
    for i, (rest, (draw, shape, axes)) in enumerate(own.items()):
      value = draw(jax.random.fold_in(rng, i), tuple(shape), jnp.float32)
      made[rest] = nn.LogicallyPartitioned(value, tuple(axes))
    return traverse_util.unflatten_dict(made, sep='/')

  out = {}
  for top, own in flat.items():
    found: Any = module.param(top, init, own)
    for rest, x in traverse_util.flatten_dict(found, sep='/').items():
      out[f'{top}/{rest}'] = x
  return out


class Chain(nn.Module):
  """Several methods at once; their deltas combine.

  Attributes:
    methods: by name; the name is the first part of the parameters' paths.
  """

  methods: Mapping[str, nn.Module]

  @nn.compact
  def __call__(self, context: Context) -> deltas.Deltas:
    """The combined deltas of all methods, in order."""
    out: deltas.Deltas = {}
    before = context.soft_tokens_before
    for method in self.methods.values():
      own = dataclasses.replace(context, soft_tokens_before=before)
      out = deltas.combine(out, method(own))
      before += sum(g * length for g, length in _soft_tables(method))
    return out


class SideNetwork(nn.Module):
  """A method that is a second network, which reads the frozen one's states.

  It lays nothing on the frozen network. The model runs that without a gradient,
  then `network`, whose logits are the model's: a linen module with the methods
  of the frozen one (its call, `encode`, `decode_step`, `prefill`), that take
  the same arguments. It is given the collections

  -   `params`: the method's parameters, and at their own paths the frozen
      network's that `SHARED` matches, with their `deltas`;
  -   `intermediates`: what `reads` takes of the frozen network's;
  -   `cache`, while decoding: its own.
  """

  @nn.nowrap
  def network(self, config: T5Config) -> Any:
    """The second network, without a parent, for a frozen one of that config."""
    raise NotImplementedError

  @nn.nowrap
  def reads(self, intermediates: Any) -> Any:
    """Of 'encoder/layers/hidden' and the like, what the network looks at."""
    return intermediates


def side_network(method: Any) -> tuple[SideNetwork, tuple[str, ...]] | None:
  """The side network in a method, and where its parameters are in the tree.

  Raises:
    ValueError: there are several.
  """
  found = _side_networks(method)
  if len(found) > 1:
    names = ', '.join('/'.join(path) for _, path in found)
    raise ValueError(
      f'Of the methods of a chain only one can be a side network, which makes '
      f'the logits; {names} are.'
    )
  return found[0] if found else None


def _side_networks(method: Any) -> list[tuple[SideNetwork, tuple[str, ...]]]:
  if isinstance(method, SideNetwork):
    return [(method, ())]
  parts = method.methods if isinstance(method, Chain) else {}
  return [
    (side, (f'methods_{name}', *path))
    for name, part in parts.items()
    for side, path in _side_networks(part)
  ]


def _soft_tables(method: Any) -> list[tuple[int, int]]:
  if isinstance(method, Chain):
    return [t for m in method.methods.values() for t in _soft_tables(m)]
  table = getattr(method, 'soft_tokens', None)
  return [table] if table else []


def soft_ids(method: Any, vocab_size: int) -> np.ndarray:
  """Ids of the soft tokens, [G, P]: row g are the P tokens of task g.

  Row j of group g of a method's table has the id `V + g * P + j`; the tables
  of several methods stand one behind the other, as their deltas combine.

  Raises:
    ValueError: two methods keep unequal numbers of tasks apart.
  """
  tables = _soft_tables(method)
  groups = max((g for g, _ in tables), default=1)
  columns, start = [], vocab_size
  for g, length in tables:
    if g not in (1, groups):
      raise ValueError(
        f'The methods of a chain keep {g} and {groups} tasks apart; the '
        'numbers must be equal, or 1 for what all tasks share.'
      )
    ids = start + np.arange(g * length, dtype=np.int32).reshape(g, length)
    columns.append(np.broadcast_to(ids, (groups, length)))
    start += g * length
  empty = np.zeros((groups, 0), np.int32)
  return np.concatenate([empty, *columns], axis=1).astype(np.int32)


def sites(boxed_params: Any) -> tuple[Site, ...]:
  """The projections of a network, from its parameters with axis names."""
  flat = traverse_util.flatten_dict(boxed_params, sep='/')
  return tuple(
    Site(path.removesuffix('/kernel'), box.value.shape, box.names)
    for path, box in sorted(flat.items())
    if path.endswith('/kernel')
  )


def modules(params: Any) -> tuple[str, ...]:
  """Paths of all modules that hold parameters, themselves or deeper."""
  flat = traverse_util.flatten_dict(params, sep='/')
  parts = [path.split('/') for path in flat]
  found = {'/'.join(p[:i]) for p in parts for i in range(1, len(p))}
  return tuple(sorted(found))


def context(
  config: T5Config,
  boxed_params: Any,
  params: Any,
  embedding: Any,
  **fields: Any,
) -> Context:
  """The Context of a network; `fields` are those that come from a batch."""
  return Context(
    embedding=embedding,
    params=params,
    **fields,
    config=config,
    sites=sites(boxed_params),
    modules=modules(boxed_params),
  )
