"""The network against reference numbers that are kept with the tests.

`testdata/tiny_forward.npz` holds the reference's smallest model whole but for
its vocabulary, of which only the ids that its batches use are there (`ids`):
rows of the embedding, columns of the output projection and of the logits. It
was recorded from google-research/prompt-tuning on T5X and flaxformer, with the
parameters of their test checkpoint (Apache License 2.0). The numbers do not
change with this project: where they differ, the network is wrong.
"""

import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import train_state
from prompt_jax.methods.soft_prompt import SoftPrompt

CLOSE = {'atol': 1e-5, 'rtol': 1e-5}  # as for the whole model


@pytest.fixture(scope='module')
def golden(testdata):
  with np.load(testdata / 'tiny_forward.npz') as f:
    found = {k: f[k] for k in f.files}
  assert 'Apache License 2.0' in str(found['license'])
  return found


def build(golden, scan, length=0):
  """The model, and its parameters."""
  config = dataclasses.replace(
    helpers.TINY, vocab_size=len(golden['ids']), scan_layers=scan
  )
  method = SoftPrompt(length) if length else None
  flat = helpers.below(golden, 'params/')
  flat = helpers.stack_layers(flat) if scan else flat
  model = models.EncoderDecoderModel(config, method=method)
  return model, train_state.unflatten(flat)


def encode(model, frozen, trainable, batch):
  network = functools.partial(model.network.apply, method='encode')
  variables = model.variables(frozen, trainable, batch)
  tokens = batch['encoder_input_tokens']
  return jax.jit(network)(variables, tokens)


def compare(got, want, real):
  np.testing.assert_allclose(np.asarray(got)[real], want[real], **CLOSE)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'loop'])
def test_forward_is_the_reference(golden, scan):
  model, params = build(golden, scan)
  batch = helpers.below(golden, 'plain/batch/')
  encoded = encode(model, params, helpers.NOTHING, batch)
  real = batch['encoder_input_tokens'] > 0
  compare(encoded, golden['plain/encoder_output'], real)
  logits = jax.jit(model.logits)(params, helpers.NOTHING, batch)
  compare(logits, golden['plain/logits'], batch['decoder_target_tokens'] > 0)


def test_packed_row_is_the_reference(golden):
  model, params = build(golden, True)
  batch = helpers.below(golden, 'packed/batch/')
  logits = jax.jit(model.logits)(params, helpers.NOTHING, batch)
  compare(logits, golden['packed/logits'], batch['decoder_target_tokens'] > 0)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'loop'])
def test_prompt_is_the_reference(golden, scan):
  """Soft tokens as ids give what the reference's concatenation gives."""
  prompt = golden['prompt/prompt']
  model, params = build(golden, scan, len(prompt))
  batch = helpers.with_prompt(helpers.below(golden, 'plain/batch/'), model)
  trainable = helpers.prompted(prompt)
  encoded = encode(model, params, trainable, batch)
  real = batch['encoder_input_tokens'] > 0
  compare(encoded, golden['prompt/encoder_output'], real)
  logits = jax.jit(model.logits)(params, trainable, batch)
  compare(logits, golden['prompt/logits'], batch['decoder_target_tokens'] > 0)
