"""Structured pruning: of which units of a network a narrower one is made.

A unit is an entry of a hidden state, of a head, or of a feed-forward block's
inside. Of each kind 1/r are kept, those that matter most by an importance of
each weight: its magnitude, or its squared gradients on some examples.

`prompt-jax prune` writes what the latter chooses, for `FromFile`.

Source: Sung et al. 2022, arXiv 2206.06522, on structural weight initialization;
checked against ylsung/Ladder-Side-Tuning `seq2seq/pruning/pruning_methods.py`
(`pruning_v2`) and `fisher.py`. It differs in three points. The units of an
attention are chosen within each head; there they are the best of all heads,
which the narrower heads then mix. Their importance is the product over query,
key and value of an importance of the unit in each; there it is the sum of
products weight by weight. And cross-attention's keys and values read the units
that the encoder puts out; there they read the decoder's.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import train_state
from prompt_jax.network.layers import T5Config

# Parameters by path, layer by layer: 'encoder/layers_0/mlp/wo/kernel'.
Flat = Mapping[str, Any]
# The units of each axis that are kept, increasing: those paths -> indices.
Units = dict[str, tuple[Any, ...]]
Start = Callable[[Flat, T5Config, int], Units]

# Norm and sublayer; a decoder without an encoder has no cross-attention.
_SUBLAYERS = {
  'encoder': (
    ('pre_attention_layer_norm', 'attention'),
    ('pre_mlp_layer_norm', 'mlp'),
  ),
  'decoder': (
    ('pre_self_attention_layer_norm', 'self_attention'),
    ('pre_cross_attention_layer_norm', 'encoder_decoder_attention'),
    ('pre_mlp_layer_norm', 'mlp'),
  ),
}
_EMBEDDING = 'token_embedder/embedding'


def by_layer(params: Any) -> dict[str, Any]:
  """The network's parameters by path, stacked layers one by one."""
  out = {}
  for path, x in train_state.flatten(params).items():
    stack, scanned, rest = path.partition('/layers/')
    if scanned:
      out |= {f'{stack}/layers_{i}/{rest}': x[i] for i in range(x.shape[0])}
    else:
      out[path] = x
  return out


