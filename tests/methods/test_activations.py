"""Keys and values of the frozen network, and prefixes that start at them."""

import dataclasses
import re

import contract
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from prefixes import CONFIG
from prefixes import LM
from prefixes import H
from prefixes import K
from prefixes import L
from prefixes import P
from prefixes import batch
from prefixes import frozen
from prefixes import model
from prefixes import own
from prefixes import tables
import pytest

from prompt_jax import train_state
from prompt_jax import vocabularies
from prompt_jax.methods import activations
from prompt_jax.network import layers

CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
BYTES = vocabularies.bytes_vocabulary(0)
TEXT = 'it was'  # an id a byte: six pieces


def test_the_fit_is_the_released_codes():
  """Adam at 1e-4, 500 steps."""
  init = activations.RealActivations(TEXT, BYTES)
  assert (init.fit_steps, init.fit_learning_rate) == (500, 1e-4)


@pytest.mark.slow
def test_keys_and_values_are_projections_of_the_normed_input():
  """In the encoder: of the embeddings, then of the first layer's output."""
  inputs = batch()['encoder_input_tokens']
  found = activations.keys_and_values(CONFIG, frozen(), inputs, inputs)
  _, state = model().network.apply(
    {'params': frozen()}, inputs, method='encode', mutable=['intermediates']
  )
  hidden = state['intermediates']['encoder']['layers']['hidden']
  embedded = frozen()['token_embedder']['embedding'][inputs]
  own = frozen()['encoder']['layers']
  scales = own['pre_attention_layer_norm']['scale']
  for layer, x in enumerate((embedded, hidden[0])):
    h = layers.RMSNorm().apply({'params': {'scale': scales[layer]}}, x)
    for got, name in zip(found['encoder_self'], ('key', 'value'), strict=True):
      want = h @ own['attention'][name]['kernel'][layer]
      np.testing.assert_allclose(got[layer].reshape(want.shape), want, **CLOSE)


@pytest.mark.slow
def test_plain_form_starts_at_a_text():
  init = activations.RealActivations(TEXT, BYTES, target_text='or not')
  of = model(mlp_dim=None, length=6, num_tasks=2, prefix_init=init)
  ids = [np.array([BYTES.encode(t)]) for t in (TEXT, 'or not')]
  found = activations.keys_and_values(CONFIG, frozen(), *ids)
  want = train_state.flatten(tables(found))  # [L, 1, P, H, K]
  got = train_state.flatten(own(of))
  assert got.keys() == want.keys()
  for path, x in got.items():
    for task in range(2):
      np.testing.assert_allclose(x[:, task], want[path][:, 0], **CLOSE)
  loop = dataclasses.replace(CONFIG, scan_layers=False)
  flat = helpers.unstack_layers(train_state.flatten(frozen()))
  unrolled = dataclasses.replace(of, config=loop)
  unrolled = own(unrolled, train_state.unflatten(flat))
  for path, x in train_state.flatten(unrolled).items():
    layer = int(re.findall(r'layers_(\d)', path)[0])
    scanned = got[path.replace(f'layers_{layer}', 'layers')]
    np.testing.assert_allclose(x, scanned[layer], **CLOSE)


@pytest.mark.parametrize('name', ['prefix_tuning', 'prefix_tuning_plain'])
def test_gin_starts_at_a_text(name):
  flags = ['PREFIX_INIT=@activations.RealActivations()',
           f'activations.RealActivations.text={TEXT}']  # fmt: skip
  [of] = contract.build(['%MODEL'], str(contract.SMALL), name, flags)
  init = of.method.prefix_init
  assert init == activations.RealActivations(TEXT, of.vocabulary)


@pytest.mark.slow
def test_mlp_is_fitted_to_a_text():
  """Adam on the mean squared error; the embeddings stay as they were drawn."""
  steps, rate = 20, 1e-3
  init = activations.RealActivations(
    TEXT[:P], BYTES, fit_steps=steps, fit_learning_rate=rate
  )
  of = model(LM, mlp_dim=5, prefix_init=init)
  got = jax.tree.map(np.asarray, own(of)['decoder_self'])
  ids = np.array([BYTES.encode(TEXT[:P])])
  key, value = activations.keys_and_values(LM, frozen(LM), ids, ids)[
    'decoder_self'
  ]

  def loss(p, embedding):
    h = jnp.tanh(embedding @ p['wi'] + p['wi_bias'])
    x = (h @ p['wo'] + p['wo_bias']).reshape(P, L, 2, H, K)
    x = jnp.moveaxis(x, 0, 2)
    error = (x[:, 0] - key[:, 0]) ** 2 + (x[:, 1] - value[:, 0]) ** 2
    return error.mean() / 2

  start = dataclasses.replace(init, fit_steps=1, fit_learning_rate=1e-30)
  start = own(model(LM, mlp_dim=5, prefix_init=start))['decoder_self']
  embedding = start.pop('embedding')
  np.testing.assert_array_equal(embedding, got.pop('embedding'))
  first = loss(start, embedding)
  optimizer = optax.adam(rate)
  step = jax.jit(jax.grad(loss))
  state = optimizer.init(start)
  for _ in range(steps):
    grads = step(start, embedding)
    with jax.numpy_dtype_promotion('standard'):
      updates, state = optimizer.update(grads, state)
    start = optax.apply_updates(start, updates)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), got, start
  )
  assert loss(got, embedding) < 0.98 * first


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'text': ''}, "text must be a text that is not empty, got ''"),
    ({'target_text': 3}, 'target_text must be a text .*, got 3'),
    ({'fit_steps': 0}, 'fit_steps must be .* at least 1, got 0'),
    ({'fit_learning_rate': 0.0}, 'fit_learning_rate must be above 0'),
  ],
)
def test_attributes_of_a_text_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    activations.RealActivations(**{'text': TEXT, 'vocabulary': BYTES} | fields)


def test_a_text_must_be_as_long_as_the_prefix():
  init = activations.RealActivations(TEXT, BYTES)
  with pytest.raises(ValueError, match="'it was' has 6 pieces, fewer than.* 7"):
    own(model(length=7, prefix_init=init))
