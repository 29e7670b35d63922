"""Learning rate schedules against the reference's numbers."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import schedules

STEPS = np.asarray([0, 1, 99, 100, 101, 150, 250, 1000, 1_100_000], np.int32)


def test_goldens(shared):
  path = shared / 'goldens' / 'train_trajectory.json'
  recorded = json.loads(path.read_text())['learning_rate_schedules']
  assert recorded
  for name, values in recorded.items():
    match = re.fullmatch(r'(.*)\|base=(.*)\|warmup=(.*)', name)
    assert match
    schedule = schedules.create_learning_rate_scheduler(
      match[1], float(match[2]), int(match[3])
    )
    ours = jax.jit(jax.vmap(schedule))(jnp.asarray([int(s) for s in values]))
    np.testing.assert_allclose(
      ours, list(values.values()), rtol=1e-6, err_msg=name
    )


S, W = STEPS.astype(np.float64), 100


@pytest.mark.parametrize(
  ('factors', 'expected'),
  [
    ('constant', np.full(S.shape, 0.5)),
    ('constant * linear_warmup', 0.5 * np.minimum(1, S / W)),
    (
      'linear_decay',
      np.maximum(0.5 * np.minimum(S / W, 1 + 0.01 * (W - S)), 1e-8),
    ),
    ('rsqrt_decay', np.maximum(S, W) ** -0.5),
    ('rsqrt_normalized_decay*constant', 0.5 * (np.maximum(S, W) / W) ** -0.5),
    ('constant * decay_every', np.maximum(0.5 * 0.01 ** (S // 50), 1e-8)),
    (
      'cosine_decay',
      np.maximum(
        0.5 * (1 + np.cos(np.pi * (np.maximum(0, S - W) / 300 % 1))), 1e-8
      ),
    ),
  ],
)
def test_factors(factors, expected):
  schedule = schedules.create_learning_rate_scheduler(
    factors,
    0.5,
    W,
    decay_factor=0.01,
    steps_per_decay=50,
    steps_per_cycle=300,
  )
  expected = np.maximum(expected, 1e-8)
  for fn in (schedule, jax.jit(schedule)):
    rates = fn(jnp.asarray(STEPS))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
  # Python numbers, and a step before the offset.
  one = schedule(250)
  assert one.shape == () and one.dtype == jnp.float32
  moved = schedules.create_learning_rate_scheduler(
    'constant * linear_warmup', 0.5, W, step_offset=1000
  )
  np.testing.assert_allclose(moved(1050), 0.25, rtol=1e-6)
  np.testing.assert_allclose(moved(3), 1e-8, rtol=1e-6)


def test_constant():
  rate = jax.jit(schedules.constant(0.3))(7)
  assert rate.shape == () and rate.dtype == jnp.float32
  assert rate == np.float32(0.3)
  assert schedules.constant(0.0)(7) == 0


def test_errors():
  make = schedules.create_learning_rate_scheduler
  with pytest.raises(ValueError, match=r"'rsqrt' .* mean rsqrt_decay"):
    make('constant * rsqrt')
  with pytest.raises(ValueError, match='Unknown factor'):
    make('')
  with pytest.raises(ValueError, match=r'base must be .* got -0\.3'):
    schedules.constant(-0.3)
  for bad in (
    {'base_learning_rate': -1.0},
    {'base_learning_rate': float('nan')},
    {'min_learning_rate': -1.0},
    {'warmup_steps': 0},
    {'decay_factor': -0.5},
    {'steps_per_decay': 0},
    {'steps_per_cycle': 0},
  ):
    with pytest.raises(ValueError, match=f'{next(iter(bad))} must be'):
      make('constant', **bad)


def test_warmup_and_linear_decay():
  """Up in 6 of 100 steps, down in 94: by hand."""
  schedule = schedules.warmup_and_linear_decay(0.3, 100)
  steps = jnp.asarray([0, 1, 3, 6, 53, 99, 100, 1000])
  expected = [0, 0.05, 0.15, 0.3, 0.15, 0.3 / 94, 0, 0]
  for fn in (schedule, jax.jit(schedule)):
    rates = fn(steps)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)
  # Not a whole number of steps: 1.5 of 25.
  odd = schedules.warmup_and_linear_decay(0.3, 25)
  np.testing.assert_allclose(odd(1), 0.2, rtol=1e-6)
  np.testing.assert_allclose(odd(2), 0.3 * 23 / 23.5, rtol=1e-6)
  none = schedules.warmup_and_linear_decay(0.3, 10, warmup=0.0)
  np.testing.assert_allclose(none(0), 0.3, rtol=1e-6)
  np.testing.assert_allclose(none(5), 0.15, rtol=1e-6)
  # A warm-up of so many steps, however long the run is.
  steps = jnp.asarray([0, 2, 5, 6, 20])
  some = schedules.warmup_and_linear_decay(0.3, 20, warmup_steps=5)
  np.testing.assert_allclose(some(steps), [0, 0.12, 0.3, 0.28, 0], rtol=1e-6)
  # One that the run is too short for: it rises to the end.
  short = schedules.warmup_and_linear_decay(0.3, 3, warmup_steps=30)
  steps = jnp.asarray([0, 1, 2, 3])
  np.testing.assert_allclose(short(steps), [0, 0.01, 0.02, 0], rtol=1e-6)


@pytest.mark.parametrize(
  'bad',
  [
    {'base_learning_rate': -1.0},
    {'total_steps': 0},
    {'warmup': 1.0},
    {'warmup': -0.1},
    {'warmup_steps': -1},
  ],
)
def test_warmup_and_linear_decay_refuses(bad):
  values: dict[str, Any] = {'base_learning_rate': 0.3, 'total_steps': 10} | bad
  with pytest.raises(ValueError, match=f'{next(iter(bad))} must be'):
    schedules.warmup_and_linear_decay(**values)
