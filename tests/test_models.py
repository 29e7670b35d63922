"""Loss, gradients, scores and decoding against the reference's numbers."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import train_state

FILES = {'tiny': 'forward', 'mini': 'mini_forward'}


def _close_gradients(got, want, message=''):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4, err_msg=message)


@pytest.mark.parametrize('name', ['tiny', 'mini'])
def test_loss_and_every_gradient_are_the_reference(shared, name):
  golden = helpers.golden(shared, FILES[name])
  batch = helpers.as_jax(helpers.below(golden, 'batch/'))
  model = helpers.model(name, trainable_patterns=['.*'])
  params = helpers.golden_params(shared, name)

  def loss_fn(network):
    trainable = {'method': {}, 'network': network}
    return model.loss_fn({}, trainable, batch)

  (loss, sums), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
    params
  )
  np.testing.assert_allclose(loss, golden['model_loss_fn'], rtol=1e-6)
  np.testing.assert_allclose(sums['loss'], golden['model_loss_fn'], rtol=1e-6)
  expected = helpers.stack_layers(helpers.below(golden, 'grad/'))
  got = train_state.flatten(grads)
  assert expected.keys() <= got.keys()
  assert len(expected) > 20
  for path, want in expected.items():
    _close_gradients(got[path], want, path)


@pytest.mark.parametrize(
  'name, key, length',
  [
    ('tiny', 'tiny', 5),
    pytest.param('mini', 'mini_p20', 20, marks=pytest.mark.slow),
    pytest.param('mini', 'mini_p150', 150, marks=pytest.mark.slow),
  ],
)
def test_prompt_is_the_reference(shared, name, key, length):
  """Soft tokens as ids give what the reference's concatenation gives."""
  golden = helpers.below(helpers.golden(shared, 'prompt_forward'), f'{key}/')
  model = helpers.model(name, length)
  whole = helpers.golden(shared, 'prompt_forward')
  text = helpers.below(whole, f'{name}/batch/')
  batch = helpers.as_jax(helpers.with_prompt(text, model))
  frozen = helpers.golden_params(shared, name)
  trainable = helpers.prompted(golden['prompt'])

  def loss_fn(trainable):
    return model.loss_fn(frozen, trainable, batch)[0]

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(trainable)
  np.testing.assert_allclose(loss, golden['model_loss_fn'], rtol=1e-6)
  _close_gradients(grads['method']['prompt'], golden['grad_prompt'])
  real = batch['decoder_target_tokens'] > 0
  logits = jax.jit(model.logits)(frozen, trainable, batch)
  close = {'atol': 1e-5, 'rtol': 1e-5}
  np.testing.assert_allclose(
    np.asarray(logits)[real], golden['logits'][real], **close
  )
  encoded = model.network.apply(
    model.variables(frozen, trainable, batch),
    batch['encoder_input_tokens'],
    method='encode',
  )
  real = batch['encoder_input_tokens'] > 0
  np.testing.assert_allclose(
    np.asarray(encoded)[real], golden['encoder_output'][real], **close
  )


def test_encoder_mask_is_the_reference(shared):
  """Prompt and text see each other fully; padding is hidden."""
  from prompt_jax.network import t5

  golden = helpers.below(helpers.golden(shared, 'prompt_forward'), 'tiny/')
  model = helpers.model('tiny', 5)
  batch = helpers.with_prompt(helpers.below(golden, 'batch/'), model)
  tokens = batch['encoder_input_tokens']
  ours = np.asarray(t5.encoder_mask(tokens, None, None))
  want = golden['mask/encoder_mask'].astype(bool)
  real = tokens > 0  # queries; the output of padding is not read
  ours = np.broadcast_to(ours, want.shape)
  np.testing.assert_array_equal(ours[:, 0][real], want[:, 0][real])


def test_with_targets_replaces_the_targets_alone():
  model = models.EncoderDecoderModel(helpers.SMALL)
  batch = helpers.random_batch(helpers.SMALL)
  ids = np.array([9, 1, 0, 0, 0, 0], np.int32)
  other = model.with_targets(batch, ids)
  for row in range(4):
    assert other['decoder_target_tokens'][row].tolist() == ids.tolist()
    assert other['decoder_input_tokens'][row].tolist() == [0, 9, 1, 0, 0, 0]
    assert other['decoder_loss_weights'][row].tolist() == [1, 1, 0, 0, 0, 0]
  np.testing.assert_array_equal(
    other['encoder_input_tokens'], batch['encoder_input_tokens']
  )


def test_with_targets_keeps_the_decoders_own_soft_tokens():
  model = models.EncoderDecoderModel(helpers.SMALL)
  batch = helpers.random_batch(helpers.SMALL, rows=1)
  batch['decoder_input_tokens'] = np.array([[0, 64, 65, 7, 8, 9]], np.int32)
  other = model.with_targets(batch, np.array([9, 1, 0, 0, 0, 0], np.int32))
  assert other['decoder_input_tokens'][0].tolist() == [0, 64, 65, 9, 1, 0]
  assert other['decoder_target_tokens'][0].tolist() == [0, 0, 9, 1, 0, 0]
  assert other['decoder_loss_weights'][0].tolist() == [0, 0, 1, 1, 0, 0]


def test_decoder_only_with_targets_puts_them_behind_the_inputs():
  config = dataclasses.replace(helpers.SMALL, num_encoder_layers=0)
  model = models.DecoderOnlyModel(config)
  batch = {  # inputs 5 6 7, targets 8 9
    'decoder_input_tokens': np.array([[0, 5, 6, 7, 8, 0]], np.int32),
    'decoder_target_tokens': np.array([[5, 6, 7, 8, 9, 0]], np.int32),
    'decoder_loss_weights': np.array([[0, 0, 0, 1, 1, 0]], np.int32),
    'decoder_causal_attention': np.array([[1, 1, 1, 1, 0, 0]], np.int32),
  }
  same = model.with_targets(batch, np.array([8, 9, 0], np.int32))
  for key in batch:
    if key == 'decoder_input_tokens':  # the last target is read too; harmless
      continue
    np.testing.assert_array_equal(same[key], batch[key], key)
  other = model.with_targets(batch, np.array([30, 1, 0], np.int32))
  assert other['decoder_target_tokens'][0].tolist() == [5, 6, 7, 30, 1, 0]


def test_bfloat16_loss_is_the_reference(shared):
  golden = helpers.golden(shared, 'mini_forward')
  config = dataclasses.replace(helpers.MINI, dtype='bfloat16')
  model = models.EncoderDecoderModel(config)
  batch = helpers.below(golden, 'batch/')
  frozen = helpers.golden_params(shared, 'mini')
  loss, _ = jax.jit(model.loss_fn)(frozen, helpers.NOTHING, batch)
  assert loss.dtype == jnp.float32
  want = golden['bfloat16/model_loss_fn']
  tokens = int((batch['decoder_target_tokens'] > 0).sum())
  assert abs(float(loss) - float(want)) / tokens < 0.05
