"""LoRA, rsLoRA and DoRA: the equation, the constant, lengths and merging."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_1_1

from prompt_jax import deltas
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.methods import lora
from prompt_jax.methods.ia3 import IA3
from prompt_jax.methods.intrinsic import IntrinsicModel
from prompt_jax.methods.lora import LoRA

CONFIG = helpers.SMALL
D, F, L = CONFIG.emb_dim, CONFIG.mlp_dim, 2
INNER = CONFIG.num_heads * CONFIG.head_dim
BARE = models.EncoderDecoderModel(CONFIG)
ALL = ('.*/(query|key|value|out)', '.*/(wi_0|wi_1|wo)', '.*logits_dense')


@functools.cache
def frozen():
  init = jax.jit(BARE.init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


@functools.cache
def apply():
  """The network with some deltas: compiled anew for each kind of them."""
  return jax.jit(BARE.apply)


def start(method):
  """The parameters at the start, by path."""
  context = BARE.context(frozen(), exporting=True)  # of all tasks
  own = method.init(jax.random.PRNGKey(0), context)['params']
  return train_state.flatten(partitioning.unbox(own))


def shapes(method):
  frozen()  # not for the first time while tracing
  return jax.eval_shape(lambda: start(method))


def moved(method):
  """The parameters away from the start."""
  rng = np.random.default_rng(0)
  return {
    path: np.asarray(x + rng.normal(scale=0.1, size=x.shape), np.float32)
    for path, x in start(method).items()
  }


def lay(method, own, **fields):
  context = BARE.context(frozen(), **fields)
  return method.apply({'params': train_state.unflatten(own)}, context)


def by_hand(method, own, c):
  """The network's parameters with the paper's W', in float64."""
  flat = dict(train_state.flatten(frozen()))
  sites = {path.rpartition('/')[0] for path in own}
  for site in sites:
    kernel, a, b = (
      np.asarray(x, np.float64)
      for x in (
        flat[f'{site}/kernel'],
        own[f'{site}/lora_a'],
        own[f'{site}/lora_b'],
      )
    )
    kernel = kernel + c * np.einsum('...dr,...re->...de', a, b)
    if method.dora:
      norm = np.sqrt((kernel**2).sum(-2, keepdims=True))
      kernel = own[f'{site}/magnitude'][..., None, :] * kernel / norm
    flat[f'{site}/kernel'] = kernel.astype(np.float32)
  return train_state.unflatten(flat)


# ---- how many --------------------------------------------------------------


def test_counts_are_the_papers_formulas():
  def q_v(rank):
    return lambda d, layers, inner, f: 6 * layers * rank * (d + inner)

  t5_1_1.check_declared('lora', q_v(8))
  t5_1_1.check_declared('rslora', q_v(64))
  t5_1_1.check_declared(
    'dora', lambda d, n, i, f: q_v(8)(d, n, i, f) + 6 * n * i
  )

  def all_linear(d, n, i, f):
    low_rank = 12 * n * 4 * (d + i) + 6 * n * 4 * (d + f)
    return low_rank + t5_1_1.norm_scales(d, n)

  t5_1_1.check_declared('lora_all', all_linear)


@pytest.mark.parametrize('dora', [False, True])
def test_count_of_all_projections(dora):
  method = LoRA(rank=3, targets=ALL[:2], dora=dora)
  want = 12 * L * 3 * (D + INNER) + 6 * L * 3 * (D + F)
  want += dora * (3 * L * (3 * INNER + D) + 2 * L * (2 * F + D))
  assert sum(x.size for x in shapes(method).values()) == want


# ---- the equation ----------------------------------------------------------


@pytest.mark.parametrize(
  'scaling, c',
  [
    ('alpha_over_rank', 12 / 4),
    ('alpha_over_sqrt_rank', 12 / 2),
    ('one_over_rank', 1 / 4),
  ],
)
def test_the_constant_is_in_the_table(scaling, c):
  method = LoRA(rank=4, alpha=12, scaling=scaling)
  own = moved(method)
  found = lay(method, own)
  assert len(found) == 6
  for path, delta in found.items():
    site, _, kind = path.rpartition('/')
    a, b = delta.table
    assert kind == 'low_rank' and a.shape == (L, 1, D, 4)
    np.testing.assert_array_equal(a[:, 0], own[f'{site}/lora_a'])
    np.testing.assert_allclose(b[:, 0], c * own[f'{site}/lora_b'], rtol=1e-6)


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.slow
def test_network_is_that_of_the_changed_weights(dora):
  """Applied, merged, and by the paper's equation in numpy."""
  method = LoRA(rank=3, alpha=6, targets=ALL, dora=dora)
  own = moved(method)
  found = lay(method, own)
  batch = helpers.random_batch(CONFIG)
  applied = np.asarray(apply()(frozen(), found, batch))
  largest = np.abs(applied).max()
  hand = by_hand(method, own, c=2)
  merged = deltas.merge_into_weights(found, frozen())
  got, want = train_state.flatten(merged), train_state.flatten(hand)
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_allclose(got[path], want[path], atol=1e-6, err_msg=path)
  for params in (merged, hand):
    exported = apply()(params, {}, batch)
    np.testing.assert_allclose(exported, applied, atol=1e-6 * largest, rtol=0)
  plain = apply()(frozen(), {}, batch)
  assert np.abs(plain - applied).max() > 0.1 * largest


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
def test_starts_at_the_frozen_model(dora):
  method = LoRA(rank=3, targets=ALL, dora=dora)
  found = lay(method, start(method))
  batch = helpers.random_batch(CONFIG)
  plain = np.asarray(apply()(frozen(), {}, batch))
  atol = 1e-6 * np.abs(plain).max() if dora else 0
  got = apply()(frozen(), found, batch)
  np.testing.assert_allclose(got, plain, atol=atol, rtol=0)
  for path, delta in found.items():
    if path.endswith('/scale'):
      np.testing.assert_allclose(delta.table, 1, atol=1e-6)


