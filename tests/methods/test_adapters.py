"""Adapters: where they stand, their equation, that they start as nothing."""

import dataclasses
import functools

import contract
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import some_deltas
from some_deltas import CLOSE
from some_deltas import C
from some_deltas import L
from some_deltas import draw

from prompt_jax import deltas
from prompt_jax import models
from prompt_jax import train_state
from prompt_jax.methods import adapters
from prompt_jax.methods import base
from prompt_jax.methods.adapters import Adapters
from prompt_jax.network import layers

D, M = C.emb_dim, 3
KEY = jax.random.PRNGKey(0)


@functools.cache
def context(scan=True):
  """What a method sees of the network, and of two examples of two tasks."""
  config = dataclasses.replace(C, scan_layers=scan)
  model = models.EncoderDecoderModel(config)
  batch = {
    'tokens': jnp.ones((2, 3), jnp.int32),
    'task_ids': jnp.array([2, 0]),
  }
  return model.context(some_deltas.params(scan), **batch)


def start(method, scan=True):
  """The method's parameters by path, with the names of their axes."""
  return train_state.flatten(method.init(KEY, context(scan))['params'])


def lay(method, own=None, scan=True):
  """The deltas of a method, by default with its parameters at the start."""
  if own is None:
    return method.init_with_output(KEY, context(scan))[0]
  own = train_state.unflatten(own)
  return method.apply({'params': own}, context(scan))


def moved(own):
  values = {path: box.value for path, box in own.items()}
  return {
    path: x + draw(*x.shape, seed=i)
    for i, (path, x) in enumerate(values.items())
  }


def places(found):
  return {path.rpartition('/')[0] for path in found}


# ---- where -----------------------------------------------------------------

ALL = {
  'encoder/layers/attention',
  'encoder/layers/mlp',
  'decoder/layers/self_attention',
  'decoder/layers/encoder_decoder_attention',
  'decoder/layers/mlp',
}


@pytest.mark.slow
def test_houlsby_is_everywhere_but_after_cross_attention():
  want = ALL - {'decoder/layers/encoder_decoder_attention'}
  assert places(lay(Adapters(M))) == want
  assert places(lay(Adapters(M, targets=('.*',)))) == ALL
  mlps = {p for p in ALL if p.endswith('mlp')}
  assert places(lay(Adapters(M, targets=('.*/mlp',)))) == mlps
  two = Adapters(M, targets=('encoder/.*/mlp', 'decoder/.*', '.*/mlp'))
  assert places(lay(two)) == {p for p in ALL if 'encoder/layers/att' not in p}


@pytest.mark.slow
def test_unscanned_layers_are_places_of_their_own():
  found = lay(Adapters(M), scan=False)
  assert len(found) == 4 * L
  assert 'decoder/layers_1/self_attention/bottleneck' in found
  one = lay(Adapters(M, targets=('encoder/layers_1/mlp',)), scan=False)
  assert list(one) == ['encoder/layers_1/mlp/bottleneck']
  assert one['encoder/layers_1/mlp/bottleneck'].table.down.shape == (1, D, M)


def test_a_decoder_alone_has_two_sublayers_a_layer():
  config = dataclasses.replace(C, num_encoder_layers=0)
  model = models.DecoderOnlyModel(config)
  context = base.context(config, model.abstract_network, None, None)
  found = [s.path for s in adapters.sublayers(context, adapters.HOULSBY)]
  assert found == ['decoder/layers/mlp', 'decoder/layers/self_attention']


@pytest.mark.parametrize('targets, sites', [
  (adapters.HOULSBY, 4 * L), (('.*',), 5 * L), (('.*/mlp',), 2 * L)
])  # fmt: skip
@pytest.mark.parametrize('tasks', [1, 3])
def test_count(targets, sites, tasks):
  boxes = start(Adapters(M, targets=targets, num_tasks=tasks))
  total = sum(box.value.size for box in boxes.values())
  assert total == tasks * sites * (2 * D * M + M + D)
  lead = ('layers', 'task') if tasks > 1 else ('layers',)
  for path, box in boxes.items():
    assert box.names[: len(lead)] == lead, path
    assert box.value.shape[: len(lead)] == (L, tasks)[: len(lead)], path


