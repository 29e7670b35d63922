"""Structured pruning: which units are kept, by weights and by gradients."""

import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import pruning

C = dataclasses.replace(helpers.SMALL, num_encoder_layers=3)
D, R = C.emb_dim, 4
MODEL = models.EncoderDecoderModel(C)
BATCH = helpers.random_batch(C)


@functools.cache
def network():
  return partitioning.unbox(jax.jit(MODEL.init_network)(jax.random.PRNGKey(0)))


def best(score, count):
  return np.sort(np.argsort(-score)[:count])


def test_units_are_the_largest():
  """By a plain statement, for the encoder's first layer and the decoder's."""
  flat = {p: np.asarray(x) for p, x in pruning.by_layer(network()).items()}
  units = pruning.Magnitude()(flat, C, R)
  size = {p: np.abs(x) for p, x in flat.items()}
  hidden = best(size['token_embedder/embedding'].sum(0), D // R)
  at, own = 'encoder/layers_0', {}
  own[f'{at}/pre_attention_layer_norm/scale'] = (hidden,)
  qkv = [f'{at}/attention/{name}/kernel' for name in ('query', 'key', 'value')]
  score = np.prod([size[path][hidden].sum(0) for path in qkv], axis=0)
  heads = score.reshape(C.num_heads, C.head_dim)
  inner = np.concatenate(
    [
      best(head, C.head_dim // R) + i * C.head_dim
      for i, head in enumerate(heads)
    ]
  )
  own |= {path: (hidden, inner) for path in qkv}
  out = f'{at}/attention/out/kernel'
  after = best(size[out][inner].sum(0), D // R)
  own[out] = (inner, after)
  wi = [f'{at}/mlp/wi_{i}/kernel' for i in (0, 1)]
  inside = best(np.prod([size[path][after].sum(0) for path in wi], axis=0),
                C.mlp_dim // R)  # fmt: skip
  own |= {path: (after, inside) for path in wi}
  for path, want in own.items():
    jax.tree.map(np.testing.assert_array_equal, tuple(units[path]), want)
  # Queries read the decoder's units, keys and values the encoder's.
  cross = 'decoder/layers_0/encoder_decoder_attention'
  [read] = units['encoder/encoder_norm/scale']
  for name in ('key', 'value'):
    np.testing.assert_array_equal(units[f'{cross}/{name}/kernel'][0], read)
  [query] = units['decoder/layers_0/pre_cross_attention_layer_norm/scale']
  np.testing.assert_array_equal(units[f'{cross}/query/kernel'][0], query)


def test_all_units_are_kept_in_order_where_r_is_one():
  flat = pruning.by_layer(network())
  units = pruning.Magnitude()(flat, C, 1)
  for path, x in pruning.take(flat, units).items():
    np.testing.assert_array_equal(x, flat[path], path)
  rest = {path for path in flat if path not in units}
  assert {path.split('/')[1] for path in rest} == {
    'embedding', 'logits_dense', 'relpos_bias',
  }  # fmt: skip


@pytest.mark.slow
def test_squared_gradients_are_summed_over_examples(tmp_path):
  file = str(tmp_path / 'units')
  batches = [{k: v[:3] for k, v in BATCH.items()}, BATCH]
  params = network()
  units = pruning.measure(MODEL, params, batches, file, R, examples=5)

  def loss(params, row):
    total, sums = MODEL.loss_fn(params, helpers.NOTHING, row)
    return total / sums['target_tokens']

  grad = jax.jit(jax.grad(loss))
  rows = [{k: v[[i]] for k, v in BATCH.items()} for i in range(3)]
  each = [grad(params, rows[i]) for i in (0, 1, 2, 0, 1)]
  total = jax.tree.map(lambda *g: sum(np.square(x) for x in g), *each)
  want = pruning.choose(pruning.by_layer(total), C, R)
  assert units.keys() == want.keys()
  other = pruning.Magnitude()(pruning.by_layer(params), C, R)
  differ = 0
  read = pruning.FromFile(file)(params, C, R)
  for path, found in want.items():
    for axis, index in enumerate(found):
      np.testing.assert_array_equal(units[path][axis], index, path)
      np.testing.assert_array_equal(read[path][axis], index, path)
      differ += bool((index != other[path][axis]).any())
  assert differ > 10
  with pytest.raises(ValueError, match="holds units for .*'reduction_factor'"):
    pruning.FromFile(file)(params, C, 2)
  with pytest.raises(ValueError, match=r'UNITS_PATH.*got None'):
    pruning.FromFile(None)
  with pytest.raises(ValueError, match='no example'):
    pruning.measure(MODEL, params, [], file, R)
