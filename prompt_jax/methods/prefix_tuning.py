"""Prefix tuning (Li & Liang 2021), P-tuning v2 (Liu et al. 2021).

P learned keys and values in front of those of an attention, in every layer.
"""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from prompt_jax import deltas
from prompt_jax.methods import activations
from prompt_jax.methods import base
from prompt_jax.network.layers import T5Config

_POSITION_BIASES = ('preceding', 'none')


class PrefixTuning(nn.Module):
  """`softmax(q [K_p; K]^T + bias) [V_p; V]`: every query sees the prefix.

  A table holds K_p and V_p [L, P, H, K] of an attention; or they come from
  P embeddings E [P, D] through an MLP of the attention's own,
  `tanh(E wi + wi_bias) wo + wo_bias` [P, 2 L H K], whose part 2l is the key of
  layer l and 2l + 1 its value. The prefix has no queries and no outputs.

  A prefix of zeros is not the frozen model: it takes its share of the softmax.

  Attributes:
    length: P, slots in front of the text.
    mlp_dim: M, the MLP's inner width; None for the plain table.
    attentions: of 'encoder_self', 'decoder_self' and 'cross'. A decoder-only
      network has the second alone; the others are then left out.
    position_bias: 'preceding': slot j stands at j - P, in front of the row's
      first token, as where past keys and values are given to an
      implementation; rows then hold one example. 'none': a bias of 0.
      Cross-attention has none in either.
    dropout_rate: of the keys and values in training, drawn for each example.
    num_tasks: G, prefixes kept apart (with their MLPs), by `task_ids`.
    prefix_init: None: table and E from N(0, 1), the MLP's weights as PyTorch
      draws them, uniform up to fan_in^-0.5; or the keys and values at which
      all tasks start, to which an MLP is fitted (E stays as it was drawn).

  Raises:
    ValueError: an attribute is out of its range; when called, the network has
      none of the attentions, or rows are packed and the prefix precedes them.

  Source: Li & Liang 2021, arXiv 2101.00190, section 4.2 and 4.3 (as known from
  the paper); XiangLi1999/PrefixTuning `seq2seq/prefixTuning.py` (sites, MLP,
  N(0, 1)); r-three/t-few `src/models/prefix_tuning.py` (T5, the position
  bias). P-tuning v2: Liu et al. 2021, arXiv 2110.07602, THUDM/P-tuning-v2
  `model/prefix_encoder.py` (the layout) and `model/sequence_classification.py`
  (dropout for each example).
  """

  length: int = 20
  mlp_dim: int | None = 512
  attentions: Sequence[str] = tuple(activations.ATTENTIONS)
  position_bias: str = 'preceding'
  dropout_rate: float = 0.0
  num_tasks: int = 1
  prefix_init: activations.RealActivations | None = None

  def __post_init__(self):
    if isinstance(self.attentions, list):  # as gin hands it over
      object.__setattr__(self, 'attentions', tuple(self.attentions))
    self._check()
    super().__post_init__()

  def _check(self) -> None:
    for field in ('length', 'num_tasks', 'mlp_dim'):
      value = getattr(self, field)
      if field == 'mlp_dim' and value is None:
        continue
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'PrefixTuning.{field} must be a whole number of at least 1'
          f'{", or None" * (field == "mlp_dim")}, got {value!r}.'
        )
    known = activations.ATTENTIONS
    some = isinstance(self.attentions, tuple) and self.attentions
    if not some or len(set(self.attentions)) < len(self.attentions):
      raise ValueError(
        'PrefixTuning.attentions must be a list of one or more different of '
        f'{", ".join(known)}, got {self.attentions!r}.'
      )
    for name in self.attentions:
      if name not in known:
        raise ValueError(
          f'PrefixTuning.attentions: no {name!r}; there are '
          f'{", ".join(known)}.{deltas.near_misses(str(name), known)}'
        )
    if self.position_bias not in _POSITION_BIASES:
      raise ValueError(
        f"PrefixTuning.position_bias must be 'preceding' or 'none', got "
        f'{self.position_bias!r}.'
      )
    rate = self.dropout_rate
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
      raise ValueError(
        f'PrefixTuning.dropout_rate must be in [0, 1), got {rate!r}.'
      )
    init = self.prefix_init
    if not isinstance(init, activations.RealActivations | None):
      raise ValueError(
        'PrefixTuning.prefix_init must be None or a RealActivations, got '
        f'{init!r}.'
      )

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the prefixes on the attentions, and their slots on the biases."""
    config = context.config
    present = [
      name for name in self.attentions if activations.num_layers(config, name)
    ]
    if not present:
      raise ValueError(
        'PrefixTuning: a decoder-only network has none of the attentions '
        f"{', '.join(self.attentions)}; it has 'decoder_self'."
      )
    precede = self.position_bias == 'preceding'
    stacks = [activations.ATTENTIONS[n][0] for n in present if n != 'cross']
    if context.packed and precede and stacks:
      raise ValueError(
        "PrefixTuning with position_bias 'preceding' is not for packed rows: "
        'the prefix would precede the row, not each example in it. Do not '
        "pack (PACK=False), or take position_bias 'none'."
      )
    make = self._tables if self.mlp_dim is None else self._from_mlp
    tables = make(present, context)
    if self.is_initializing():  # there is no batch yet, and no `task_ids`
      return {}
    out: deltas.Deltas = {
      f'{path}/prefix': self._lay(table, context)
      for path, table in tables.items()
    }
    if precede:
      slots = deltas.Routed(jnp.zeros((1, self.length)))
      out |= {f'{stack}/relpos_bias/preceding': slots for stack in stacks}
    return out

  def _start(self, context: base.Context) -> dict[str, Any]:
    """The keys and values to start at, if a `prefix_init` gives any.

    Only while parameters are made: an `init` function is traced in every step
    too, for the shapes, and this one runs the network.
    """
    if self.prefix_init is None or not self.is_initializing():
      return {}
    return self.prefix_init(context, self.length)

  def _lead(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape and name of the axis of the tasks, if there are several."""
    return ((self.num_tasks,), ('task',)) if self.num_tasks > 1 else ((), ())

  def _tables(
    self, present: Sequence[str], context: base.Context
  ) -> dict[str, Any]:
    """Path -> (K_p, V_p), [(L,) (G,) P, H, K] each, which are parameters."""
    c = context.config
    start = self._start(context)
    tasks, names = self._lead()
    shape = (*tasks, self.length, c.num_heads, c.head_dim)
    axes: tuple[str, ...] = (*names, 'prefix_len', 'heads', 'kv')
    if c.scan_layers:
      axes = ('layers', *axes)
    specs, pairs = {}, {}
    for name in present:
      lead = (activations.num_layers(c, name),) if c.scan_layers else ()
      for i, path in enumerate(activations.paths(c, name)):
        pairs[path] = (f'{path}/prefix_key', f'{path}/prefix_value')
        for half, parameter in enumerate(pairs[path]):
          draw: Any = nn.initializers.normal(1.0)
          if start:
            x = start[name][half]  # [L, P, H, K]
            one_task = (*lead, *(1 for _ in tasks), *x.shape[1:])
            draw = _constant((x if lead else x[i]).reshape(one_task))
          specs[parameter] = draw, (*lead, *shape), axes
    own = base.params_at(self, specs)
    return {path: (own[k], own[v]) for path, (k, v) in pairs.items()}

  def _from_mlp(
    self, present: Sequence[str], context: base.Context
  ) -> dict[str, Any]:
    """Path -> (K_p, V_p), [(L,) (G,) P, H, K] each, from the MLPs."""
    c = context.config
    start = self._start(context)
    specs = {}
    for name in present:
      mlp = self._mlp_specs(c, activations.num_layers(c, name))
      if start:
        mlp = self._fitted(mlp, start[name])
      specs |= {f'{name}/{k}': spec for k, spec in mlp.items()}
    own = base.params_at(self, specs)
    out = {}
    for name in present:
      y = _mlp({k: own[f'{name}/{k}'] for k in _MLP})
      key, value = _split(y, activations.num_layers(c, name), c)
      for i, path in enumerate(activations.paths(c, name)):
        out[path] = (key, value) if c.scan_layers else (key[i], value[i])
    return out

  def _mlp_specs(self, c: T5Config, layers: int) -> dict[str, Any]:
    """Name -> initializer, shape and axes of E and of the MLP's parameters."""
    assert self.mlp_dim is not None
    d, m, width = c.emb_dim, self.mlp_dim, 2 * layers * c.num_heads * c.head_dim
    tasks, names = self._lead()
    specs = {
      'embedding': (
        nn.initializers.normal(1.0),
        (self.length, d),
        ('prefix_len', 'prompt_embed'),
      ),
      'wi': (_linear(d), (d, m), ('prompt_embed', 'adapter_mid')),
      'wi_bias': (_linear(d), (m,), ('adapter_mid',)),
      'wo': (_linear(m), (m, width), ('adapter_mid', 'joined_kv')),
      'wo_bias': (_linear(m), (width,), ('joined_kv',)),
    }
    return {
      name: (draw, (*tasks, *shape), (*names, *axes))
      for name, (draw, shape, axes) in specs.items()
    }

  def _fitted(self, drawn: Any, start: Any) -> Any:
    """The MLP's parameters where its output is near the keys and values."""
    assert self.prefix_init is not None
    rngs = jax.random.split(self.make_rng('params'), len(drawn))
    params = {
      name: draw(rng, shape, jnp.float32)
      for rng, (name, (draw, shape, _)) in zip(rngs, drawn.items(), strict=True)
    }
    embedding = params.pop('embedding')
    wanted = jnp.stack(start, 1)  # [L, 2, P, H, K]
    wanted = jnp.moveaxis(wanted, 2, 0).reshape(self.length, -1)
    params = self.prefix_init.fit(
      lambda p: _mlp({**p, 'embedding': embedding}), params, wanted
    )
    params['embedding'] = embedding
    return {
      name: (_constant(params[name]), shape, axes)
      for name, (_, shape, axes) in drawn.items()
    }

  def _lay(self, table: Any, context: base.Context) -> deltas.Routed:
    """One attention's keys and values, by task, with dropout in training."""
    lead = table[0].shape[:1] if context.config.scan_layers else ()
    axis = len(lead)
    if self.num_tasks == 1:
      table = jax.tree.map(lambda x: jnp.expand_dims(x, axis), table)
    routed = context.route(table, lead)
    if not self.dropout_rate or not self.has_rng('dropout'):
      return routed
    rows = context.tokens.shape[0]
    group = jnp.zeros(rows, jnp.int32)
    if routed.group is not None:
      group = context.task_ids
    drop = nn.Dropout(self.dropout_rate, deterministic=False)
    names = (*('layers',) * axis, 'batch', 'prefix_len', 'heads', 'kv')

    def one(x: Any) -> Any:
      return nn.with_logical_constraint(
        drop(jnp.take(x, group, axis=axis)), names
      )

    return deltas.Routed(jax.tree.map(one, table))


