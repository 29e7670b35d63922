"""LST (Sung et al. 2022): a small T5 beside the frozen one, reading its states.

With h_i the output of the frozen network's layer i, to which no gradient goes,
and T the gates' temperature, each stack of the side network computes

    s = D_0(embedding)
    s = Block_i(g_i s + (1 - g_i) D_i(h_i)),  g_i = sigmoid(alpha_i / T)

for the chosen layers i; its decoder attends to its own encoder, and the logits
are the frozen output projection of U(s). D_0, D_i and U are linear with a bias.

Where the two networks run, one after the other, is `models/laddered.py`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import pruning
from prompt_jax.methods import side_t5
from prompt_jax.network.layers import T5Config

_STACKS = ('encoder', 'decoder')


class LST(base.SideNetwork):
  """Ladder side tuning: only the side network is trained.

  Its gradient needs no activation of the frozen network but the h_i, and it
  has 1/r of that network's widths: D/r, K/r, F/r, with as many heads.

  Attributes:
    reduction_factor: r.
    encoder_layers: which layers of the frozen encoder have a side layer, from
      0 on; None for all.
    decoder_layers: of the decoder.
    alpha: that all gates start with; 0 weighs both sides alike.
    temperature: T, of the gates.
    start: the first weights of the side network's layers: units of the frozen
      network's, or None to draw them.

  Raises:
    ValueError: r does not divide D, K and F, or an argument is out of range.

  Source: Sung et al. 2022, arXiv 2206.06522, section 3; checked against
  ylsung/Ladder-Side-Tuning `seq2seq/third_party/models/t5/modeling_side_t5.py`,
  by which dropout acts in both networks. Not here: its gate that mixes U(s)
  with the frozen network's last state, which is off there.
  """

  reduction_factor: int = 8
  encoder_layers: Sequence[int] | None = None
  decoder_layers: Sequence[int] | None = None
  alpha: float = 0.0
  temperature: float = 0.1
  start: pruning.Start | None = pruning.Magnitude()

  def __post_init__(self):
    r = self.reduction_factor
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
      raise ValueError(
        f'LST.reduction_factor must be a whole number of at least 1, got {r!r}.'
      )
    for name, low in (('temperature', 0), ('alpha', -jnp.inf)):
      value = getattr(self, name)
      if not isinstance(value, int | float) or not low < value < jnp.inf:
        raise ValueError(
          f'LST.{name} must be a finite number{" above 0" if not low else ""}, '
          f'got {value!r}.'
        )
    for name in _STACKS:
      chosen = getattr(self, f'{name}_layers')
      if chosen is not None:  # gin hands over a list; a field must be hashable
        object.__setattr__(self, f'{name}_layers', _increasing(name, chosen))
    super().__post_init__()

  @nn.nowrap
  def network(self, config: T5Config) -> Any:
    """The side network on a frozen one of that config, without a parent."""
    widths = {}
    for field in ('emb_dim', 'head_dim', 'mlp_dim'):
      width = getattr(config, field)
      if width % self.reduction_factor:
        raise ValueError(
          f'LST.reduction_factor = {self.reduction_factor} must divide '
          f'T5Config.{field}, which is {width}.'
        )
      widths[field] = width // self.reduction_factor
    for name in _STACKS:
      widths[f'num_{name}_layers'] = len(self._chosen(name, config))
    side = dataclasses.replace(config, **widths)
    cls = (
      side_t5.SideT5 if config.num_encoder_layers else side_t5.SideDecoderOnly
    )
    return cls(config, side=side, temperature=self.temperature, parent=None)

  @nn.nowrap
  def reads(self, intermediates: Any) -> Any:
    """The outputs of the chosen layers."""
    return {
      name: _pick(stack, getattr(self, f'{name}_layers'))
      for name, stack in intermediates.items()
    }

  @nn.nowrap
  def _chosen(self, name: str, config: T5Config) -> tuple[int, ...]:
    count = getattr(config, f'num_{name}_layers')
    chosen = getattr(self, f'{name}_layers')
    if chosen is None:
      return tuple(range(count))
    if chosen[-1] >= count:
      raise ValueError(
        f'LST.{name}_layers has layer {chosen[-1]}, but the {name} has '
        f'{count}, from 0 on.'
      )
    return chosen

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays nothing on the network; makes the parameters, when they are made."""
    if context.exporting:
      raise ValueError(
        'A side network lays no deltas on the frozen one, so the method cannot '
        'be exported; its trainable.safetensors is what it needs.'
      )
    if self.is_initializing():
      base.params_at(self, self._first(context))
    return {}

  def _first(self, context: base.Context) -> dict[str, Any]:
    """By path (initializer, shape, axes) of all parameters."""
    config = context.config
    network = self.network(config)
    # One token and any state: of the parameters only the shapes depend on them.
    hidden = {
      name: _hidden(network.side, name, config.emb_dim)
      for name in _STACKS
      if getattr(config, f'num_{name}_layers')
    }
    token = jnp.ones((1, 1), jnp.int32)

    @jax.jit  # one program in place of thousands of small ones
    def make(rng: Any, params: Any) -> dict[str, Any]:
      _, made = network.apply(
        {'intermediates': hidden},
        *[token] * len(hidden),
        rngs={'params': rng},
        mutable=['params'],
      )
      boxes: Any = traverse_util.flatten_dict(made['params'], sep='/')
      own = {p: x for p, x in boxes.items() if not base.SHARED.fullmatch(p)}
      pruned = self._pruned(params, config, list(own))
      for path, box in own.items():
        x = pruned.get(path, box.value)
        x = x + self.alpha if path.endswith('/alpha') else x
        own[path] = box.replace(value=x)
      return own

    found = make(self.make_rng('params'), context.params)
    return {
      path: (lambda *_, x=box.value: x, box.value.shape, box.names)
      for path, box in found.items()
    }

  @nn.nowrap
  def _pruned(
    self, params: Any, config: T5Config, paths: list[str]
  ) -> dict[str, Any]:
    """Of these parameters, the values of those that the frozen network has."""
    if self.start is None:
      return {}
    whole = pruning.by_layer(params)
    units = self.start(whole, config, self.reduction_factor)
    found = pruning.take(whole, units)
    # As many heads, so that the tables of position biases fit as they are.
    found |= {p: x for p, x in whole.items() if p.endswith('/rel_embedding')}
    out = {}
    for path in paths:
      stack, stacked, rest = path.partition('/layers')
      layer, _, rest = rest.partition('/')
      if not stacked:
        sources = [path]
      else:
        chosen = self._chosen(stack, config)
        chosen = chosen[int(layer[1:]) :][:1] if layer else chosen
        sources = [f'{stack}/layers_{i}/{rest}' for i in chosen]
      if sources[0] in found:
        values = [jnp.asarray(found[p], jnp.float32) for p in sources]
        scanned = stacked and not layer
        out[path] = jnp.stack(values) if scanned else values[0]
    return out


