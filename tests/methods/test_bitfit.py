"""Added biases, norm scales, and what both mean on T5."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_1_1

from prompt_jax import deltas
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods.bitfit import Shifts

CONFIG = helpers.SMALL
D, F, L = CONFIG.emb_dim, CONFIG.mlp_dim, 2
INNER = CONFIG.num_heads * CONFIG.head_dim
BARE = models.EncoderDecoderModel(CONFIG)
NORMS = ('.*norm/scale',)
KEYS = ('.*/key',)


@functools.cache
def frozen():
  init = jax.jit(BARE.init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


@functools.cache
def apply():
  """The network with some deltas: compiled anew for each kind of them."""
  return jax.jit(BARE.apply)


def start(**fields):
  context = BARE.context(frozen(), exporting=True)  # of all tasks
  own = Shifts(**fields).init(jax.random.PRNGKey(0), context)['params']
  return train_state.flatten(partitioning.unbox(own))


def biases(scale=0.5, **fields):
  rng = np.random.default_rng(0)
  return {
    path: rng.normal(scale=scale, size=x.shape).astype(np.float32)
    for path, x in start(**fields).items()
  }


def lay(own, **fields):
  variables = {'params': train_state.unflatten(own)}
  return Shifts(**fields).apply(variables, BARE.context(frozen()))


# ---- how many --------------------------------------------------------------


def test_counts_are_the_formulas():
  def shifts(d, n, i, f):
    return 3 * n * (2 * i + d) + 2 * n * (2 * f + d)

  t5_1_1.check_declared('layer_norm', t5_1_1.norm_scales)
  t5_1_1.check_declared(
    'bitfit', lambda *size: shifts(*size) + t5_1_1.norm_scales(*size)
  )
  assert sum(x.size for x in start().values()) == shifts(D, L, INNER, F)
  # With the keys all seven kernels of a layer have one.
  every = start(targets='.*/layers/.*')
  want = 3 * L * (3 * INNER + D) + 2 * L * (2 * F + D)
  assert sum(x.size for x in every.values()) == want


def test_the_pattern_is_of_all_norms_and_of_nothing_else():
  trained, _ = train_state.split(frozen(), NORMS)
  flat = train_state.flatten(trained)
  assert {path.rsplit('/', 1)[1] for path in flat} == {'scale'}
  assert sum(x.size for x in flat.values()) == t5_1_1.norm_scales(D, L)
  scales = {k for k in train_state.flatten(frozen()) if k.endswith('/scale')}
  assert flat.keys() == scales and len(scales) == 7


# ---- biases ----------------------------------------------------------------


def test_zeros_change_not_a_bit():
  own = start()
  assert not any(x.any() for x in own.values())
  batch = helpers.random_batch(CONFIG)
  np.testing.assert_array_equal(
    apply()(frozen(), lay(own), batch), apply()(frozen(), {}, batch)
  )


def test_a_bias_stands_behind_its_projection():
  """`y = x W + b`: of W_o it is the same at every position of the stream."""
  own = biases(targets='decoder/.*/wo')
  batch = helpers.random_batch(CONFIG)
  found = lay(own, targets='decoder/.*/wo')
  [(path, delta)] = found.items()
  assert path == 'decoder/layers/mlp/wo/shift'
  np.testing.assert_array_equal(delta.table[:, 0], *own.values())
  last = jnp.zeros((L, 1, D)).at[-1].set(delta.table[-1])
  run = jax.jit(functools.partial(BARE.apply, mutable=['intermediates']))
  got, want = (
    run(frozen(), laid, batch)[1]['intermediates']['decoder']['layers']
    for laid in ({path: deltas.Routed(last)}, {path: deltas.Routed(0 * last)})
  )
  got, want = got['hidden'], want['hidden']
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_allclose(
    got[1] - want[1], np.broadcast_to(last[-1], want[1].shape), atol=1e-5
  )


@pytest.mark.slow
def test_a_bias_of_keys_changes_nothing_without_a_prefix():
  batch = helpers.random_batch(CONFIG)
  own = biases(targets=KEYS)
  found = lay(own, targets=KEYS)
  plain = np.asarray(apply()(frozen(), {}, batch))
  got = np.asarray(apply()(frozen(), found, batch))
  np.testing.assert_allclose(got, plain, atol=1e-6 * np.abs(plain).max())
  rng = np.random.default_rng(1)
  shape = (L, 1, 3, CONFIG.num_heads, CONFIG.head_dim)
  table = tuple(jnp.asarray(rng.normal(size=shape), 'float32') for _ in 'kv')
  prefix = {'decoder/layers/self_attention/prefix': deltas.Routed(table)}
  plain = np.asarray(apply()(frozen(), prefix, batch))
  got = np.asarray(apply()(frozen(), {**prefix, **found}, batch))
  assert np.abs(got - plain).max() > 1e-3 * np.abs(plain).max()


def test_targets_leave_the_keys_out():
  paths = {path.removesuffix('/bias') for path in start()}
  kernels = {
    path.removesuffix('/kernel')
    for path in train_state.flatten(frozen())
    if path.endswith('/kernel')
  }
  left = {path.rsplit('/', 1)[1] for path in kernels - paths}
  assert paths < kernels and left == {'key', 'logits_dense'}


def test_biases_are_not_folded_into_weights():
  with pytest.raises(ValueError, match='shift cannot be folded'):
    deltas.merge_into_weights(lay(start()), frozen())


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'num_tasks': -1}, 'Shifts.num_tasks must be .* at least 1, got -1'),
    ({'targets': []}, r'Shifts.targets must be patterns .*, got \[\]'),
    ({'targets': ('.*/queries',)}, "matches '.*/queries'"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    start(**fields)


# ---- norm scales -----------------------------------------------------------


def test_scales_of_norms_are_rows_of_what_follows():
  """A scale s in front of kernels is `s[:, None] * W` behind a scale of 1."""
  follows = {
    'encoder/layers/pre_mlp_layer_norm': ['encoder/layers/mlp/wi_'],
    'decoder/layers/pre_self_attention_layer_norm': [
      f'decoder/layers/self_attention/{name}'
      for name in ('query', 'key', 'value')
    ],
    'decoder/decoder_norm': ['decoder/logits_dense'],
  }
  rng = np.random.default_rng(0)
  flat = dict(train_state.flatten(frozen()))
  folded = dict(flat)
  for norm, starts in follows.items():
    name = f'{norm}/scale'
    flat[name] = rng.uniform(0.5, 1.5, flat[name].shape).astype(np.float32)
    folded[name] = np.ones_like(flat[name])
    for path, x in folded.items():
      if path.startswith(tuple(starts)):
        folded[path] = x * flat[name][..., None]
  batch = helpers.random_batch(CONFIG)
  got = np.asarray(apply()(train_state.unflatten(flat), {}, batch))
  want = apply()(train_state.unflatten(folded), {}, batch)
  np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(got).max(), rtol=0)
  plain = apply()(frozen(), {}, batch)
  assert np.abs(got - plain).max() > 0.1 * np.abs(got).max()
