"""The algebra of deltas; what each kind does is in network/test_hooks.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_deltas import GROUP
from some_deltas import WHOSE
from some_deltas import WIDTH
from some_deltas import B
from some_deltas import C
from some_deltas import L
from some_deltas import by_example
from some_deltas import draw
from some_deltas import make
from some_deltas import params
from some_deltas import tokens
from some_deltas import whose

from prompt_jax import deltas
from prompt_jax.deltas import Routed
from prompt_jax.network import layers
from prompt_jax.network import t5

# ---- the algebra -----------------------------------------------------------

ALONE = ('bottleneck', 'parallel', 'hidden')
JOINED = sorted({*deltas.KINDS} - {*ALONE, 'preceding'})


def numpy_join(kind, x, y):
  """The change that both make, for each example, from those of each."""
  if kind == 'low_rank':
    return [
      np.concatenate([x[0], y[0]], -1),
      np.concatenate([x[1], y[1]], -2),
    ]
  if kind == 'prefix':
    return [np.concatenate(pair, -3) for pair in zip(x, y, strict=True)]
  return {
    'rows': lambda: [np.concatenate([x[0], y[0]], -2)],
    'scale': lambda: [x[0] * y[0]],
    'shift': lambda: [x[0] + y[0]],
    'kernel': lambda: [x[0] + y[0]],
  }[kind]()


@pytest.mark.parametrize('kind', JOINED)
def test_combine_joins_each_kind_whoever_owns_it(kind):
  for lead in [(), (L,)] if kind != 'rows' else [()]:
    for first in WHOSE:
      for second in WHOSE:
        x = whose(kind, first, lead, seed=1)
        y = whose(kind, second, lead, seed=2)
        found = deltas.combine({f'a/{kind}': x}, {f'a/{kind}': y})
        assert found.keys() == {f'a/{kind}'}
        want = numpy_join(kind, by_example(x, kind), by_example(y, kind))
        got = by_example(found[f'a/{kind}'], kind)
        for g, w in zip(got, want, strict=True):
          np.testing.assert_allclose(
            g, w, rtol=1e-6, err_msg=f'{lead} {first} {second}'
          )


def test_combine_is_a_monoid():
  some = [
    {f'a/{kind}': whose(kind, owner, seed=i) for kind in JOINED}
    for i, owner in enumerate(['shared', 'task', 'example', 'task'])
  ]
  some[0]['b/bottleneck'] = whose('bottleneck', 'shared')
  for x in some:
    assert deltas.combine(x, {}) == x == deltas.combine({}, x)
  for x, y, z in [some[:3], some[1:], some[::-1][:3]]:
    left = deltas.combine(deltas.combine(x, y), z)
    right = deltas.combine(x, deltas.combine(y, z))
    assert left.keys() == right.keys() == x.keys() | y.keys() | z.keys()
    for path in left:
      kind = path.split('/')[1]
      for a, b in zip(
        by_example(left[path], kind), by_example(right[path], kind), strict=True
      ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)


def test_combine_keeps_what_only_one_sets():
  x, y = (
    {'a/shift': whose('shift', 'task')},
    {'b/shift': whose('shift', 'task')},
  )
  both = deltas.combine(x, y)
  assert both == {**x, **y}
  assert len(x) == 1  # its arguments stay as they were


@pytest.mark.parametrize('kind', JOINED)
@pytest.mark.parametrize('routed', [True, False])
def test_unequal_groups_do_not_combine(kind, routed):
  group = GROUP if routed else None
  x = {f'a/{kind}': Routed(make(kind, (3,)), group)}
  y = {f'a/{kind}': Routed(make(kind, (2,)), group)}
  with pytest.raises(ValueError, match=f'a/{kind}: .* for 3 and for 2 groups'):
    deltas.combine(x, y)


@pytest.mark.parametrize('kind', ALONE)
def test_what_does_not_combine_at_one_place(kind):
  x = {f'a/{kind}': whose(kind, 'shared')}
  with pytest.raises(ValueError, match=f'a/{kind}: .* does not combine'):
    deltas.combine(x, x)
  other = {f'b/{kind}': whose(kind, 'shared')}
  assert len(deltas.combine(x, other)) == 2


def test_slots_that_precede_the_text_add_up():
  x, y = (Routed(jnp.zeros((1, n))) for n in (2, 3))
  both = deltas.combine({'a/preceding': x}, {'a/preceding': y})
  assert both['a/preceding'].table.shape == (1, 5)


def test_low_ranks_of_unequal_dropout_do_not_combine():
  x = {'a/low_rank': whose('low_rank', 'shared')}
  y = {'a/low_rank': dataclasses.replace(x['a/low_rank'], dropout_rate=0.1)}
  assert deltas.combine(y, y)['a/low_rank'].dropout_rate == 0.1
  with pytest.raises(ValueError, match='a/low_rank: .* does not combine'):
    deltas.combine(x, y)


@pytest.mark.parametrize('owner', WHOSE)
def test_repeat_is_each_example_times_beams(owner):
  for kind in {*deltas.KINDS} - {'hidden', 'preceding'}:
    for lead in [(), (L,)] if kind != 'rows' else [()]:
      delta = whose(kind, owner, lead)
      got = deltas.repeat({f'a/{kind}': delta}, 3)[f'a/{kind}']
      if owner == 'shared':
        assert got is delta
        continue
      axis = len(lead)
      want = [np.repeat(x, 3, axis) for x in by_example(delta, kind)]
      found = got.table
      if got.group is not None:
        index = np.asarray(got.group).reshape(-1, 3 * B)[0]
        found = jax.tree.map(
          lambda t, i=index, a=axis: jnp.take(t, i, a), found
        )
      for g, w in zip(jax.tree.leaves(found), want, strict=True):
        np.testing.assert_array_equal(g, w, err_msg=f'{kind} {lead}')


# ---- hooks -----------------------------------------------------------------


def program(found=None):
  """The traced network, as text."""
  variables = {'params': params()}
  if found is not None:
    variables['deltas'] = deltas.collection(found)
  # A new function each time: traces are cached by function.
  return str(jax.make_jaxpr(lambda v: t5.T5(C).apply(v, *tokens()))(variables))


def test_hooks_are_free(monkeypatch):
  """With no deltas the program is that of a T5 without hooks."""
  found = {'encoder/layers/mlp/wo/shift': Routed(jnp.ones((L, 1, C.emb_dim)))}
  with_hooks, changed = program({}), program(found)
  assert program(None) == with_hooks
  assert changed != with_hooks
  called = set()

  def identity(name, result):
    def hook(*args):
      called.add(name)
      return result(*args)

    assert hasattr(deltas, name)
    monkeypatch.setattr(deltas, name, hook)

  identity('adapt_embedding', lambda module, lookup, ids, rows: lookup(ids))
  identity(
    'adapt_projection', lambda module, x, kernel, product: product(x, kernel)
  )
  identity('adapt_keys_values', lambda module, *same: same)
  identity('adapt_sublayer', lambda module, x, y: y)
  identity('adapt_layer_input', lambda module, x: x)
  identity('slots_before_text', lambda module: 0)
  assert program({}) == with_hooks
  assert len(called) == 6


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('groups', [1, 2])
def test_a_small_change_of_a_kernel_is_not_rounded_away(dtype, groups):
  # Next to 1, bfloat16 has steps of 2^-7.
  kernel = jnp.array([[1.0], [-1.0]])
  change = Routed(jnp.full((groups, 2, 1), 2.0**-10))
  got = layers.Dense(1, ('embed', 'mlp')).apply(
    {'params': {'kernel': kernel}, 'deltas': {'kernel': change}},
    jnp.ones((2, 3, 2), dtype),
  )
  np.testing.assert_array_equal(got, np.full((2, 3, 1), 2.0**-9))


# ---- check and merge -------------------------------------------------------

MODULES = ['encoder/layers/attention/query', 'encoder/layers/mlp/wi_0']


def test_check_accepts_what_is_there():
  deltas.check({f'{MODULES[0]}/{k}': Routed(0) for k in deltas.KINDS}, MODULES)
  deltas.check({}, MODULES)


@pytest.mark.parametrize(
  'path, message',
  [
    ('encoder/layers/attention/qurey/scale', f"mean '{MODULES[0]}'"),
    ('encoder/layer/mlp/wi_0/shift', f"mean '{MODULES[1]}'"),
    ('layers/scale', "no module 'layers'"),
    (f'{MODULES[0]}/low_rnk', "'low_rnk'; there are rows, .* mean 'low_rank'"),
    (f'{MODULES[0]}/prefixes', "unknown kind .* mean 'prefix'"),
    ('scale', "no module ''"),
  ],
)
def test_check_names_what_comes_near(path, message):
  with pytest.raises(ValueError, match=f'^{path}: .*{message}'):
    deltas.check({path: Routed(0)}, MODULES)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'loop'])
def test_merged_weights_are_the_deltas_applied(scan):
  sizes = {
    'encoder/layers/attention/query': WIDTH,
    'decoder/layers/encoder_decoder_attention/value': WIDTH,
    'decoder/layers/mlp/wi_1': C.mlp_dim,
  }
  found = {}
  for i, (path, width) in enumerate(sizes.items()):
    for kind in ('scale', 'low_rank'):  # both at one place
      if scan:
        table = make(kind, (L, 1), i, width)
        found[f'{path}/{kind}'] = Routed(table)
        continue
      for layer in range(L):
        name = path.replace('layers', f'layers_{layer}')
        table = make(kind, (1,), 10 * i + layer, width)
        found[f'{name}/{kind}'] = Routed(table)
  table = draw(1, C.emb_dim, 2), draw(1, 2, C.vocab_size)
  found['decoder/logits_dense/low_rank'] = Routed(table)
  config = dataclasses.replace(C, scan_layers=scan)
  network = jax.jit(t5.T5(config).apply)
  inputs, targets = tokens()
  frozen = params(scan)
  variables = {'params': frozen, 'deltas': deltas.collection(found)}
  applied = network(variables, inputs, targets)
  merged = deltas.merge_into_weights(found, frozen)
  exported = network({'params': merged}, inputs, targets)
  largest = np.abs(applied).max()
  np.testing.assert_allclose(exported, applied, atol=1e-6 * largest, rtol=0)
  plain = network({'params': frozen}, inputs, targets)
  assert np.abs(plain - applied).max() > 1e-2 * largest
  again = network({'params': frozen}, inputs, targets)
  np.testing.assert_array_equal(plain, again)  # its arguments stay


REFUSED = [
  *((kind, 'shared') for kind in ('rows', 'shift', 'prefix', 'bottleneck')),
  *((kind, o) for kind in ('low_rank', 'scale') for o in ('task', 'example')),
]


@pytest.mark.parametrize('kind, owner', REFUSED)
def test_what_is_no_change_of_a_weight_is_not_merged(kind, owner):
  path = f'encoder/layers/attention/query/{kind}'
  delta = whose(kind, owner, () if kind == 'rows' else (L,))
  with pytest.raises(ValueError, match=f'^{path}: .*cannot be folded'):
    deltas.merge_into_weights({path: delta}, params())
