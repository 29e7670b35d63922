"""Decoding of whole models against the reference's decodes and scores.

The golden numbers were recorded from google-research/prompt-tuning on T5X
(Apache License 2.0); ids agree exactly, scores to 1e-4.
"""

import dataclasses
import functools
import itertools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import decoding
from prompt_jax import models
from prompt_jax.methods import soft_prompt
from prompt_jax.network import t5

CONFIGS = {
  'tiny': t5.T5Config(
    vocab_size=32128,
    emb_dim=4,
    num_heads=2,
    head_dim=2,
    mlp_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relpos_num_buckets=4,
    relpos_max_distance=8,
  ),
  'mini': t5.T5Config(
    vocab_size=256,
    emb_dim=128,
    num_heads=4,
    head_dim=32,
    mlp_dim=256,
    num_encoder_layers=2,
    num_decoder_layers=2,
  ),
}
LENGTHS = {'tiny': 10, 'mini': 16}
PROMPTS = {'tiny': 'prompt_p5', 'mini': 'prompt_p20'}
SEARCHES = {
  'greedy_topk1': (decoding.temperature_sample, 1, {'topk': 1}),
  'greedy_temp0': (decoding.temperature_sample, 1, {'temperature': 0.0}),
  'beam1_alpha0.6': (decoding.beam_search, 1, {'alpha': 0.6}),
  'beam4_alpha0.6': (decoding.beam_search, 4, {'alpha': 0.6}),
  'beam4_alpha0.0': (decoding.beam_search, 4, {'alpha': 0.0}),
}


@pytest.fixture(scope='module')
def goldens(shared):
  return dict(np.load(shared / 'goldens' / 'decode.npz'))


@pytest.fixture(scope='module')
def flat_params(shared, goldens):
  tiny = np.load(shared / 'goldens' / 't5x_tiny_checkpoint_contents.npz')
  mini = dict(np.load(shared / 'goldens' / 'mini_params.npz'))
  # The column of EOS is enlarged, so that sequences end.
  mini['decoder/logits_dense/kernel'] = goldens[
    'mini/logits_dense_kernel_override'
  ]
  start = 'target/'
  return {
    'tiny': {k[len(start) :]: v for k, v in tiny.items() if start in k[:7]},
    'mini': mini,
  }


def stacked(flat):
  """`layers_0/X`, `layers_1/X` as one `layers/X`."""
  names = {k.replace('/layers_0/', '/layers/'): k for k in flat}
  return {
    name: np.stack([flat[k], flat[k.replace('layers_0', 'layers_1')]])
    if 'layers_0' in k
    else flat[k]
    for name, k in names.items()
    if 'layers_1' not in k
  }


def setting(goldens, flat_params, name, prompted, scan=True):
  """The model, its parameters and a batch as long as the decodes."""
  config = dataclasses.replace(CONFIGS[name], scan_layers=scan)
  flat = stacked(flat_params[name]) if scan else flat_params[name]
  tokens = goldens[f'{name}/batch/encoder_input_tokens']
  method, own = None, {}
  if prompted:
    prompt = goldens[f'{name}/{PROMPTS[name]}/prompt']
    method = soft_prompt.SoftPrompt(length=len(prompt))
    own = {'prompt': jnp.asarray(prompt)}
    soft = config.vocab_size + np.arange(len(prompt), dtype=np.int32)
    tokens = np.concatenate([np.tile(soft, (len(tokens), 1)), tokens], axis=1)
  model = models.EncoderDecoderModel(config, method=method)
  frozen = traverse_util.unflatten_dict(
    jax.tree.map(jnp.asarray, flat), sep='/'
  )
  batch = {
    'encoder_input_tokens': jnp.asarray(tokens),
    'decoder_input_tokens': jnp.zeros((len(tokens), LENGTHS[name]), jnp.int32),
  }
  return model, frozen, {'method': own, 'network': {}}, batch