def choose(importance: Flat, config: T5Config, reduction_factor: int) -> Units:
  """The units of each layer that matter most, 1 / `reduction_factor` of them.

  Hidden units are chosen by the embedding first; what a sublayer puts out, by
  its last kernel's importance from the inner units that are kept, and so on:
  each tensor reads the units that the one before it puts out.

  Args:
    importance: of each weight, at least 0; paths of `by_layer`.
    config: of the network that is pruned.
    reduction_factor: r.
  """
  units: Units = {}

  def top(score: Any, heads: int = 1) -> Any:
    parts = score.reshape(heads, -1)
    size = parts.shape[1]
    best = jax.lax.top_k(parts, size // reduction_factor)[1]
    return (jnp.sort(best) + size * jnp.arange(heads)[:, None]).reshape(-1)

  def sublayer(reads: dict[str, Any], out: str, heads: int) -> Any:
    # A product over kernels, as a sum that cannot underflow.
    score = sum(
      jnp.log(jnp.sum(importance[path][rows], axis=0))
      for path, rows in reads.items()
    )
    inner = top(score, heads)
    units.update({path: (rows, inner) for path, rows in reads.items()})
    written = top(jnp.sum(importance[out][inner], axis=0))
    units[out] = (inner, written)
    return written

  [embedding] = [path for path in importance if path.endswith(_EMBEDDING)]
  embedded = top(jnp.sum(importance[embedding], axis=0))
  encoded = None
  for stack, parts in _SUBLAYERS.items():
    hidden, count = embedded, getattr(config, f'num_{stack}_layers')
    if not count:
      continue
    for i in range(count):
      for norm, name in parts:
        at = f'{stack}/layers_{i}/{name}'
        scale = f'{stack}/layers_{i}/{norm}/scale'
        if scale not in importance:
          continue
        units[scale] = (hidden,)
        if name == 'mlp':
          reads = {
            path: hidden
            for path in importance
            if re.fullmatch(rf'{at}/wi(_\d)?/kernel', path)
          }
          hidden = sublayer(reads, f'{at}/wo/kernel', 1)
          continue
        other = encoded if name == 'encoder_decoder_attention' else hidden
        reads = {f'{at}/query/kernel': hidden}
        reads |= {f'{at}/{n}/kernel': other for n in ('key', 'value')}
        hidden = sublayer(reads, f'{at}/out/kernel', config.num_heads)
    units[f'{stack}/{stack}_norm/scale'] = (hidden,)
    encoded = hidden
  return units


def take(params: Flat, units: Units) -> dict[str, Any]:
  """The weights between units that are kept."""
  out = {}
  for path, axes in units.items():
    x = params[path]
    for axis, index in enumerate(axes):
      x = jnp.take(x, index, axis=axis)
    out[path] = x
  return out


@dataclasses.dataclass(frozen=True)
class Magnitude:
  """Units of the largest weights."""

  def __call__(self, params: Flat, config: T5Config, factor: int) -> Units:
    """The units that are kept; `factor` is r."""
    # In float32: a sum of bfloat16 cannot tell units apart.
    size = {k: jnp.abs(jnp.asarray(x, jnp.float32)) for k, x in params.items()}
    return choose(size, config, factor)


@dataclasses.dataclass(frozen=True)
class FromFile:
  """Units that `measure` has chosen.

  Attributes:
    path: its file.

  Raises:
    CheckpointError: when called, no such file.
    ValueError: no path; when called, it is of another network or another r.
  """

  path: str

  def __post_init__(self):
    if not isinstance(self.path, str) or not self.path:
      raise ValueError(
        'FromFile.path must be the file that `prompt-jax prune` wrote '
        f'(UNITS_PATH), got {self.path!r}.'
      )

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return (self.path,)

  def __call__(self, params: Flat, config: T5Config, factor: int) -> Units:
    """The units that are kept; `factor` is r."""
    arrays, header = checkpoints.load_trainable(self.path)
    made_for = json.loads(header.get('units_of', 'null'))
    wanted = _sizes(config, factor)
    if made_for != wanted:
      raise ValueError(
        f'{self.path} holds units for {made_for}, but these are needed: '
        f'{wanted}. Write them with `prompt-jax prune`.'
      )
    units: dict[str, dict[int, Any]] = {}
    for name, index in arrays.items():
      path, _, axis = name.rpartition('/')
      units.setdefault(path, {})[int(axis)] = index
    return {
      path: tuple(found[axis] for axis in sorted(found))
      for path, found in units.items()
    }


def _sizes(config: T5Config, factor: int) -> dict[str, Any]:
  """What units depend on, as JSON has it."""
  fields = dataclasses.asdict(config)
  names = ('emb_dim', 'num_heads', 'head_dim', 'mlp_dim', 'mlp_activations')
  counts = ('num_encoder_layers', 'num_decoder_layers')
  sizes = {name: fields[name] for name in (*names, *counts)}
  return {
    **sizes,
    'mlp_activations': list(sizes['mlp_activations']),
    'reduction_factor': factor,
  }


def squared_gradients(
  loss_fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Mapping[str, Any]],
  examples: int = 1024,
) -> Any:
  """The squares of each example's gradient, summed: a tree as `params`.

  Args:
    loss_fn: from parameters and a batch of one example to its loss.
    params: all of them are differentiated.
    batches: of examples, [B, ...] each.
    examples: how many are read.

  Raises:
    ValueError: `batches` has none.
  """

  @jax.jit
  def add(params: Any, total: Any, batch: Any) -> Any:
    def one(total: Any, example: Any) -> tuple[Any, None]:
      grads = jax.grad(loss_fn)(params, example)
      return jax.tree.map(lambda t, g: t + g**2, total, grads), None

    rows = jax.tree.map(lambda x: x[:, None], batch)
    return jax.lax.scan(one, total, rows)[0]

  total, seen = jax.tree.map(jnp.zeros_like, params), 0
  for batch in batches:
    part = {name: x[: examples - seen] for name, x in batch.items()}
    total = add(params, total, part)
    seen += len(next(iter(part.values())))
    if seen >= examples:
      break
  if not seen:
    raise ValueError('There is no example to measure gradients on.')
  return total


def measure(
  model: Any,
  params: Any,
  batches: Iterable[Mapping[str, Any]],
  path: str,
  reduction_factor: int = 8,
  examples: int = 1024,
  header: Mapping[str, Any] | None = None,
) -> Units:
  """Chooses units by squared gradients and writes them for `FromFile`.

  The loss of an example is the mean over its target tokens.

  Args:
    model: an `EncoderDecoderModel`, whose method is not looked at.
    params: all parameters of its network, float32.
    batches: the model's features, not packed, without soft tokens.
    path: the file.
    reduction_factor: r.
    examples: how many are read.
    header: what else the file is to say of itself.
  """
  bare = dataclasses.replace(model, method=None, trainable_patterns=('.*',))

  def loss_fn(network: Any, batch: Any) -> Any:
    trainable = {'method': {}, 'network': network}
    tokens = jnp.maximum(jnp.sum(batch['decoder_loss_weights']), 1)
    return bare.loss_fn({}, trainable, batch, None, tokens)[0]

  found = squared_gradients(loss_fn, params, batches, examples)
  units = choose(by_layer(found), model.config, reduction_factor)
  arrays = {
    f'{name}/{axis}': np.asarray(index, np.int32)
    for name, axes in units.items()
    for axis, index in enumerate(axes)
  }
  origin = {'units_of': _sizes(model.config, reduction_factor)}
  origin |= header or {}
  checkpoints.save_trainable(pathlib.Path(path), arrays, origin)
  return units