def test_tasks_have_changes_of_their_own():
  site = 'decoder/layers/self_attention/value'
  method = LoRA(rank=2, dora=True, num_tasks=3, targets=site)
  own = moved(method)
  tasks = np.array([2, 0, 2, 1], np.int32)
  tokens = np.ones((4, 1), np.int32)
  found = lay(method, own, tokens=tokens, task_ids=tasks)
  for path, delta in found.items():
    assert delta.group.tolist() == [tasks.tolist()] * L
    leaves = jax.tree.leaves(delta.table)
    assert all(leaf.shape[:2] == (L, 3) for leaf in leaves), path
  alone = LoRA(rank=2, dora=True, targets=site)
  for task in range(3):
    one = {path: x[:, task] for path, x in own.items()}
    want = lay(alone, one)[f'{site}/scale'].table[:, 0]
    got = found[f'{site}/scale'].table[:, task]
    np.testing.assert_allclose(got, want, rtol=1e-5)
  with pytest.raises(ValueError, match='3 tasks apart, but .* no `task_ids`'):
    lay(method, own, tokens=tokens)


# ---- DoRA's lengths --------------------------------------------------------


def test_column_lengths_are_those_of_the_changed_weight():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 7, 5)).astype(np.float32)
  a = rng.normal(size=(2, 3, 7, 4)).astype(np.float32)
  b = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  kernel[:, :, 0], b[..., 0] = 0, 0  # a column without a length
  got = lora.column_lengths(jnp.asarray(kernel), a, b)
  want = np.linalg.norm(kernel[:, None] + a @ b, axis=-2)
  assert got.shape == (2, 3, 5) and (got > 0).all()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)
  got = lora.column_lengths(jnp.asarray(kernel[0]), a[0], b[0])
  np.testing.assert_allclose(got, want[0], rtol=1e-5, atol=1e-12)


def test_lengths_are_constant_in_the_gradient():
  method = LoRA(rank=2, dora=True, targets='encoder/.*/query')
  own = moved(method)

  def scales(own):
    found = lay(method, own)
    return sum(
      jnp.sum(delta.table)
      for path, delta in found.items()
      if path.endswith('/scale')
    )

  found = jax.grad(scales)(own)
  flat = train_state.flatten(frozen())
  for path, gradient in found.items():
    site, _, name = path.rpartition('/')
    if name != 'magnitude':
      assert (gradient == 0).all(), path
      continue
    a, b = own[f'{site}/lora_a'], own[f'{site}/lora_b']
    changed = flat[f'{site}/kernel'] + 8 * a @ b  # alpha / r = 16 / 2
    want = 1 / np.linalg.norm(changed, axis=-2)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, err_msg=path)


def test_dropout_is_of_the_low_rank_alone():
  method = LoRA(rank=2, dora=True, dropout_rate=0.25)
  for path, delta in lay(method, moved(method)).items():
    rate = 0.25 if path.endswith('/low_rank') else 0.0
    assert delta.dropout_rate == rate, path


# ---- where it starts -------------------------------------------------------


def test_initial_values():
  shape = (40, 64, 16)
  drawn = {
    name: np.asarray(init(jax.random.PRNGKey(0), shape, jnp.float32))
    for name, init in lora.A_INIT.items()
  }
  bound = 64**-0.5
  assert 0.99 * bound < np.abs(drawn['uniform']).max() <= bound
  assert abs(drawn['uniform'].std() * 3**0.5 / bound - 1) < 0.02
  assert abs(drawn['normal'].std() / 0.01 - 1) < 0.02
  assert abs(drawn['normal_over_rank'].std() * 16 - 1) < 0.02
  for x in drawn.values():
    assert abs(x.mean()) < 0.02 * x.std()
  flat = train_state.flatten(frozen())
  own = start(LoRA(rank=3, a_init='normal', dora=True))
  for path, x in own.items():
    site, _, name = path.rpartition('/')
    if name == 'lora_a':
      assert x.shape == (L, D, 3) and 0.005 < x.std() < 0.02, path
    elif name == 'lora_b':
      assert x.shape == (L, 3, INNER) and not x.any(), path
    else:
      want = np.linalg.norm(flat[f'{site}/kernel'], axis=-2)
      np.testing.assert_allclose(x, want, rtol=1e-6, err_msg=path)


