"""What each kind of delta does to the network, by its equation."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_deltas import CLOSE
from some_deltas import GROUP
from some_deltas import WHOSE
from some_deltas import WIDTH
from some_deltas import B
from some_deltas import C
from some_deltas import G
from some_deltas import L
from some_deltas import by_example
from some_deltas import draw
from some_deltas import params
from some_deltas import tokens
from some_deltas import whose

from prompt_jax import deltas
from prompt_jax.deltas import Routed
from prompt_jax.network import attention
from prompt_jax.network import layers
from prompt_jax.network import t5


def single(module, kind_to_delta, *args):
  """`module` alone with deltas on it, and its parameters by path."""
  own = nn.meta.unbox(module.init(jax.random.PRNGKey(0), *args)['params'])
  found = deltas.collection(kind_to_delta)
  out = module.apply({'params': own, 'deltas': found}, *args)
  return np.asarray(out), jax.tree.map(np.asarray, own)


def each(delta, kind):
  """The change of each example, a tuple of arrays for each."""
  return list(zip(*by_example(delta, kind), strict=True))


@pytest.mark.parametrize('owner', WHOSE)
def test_projection_is_its_equation(owner):
  """(x W + x W' + x A B) * scale + shift."""
  kinds = ('low_rank', 'kernel', 'scale', 'shift')
  found = {kind: whose(kind, owner, seed=5) for kind in kinds}
  x = draw(B, 7, C.emb_dim)
  dense = layers.Dense(WIDTH, ('embed', 'mlp'))
  got, own = single(dense, found, x)
  per = {kind: each(found[kind], kind) for kind in kinds}
  for i, row in enumerate(np.asarray(x)):
    (a, b), (more,), (scale,), (shift,) = (per[kind][i] for kind in kinds)
    y = row @ (own['kernel'] + more) + row @ a @ b
    want = y * scale + shift
    np.testing.assert_allclose(got[i], want, **CLOSE)


@pytest.mark.parametrize('owner', WHOSE)
def test_rows_are_more_rows_of_the_embedding(owner):
  found = {'rows': whose('rows', owner)}
  ids = np.array([[5, 65, 0], [64, 63, 1], [65, 64, 2], [9, 64, 65]], np.int32)
  got, own = single(layers.Embed(C), found, jnp.asarray(ids))
  for i, (rows,) in enumerate(each(found['rows'], 'rows')):
    table = np.concatenate([own['embedding'], rows])
    np.testing.assert_array_equal(got[i], table[ids[i]])


def test_a_row_that_is_not_there_is_nan():
  """Never another row: NaN is seen, a clamped index is not."""
  for owner in WHOSE:
    ids = jnp.full((B, 1), C.vocab_size + 2)
    got, _ = single(layers.Embed(C), {'rows': whose('rows', owner)}, ids)
    assert np.isnan(got).all(), owner


@pytest.mark.parametrize('owner', WHOSE)
@pytest.mark.parametrize('kind', ['bottleneck', 'parallel'])
def test_adapter_is_its_equation(kind, owner):
  """Y + f(z A + a) B + b, z the sublayer's output or, parallel, its input."""
  found = {kind: whose(kind, owner)}
  x = draw(B, 7, C.emb_dim)
  plain, _ = single(layers.Mlp(C), {}, x)
  got, _ = single(layers.Mlp(C), found, x)
  for i, (a, a0, b, b0) in enumerate(each(found[kind], kind)):
    if kind == 'bottleneck':
      h = np.maximum(plain[i] @ a + a0, 0)
    else:
      h = np.asarray(x[i]) @ a + a0
      h = h / (1 + np.exp(-h))
    np.testing.assert_allclose(got[i], plain[i] + h @ b + b0, **CLOSE)


def test_dropout_of_a_low_rank_is_of_its_input_alone():
  """As many rows differ as are drawn; without an rng none are."""
  x = draw(B, 7, C.emb_dim)
  dense = layers.Dense(WIDTH, ('embed', 'mlp'))
  own = dense.init(jax.random.PRNGKey(0), x)
  delta = whose('low_rank', 'shared')
  found = {'low_rank': dataclasses.replace(delta, dropout_rate=0.5)}
  apply = functools.partial(
    dense.apply, {**own, 'deltas': deltas.collection(found)}, x
  )
  plain = dense.apply({**own, 'deltas': {'low_rank': delta}}, x)
  np.testing.assert_array_equal(apply(), plain)
  many = [apply(rngs={'dropout': jax.random.PRNGKey(i)}) for i in range(400)]
  assert np.abs(many[0] - many[1]).max() > 0.1
  spread = np.std(many, axis=0).max() / np.sqrt(len(many))
  np.testing.assert_allclose(np.mean(many, axis=0), plain, atol=5 * spread)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'loop'])