def _increasing(stack: str, chosen: Any) -> tuple[int, ...]:
  """The chosen layers of a stack, checked."""
  whole = isinstance(chosen, Sequence) and all(
    isinstance(i, int) and i >= 0 for i in chosen
  )
  if not whole or not chosen or list(chosen) != sorted(set(chosen)):
    raise ValueError(
      f'LST.{stack}_layers must be None, or numbers of layers from 0 on, each '
      f'larger than the one before, got {chosen!r}.'
    )
  return tuple(chosen)


def _pick(stack: Any, chosen: tuple[int, ...] | None) -> Any:
  """The chosen layers' own, one behind the other."""
  if chosen is None:
    return stack
  if 'layers' in stack:
    index = np.asarray(chosen)
    return {'layers': jax.tree.map(lambda x: x[index], stack['layers'])}
  return {f'layers_{j}': stack[f'layers_{i}'] for j, i in enumerate(chosen)}


def _hidden(side: T5Config, stack: str, width: int) -> Any:
  """What the layers of a side stack read, of one token."""
  count = getattr(side, f'num_{stack}_layers')
  one = jnp.zeros((1, 1, width), side.dtype)
  if side.scan_layers:
    return {'layers': {'hidden': jnp.stack([one] * count)}}
  return {f'layers_{i}': {'hidden': one} for i in range(count)}