def test_published_variants():
  """Of what a count does not show, the gin files have the paper's."""
  fields = ('bottleneck_dim', 'kind', 'scale', 'activation', 'adapter_init')
  want = {
    'houlsby': (64, 'bottleneck', 1.0, 'gelu', 'lora'),
    'pfeiffer': (64, 'bottleneck', 1.0, 'relu', 'lora'),
    'parallel_adapter': (512, 'parallel', 4.0, 'relu', 'lora'),
  }
  for name, values in want.items():
    model = str(contract.SMALL)
    [method] = contract.build(['%METHOD'], model, name, ['DROPOUT_RATE=0.1'])
    assert tuple(getattr(method, f) for f in fields) == values
    sites = 4 if name == 'houlsby' else 2
    assert len(lay(method)) == sites


# ---- what ------------------------------------------------------------------


def silu(x):
  return x / (1 + np.exp(-x))


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
  'relu': lambda x: np.maximum(x, 0), 'silu': silu, 'gelu': gelu,
  'linear': lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('kind', adapters.KINDS)
def test_is_its_equation(kind, activation):
  """Z + s (f(v A + a) B + b), v the sublayer's output or its input."""
  method = Adapters(M, kind=kind, activation=activation, scale=4.0)
  own = moved(start(method))
  found = lay(method, own)
  layer, path = 1, 'encoder/layers/mlp'
  delta = jax.tree.map(lambda t: t[layer], found[f'{path}/{kind}'])
  params = some_deltas.params()['encoder']['layers']['mlp']
  params = jax.tree.map(lambda p: p[layer], params)
  x = draw(2, 5, D)
  mlp = layers.Mlp(C)
  z = np.asarray(mlp.apply({'params': params}, x))
  got = mlp.apply({'params': params, 'deltas': {kind: delta}}, x)
  a, a0, b, b0 = (
    np.asarray(own[f'{path}/{name}'][layer])
    for name in ('down', 'down_bias', 'up', 'up_bias')
  )
  v = z if kind == 'bottleneck' else np.asarray(x)
  want = z + 4 * (ACTIVATIONS[activation](v @ a + a0) @ b + b0)
  np.testing.assert_allclose(got, want, **CLOSE)


BOTH = base.Chain(
  {kind: Adapters(M, targets=('.*',), kind=kind) for kind in adapters.KINDS}
)


@functools.cache
def program():
  batch = helpers.random_batch(C)
  apply = jax.jit(models.EncoderDecoderModel(C).apply)
  return lambda found: np.asarray(apply(some_deltas.params(), found, batch))


def test_without_effect_the_logits_are_those_of_the_network():
  """Bit by bit, where B and b are 0, as at the start, and where s is 0."""
  want = program()({})
  own = start(BOTH)
  values = moved(own)
  assert np.abs(program()(lay(BOTH, values)) - want).max() > 0.1
  parts = {k: m.clone(scale=0.0) for k, m in BOTH.methods.items()}
  got = program()(lay(base.Chain(parts), values))
  np.testing.assert_array_equal(got, want)
  for path, box in own.items():
    if path.split('/')[-1] in ('up', 'up_bias'):
      assert (box.value == 0).all()
      values[path] = box.value
  np.testing.assert_array_equal(program()(lay(BOTH, values)), want)
  np.testing.assert_array_equal(program()(lay(BOTH)), want)