def test_no_two_changes_start_alike():
  own = start(LoRA(rank=2, num_tasks=2, targets='decoder/.*query'))
  drawn = [x for path, x in own.items() if path.endswith('/lora_a')]
  columns = np.concatenate([np.asarray(x).reshape(-1) for x in drawn])
  assert len(np.unique(columns)) > 0.99 * columns.size


# ---- what is refused -------------------------------------------------------


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'rank': 0}, 'LoRA.rank must be .* at least 1, got 0'),
    ({'rank': -2}, 'LoRA.rank must be .* at least 1, got -2'),
    ({'rank': 2.0}, 'LoRA.rank must be a whole number .*, got 2.0'),
    ({'rank': '4'}, "LoRA.rank must be a whole number .*, got '4'"),
    ({'num_tasks': 0}, 'LoRA.num_tasks must be .* at least 1, got 0'),
    ({'alpha': 0}, 'LoRA.alpha must be above 0, got 0'),
    ({'alpha': float('nan')}, 'LoRA.alpha must be above 0, got nan'),
    ({'alpha': '16'}, "LoRA.alpha must be above 0, got '16'"),
    ({'dropout_rate': 1.0}, r'must be in \[0, 1\), got 1.0'),
    ({'dropout_rate': -0.1}, r'must be in \[0, 1\), got -0.1'),
    ({'scaling': 'alpha_over_rnk'}, "Did you mean 'alpha_over_rank'"),
    ({'scaling': 2.0}, 'LoRA.scaling must be one of .*, got 2.0'),
    ({'a_init': 'gaussian'}, "one of uniform, normal, .* got 'gaussian'"),
    ({'targets': ()}, r'LoRA.targets must be patterns .*, got \(\)'),
    ({'targets': (3,)}, r'LoRA.targets must be patterns .*, got \(3,\)'),
    ({'targets': None}, 'LoRA.targets must be patterns .*, got None'),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    LoRA(**fields)


def test_a_rank_that_a_target_cannot_have():
  message = rf'LoRA.rank is {D + 1}, but .* {D} x {INNER}: .* at most {D}\.'
  with pytest.raises(ValueError, match=message):
    start(LoRA(rank=D + 1))
  assert start(LoRA(rank=D))  # as large as can be


def test_every_target_must_be_there():
  near = 'encoder/layers/attention/qurey'
  message = f"matches '{near}'.*mean 'encoder/layers/attention/query'"
  with pytest.raises(ValueError, match=message):
    start(LoRA(targets=('.*/value', near)))


def test_one_pattern_or_several_and_each_site_once():
  def paths(**fields):
    return shapes(LoRA(**fields)).keys()

  one = paths(targets='.*/(query|value)')
  several = paths(targets=['.*/query', '.*/value', 'encoder/.*/query'])
  assert one == several == paths()


# ---- in a chain --------------------------------------------------------------


def chained(**methods):
  chain = base.Chain(methods)
  context = BARE.context(frozen())
  made = chain.init(jax.random.PRNGKey(0), context)
  return chain.apply(made, context)


@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize(
  ('other', 'kind'),
  [
    (LoRA(rank=2, targets='.*/query'), 'low_rank'),
    (LoRA(rank=3, targets='.*/query', dora=True), 'low_rank'),
    (IntrinsicModel(dimension=30, targets='encoder/.*'), 'kernel'),
    # The lengths are DoRA's, wherever in the chains it stands.
    (base.Chain({'a': IA3(('.*/query',)), 'b': LoRA(rank=2)}), 'low_rank'),
  ],
)
def test_lengths_of_a_kernel_that_another_changes_too(other, kind, first):
  methods = {'dora': LoRA(rank=2, dora=True), 'other': other}
  if first:
    methods = dict(reversed(methods.items()))
  message = rf'^\w+/layers/\w+/\w+: .*DoRA.*the same kernel \({kind}\)'
  with pytest.raises(ValueError, match=message):
    chained(**methods)


def test_dora_stands_beside_what_changes_no_kernel_of_its_own():
  dora = LoRA(rank=2, targets='.*/query', dora=True)
  values = LoRA(rank=2, targets='.*/value')
  laid = chained(a=dora, b=IA3(('.*/query',)), c=values)
  alone = chained(a=dora)
  path = 'encoder/layers/attention/query/scale'
  np.testing.assert_allclose(laid[path].table, alone[path].table, rtol=1e-6)
  assert 'encoder/layers/attention/value/low_rank' in laid
  # Of two scales at one place the lengths still are what they were made for.
  with pytest.raises(ValueError, match='the same kernel'):
    chained(a=base.Chain({'a': dora, 'b': IA3(('.*/query',))}), c=LoRA(rank=2))
