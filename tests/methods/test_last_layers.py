"""The last layers of each stack: which they are, and where gradients stop."""

import collections
import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest
import t5_1_1

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import last_layers

CONFIG = dataclasses.replace(
  helpers.SMALL,
  scan_layers=False,
  num_encoder_layers=3,
  num_decoder_layers=4,
  dropout_rate=0.1,
)


def model(config=CONFIG, **fields):
  patterns = last_layers.patterns(config, **fields)
  return models.EncoderDecoderModel(config, trainable_patterns=patterns)


def test_count_is_the_formula():
  def blocks(d, _, i, f):
    return (4 * d * i + 3 * d * f + 2 * d) + (8 * d * i + 3 * d * f + 3 * d)

  t5_1_1.check_declared('last_layers', blocks)
  made = model(encoder_layers=2, decoder_layers=2)
  trained, _ = made.split(partitioning.unbox(made.abstract_network))
  inner = CONFIG.num_heads * CONFIG.head_dim
  want = 2 * blocks(CONFIG.emb_dim, None, inner, CONFIG.mlp_dim)
  assert sum(x.size for x in jax.tree.leaves(trained)) == want


@pytest.mark.parametrize(
  'fields, wanted',
  [
    ({}, {'encoder/layers_2', 'decoder/layers_3'}),
    ({'encoder_layers': 0}, {'decoder/layers_3'}),
    (
      {'encoder_layers': 2, 'decoder_layers': 0},
      {'encoder/layers_1', 'encoder/layers_2'},
    ),
    (
      {'encoder_layers': 0, 'also': ('.*/decoder_norm/scale',)},
      {'decoder/layers_3', 'decoder/decoder_norm'},
    ),
  ],
)
def test_the_last_ones_whole_and_nothing_else(fields, wanted):
  made = model(**fields)
  params = partitioning.unbox(made.abstract_network)
  trained = train_state.flatten(made.split(params)[0]).keys()
  assert {'/'.join(path.split('/')[:2]) for path in trained} == wanted
  every = train_state.flatten(params).keys()
  starts = tuple(f'{w}/' for w in wanted)
  assert trained == {path for path in every if path.startswith(starts)}
  norms = {path for path in trained if path.endswith('norm/scale')}
  assert norms


# ---- where gradients stop --------------------------------------------------


def products(jaxpr):
  """How many matrix products a program has, and those it calls."""
  count = collections.Counter()
  for eqn in jaxpr.eqns:
    count[eqn.primitive.name] += 1
    for inner in jax.core.jaxprs_in_params(eqn.params):
      count['dot_general'] += products(inner)
  return count['dot_general']


@functools.cache
def both(depths, **fields):
  """Matrix products of the loss, and of the loss and its gradient."""
  config = dataclasses.replace(
    CONFIG, num_encoder_layers=depths[0], num_decoder_layers=depths[1]
  )
  made = model(config, **dict(fields))
  params = partitioning.unbox(made.abstract_network)
  network, frozen = made.split(params)
  batch = helpers.as_jax(helpers.random_batch(config))

  def loss_fn(trainable, frozen):
    rng = jax.random.PRNGKey(0)
    return made.loss_fn(frozen, trainable, batch, rng)[0]

  trainable = {'method': {}, 'network': network}
  return [
    products(jax.make_jaxpr(f)(trainable, frozen).jaxpr)
    for f in (loss_fn, jax.value_and_grad(loss_fn))
  ]


def cost_of_a_layer(encoder, decoder, **fields):
  """Products that one more layer below costs, in the loss and in training."""
  shallow = both((2, 2), **fields)
  deep = both((2 + encoder, 2 + decoder), **fields)
  return [b - a for a, b in zip(shallow, deep, strict=True)]


@pytest.mark.slow
def test_gradients_stop_below_the_first_layer_that_is_trained():
  """One more frozen layer below costs training what it costs the loss."""
  forward, training = cost_of_a_layer(1, 0)
  assert forward == training == 4 + 2 + 3  # q, k, v, o; q k, p v; the Mlp's
  forward, training = cost_of_a_layer(0, 1, encoder_layers=0)
  assert forward == training == 8 + 4 + 3
  # Every decoder layer reads what the encoder's last layers make.
  forward, training = cost_of_a_layer(0, 1)
  assert training > 1.5 * forward


@pytest.mark.slow
def test_only_they_get_gradients_and_all_of_them():
  config = dataclasses.replace(CONFIG, num_encoder_layers=2)
  config = dataclasses.replace(config, num_decoder_layers=2)
  made = model(config)
  params = partitioning.unbox(jax.jit(made.init_network)(jax.random.PRNGKey(0)))
  network, frozen = made.split(params)
  trainable = {'method': {}, 'network': network}
  batch = helpers.as_jax(helpers.random_batch(config))
  grads = jax.jit(jax.grad(lambda t: made.loss_fn(frozen, t, batch)[0]))(
    trainable
  )
  for path, x in train_state.flatten(grads).items():
    assert path.startswith(
      ('network/encoder/layers_1/', 'network/decoder/layers_1/')
    )
    assert np.isfinite(x).all() and (x != 0).any(), path


# ---- what is refused -------------------------------------------------------


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'encoder_layers': 4}, 'encoder_layers must .* from 0 to 3, .* got 4'),
    ({'decoder_layers': -1}, 'decoder_layers must .* from 0 to 4, .* got -1'),
    ({'decoder_layers': '1'}, "decoder_layers must .*, got '1'"),
    ({'encoder_layers': 0, 'decoder_layers': 0}, 'nothing to train'),
  ],
)
def test_wrong_numbers(fields, message):
  with pytest.raises(ValueError, match=message):
    last_layers.patterns(CONFIG, **fields)


def test_scanned_layers_are_refused():
  message = r'scanned: bind t5.T5Config.scan_layers = False'
  with pytest.raises(ValueError, match=message):
    last_layers.patterns(helpers.SMALL)


def test_a_network_without_an_encoder():
  config = dataclasses.replace(CONFIG, num_encoder_layers=0)
  found = last_layers.patterns(config, encoder_layers=0, decoder_layers=2)
  assert found == ('decoder/layers_2/.*', 'decoder/layers_3/.*')
  with pytest.raises(ValueError, match='from 0 to 0'):
    last_layers.patterns(config)