def test_initial_values():
  site = base.Site('encoder/layers/mlp/wo', (40, 32, 64), ('layers', '', ''))
  context = base.Context(embedding=None, sites=(site,))

  def drawn(name):
    method = Adapters(32, targets=('.*',), adapter_init=name)
    own = method.init(KEY, context)['params']['encoder']['layers']['mlp']
    own = {k: np.asarray(box.value) for k, box in own.items()}
    assert not own['down_bias'].any() and not own['up_bias'].any()
    return own['down'], own['up']

  down, up = drawn('lora')
  assert (up == 0).all() and 0.124 < np.abs(down).max() <= 0.125
  np.testing.assert_allclose(down.std(), 0.125 / np.sqrt(3), rtol=0.02)
  for x in drawn('near_identity'):
    assert 1.9e-3 < np.abs(x).max() <= 2e-3
    np.testing.assert_allclose(x.std(), 0.88e-3, rtol=0.02)  # cut at 2 sigma
  for x in drawn('normal'):
    np.testing.assert_allclose(x.std(), 0.02, rtol=0.02)
    assert np.abs(x).max() > 0.06


def test_tasks_and_layers_start_apart():
  own = start(Adapters(M, num_tasks=3))
  down = np.asarray(own['encoder/layers/mlp/down'].value)
  assert down.shape == (L, 3, D, M)
  assert len(np.unique(down)) == down.size
  routed = lay(Adapters(M, num_tasks=3))
  for delta in routed.values():
    np.testing.assert_array_equal(delta.group, [[2, 0]] * L)


# ---- two at one place, and what else is refused ----------------------------


@pytest.mark.parametrize('kind', adapters.KINDS)
def test_two_of_a_kind_at_one_place_are_refused(kind):
  """They have no order. At different places, and of two kinds, they combine."""
  one = Adapters(M, kind=kind, targets=('.*/mlp',))
  two = {'a': one, 'b': one.clone(targets=('encoder/.*',))}
  with pytest.raises(ValueError) as error:
    start(base.Chain(two))
  assert f'encoder/layers/mlp/{kind}: two methods set it' in str(error.value)
  assert 'does not combine' in str(error.value)
  apart = {'a': one, 'b': one.clone(targets=('.*attention',))}
  assert places(lay(base.Chain(apart))) == ALL
  assert len(lay(BOTH)) == 2 * len(ALL)


def test_cannot_be_folded_into_weights():
  with pytest.raises(ValueError, match='bottleneck cannot be folded'):
    deltas.merge_into_weights(lay(Adapters(M)), some_deltas.params())


@pytest.mark.parametrize('fields, message', [
  ({'bottleneck_dim': 0}, 'bottleneck_dim must be .* at least 1, got 0'),
  ({'bottleneck_dim': -4}, 'bottleneck_dim must be .* at least 1, got -4'),
  ({'bottleneck_dim': 2.0}, r'bottleneck_dim must be .* got 2\.0'),
  ({'num_tasks': '3'}, "num_tasks must be .* at least 1, got '3'"),
  ({'kind': 'paralel'}, "one of .* got 'paralel'. Did you mean 'parallel'"),
  ({'activation': 'gelu_new'}, "got 'gelu_new'. Did you mean 'gelu'"),
  ({'adapter_init': 'near'}, "Adapters.adapter_init must be one of lora, near"),
  ({'scale': -1.0}, 'scale must be a finite number of at least 0, got -1.0'),
  ({'scale': float('inf')}, 'scale must be a finite number .* got inf'),
  ({'scale': '4'}, "scale must be a finite number .* got '4'"),
  ({'targets': '.*/mlp'}, "must be a sequence of patterns .* got '.*/mlp'"),
  ({'targets': ()}, r"such as \('encoder/\.\*/mlp',\), got \(\)"),
])  # fmt: skip
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    Adapters(**fields)


@pytest.mark.parametrize('pattern, message', [
  ('encoder/layers/self_attention', "mean 'decoder/layers/self_attention'"),
  ('encoder/layers/mlp/wo', "Did you mean 'encoder/layers/mlp'"),
  ('encoder/layers/mpl', "No sublayer .* 'encoder/layers/mpl'. Did you mean"),
  ('xyz', r"There are \['decoder/layers/encoder_decoder_attention',"),
])  # fmt: skip
def test_targets_that_are_no_sublayers(pattern, message):
  """Also where another target matches."""
  with pytest.raises(ValueError, match=message):
    start(Adapters(M, targets=('.*/mlp', pattern)))
