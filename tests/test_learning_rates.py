"""Learning rates of their own for some of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import learning_rates
from prompt_jax import optimizers

PARAMS = {
  'method': {'prompt': jnp.ones((2, 3))},
  'network': {'logits_dense': {'kernel': jnp.ones(4)}, 'scale': jnp.ones(2)},
}
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)


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
