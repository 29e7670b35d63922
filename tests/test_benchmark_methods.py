"""What benchmarks/methods.py counts: the closed form, loops, files, aims."""

import argparse
import importlib
import math
import pathlib
import sys
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval
import jax.numpy as jnp
import pytest

from prompt_jax.network.layers import T5Config

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'benchmarks'))
# What is imported from there is no package of ours: pyright does not find it.
closed_form: Any = importlib.import_module('lib.closed_form')
method_report: Any = importlib.import_module('lib.method_report')
method_steps: Any = importlib.import_module('lib.method_steps')
methods: Any = importlib.import_module('methods')

SIZES = T5Config(
  vocab_size=10,
  emb_dim=4,
  num_heads=1,
  head_dim=2,
  mlp_dim=3,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_activations=('relu',),
)
LENGTHS = closed_form.Lengths(batch=1, encoder=2, decoder=1)


def step(**changes):
  found = closed_form.network(SIZES, LENGTHS, closed_form.Changes(**changes))
  return closed_form.flops(found)


def test_by_hand():
  # Multiplications forward. Encoder: projections 4 of 2*4*2, logits and values
  # 2*2*2 each, feed-forward 2*4*3 each; decoder: 4 of 4*2, then 2 and 2, of
  # cross-attention 8, 16, 16, 8 and 4 and 4, 12 and 12; logits 4*10.
  encoder, decoder = 64 + 16 + 48, 32 + 4 + 48 + 8 + 24
  forward = 2 * (encoder + decoder + 40)
  assert forward == 568
  assert step() == forward
  assert step(trained=None) == 3 * forward


def test_lora_by_hand():
  # Of the encoder's query, rank 1. Nothing below it has a backward pass: its
  # own W, key and value, the decoder's self-attention and its cross-query.
  encoder = 3 * 2 * 16 + 2 * 8 * 2 + 2 * 4 * 3  # query, key, value; A; B
  encoder += 2 * (8 + 8 + 16 + 48) * 2  # logits, values, out, feed-forward
  decoder = 2 * 36 + 2 * 8 + 2 * 32 * 2  # self; query; key and value
  decoder += 2 * 4 * 2 + 2 * 4 * 3  # logits of frozen queries; values
  decoder += 2 * (8 + 24 + 40) * 2
  laid = {'encoder/layers/attention/query/low_rank': 1}
  assert step(laid=laid) == encoder + decoder == 1016
  # With the gradient of W, too.
  kernel = 'encoder/layers_0/attention/query/kernel'
  assert step(laid=laid, trained={kernel}) == 1016 + 2 * 16


def args(tmp_path, **fields):
  return argparse.Namespace(
    **{
      'model': 'mini',
      'dropout': 0.0,
      'scan': False,
      'folder': str(tmp_path),
      'batch': 2,
      'inputs': 6,
      'targets': 3,
      **fields,
    }
  )


def products_in(jaxpr) -> int:
  """Operations of all products of a program."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in summed)
      total += 2 * eqn.outvars[0].aval.size * inner
    for value in eqn.params.values():
      for x in value if isinstance(value, tuple) else (value,):
        if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
          times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
          total += times * products_in(getattr(x, 'jaxpr', x))
  return total


def gradient(setup, data):
  """The program of the gradient, without what nobody needs."""
  state, frozen = setup.shapes

  def loss(trainable, frozen, data):
    return setup.model.loss_fn(frozen, trainable, data)[0]

  made = jax.make_jaxpr(jax.grad(loss))(state.trainable, frozen, data).jaxpr
  return partial_eval.dce_jaxpr(made, [True] * len(made.outvars))[0]


@pytest.mark.parametrize(
  'name',
  ['fine_tune', 'dora', 'mam', 'houlsby', 'last_layers', 'layer_norm', 'lst'],
)
def test_is_what_the_gradient_has(name, tmp_path):
  setup = method_steps.read(name, args(tmp_path))
  data = method_steps.batch(setup, args(tmp_path))
  want = closed_form.flops(method_steps.products(setup, data))
  assert products_in(gradient(setup, data)) == want


def test_soft_tokens_reach_little_more(tmp_path):
  # The program does not know that none stands in the decoder: there its first
  # self-attention and query have a backward pass.
  given = args(tmp_path)
  setup = method_steps.read('soft_prompt', given)
  data = method_steps.batch(setup, given)
  found = method_steps.products(setup, data)
  unreached = [p for p in found if not p.x and not p.w]
  assert {p.name.rpartition('/')[0] for p in unreached} == {
    'decoder/layers_0/self_attention',
    'decoder/layers_0/encoder_decoder_attention',
  }
  assert unreached[-1].name.endswith('/query')
  # Logits have two factors, values too; of cross-attention the keys counted.
  twice = [p for p in found if p.name.endswith(('/logits', '/values'))]
  more = sum(2 * p.size for p in unreached)
  more += sum(2 * p.size for p in twice if '/layers_0/self_' in p.name)
  path = 'decoder/layers_0/encoder_decoder_attention/logits'
  more += sum(2 * p.size for p in twice if p.name == path)
  want = closed_form.flops(found) + more
  assert products_in(gradient(setup, data)) == want


def test_loops_count_as_often_as_they_run():
  def loop(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

  x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  ws = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
  traced = jax.jit(loop).trace(x, ws)
  found = method_steps.counted(traced.lower().compile(), traced.jaxpr)
  assert found == pytest.approx(5 * 2 * 16**3, rel=0.05)


def test_numbers_of_the_files(tmp_path):
  lora = method_steps.read('lora', args(tmp_path))
  found = method_steps.saved(lora, str(tmp_path))
  assert found['trained'] == found['deployed'] == 6 * 2 * 8 * (128 + 128)
  assert 4 * found['trained'] < found['trained_bytes'] < found['deployed_bytes']
  hidden = method_steps.read('hidden_prompt', args(tmp_path))
  assert method_steps.saved(hidden, str(tmp_path))['deployed'] is None
  assert not list(tmp_path.glob('*.safetensors'))


def test_aims_say_what_is_not_met():
  cost = {'closed_flops': 100.0, 'scratch_bytes': 100}
  results = {
    'fine_tune': {**cost, 'counted_flops': 102.0},
    'mpt': {**cost, 'counted_flops': 130.0},
    'lst': {**cost, 'counted_flops': 110.0, 'scratch_bytes': 41},
    'lora': {
      **cost, 'counted_flops': 101.0, 'with_kernel_gradients_flops': 105.0
    },
  }  # fmt: skip
  costs, memory, lora = method_report.aims(results)
  assert costs.endswith('NOT MET by mpt 1.30.')
  assert '41.0%, NOT MET' in memory
  assert lora.endswith(': met.')


def test_unknown_methods_are_refused():
  assert methods.chosen('', ['a', 'fine_tune']) == ['fine_tune', 'a']
  with pytest.raises(ValueError, match='No method lroa; there are'):
    methods.chosen('lroa', ['fine_tune', 'lora'])