_MLP = ('embedding', 'wi', 'wi_bias', 'wo', 'wo_bias')


def _mlp(own: Any) -> Any:
  """`tanh(E wi + wi_bias) wo + wo_bias`, [(G,) P, 2 L H K]."""
  h = own['embedding'] @ own['wi'] + own['wi_bias'][..., None, :]
  return jnp.tanh(h) @ own['wo'] + own['wo_bias'][..., None, :]


def _split(x: Any, layers: int, c: T5Config) -> tuple[Any, Any]:
  """[(G,) P, 2 L H K] -> keys and values, [L, (G,) P, H, K] each."""
  x = x.reshape(*x.shape[:-1], layers, 2, c.num_heads, c.head_dim)
  x = jnp.moveaxis(x, -4, 0)
  return x[..., 0, :, :], x[..., 1, :, :]


def _linear(fan_in: int) -> Any:
  """What PyTorch draws weights and biases of a linear layer from."""
  bound = fan_in**-0.5
  return lambda rng, shape, dtype: jax.random.uniform(
    rng, shape, dtype, -bound, bound
  )


def _constant(x: Any) -> Any:
  """An initializer that is `x`, the same for all tasks."""
  return lambda rng, shape, dtype: jnp.broadcast_to(x, shape).astype(dtype)
