"""Learning rates of their own for some of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import learning_rates
from prompt_jax import optimizers

PARAMS: Any = {
  'method': {'prompt': jnp.ones((2, 3))},
  'network': {'logits_dense': {'kernel': jnp.ones(4)}, 'scale': jnp.ones(2)},
}
GRADS: Any = jax.tree.map(lambda x: 0.5 * x, PARAMS)


def _update(optimizer):
  state = optimizer.init(PARAMS)
  return optimizer.update(GRADS, state, PARAMS, learning_rate=0.1)[0]


def test_updates_are_multiplied():
  plain = _update(optimizers.sgd())
  factors = {'method/.*': 10.0, 'network/logits.*': 0.5, 'network/.*': 2.0}
  got = _update(learning_rates.scaled(optimizers.sgd(), factors))
  want = {
    'method': {'prompt': 10 * plain['method']['prompt']},
    'network': {
      'logits_dense': {
        'kernel': 0.5 * plain['network']['logits_dense']['kernel']
      },
      'scale': 2 * plain['network']['scale'],
    },
  }
  jax.tree.map(np.testing.assert_allclose, got, want)


def test_what_matches_nothing():
  optimizer = learning_rates.scaled(optimizers.sgd(), {'method/promt': 2.0})
  with pytest.raises(ValueError, match='method/prompt'):
    optimizer.init(PARAMS)
  with pytest.raises(ValueError, match='above 0'):
    learning_rates.scaled(optimizers.sgd(), {'.*': 0.0})


def _parts(**patterns):
  own = {
    'method': learning_rates.Part(optimizers.adafactor(), lambda step: 0.3),
    'network': learning_rates.Part(
      optimizers.sgd(), lambda step: 0.01 * (step + 1.0)
    ),
  }
  return learning_rates.by_part(
    {pattern: own[name] for name, pattern in patterns.items()}
  )


def test_each_part_is_trained_as_if_alone():
  """With its own optimizer, schedule and state; a run's scale is of all."""
  optimizer = _parts(method='method/.*', network='network/.*')
  state = optimizer.init(PARAMS)
  alone = optimizers.adafactor()
  own = alone.init(PARAMS['method'])
  for step in range(3):
    got: Any
    got, state = optimizer.update(
      GRADS,
      state,
      PARAMS,
      learning_rate=jnp.inf,
      learning_rate_scale=2.0,
      step=jnp.asarray(step),
    )
    want, own = alone.update(
      GRADS['method'], own, PARAMS['method'], learning_rate=0.6
    )
    jax.tree.map(np.testing.assert_array_equal, got['method'], want)
    rate = 2.0 * 0.01 * (step + 1)
    jax.tree.map(
      lambda u, g, r=rate: np.testing.assert_allclose(u, -r * g, rtol=1e-6),
      got['network'],
      GRADS['network'],
    )


def test_adafactor_in_a_part_starts_at_a_step():
  optimizer = _parts(method='method/.*', network='network/.*')
  state = optimizers.start_at(optimizer.init(PARAMS), 1_100_000)
  found = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, optimizers.AdafactorState)
  )
  counts = [x.count for x in found if isinstance(x, optimizers.AdafactorState)]
  assert [int(x) for x in counts] == [1_100_000]


def test_parts_cover_all_parameters_and_no_other():
  with pytest.raises(ValueError, match="No part trains 'network/"):
    _parts(method='method/.*').init(PARAMS)
  with pytest.raises(ValueError, match=r"matches 'metod/\.\*'"):
    _parts(method='metod/.*', network='.*').init(PARAMS)
  with pytest.raises(ValueError, match='at least one part'):
    learning_rates.by_part({})