# One compilation each: the others are slow together.
QUICK = [
  ('tiny', False, 'greedy_topk1'),
  ('tiny', True, 'beam4_alpha0.6'),
  ('mini', True, 'greedy_topk1'),
  ('mini', True, 'beam4_alpha0.6'),
]


def decode_cases():
  for case in itertools.product(CONFIGS, [False, True], SEARCHES):
    name, prompted, search = case
    marks = () if case in QUICK else pytest.mark.slow
    case_id = f'{name}-{"prompt" if prompted else "base"}-{search}'
    yield pytest.param(*case, marks=marks, id=case_id)


@pytest.mark.parametrize('name, prompted, search', decode_cases())
def test_decodes_are_the_reference_s(
  goldens, flat_params, name, prompted, search
):
  model, frozen, trainable, batch = setting(
    goldens, flat_params, name, prompted
  )
  decode_fn, num_decodes, arguments = SEARCHES[search]
  decode_fn = functools.partial(decode_fn, **arguments)
  predict = jax.jit(
    functools.partial(
      model.predict_batch, decode_fn=decode_fn, num_decodes=num_decodes
    )
  )
  sequences, scores = predict(frozen, trainable, batch)
  key = f'{name}/{PROMPTS[name] if prompted else "base"}/{search}'
  np.testing.assert_array_equal(sequences, goldens[f'{key}/sequences'])
  np.testing.assert_allclose(scores, goldens[f'{key}/scores'], atol=1e-4)
  if search == 'beam4_alpha0.6':
    best = goldens[f'{key}_best/sequences']
    np.testing.assert_array_equal(sequences[:, -1], best)


@pytest.mark.slow
def test_unrolled_layers_decode_alike(goldens, flat_params):
  model, frozen, trainable, batch = setting(
    goldens, flat_params, 'mini', prompted=True, scan=False
  )
  predict = jax.jit(
    functools.partial(
      model.predict_batch, decode_fn=decoding.beam_search, num_decodes=4
    )
  )
  sequences, scores = predict(frozen, trainable, batch)
  key = f'mini/{PROMPTS["mini"]}/beam4_alpha0.6'
  np.testing.assert_array_equal(sequences, goldens[f'{key}/sequences'])
  np.testing.assert_allclose(scores, goldens[f'{key}/scores'], atol=1e-4)


@pytest.mark.parametrize('prompted', [False, True], ids=['base', 'prompt'])
@pytest.mark.parametrize('name', CONFIGS)
def test_scores_are_the_reference_s(goldens, flat_params, name, prompted):
  model, frozen, trainable, batch = setting(
    goldens, flat_params, name, prompted
  )
  for feature in ('input_tokens', 'target_tokens', 'loss_weights'):
    value = goldens[f'{name}/batch/decoder_{feature}']
    batch[f'decoder_{feature}'] = jnp.asarray(value)
  scores = jax.jit(model.score_batch)(frozen, trainable, batch)
  key = f'{name}/{PROMPTS[name] if prompted else "base"}/score_batch'
  np.testing.assert_allclose(scores, goldens[key], atol=1e-4)


def test_scores_of_decodes_are_those_of_teacher_forcing(goldens, flat_params):
  model, frozen, trainable, batch = setting(
    goldens, flat_params, 'mini', prompted=True
  )
  decode_fn = functools.partial(
    decoding.temperature_sample, rescale_log_probs=False
  )
  predict = jax.jit(
    functools.partial(
      model.predict_batch,
      decode_fn=decode_fn,
      num_decodes=3,
    )
  )
  sequences, scores = predict(frozen, trainable, batch, rng=jax.random.key(0))
  score = jax.jit(model.score_batch)
  for k in range(3):
    targets = sequences[:, k]
    # Up to EOS: a generated 0 is a token, the zeros after EOS are none.
    ended = (targets == 1).astype(jnp.int32)
    weights = (jnp.cumsum(ended, axis=1) - ended) == 0
    given = {
      **batch,
      'decoder_input_tokens': jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': weights.astype(jnp.int32),
    }
    expected = score(frozen, trainable, given)
    np.testing.assert_allclose(scores[:, k], expected, atol=1e-4)
