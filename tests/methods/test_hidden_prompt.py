"""Deep hidden prompts: which layer reads what at which token."""

import dataclasses
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import deltas
from prompt_jax import gin_rules
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.methods.hidden_prompt import HiddenPrompt
from prompt_jax.methods.prefix_tuning import PrefixTuning
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network import layers

CONFIG = helpers.SMALL
V, D, L = CONFIG.vocab_size, CONFIG.emb_dim, 2
P = 3
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
COMBINE = ('replace', 'add')
# T5 1.1: D, L.
SIZES = {
  'small': (512, 8),
  'base': (768, 12),
  'large': (1024, 24),
  'xl': (2048, 24),
  'xxl': (4096, 24),
}


def model(length=P, config=CONFIG, **fields):
  method = HiddenPrompt(length, **fields)
  return models.EncoderDecoderModel(config, method=method)


@functools.cache
def frozen():
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def draw(*shape):
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def prompted(prompts):
  """Trainable parameters of prompts [L, (G,) P, D]."""
  method = {'encoder': {'layers': {'prompt': prompts}}}
  return {'method': method, 'network': {}}


def inputs_of_layers(of, trainable, batch):
  """(input of the first layer and outputs of all, encoder's output)."""
  params, laid, _ = of.lay(frozen(), trainable, batch)
  encode = functools.partial(
    of.network.apply, method='encode', mutable=['intermediates']
  )
  encoded, state = jax.jit(encode)(
    {'params': params, 'deltas': deltas.collection(laid)},
    batch['encoder_input_tokens'],
  )
  hidden = state['intermediates']['encoder']['layers']['hidden']
  return np.asarray(hidden), np.asarray(encoded)


# ---- how many --------------------------------------------------------------


def test_count_is_the_formula_and_the_header_says_so():
  text = (gin_rules.packaged() / 'methods' / 'hidden_prompt.gin').read_text()
  said = re.findall(r'\b(\w+) ([\d,]+)[;.]', text.split('__gin__')[0])
  said = {name: int(n.replace(',', '')) for name, n in said if name in SIZES}
  [n] = map(int, re.findall(r'^PROMPT_LENGTH = (\d+)', text, re.M))
  assert said == {size: n * d * depth for size, (d, depth) in SIZES.items()}
  for d, depth in SIZES.values():
    config = dataclasses.replace(CONFIG, emb_dim=d, num_encoder_layers=depth)
    context = base.Context(
      embedding=jax.ShapeDtypeStruct((V, d), jnp.float32),
      config=config,
      modules=('token_embedder',),
    )
    found = jax.eval_shape(HiddenPrompt(n).init, jax.random.PRNGKey(0), context)
    assert sum(x.size for x in jax.tree.leaves(found)) == n * d * depth


# ---- the reference ---------------------------------------------------------


