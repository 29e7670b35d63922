"""Compacter: sums of Kronecker products, what is shared, and the counts."""

import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import some_deltas
from some_deltas import CLOSE
from some_deltas import C
from some_deltas import L
from some_deltas import draw

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.methods.compacter import Compacter
from prompt_jax.methods.compacter import kronecker_sum
from prompt_jax.network import layers

D, N, R = C.emb_dim, 2, 3
M = D // 4
KEY = jax.random.PRNGKey(0)
METHOD = Compacter(phm_dim=N, reduction_factor=4, phm_rank=R)


@functools.cache
def context():
  """What a method sees of the network, and of two examples of two tasks."""
  model = models.EncoderDecoderModel(C)
  batch = {
    'tokens': jnp.ones((2, 3), jnp.int32),
    'task_ids': jnp.array([2, 0]),
  }
  return model.context(some_deltas.params(), **batch)


def start(method):
  """The method's parameters by path, with the names of their axes."""
  return train_state.flatten(method.init(KEY, context())['params'])


def moved(own):
  return {
    path: box.value + draw(*box.value.shape, seed=i)
    for i, (path, box) in enumerate(own.items())
  }


def lay(method, own):
  own = train_state.unflatten(own)
  return method.apply({'params': own}, context())


def by_hand(rule, left, right):
  """`np.kron`, term by term."""
  factors = [np.asarray(x) for x in (rule, left, right)]
  terms = [np.kron(a, s @ t) for a, s, t in zip(*factors, strict=True)]
  return np.sum(terms, axis=0)


def test_kronecker_sum_is_numpys_for_each_layer_and_group():
  rule, left = draw(3, N, N, N), draw(L, 3, N, 5, R)
  right = draw(L, 3, N, R, 4)
  got = kronecker_sum(rule, left, right)
  assert got.shape == (L, 3, N * 5, N * 4)
  for i, j in np.ndindex(L, 3):
    want = by_hand(rule[j], left[i, j], right[i, j])
    np.testing.assert_allclose(got[i, j], want, **CLOSE)


@pytest.mark.parametrize('path', ['encoder/layers/mlp', 'decoder/layers/mlp'])
def test_is_its_equation(path):
  """With the same A_i on both ways, in both stacks."""
  own = moved(start(METHOD))
  found = lay(METHOD, own)
  layer = 1
  delta = jax.tree.map(lambda t: t[layer], found[f'{path}/bottleneck'])
  params = some_deltas.params()[path.split('/')[0]]['layers']['mlp']
  params = jax.tree.map(lambda p: p[layer], params)
  x = draw(2, 5, D)
  mlp = layers.Mlp(C)
  z = np.asarray(mlp.apply({'params': params}, x))
  got = mlp.apply({'params': params, 'deltas': {'bottleneck': delta}}, x)
  mine = {
    name: np.asarray(own[f'{path}/{name}'][layer])
    for name in ('down_left', 'down_right', 'down_bias',
                 'up_left', 'up_right', 'up_bias')
  }  # fmt: skip
  rule = own['phm_rule']
  down = by_hand(rule, mine['down_left'], mine['down_right'])
  up = by_hand(rule, mine['up_left'], mine['up_right'])
  assert down.shape == (D, M) and up.shape == (M, D)
  h = z @ down + mine['down_bias']
  h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  np.testing.assert_allclose(got, z + h @ up + mine['up_bias'], **CLOSE)


@pytest.mark.parametrize('tasks', [1, 3])
def test_count(tasks):
  own = start(METHOD.clone(num_tasks=tasks))
  shape = own['phm_rule'].value.shape
  assert shape == ((3, N, N, N) if tasks > 1 else (N, N, N))
  each = 2 * R * (D + M) + M + D
  total = sum(box.value.size for box in own.values())
  assert total == tasks * (N**3 + 4 * L * each)


