"""Optimizers against the reference's numbers, optax's, and themselves.

`testdata/adafactor.npz` is a part of the golden numbers recorded from
google-research/t5x (Apache License 2.0): the two parameters that are not
factored, whose updates do not depend on the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from prompt_jax import optimizers

# One optimizer step in float32, as the golden numbers' README has it.
ATOL = 2e-6
# Six steps: the reference itself is then 3e-6 away from exact arithmetic.
ATOL_SIX_STEPS = 4e-6

PROMPT_RECIPE = {
  'multiply_by_parameter_scale': False,
  'weight_decay_rate': 1e-5,
}
CONFIGURATIONS = {
  'prompt_recipe': PROMPT_RECIPE,
  'prompt_recipe_from_step_1100000': PROMPT_RECIPE,
  'default': {},
  'default_momentum': {'beta1': 0.9},
  'default_noclip_unfactored': {'clipping_threshold': None, 'factored': False},
  'default_step_offset': {'step_offset': 1000},
  'weight_decay_lr_exponent': {
    'weight_decay_rate': 0.1,
    'weight_decay_rate_lr_exponent': 2.0,
  },
  'global_norm_clip': {'global_norm_clip_threshold': 1.0},
}


def make_step(optimizer):
  """One jitted step: (params, state, grads, rate) -> (params, state)."""

  @jax.jit
  def step(params, state, grads, rate):
    updates, state = optimizer.update(grads, state, params, learning_rate=rate)
    return optax.apply_updates(params, updates), state

  return step


def run(optimizer, params, grads, rate):
  """Steps over gradients stacked on axis 0; all parameters, last state."""
  step, state, history = make_step(optimizer), optimizer.init(params), []
  for i in range(jax.tree.leaves(grads)[0].shape[0]):
    params, state = step(
      params, state, jax.tree.map(lambda g, i=i: g[i], grads), rate
    )
    history.append(params)
  return history, state


def part(arrays, prefix):
  return {
    k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)
  }


def check_configuration(arrays, name):
  ours = part(arrays, f'{name}/')
  optimizer = optimizers.adafactor(
    initial_step=int(ours['initial_step']), **CONFIGURATIONS[name]
  )
  history, state = run(
    optimizer,
    part(arrays, 'param0/'),
    part(arrays, 'grads/'),
    ours['learning_rate'],
  )
  compared = 0
  for n, atol in ((1, ATOL), (2, ATOL), (6, ATOL_SIX_STEPS)):
    for leaf, expected in part(ours, f'param_after_{n}/').items():
      np.testing.assert_allclose(
        history[n - 1][leaf], expected, atol=atol, rtol=0, err_msg=f'{leaf}@{n}'
      )
      compared += 1
  for field in ('v_row', 'v_col', 'v', 'm'):
    for leaf, expected in part(ours, f'{field}/').items():
      np.testing.assert_allclose(
        getattr(state, field)[leaf], expected, rtol=1e-5, err_msg=field + leaf
      )
      compared += 1
  assert state.count == ours['initial_step'] + 6
  return compared


@pytest.mark.parametrize('name', [c for c in CONFIGURATIONS if 'norm' not in c])
def test_adafactor_goldens_kept(name, testdata):
  assert check_configuration(np.load(testdata / 'adafactor.npz'), name) >= 7


@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_adafactor_goldens(name, shared):
  arrays = np.load(shared / 'goldens' / 'adafactor.npz')
  assert check_configuration(arrays, name) >= 12


@pytest.mark.parametrize(
  ('name', 'initial_step'),
  [
    ('tiny_restored_step3', 3),
    ('tiny_step0', 0),
    ('tiny_step1100000', 1_100_000),
    ('mini_p20_step0', 0),
    ('mini_p20_step1100000', 1_100_000),
  ],
)
def test_single_steps_of_prompt_training(name, initial_step, shared):
  """Each of the 20 steps from its stored state, as 20 runs of one program."""
  path = shared / 'goldens' / 'train_trajectory.npz'
  arrays = part(np.load(path), f'{name}/')
  after, v_after = arrays['prompt_after_step'], arrays['v_after_step']
  before = np.concatenate([arrays['prompt_initial'][None], after[:-1]])
  v_before = np.concatenate([jnp.zeros_like(v_after[:1]), v_after[:-1]])
  optimizer = optimizers.adafactor(initial_step=initial_step, **PROMPT_RECIPE)

  def step(count, prompt, v, grad):
    params = {'prompt': prompt}
    state = optimizer.init(params)._replace(count=count, v={'prompt': v})
    updates, state = optimizer.update(
      {'prompt': grad}, state, params, learning_rate=0.3
    )
    return optax.apply_updates(params, updates)['prompt'], state.v['prompt']

  counts = initial_step + jnp.arange(20, dtype=jnp.int32)
  ours, v_ours = jax.jit(jax.vmap(step))(
    counts, before, v_before, arrays['grad_at_step']
  )
  np.testing.assert_allclose(ours, after, atol=ATOL, rtol=0)
  np.testing.assert_allclose(v_ours, v_after, rtol=1e-5)


def test_long_prompts_are_factored(shared):
  arrays = np.load(shared / 'goldens' / 'train_trajectory.npz')
  state = optimizers.adafactor(**PROMPT_RECIPE).init(
    {'prompt': arrays['mini_p150_step0/prompt_initial']}
  )
  for field in ('v_row', 'v_col'):
    expected = arrays[f'mini_p150_step0/{field}_after_step'][0]
    assert getattr(state, field)['prompt'].shape == expected.shape
  assert state.v['prompt'] is None


def random_tree(seed, *lead):
  shapes = {
    'encoder': {
      'layers': {'kernel': (3, 10, 8), 'scale': (3, 8), 'prefix': (3, 2, 9, 8)},
      'encoder_norm': {'scale': (8,)},
    },
    'wide': (8, 10),
    'tall': (12, 9),
    'square': (8, 8),
    'small': (7, 20),
    'tensor': (9, 9, 9),
  }
  rng = np.random.default_rng(seed)

  def leaf(shape):
    # Layers of different sizes, so that a mean over them would show.
    sizes = np.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    return np.float32(rng.normal(size=(*lead, *shape)) * sizes)

  return jax.tree.map(leaf, shapes, is_leaf=lambda s: isinstance(s, tuple))


def check_equals_optax(ours, theirs, params, grads):
  """`theirs` has the learning rate 0.1 in it."""
  told_rate = optax.GradientTransformationExtraArgs(
    theirs.init, lambda u, s, p, learning_rate: theirs.update(u, s, p)
  )
  history, state = run(ours, params, grads, 0.1)
  with jax.numpy_dtype_promotion('standard'):  # optax's own Adam needs it.
    expected, _ = run(told_rate, params, grads, 0.1)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL, rtol=1e-6),
    history,
    expected,
  )
  return state


def test_factored_equals_optax():
  """An independent implementation, on matrices of either orientation."""
  params, grads = random_tree(0), random_tree(1, 3)
  for tree in (params, grads):
    # optax knows no batched leaves, and factors tensors.
    del tree['encoder'], tree['tensor']
  state = check_equals_optax(
    optimizers.adafactor(min_dim_size_to_factor=8),
    optax.adafactor(0.1, min_dim_size_to_factor=8),
    params,
    grads,
  )
  assert state.v_row['tall'].shape == (9,)
  assert state.v_col['tall'].shape == (12,)
  assert state.v['small'].shape == (7, 20) and state.v['square'] is None


def test_adamw_equals_optax():
  kwargs = {'b1': 0.8, 'b2': 0.95, 'eps': 1e-6, 'weight_decay': 0.1}
  check_equals_optax(
    optimizers.adamw(**kwargs),
    optax.adamw(0.1, **kwargs),
    random_tree(0),
    random_tree(1, 3),
  )


@pytest.mark.parametrize('beta1', [None, 0.9])
def test_scanned_layers_are_updated_apart(beta1):
  optimizer = optimizers.adafactor(
    min_dim_size_to_factor=8, weight_decay_rate=0.01, beta1=beta1
  )
  params = random_tree(0)['encoder']['layers']
  grads = random_tree(1, 4)['encoder']['layers']
  stacked, state = run(
    optimizer,
    {'encoder': {'layers': params}},
    {'encoder': {'layers': grads}},
    0.1,
  )
  for i in range(3):
    apart, state_i = run(
      optimizer,
      jax.tree.map(lambda p, i=i: p[i], params),
      jax.tree.map(lambda g, i=i: g[:, i], grads),
      0.1,
    )
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6),
      stacked[-1]['encoder']['layers'],
      apart[-1],
    )
    for field in ('v_row', 'v_col', 'v', 'm'):
      jax.tree.map(
        lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5),
        getattr(state, field)['encoder']['layers'],
        getattr(state_i, field),
      )
  # `layers_0` is one layer, not a stack.
  state = optimizer.init({'layers_0': params['kernel'][0]})
  assert state.v_row['layers_0'].shape == (8,)


ALL = {
  'adafactor': lambda: optimizers.adafactor(
    min_dim_size_to_factor=8, global_norm_clip_threshold=1.0, beta1=0.5
  ),
  'adafactor_unclipped': lambda: optimizers.adafactor(initial_step=1000),
  'adamw': lambda: optimizers.adamw(
    weight_decay=0.1, global_norm_clip_threshold=1.0
  ),
  'sgd': lambda: optimizers.sgd(momentum=0.9),
}


@pytest.mark.parametrize('name', ALL)
def test_runs_of_different_rates_under_vmap(name):
  optimizer = ALL[name]()
  trees = [random_tree(0), random_tree(1)]
  grads = [random_tree(2), random_tree(3)]
  rates = jnp.asarray([0.1, 0.003])
  step = make_step(optimizer)

  apart = []
  for params, grad, rate in zip(trees, grads, rates, strict=True):
    state = optimizer.init(params)
    for _ in range(2):
      params, state = step(params, state, grad, rate)
    apart.append((params, state))

  def stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)

  params, grad = stack(trees), stack(grads)
  state = jax.vmap(optimizer.init)(params)
  for _ in range(2):
    params, state = jax.vmap(step)(params, state, grad, rates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL, rtol=1e-5),
    (params, state),
    stack(apart),
  )


@pytest.mark.parametrize('name', ALL)
def test_state_survives_orbax(name, tmp_path):
  optimizer = ALL[name]()
  params = random_tree(0)
  step = make_step(optimizer)
  params, state = step(params, optimizer.init(params), random_tree(1), 0.1)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    abstract = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    restored = checkpointer.restore(tmp_path / 'state', abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  went_on, _ = step(params, restored, random_tree(2), 0.1)
  never_stopped, _ = step(params, state, random_tree(2), 0.1)
  jax.tree.map(np.testing.assert_array_equal, went_on, never_stopped)


def test_state_holds_nothing_that_is_not_needed():
  params = {'matrix': jnp.zeros((128, 130)), 'prompt': jnp.zeros((100, 768))}
  state = optimizers.adafactor().init(params)
  sizes = [leaf.size for leaf in jax.tree.leaves(state)]
  assert sorted(sizes) == [1, 128, 130, 76800]
  assert jax.tree.leaves(optimizers.adafactor().init({})) == [0]


def test_extra_arguments_pass_through_a_chain():
  optimizer = optax.chain(optax.clip(1.0), optimizers.adafactor())
  params = {'p': jnp.ones((3,))}
  history, _ = run(optimizer, params, {'p': np.ones((1, 3), np.float32)}, 0.5)
  # The first update has size 1 and the parameter RMS 1.
  np.testing.assert_allclose(history[0]['p'], 0.5, rtol=1e-6)


def test_bfloat16_gradients_and_parameters():
  params = {'p': jnp.ones((3,), jnp.bfloat16)}
  grads = {'p': params['p'][None]}
  history, state = run(optimizers.adafactor(beta1=0.9), params, grads, 0.5)
  assert history[0]['p'].dtype == jnp.bfloat16
  assert state.v['p'].dtype == state.m['p'].dtype == jnp.float32


def test_decay_is_scaled_by_the_rate_in_adamw_only():
  params, grads = {'p': jnp.full((4,), 2.0)}, {'p': jnp.zeros((4,))}
  for optimizer, expected in (
    (optimizers.adamw(weight_decay=0.1), 2.0 * (1 - 0.5 * 0.1)),
    (optimizers.adafactor(weight_decay_rate=0.1), 2.0 * (1 - 0.1)),
  ):
    history, _ = run(optimizer, params, {'p': grads['p'][None]}, 0.5)
    np.testing.assert_allclose(history[0]['p'], expected, rtol=1e-6)


def test_sgd():
  params, grads = {'p': jnp.zeros(())}, {'p': np.float32([1.0, 2.0])}
  history, _ = run(optimizers.sgd(momentum=0.5), params, grads, 0.1)
  ours = [h['p'] for h in history]
  np.testing.assert_allclose(ours, [-0.1, -0.35], rtol=1e-6)


@pytest.mark.parametrize('name', ['adafactor', 'adamw', 'sgd'])
def test_global_norm_clip(name):
  make = getattr(optimizers, name)
  params = {'a': jnp.ones((1,)), 'b': jnp.ones((1,))}
  grads = {'a': np.float32([[3.0]]), 'b': np.float32([[4.0]])}
  small = {'a': np.float32([[0.3]]), 'b': np.float32([[0.4]])}
  clipped = run(make(global_norm_clip_threshold=0.5), params, grads, 1.0)
  expected = run(make(), params, small, 1.0)
  for ours, theirs in zip(
    jax.tree.leaves(clipped), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'bad', 'message'),
  [
    ('adafactor', {'decay_rate': 0.0}, r'decay_rate must be in \(0, 1\]'),
    ('adafactor', {'decay_rate': None}, 'decay_rate must be .*, got None'),
    ('adafactor', {'step_offset': 5}, r'initial_step .* step_offset \(5\)'),
    ('adafactor', {'clipping_threshold': 0.0}, 'None or above 0, got 0.0'),
    ('adafactor', {'beta1': 1.0}, r'beta1 must be None or in \[0, 1\)'),
    ('adafactor', {'weight_decay_rate': -0.1}, 'weight_decay_rate must be'),
    ('adafactor', {'epsilon2': float('nan')}, 'epsilon2 must be above 0'),
    ('adafactor', {'global_norm_clip_threshold': 0}, 'global_norm_clip'),
    ('adamw', {'b1': 1.0}, r'b1 must be in \[0, 1\), got 1.0'),
    ('adamw', {'global_norm_clip_threshold': -1.0}, 'None or above 0'),
    ('sgd', {'momentum': 1.0}, r'momentum must be in \[0, 1\)'),
  ],
)
def test_bad_hyperparameters(name, bad, message):
  with pytest.raises(ValueError, match=message):
    getattr(optimizers, name)(**bad)


def test_misuse():
  optimizer = optimizers.adafactor()
  params = {'p': jnp.ones((3,))}
  state = optimizer.init(params)
  with pytest.raises(ValueError, match='adafactor needs params'):
    optimizer.update(params, state, learning_rate=0.1)
  with pytest.raises(TypeError, match='learning_rate'):
    optimizer.update(params, state, params)
  with pytest.raises(ValueError, match='first axis must be the layers'):
    optimizer.init({'layers': {'scale': jnp.ones(())}})