def test_hidden_is_its_equation(scan):
  """Of the last encoder layer: its input is replaced at some positions."""
  config = dataclasses.replace(C, scan_layers=scan)
  network = t5.T5(config)
  encoder_tokens, _ = tokens()
  value = draw(L, 2, C.emb_dim).at[:, 0].set(0)  # of nothing, of position 1
  gate = jnp.ones((L, 2, 1)).at[-1, 1].set(0)
  value = value.at[0].set(0)
  where = jnp.zeros(encoder_tokens.shape, jnp.int32).at[:, 1].set(1)
  if scan:
    where = jnp.broadcast_to(where, (L, *where.shape))
    found = {'encoder/layers/hidden': Routed((gate, value), where)}
  else:
    found = {
      f'encoder/layers_{i}/hidden': Routed((gate[i], value[i]), where)
      for i in range(L)
    }

  def last(laid):
    _, state = network.apply(
      {'params': params(scan), 'deltas': deltas.collection(laid)},
      encoder_tokens,
      method='encode',
      mutable=['intermediates'],
    )
    hidden = state['intermediates']['encoder']
    if scan:
      return [np.asarray(x) for x in hidden['layers']['hidden']]
    return [np.asarray(hidden[f'layers_{i}']['hidden']) for i in range(L)]

  plain, got = last({}), last(found)
  np.testing.assert_array_equal(plain[0], got[0])
  # By hand: the last layer alone, on an input with that position replaced.
  x = jnp.asarray(plain[0]).at[:, 1].set(value[-1, 1])
  own = params(False)['encoder']
  bias = attention.RelativePositionBias(C, bidirectional=True).apply(
    {'params': own['relpos_bias']}, *2 * encoder_tokens.shape[1:]
  )
  mask = t5.encoder_mask(encoder_tokens, None, None)
  want, _ = t5.EncoderLayer(C).apply(
    {'params': own[f'layers_{L - 1}']}, x, bias, mask
  )
  np.testing.assert_allclose(got[-1], want, **CLOSE)


def test_slots_that_precede_the_text_have_its_bias():
  """Keys at -P, ..., -1, in the encoder's bias and in decoding's."""
  own = params()['encoder']['relpos_bias']
  for bidirectional in (True, False):
    bias = attention.RelativePositionBias(C, bidirectional)
    longer = bias.apply({'params': own}, 9, 9)
    laid = {'params': own, 'deltas': {'preceding': Routed(jnp.zeros((1, 4)))}}
    got = bias.apply(laid, 5, 5)
    np.testing.assert_array_equal(got, longer[:, :, 4:])
    step = bias.apply(laid, 1, 5, 3)
    np.testing.assert_array_equal(step, longer[:, :, 7:8])


def test_a_prefix_beside_one_that_precedes_is_refused():
  x, mask = draw(B, 5, C.emb_dim), jnp.ones((B, 1, 5, 5), bool)
  module = attention.Attention(C)
  own = module.init(jax.random.PRNGKey(0), x, None, None, mask)
  found = deltas.collection({'prefix': whose('prefix', 'shared')})
  bias = draw(1, C.num_heads, 5, 7)  # of 2 slots, for a prefix of 3
  with pytest.raises(ValueError, match='all must precede the text, or none'):
    module.apply({**own, 'deltas': found}, x, None, bias, mask)