@pytest.mark.parametrize('combine', COMBINE)
def test_reference(shared, combine):
  """A prompt at the embedding and in front of each layer, there."""
  arrays = helpers.below(
    helpers.golden(shared, 'extended'), f'per_layer_{combine}/'
  )
  params = helpers.below(arrays, 'param/encoder/')
  first = params['prompt/prompt/prompt']
  layer = 'layers_{}/prompt/prompt/prompt'
  prompts = np.stack([params[layer.format(i)] for i in range(2)])
  if combine == 'add':  # the sum of the two counts
    prompts[0] += first
  of = model(len(first), helpers.TINY, combine=combine)
  weights = helpers.golden_params(shared, 'tiny')
  batch = helpers.with_prompt(helpers.below(arrays, 'batch/'), of)
  own = prompted(prompts)
  logits = jax.jit(of.logits)(weights, own, batch)
  real = batch['decoder_target_tokens'] > 0
  vocabulary = helpers.golden(shared, 'extended')['logits_vocab_subset']
  np.testing.assert_allclose(
    np.asarray(logits)[..., vocabulary][real],
    arrays['logits_subset'][real],
    **CLOSE,
  )

  batch = helpers.as_jax(batch)
  loss = jax.jit(jax.value_and_grad(of.loss_fn, 1, has_aux=True))
  (found, _), grads = loss(weights, own, batch)
  np.testing.assert_allclose(found, arrays['model_loss_fn'], rtol=1e-6)
  np.testing.assert_allclose(
    jax.jit(of.score_batch)(weights, own, batch), arrays['score_batch'], **CLOSE
  )
  grad = np.asarray(grads['method']['encoder']['layers']['prompt'])
  for i in range(2):
    want = arrays[f'grad/encoder/{layer.format(i)}']
    np.testing.assert_allclose(grad[i], want, rtol=1e-4, atol=1e-5)
  # Why there is none at the embedding here.
  embedded = arrays['grad/encoder/prompt/prompt/prompt']
  want = grad[0] if combine == 'add' else np.zeros_like(first)
  np.testing.assert_allclose(embedded, want, rtol=1e-4, atol=1e-5)
  params, laid, _ = of.lay(weights, own, batch)
  encoded = of.network.apply(
    {'params': params, 'deltas': deltas.collection(laid)},
    batch['encoder_input_tokens'],
    method='encode',
  )
  real = np.asarray(batch['encoder_input_tokens'] > 0)
  np.testing.assert_allclose(
    np.asarray(encoded)[real], arrays['encoder_output'][real], **CLOSE
  )


# ---- what it does ----------------------------------------------------------


@pytest.mark.slow
def test_replace_is_a_prefix_of_the_projected_prompts():
  """Preceding, K_l = LN_l(P_l) W_k and V_l alike; on the text's rows."""
  prompts = draw(L, P, D)
  text = helpers.random_batch(CONFIG)
  hidden = model()
  batch = helpers.with_prompt(text, hidden)
  own = frozen()['encoder']['layers']
  tables = {}
  for name in ('key', 'value'):
    made = []
    for i in range(L):
      scale = own['pre_attention_layer_norm']['scale'][i]
      h = layers.RMSNorm().apply({'params': {'scale': scale}}, prompts[i])
      made.append(h @ own['attention'][name]['kernel'][i])
    heads = (L, P, CONFIG.num_heads, CONFIG.head_dim)
    tables[f'prefix_{name}'] = jnp.stack(made).reshape(heads)
  prefix = PrefixTuning(P, mlp_dim=None, attentions=('encoder_self',))
  prefix = dataclasses.replace(hidden, method=prefix)
  trainable = {
    'method': {'encoder': {'layers': {'attention': tables}}},
    'network': {},
  }
  _, want = inputs_of_layers(prefix, trainable, text)
  _, got = inputs_of_layers(hidden, prompted(prompts), batch)
  real = text['encoder_input_tokens'] > 0
  np.testing.assert_allclose(got[:, P:][real], want[real], **CLOSE)
  bare = dataclasses.replace(hidden, method=None)
  _, plain = inputs_of_layers(bare, helpers.NOTHING, text)
  assert np.abs(plain - want)[real].max() > 1e-2


@pytest.mark.parametrize('combine', COMBINE)
def test_in_the_first_layer_it_is_a_prompt_at_the_embedding(combine):
  """`add` of zeros in the second layer is prompt tuning; `replace` is not."""
  prompts = draw(L, P, D)
  prompts[1] = 0
  hidden = model(combine=combine)
  batch = helpers.with_prompt(helpers.random_batch(CONFIG), hidden)
  soft = dataclasses.replace(hidden, method=SoftPrompt(P))
  got = inputs_of_layers(hidden, prompted(prompts), batch)
  want = inputs_of_layers(soft, helpers.prompted(prompts[0]), batch)
  np.testing.assert_allclose(got[0][0], want[0][0], **CLOSE)
  difference = np.abs(got[0][1] - want[0][1]).max()
  assert difference < 1e-5 if combine == 'add' else difference > 1e-2


