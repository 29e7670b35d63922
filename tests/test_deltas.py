"""The algebra of deltas, and what each kind does to the network."""

import dataclasses
import functools

from flax import linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import deltas
from prompt_jax import train_state
from prompt_jax.deltas import Routed
from prompt_jax.network import attention
from prompt_jax.network import layers
from prompt_jax.network import t5

C = helpers.SMALL
B, G, L = 4, 3, 2
WIDTH = C.num_heads * C.head_dim
GROUP = jnp.asarray([2, 0, 0, 1])
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def draw(*shape, seed=0, scale=0.5):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def make(kind, lead, seed=0, width=WIDTH):
  """A table of that kind with the leading axes `lead`, ((L,) G)."""
  d = functools.partial(draw, *lead, seed=seed)
  return {
    'rows': lambda: d(2, C.emb_dim),
    'low_rank': lambda: (d(C.emb_dim, 2), d(2, width)),
    'scale': lambda: 1 + d(width),
    'shift': lambda: d(width),
    'prefix': lambda: (
      d(3, C.num_heads, C.head_dim),
      d(3, C.num_heads, C.head_dim, seed=seed + 1),
    ),
    'bottleneck': lambda: (d(C.emb_dim, 2), d(2, C.emb_dim)),
  }[kind]()


# Of what a table may be: shared, one a task (routed), one an example.
WHOSE = {
  'shared': lambda kind, lead, seed: Routed(make(kind, (*lead, 1), seed)),
  'task': lambda kind, lead, seed: Routed(
    make(kind, (*lead, G), seed), jnp.broadcast_to(GROUP, (*lead, B))
  ),
  'example': lambda kind, lead, seed: Routed(make(kind, (*lead, B), seed)),
}


def whose(kind, owner, lead=(), seed=0):
  return WHOSE[owner](kind, lead, seed)


def by_example(delta, kind):
  """What each of the B examples gets, [(L,) B, ...]: a definition by hand."""
  layers_axes = {'rows': 3, 'scale': 2, 'shift': 2, 'prefix': 4}.get(kind, 3)
  leaves = []
  for leaf in jax.tree.leaves(delta.table):
    leaf = np.asarray(leaf)
    scanned = leaf.ndim > layers_axes
    leaf = leaf if scanned else leaf[None]
    index = np.zeros(B, int) if leaf.shape[1] == 1 else np.arange(B)
    if delta.group is not None:
      index = np.asarray(delta.group).reshape(-1, B)[0]
    leaf = leaf[:, index]
    leaves.append(leaf if scanned else leaf[0])
  return leaves


# ---- the algebra -----------------------------------------------------------

JOINED = [kind for kind in deltas.KINDS if kind != 'bottleneck']


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


def test_two_bottlenecks_at_one_place_do_not_combine():
  x = {'a/bottleneck': whose('bottleneck', 'shared')}
  with pytest.raises(ValueError, match=r'a/bottleneck: .* does not combine'):
    deltas.combine(x, x)
  other = {'b/bottleneck': whose('bottleneck', 'shared')}
  assert len(deltas.combine(x, other)) == 2


@pytest.mark.parametrize('owner', WHOSE)
def test_repeat_is_each_example_times_beams(owner):
  for kind in deltas.KINDS:
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


@functools.cache
def params(scan=True):
  """The same weights, stacked or layer by layer."""
  if not scan:
    flat = helpers.unstack_layers(train_state.flatten(params()))
    return train_state.unflatten(flat)
  one = np.ones((1, 1), np.int32)
  init = jax.jit(t5.T5(C).init)
  return nn.meta.unbox(init(jax.random.PRNGKey(0), one, one)['params'])


def tokens():
  batch = helpers.random_batch(C, rows=B)
  return batch['encoder_input_tokens'], batch['decoder_input_tokens']


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
  identity('adapt_projection', lambda module, x, y: y)
  identity('adapt_keys_values', lambda module, *same: same)
  identity('adapt_sublayer', lambda module, y: y)
  assert program({}) == with_hooks
  assert len(called) == 4


# ---- each kind, by its equation --------------------------------------------


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
  """(x W + x A B) * scale + shift."""
  kinds = ('low_rank', 'scale', 'shift')
  found = {kind: whose(kind, owner, seed=5) for kind in kinds}
  x = draw(B, 7, C.emb_dim)
  dense = layers.Dense(WIDTH, ('embed', 'mlp'))
  got, own = single(dense, found, x)
  per = {kind: each(found[kind], kind) for kind in kinds}
  for i, row in enumerate(np.asarray(x)):
    (a, b), (scale,), (shift,) = (per[kind][i] for kind in kinds)
    want = (row @ own['kernel'] + row @ a @ b) * scale + shift
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
def test_bottleneck_is_its_equation(owner):
  """Y + relu(y A) B, on what the sublayer gives without it."""
  found = {'bottleneck': whose('bottleneck', owner)}
  x = draw(B, 7, C.emb_dim)
  plain, _ = single(layers.Mlp(C), {}, x)
  got, _ = single(layers.Mlp(C), found, x)
  for i, (a, b) in enumerate(each(found['bottleneck'], 'bottleneck')):
    want = plain[i] + np.maximum(plain[i] @ a, 0) @ b
    np.testing.assert_allclose(got[i], want, **CLOSE)


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
