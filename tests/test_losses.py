"""Losses against the reference's numbers and against their definitions.

`testdata/losses.npz` is a part of the `mini` golden numbers recorded from
google-research/t5x (Apache License 2.0).
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import losses

SETTINGS = [(z, s) for z in (0.0, 1e-4) for s in (0.0, 0.1)]
NAMES = {0.0: '0', 1e-4: '0.0001', 0.1: '0.1'}
FACTORS = {
  'None': None,
  'NUM_REAL_TARGET_TOKENS': 'NUM_REAL_TARGET_TOKENS',
  'NUM_TOTAL_TARGET_TOKENS': 'num_total_target_tokens',
  'AVERAGE_PER_SEQUENCE': (
    losses.SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE
  ),
  '233472.0': 233472.0,
}


def golden(name, request):
  if name == 'kept':
    return np.load(request.getfixturevalue('testdata') / 'losses.npz')
  return np.load(request.getfixturevalue('shared') / 'goldens' / f'{name}.npz')


def as_batch(arrays, prefix='batch/'):
  names = (
    'decoder_target_tokens',
    'decoder_loss_weights',
    'decoder_segment_ids',
    'decoder_positions',
  )
  return {
    n: jnp.asarray(arrays[prefix + n]) for n in names if prefix + n in arrays
  }


def loss_of(logits, batch, factor, **kwargs):
  factor, weights = losses.get_loss_normalizing_factor_and_weights(
    factor, batch
  )
  return losses.compute_weighted_cross_entropy(
    logits,
    batch['decoder_target_tokens'],
    weights,
    loss_normalizing_factor=factor,
    **kwargs,
  )


@pytest.mark.parametrize('name', ['kept', 'forward', 'mini_forward'])
def test_goldens(name, request):
  arrays = golden(name, request)
  logits = jnp.asarray(arrays['logits'])
  batch = as_batch(arrays)
  for z, smoothing in SETTINGS:
    key = f'z{NAMES[z]}_ls{NAMES[smoothing]}'
    token_loss, token_z_loss = jax.jit(
      lambda x, z=z, smoothing=smoothing: losses.cross_entropy_with_logits(
        x,
        batch['decoder_target_tokens'],
        label_smoothing=smoothing,
        z_loss=z,
      )
    )(logits)
    for ours, what in (
      (token_loss, 'per_token_loss'),
      (token_z_loss, 'per_token_z_loss'),
    ):
      np.testing.assert_allclose(
        ours, arrays[f'{what}/{key}'], atol=1e-5, rtol=1e-5, err_msg=what
      )
    for factor_name, factor in FACTORS.items():
      ours = loss_of(logits, batch, factor, label_smoothing=smoothing, z_loss=z)
      for value, what in zip(
        ours, ('loss', 'z_loss', 'weight_sum'), strict=True
      ):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(
          value,
          arrays[f'{what}/{key}/{factor_name}'],
          rtol=1e-6,
          err_msg=f'{what}/{key}/{factor_name}',
        )


@pytest.mark.parametrize('name', ['kept', 'forward', 'mini_forward'])
def test_special_factors(name, request):
  arrays = golden(name, request)
  batch = as_batch(arrays)
  for factor in list(FACTORS)[1:4]:
    ours, _ = losses.get_loss_normalizing_factor_and_weights(factor, batch)
    expected = arrays[f'loss_normalizing_factor/{factor}']
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize('name', ['forward', 'mini_forward'])
def test_model_loss(name, request):
  arrays = golden(name, request)
  loss, _, _ = loss_of(
    jnp.asarray(arrays['logits']), as_batch(arrays), None, z_loss=1e-4
  )
  np.testing.assert_allclose(loss, arrays['model_loss_fn'], rtol=1e-6)


def test_packed_goldens(shared):
  arrays = np.load(shared / 'goldens' / 'forward.npz')
  batch = as_batch(arrays, 'packed/batch/')
  factor, weights = jax.jit(
    lambda b: losses.get_loss_normalizing_factor_and_weights(
      'AVERAGE_PER_SEQUENCE', b
    )
  )(batch)
  np.testing.assert_allclose(
    weights, arrays['packed/avg_per_seq_weights'], rtol=1e-6
  )
  np.testing.assert_allclose(
    factor, arrays['packed/avg_per_seq_factor'], rtol=1e-6
  )
  loss, _, _ = loss_of(
    jnp.asarray(arrays['packed/logits']), batch, None, z_loss=1e-4
  )
  np.testing.assert_allclose(loss, arrays['packed/model_loss_fn'], rtol=1e-6)


def random_case(batch=3, length=7, vocab=11):
  keys = jax.random.split(jax.random.key(0), 3)
  logits = 4.0 * jax.random.normal(keys[0], (batch, length, vocab))
  targets = jax.random.randint(keys[1], (batch, length), 0, vocab)
  weights = jax.random.uniform(keys[2], (batch, length))
  return logits, targets, weights


@pytest.mark.parametrize(('z', 'smoothing'), SETTINGS)
def test_against_the_definition(z, smoothing):
  logits, targets, _ = random_case()

  def from_definition(logits):
    vocab = logits.shape[-1]
    q = jnp.where(
      jax.nn.one_hot(targets, vocab) > 0,
      1 - smoothing,
      smoothing / (vocab - 1),
    )
    loss = -jnp.sum(q * jax.nn.log_softmax(logits), -1)
    loss += jnp.sum(jax.scipy.special.xlogy(q, q), -1)
    return loss + z * jax.nn.logsumexp(logits, axis=-1) ** 2

  def ours(logits):
    return losses.cross_entropy_with_logits(
      logits, targets, label_smoothing=smoothing, z_loss=z
    )[0]

  def loss_and_grad(fn):
    return jax.jit(jax.grad(lambda x: (fn(x).sum(), fn(x)), has_aux=True))

  grad, loss = loss_and_grad(ours)(logits)
  expected_grad, expected = loss_and_grad(from_definition)(logits)
  np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(grad, expected_grad, atol=1e-5, rtol=1e-4)


def test_smoothed_loss_is_zero_at_the_smoothed_target():
  q = jnp.asarray([0.9, 0.05, 0.05])
  loss, _ = losses.cross_entropy_with_logits(
    jnp.log(q), jnp.asarray(0), label_smoothing=0.1
  )
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_no_gradient_through_the_reported_z_loss():
  logits, targets, _ = random_case()
  grad = jax.grad(
    lambda x: losses.cross_entropy_with_logits(x, targets, z_loss=1.0)[1].sum()
  )(logits)
  assert not np.any(grad)


def test_float32_from_bfloat16_and_precise_far_from_zero():
  logits, targets, _ = random_case()
  loss, z_loss = losses.cross_entropy_with_logits(
    logits.astype(jnp.bfloat16), targets, z_loss=1e-4
  )
  assert loss.dtype == z_loss.dtype == jnp.float32
  # Whole numbers, so that moving them by 2^16 loses nothing of the logits.
  logits = jnp.round(logits)
  near, _ = losses.cross_entropy_with_logits(logits, targets)
  far, _ = losses.cross_entropy_with_logits(logits + 65536.0, targets)
  np.testing.assert_array_equal(near, far)


def test_no_one_hot_in_the_plain_loss():
  logits, targets, _ = random_case()
  jaxpr = jax.make_jaxpr(losses.cross_entropy_with_logits)(logits, targets)
  assert 'iota' not in str(jaxpr) and ' eq ' not in str(jaxpr)


def test_target_outside_the_vocabulary_is_loud():
  logits, targets, _ = random_case()
  loss, _ = losses.cross_entropy_with_logits(logits, targets + 11)
  assert np.all(np.isnan(loss))


def test_padding_counts_without_weights_and_factor():
  logits, targets, _ = random_case()
  targets = targets.at[:, 4:].set(0)
  batch = {'decoder_target_tokens': targets}
  assert losses.get_loss_normalizing_factor_and_weights(None, batch) == (
    None,
    None,
  )
  loss, _, weight_sum = loss_of(logits, batch, None)
  token_loss, _ = losses.cross_entropy_with_logits(logits, targets)
  np.testing.assert_allclose(loss, token_loss.sum(), rtol=1e-6)
  assert weight_sum == targets.size
  # With a special factor the weights are made up from the targets.
  _, weights = losses.get_loss_normalizing_factor_and_weights(
    'NUM_REAL_TARGET_TOKENS', batch
  )
  np.testing.assert_array_equal(weights, targets > 0)


def test_average_per_sequence_packed_is_unpacked():
  logits, targets, weights = random_case(batch=2, length=4)
  targets = targets.at[0, 3].set(0)
  weights = weights.at[0, 3].set(0)
  unpacked = {
    'decoder_target_tokens': targets,
    'decoder_loss_weights': weights,
  }

  def pack(x):
    packed = jnp.concatenate([x[0, :3], x[1], jnp.zeros_like(x[0, :2])])
    return packed[None]

  packed = jax.tree.map(pack, unpacked)
  packed['decoder_segment_ids'] = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  loss = jax.jit(lambda x, batch: loss_of(x, batch, 'AVERAGE_PER_SEQUENCE')[0])
  apart = [
    loss(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], unpacked))
    for i in range(2)
  ]
  expected = np.mean(apart)
  whole = loss(logits, unpacked)
  together = loss(pack(logits), packed)
  np.testing.assert_allclose(whole, expected, rtol=1e-6)
  np.testing.assert_allclose(together, expected, rtol=1e-6)


def test_sequences_without_weight_count_for_nothing():
  weights = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  factor, new = losses.get_loss_normalizing_factor_and_weights(
    'AVERAGE_PER_SEQUENCE',
    {'decoder_target_tokens': weights, 'decoder_loss_weights': weights},
  )
  np.testing.assert_array_equal(new, [[0.5, 0.5, 0], [0, 0, 0]])
  assert factor == 1.0


def test_runs_under_vmap():
  logits, targets, weights = random_case()

  def run(logits, targets, weights):
    batch = {'decoder_target_tokens': targets, 'decoder_loss_weights': weights}
    return loss_of(logits, batch, 'AVERAGE_PER_SEQUENCE', z_loss=1e-4)

  runs = [(logits, targets, weights), (2 * logits, targets, weights**2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *runs)
  together = jax.jit(jax.vmap(run))(*stacked)
  run_alone = jax.jit(run)
  apart = jax.tree.map(lambda *x: np.stack(x), *[run_alone(*r) for r in runs])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), together, apart
  )


def test_errors():
  logits, targets, _ = random_case()
  with pytest.raises(ValueError, match='vocabulary appended'):
    # The annotations say the same under the tests' import hook.
    inspect.unwrap(losses.cross_entropy_with_logits)(logits, targets[:, :3])
  with pytest.raises(ValueError, match=r'label_smoothing must be in \[0, 1\)'):
    losses.cross_entropy_with_logits(logits, targets, label_smoothing=1.0)
  with pytest.raises(ValueError, match='Did you mean NUM_REAL_TARGET_TOKENS'):
    losses.get_loss_normalizing_factor_and_weights('NUM_REAL_TARGETS', {})
  with pytest.raises(ValueError, match='must be above 0, got 0'):
    losses.get_loss_normalizing_factor_and_weights(0, {})