@pytest.mark.parametrize('sublayers, published', [
  ("('.*/(attention|self_attention|mlp)',)", '0.073'), ("('.*/mlp',)", '0.047')
])  # fmt: skip
def test_share_of_t5_base_is_the_papers(sublayers, published):
  """Compacter's and Compacter++'s, with the layer norms."""
  flags = [
    f'SUBLAYERS={sublayers}',
    "TRAINABLE_PATTERNS=('.*norm/scale',)",
    'VOCABULARY=None',
    'VOCABULARY_PATH=nowhere',
  ]
  [model] = contract.build(['%MODEL'], 'models/t5_base.gin', 'compacter', flags)
  network = partitioning.unbox(model.abstract_network)
  method = jax.eval_shape(model.init_method, KEY, network)
  norms = model.split(network)[0]
  trained = sum(x.size for x in jax.tree.leaves((method, norms)))
  every = sum(x.size for x in jax.tree.leaves(network))
  assert f'{100 * trained / every:.3f}' == published


def test_starts_at_the_frozen_model_but_for_rounding():
  """What an adapter adds to z at first, against z, with the released sizes."""
  site = base.Site('encoder/layers/mlp/wo', (768, 768), ('mlp', 'embed'))
  wide = base.Context(embedding=None, sites=(site,))
  method = Compacter(targets=('.*',))
  found, own = method.init_with_output(KEY, wide)
  adapter = found['encoder/layers/mlp/bottleneck'].table
  assert adapter.down.shape == (1, 768, 24)
  z = np.asarray(draw(50, 768, scale=1.0))
  h = np.asarray(jax.nn.gelu(z @ adapter.down[0]))
  added = h @ adapter.up[0]
  assert 0 < np.abs(added).max() < 1e-6 < np.abs(h).max()
  own = own['params']
  rule = np.asarray(own['phm_rule'].value)
  assert 0.5e-4 < rule.std() < 1.5e-4
  left = np.asarray(own['encoder']['layers']['mlp']['down_left'].value)
  bound = np.sqrt(2) * np.sqrt(6 / (768 // 4 + 1))
  assert left.shape == (4, 192, 1) and 0.95 * bound < left.max() <= bound
  for name in ('down_bias', 'up_bias'):
    assert not np.any(own['encoder']['layers']['mlp'][name].value)


def test_a_task_has_its_own_slow_weights():
  """Else two tasks in one batch would not be two runs."""
  method = METHOD.clone(num_tasks=3)
  own = moved(start(method))
  before = lay(method, own)
  own['phm_rule'] = own['phm_rule'].at[1].add(1.0)
  after = lay(method, own)
  for path, delta in before.items():
    down, other = delta.table.down, after[path].table.down
    same = np.asarray(down == other).all((0, 2, 3))
    assert same.tolist() == [True, False, True]
    np.testing.assert_array_equal(delta.group, [[2, 0]] * L)


@pytest.mark.parametrize('fields, message', [
  ({'phm_dim': 0}, 'Compacter.phm_dim must be .* at least 1, got 0'),
  ({'phm_rank': -1}, 'Compacter.phm_rank must be .* at least 1, got -1'),
  ({'reduction_factor': 2.0}, r'reduction_factor must be .* got 2\.0'),
  ({'num_tasks': None}, 'num_tasks must be .* at least 1, got None'),
  ({'activation': 'swish'}, "Compacter.activation must be .* got 'swish'"),
  ({'phm_init_range': 0.0}, 'no gradient would reach S and T'),
  ({'targets': '.*/mlp'}, "Compacter.targets must be a sequence .* '.*/mlp'"),
])  # fmt: skip
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    Compacter(**fields)


@pytest.mark.parametrize('fields, message', [
  ({'phm_dim': 3}, 'the width 16 and the bottleneck 16 // 4 = 4 in 3 parts'),
  ({'phm_dim': 8}, 'both must be multiples of phm_dim'),
  ({'reduction_factor': 17}, '16 // 17 = 0'),
  ({'targets': ('.*/mpl',)}, "No sublayer of the network matches '.*/mpl'"),
])  # fmt: skip
def test_what_the_network_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    start(METHOD.clone(**fields))