def test_soft_tokens_are_found_by_their_ids():
  """Anywhere, in any order, of any task; all other positions stay."""
  of = model(num_tasks=2, combine='add')
  prompts = draw(L, 2, P, D)
  tokens = np.array([[V + 4, 7, V, 1, 0], [9, V + 5, V + 5, 3, 1]], np.int32)
  batch = {**helpers.random_batch(CONFIG), 'encoder_input_tokens': tokens}
  laid = of.method_deltas(frozen(), prompted(prompts), batch)
  gate, value = laid['encoder/layers/hidden'].table
  group = laid['encoder/layers/hidden'].group
  rows = {0: (1, 1), 2: (0, 0)}, {1: (1, 2), 2: (1, 2)}  # of task, of token
  for layer in range(L):
    for b, t in np.ndindex(tokens.shape):
      row = group[layer, b, t]
      want = prompts[layer][rows[b][t]] if t in rows[b] else np.zeros(D)
      np.testing.assert_array_equal(value[layer, row], want)
      assert gate[layer, row] == 1
  _, encoded = inputs_of_layers(of, prompted(prompts), batch)
  assert np.isfinite(encoded).all()


def test_in_a_chain_it_finds_its_own_tokens():
  """Behind other methods' too, however deep."""
  prompts = draw(L, P, D)
  of = model()
  inner = base.Chain({'b': SoftPrompt(1), 'own': of.method})
  parts = {'a': SoftPrompt(2, num_tasks=2), 'in': inner, 'c': SoftPrompt(1)}
  chain = dataclasses.replace(of, method=base.Chain(parts))
  own = chain.init_method(jax.random.PRNGKey(0), frozen())
  own = train_state.flatten(partitioning.unbox(own))
  [name] = [k for k in own if k.endswith('encoder/layers/prompt')]
  own[name] = prompts
  first = V + 2 * 2 + 1
  tokens = np.array([[first + 1, V, 7, first + P, first, 1]], np.int32)
  batch = {**helpers.random_batch(CONFIG, 1), 'encoder_input_tokens': tokens}
  trainable = {'method': train_state.unflatten(own), 'network': {}}
  got = chain.method_deltas(frozen(), trainable, batch)
  group = np.asarray(got['encoder/layers/hidden'].group)
  assert group.tolist() == [[[2, 0, 0, 0, 1, 0]]] * L
  assert chain.soft_ids[0].tolist() == [V, V + 1, *range(V + 4, V + 9)]


def test_layers_and_tasks_start_apart():
  of = model(num_tasks=2)
  own = of.init_method(jax.random.PRNGKey(0), frozen())
  own = np.asarray(partitioning.unbox(own)['encoder']['layers']['prompt'])
  assert own.shape == (L, 2, P, D) and len(np.unique(own)) == own.size


# ---- bad inputs ------------------------------------------------------------


@pytest.mark.parametrize('value', [0, -3, 2.0, '5', None])
@pytest.mark.parametrize('field', ['length', 'num_tasks'])
def test_length_and_tasks_are_whole_numbers(field, value):
  message = f'HiddenPrompt.{field} must be .* at least 1, got {value!r}'
  with pytest.raises(ValueError, match=message):
    HiddenPrompt(**{field: value})


def test_combine_is_one_of_two():
  with pytest.raises(ValueError, match="'replace' or 'add', got 'append'"):
    HiddenPrompt(combine='append')


def test_a_decoder_only_network_is_refused():
  config = dataclasses.replace(CONFIG, num_encoder_layers=0)
  context = base.Context(embedding=None, config=config)
  with pytest.raises(ValueError, match='has none. Take PrefixTuning'):
    HiddenPrompt(P).init(jax.random.PRNGKey(0), context)


def test_export_is_refused():
  of = model()
  context = of.context(frozen(), exporting=True)
  own = prompted(draw(L, P, D))['method']
  with pytest.raises(ValueError, match='cannot be exported; its trainable'):
    of.method.apply({'params': own}, context)