@pytest.mark.parametrize('owner', WHOSE)
def test_prefix_is_its_equation(owner):
  """softmax(q [K_p; K]^T + [0; bias]) [V_p; V], masked but for the prefix."""
  found = {'prefix': whose('prefix', owner)}
  x, context = draw(B, 5, C.emb_dim), draw(B, 6, C.emb_dim, seed=1)
  bias = draw(1, C.num_heads, 5, 6)
  mask = np.ones((B, 1, 5, 6), bool)
  mask[0, :, :, 4:] = False
  args = (x, context, bias, jnp.asarray(mask))
  got, own = single(attention.Attention(C), found, *args)

  def heads(y, name):
    y = y @ own[name]['kernel']
    return y.reshape(len(y), C.num_heads, C.head_dim).swapaxes(0, 1)

  for i, (prefix_key, prefix_value) in enumerate(
    each(found['prefix'], 'prefix')
  ):
    query = heads(np.asarray(x[i]), 'query')
    key, value = (heads(np.asarray(context[i]), n) for n in ('key', 'value'))
    key = np.concatenate([prefix_key.swapaxes(0, 1), key], axis=1)
    value = np.concatenate([prefix_value.swapaxes(0, 1), value], axis=1)
    logits = query @ key.swapaxes(1, 2)
    logits[:, :, 3:] += np.asarray(bias[0])
    logits[:, :, 3:][:, ~mask[i, 0]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = (weights @ value).swapaxes(0, 1).reshape(5, WIDTH)
    np.testing.assert_allclose(got[i], y @ own['out']['kernel'], **CLOSE)


def everywhere(owner, scan):
  """Deltas of all kinds at once; scanned and unrolled are the same numbers."""
  places = [
    ('encoder', 'attention/query', 'low_rank'),
    ('encoder', 'attention/value', 'scale'),
    ('decoder', 'mlp/wi_0', 'shift'),
    ('decoder', 'self_attention', 'prefix'),
    ('encoder', 'attention', 'prefix'),
    ('decoder', 'encoder_decoder_attention', 'prefix'),
    ('encoder', 'mlp', 'bottleneck'),
    ('decoder', 'encoder_decoder_attention', 'bottleneck'),
  ]
  found = {'token_embedder/rows': whose('rows', owner)}
  for i, (stack, module, kind) in enumerate(places):
    whole = whose(kind, owner, (L,), seed=i)
    if scan:
      found[f'{stack}/layers/{module}/{kind}'] = whole
      continue
    for layer in range(L):
      one = jax.tree.map(lambda x, layer=layer: x[layer], whole)
      found[f'{stack}/layers_{layer}/{module}/{kind}'] = one
  return found


@functools.cache
def apply(scan):
  config, own = dataclasses.replace(C, scan_layers=scan), params(scan)
  inputs, targets = tokens()
  inputs[:, :2] = [C.vocab_size, C.vocab_size + 1]

  def run(found):
    found = deltas.collection(found)
    variables = {'params': own, 'deltas': found}
    return t5.T5(config).apply(variables, inputs, targets)

  return jax.jit(run)


@pytest.mark.parametrize('owner', ['shared', 'task'])
@pytest.mark.slow
def test_scanned_layers_get_what_unrolled_ones_get(owner):
  scanned = apply(True)(everywhere(owner, True))
  unrolled = apply(False)(everywhere(owner, False))
  np.testing.assert_allclose(scanned, unrolled, **CLOSE)


def test_routed_is_each_example_with_its_own_task():
  """All kinds at once, scanned: row i has what its task alone would have."""
  routed = everywhere('task', True)
  together = apply(True)(routed)
  for task in range(G):
    alone = {}
    for path, delta in routed.items():
      axis = 0 if path.endswith('/rows') else 1
      one = jax.tree.map(
        lambda x, t=task, a=axis: jnp.take(x, jnp.array([t]), a), delta.table
      )
      alone[path] = Routed(one)
    mine = np.asarray(GROUP) == task
    got = apply(True)(alone)[mine]
    np.testing.assert_allclose(together[mine], got, **CLOSE)
    assert np.abs(together[~mine] - apply(True)(alone)[~mine]).max() > 1e-2


def test_each_place_of_everywhere_counts():
  """The checks above would miss a delta that no module reads."""
  found = everywhere('shared', True)
  whole = apply(True)(found)
  for path, delta in found.items():
    other = found | {path: jax.tree.map(lambda x: 2 * x, delta)}
    assert np.abs(whole - apply(True)(other)).max() > 1e-3, path
