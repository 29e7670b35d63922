"""Mesh, logical axis rules, and arrays that are born sharded.

Parameters name their axes ('embed', 'heads', ...); one table maps the names to
the two axes of the mesh, `data` and `model`.  Source: T5X,
`t5x/partitioning.py` (`standard_logical_axis_rules`), and the logical axes of
google-research/prompt-tuning `prompt_tuning/train/partitioning.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import os
from typing import Any

from absl import logging
from flax import linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

Rules = Sequence[tuple[str, str | None]]


def standard_logical_axis_rules() -> Rules:
  """T5X's rules for 1-D activations and 1-D parameters, and ours.

  What a method adds is small: prompts, prefixes and ranks are on every device.
  """
  return (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('joined_kv', 'model'),
    ('embed', None),
    ('kv', None),
    ('length', None),
    ('layers', None),
    ('relpos_buckets', None),
    ('prompt', None),
    ('prompt_embed', None),
    ('task', None),
    ('lora_rank', None),
    ('adapter_mid', None),
    ('prefix_len', None),
    ('subspace', None),
    ('rank', None),
  )


def initialize_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """`jax.distributed.initialize`, where there are several processes.

  They are found by the arguments, by JAX_COORDINATOR_ADDRESS with
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what JAX itself finds of a
  cluster (Slurm, Open MPI, TPU pods) if PROMPT_JAX_DISTRIBUTED=1.

  Raises:
    ValueError: an address without both numbers.
  """
  env = os.environ
  address = coordinator_address or env.get('JAX_COORDINATOR_ADDRESS')
  if address is None and env.get('PROMPT_JAX_DISTRIBUTED') != '1':
    return
  if address is None:
    jax.distributed.initialize()
    return

  def number(value: int | None, name: str) -> int:
    found = env.get(name) if value is None else value
    if found is None:
      raise ValueError(
        f'The coordinator is at {address}, but how many processes there are '
        f'and which this one is are not both said: set {name}.'
      )
    return int(found)

  jax.distributed.initialize(
    address,
    number(num_processes, 'JAX_NUM_PROCESSES'),
    number(process_id, 'JAX_PROCESS_ID'),
  )


def make_mesh(data: int = -1, model: int = 1) -> jax.sharding.Mesh:
  """A mesh of all devices with the axes ('data', 'model').

  Args:
    data: size of the data axis; -1 for all devices that `model` leaves.
    model: size of the model axis.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  count = jax.device_count()
  if model < 1 or (data < 1 and data != -1):
    raise ValueError(f'A mesh of shape ({data}, {model}) cannot be.')
  size = count // model if data == -1 else data
  if size * model != count:
    raise ValueError(
      f'A mesh of shape ({data}, {model}) does not fit {count} devices; the '
      'product must be their number.'
    )
  # Auto: the compiler finds the layout of activations. Under JAX's explicit
  # default a gather from a sharded table is an error.
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((size, model), ('data', 'model'), axis_types=auto)


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """Where every array lies.

  Attributes:
    data: size of the mesh's data axis; -1 for all that `model` leaves.
    model: size of the mesh's model axis.
    logical_axis_rules: logical axis -> mesh axis; the first match wins.
  """

  data: int = -1
  model: int = 1
  logical_axis_rules: Rules = dataclasses.field(
    default_factory=standard_logical_axis_rules
  )

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices, ('data', 'model')."""
    return make_mesh(self.data, self.model)

  @functools.cached_property
  def replicated(self) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  @functools.cached_property
  def batch_sharding(self) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(self.mesh, PartitionSpec('data'))

  @contextlib.contextmanager
  def activate(self) -> Iterator[None]:
    """Lets the network's constraints on activations see mesh and rules."""
    with jax.set_mesh(self.mesh):
      with nn.logical_axis_rules(tuple(self.logical_axis_rules)):
        yield

  def shardings(self, boxed: Any) -> Any:
    """A sharding for each parameter; what has no axis names is replicated.

    An axis that the mesh does not divide (a tiny model's two heads over four
    devices) is replicated, with a line in the log.
    """
    known = {name for name, _ in self.logical_axis_rules}

    def one(path: Any, leaf: Any) -> NamedSharding:
      if not isinstance(leaf, nn.Partitioned):
        return self.replicated
      unknown = {n for n in leaf.names if n is not None} - known
      if unknown:
        raise ValueError(
          f'{jax.tree_util.keystr(path)}: no rule for the logical axes '
          f'{sorted(unknown)}; add them to logical_axis_rules.'
        )
      rules = tuple(self.logical_axis_rules)
      spec = nn.logical_to_mesh_axes(leaf.names, rules) or PartitionSpec()
      sizes = self.mesh.shape
      kept = []
      for length, axis in zip(leaf.value.shape, spec, strict=True):
        fits = axis is None or length % sizes[axis] == 0
        if not fits:
          logging.info(
            '%s: %d does not divide by %d devices; replicated.',
            jax.tree_util.keystr(path),
            length,
            sizes[axis],
          )
        kept.append(axis if fits else None)
      return NamedSharding(self.mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(
      one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )

  def like(self, shardings: Any, tree: Any) -> Any:
    """Shardings for a tree in which those of `shardings` recur by path.

    An optimizer's moments have the paths of the parameters at their ends; a
    moment of a parameter's shape lies as the parameter does, everything else
    on every device.
    """
    by_path = {
      _names(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
      names = _names(path)
      for start in range(len(names)):
        found = by_path.get(names[start:])
        if found is not None and len(found.spec) == len(leaf.shape):
          fits = all(
            axis is None or n % self.mesh.shape[axis] == 0
            for n, axis in zip(leaf.shape, found.spec, strict=True)
          )
          return found if fits else self.replicated
      return self.replicated

    return jax.tree_util.tree_map_with_path(one, tree)

  def put(self, shape: Sequence[int], sharding: Any, read: Callable) -> Any:
    """A global array, of which each process reads only its own parts.

    Args:
      shape: of the whole array.
      sharding: where its parts lie.
      read: from an index (a tuple of slices) to that part as numpy.
    """
    return jax.make_array_from_callback(tuple(shape), sharding, read)

  def gather(self, tree: Any) -> Any:
    """Arrays on the devices as whole numpy arrays, on every process.

    With several processes all of them have to call it.
    """
    if jax.process_count() == 1:
      return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch on the devices, its rows over the data axis.

    Every process has the same global batch on the host and takes its rows, so
    that the numbers do not depend on the number of processes.

    Raises:
      ValueError: the rows do not divide over the data axis.
    """
    self.check_rows(len(next(iter(batch.values()))))
    return {
      name: self.put(x.shape, self.batch_sharding, lambda i, x=x: x[i])
      for name, x in batch.items()
    }

  def check_rows(self, rows: int) -> None:
    """Checks that so many rows divide over the data axis.

    Raises:
      ValueError: they do not.
    """
    size = self.mesh.shape['data']
    if rows % size:
      raise ValueError(
        f'A batch of {rows} rows does not divide over the {size} devices of '
        'the data axis; choose a BATCH_SIZE that is a multiple of it.'
      )


def _names(path: Any) -> tuple[str, ...]:
  """The keys of a pytree path, whatever containers it goes through."""
  return tuple(
    str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p))))
    for p in path
  )


def unbox(tree: Any) -> Any:
  """Parameters without their axis names.

  Unlike `nn.meta.unbox` it puts no constraint on them, so that it takes shapes
  too.
  """
  return jax.tree.map(
    lambda x: x.value if isinstance(x, nn.Partitioned) else x,
    tree,
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )
