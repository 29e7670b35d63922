"""Learning rates of their own for some of the parameters.

Not for rates that change with the step (`schedules.py`).
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import optax

from prompt_jax import deltas
from prompt_jax import train_state
from prompt_jax.schedules import require


def scaled(
  optimizer: optax.GradientTransformationExtraArgs,
  factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
  """An optimizer that multiplies the learning rate of some parameters.

  The update of a parameter is multiplied by the factor of the first pattern
  that matches its whole path, 'method/prompt' or
  'network/token_embedder/embedding'; by 1 if none does. An update that does not
  depend on the rate, as Adafactor's weight decay, is multiplied too.

  Args:
    optimizer: from `optimizers`.
    factors: pattern -> factor, above 0.

  Raises:
    ValueError: a factor is not above 0; at `init`, a pattern matches nothing.
  """
  for pattern, factor in factors.items():
    require(factor > 0, f'the factor of {pattern!r}', 'above 0', factor)

  def init(params: Any) -> Any:
    paths = list(train_state.flatten(params))
    for pattern in factors:
      if not any(re.fullmatch(pattern, path) for path in paths):
        raise ValueError(
          f'No trained parameter matches {pattern!r}, whose learning rate is '
          f'scaled.{deltas.near_misses(pattern, paths)}'
        )
    return optimizer.init(params)

  def update(
    updates: Any, state: Any, params: Any = None, **kwargs: Any
  ) -> Any:
    updates, state = optimizer.update(updates, state, params, **kwargs)

    def scale(path: Any, x: Any) -> Any:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      for pattern, factor in factors.items():
        if re.fullmatch(pattern, name):
          return x * factor
      return x

    return jax.tree_util.tree_map_with_path(scale, updates), state

  return optax.GradientTransformationExtraArgs(init, update)
