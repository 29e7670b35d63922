"""Learning rates, schedules and optimizers of their own for some parameters.

Not for how a rate changes with the step (`schedules.py`).
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax
import optax

from prompt_jax import deltas
from prompt_jax import train_state
from prompt_jax.schedules import require


@dataclasses.dataclass(frozen=True)
class Part:
  """How some of the parameters are trained.

  Attributes:
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`.
  """

  optimizer: optax.GradientTransformationExtraArgs
  learning_rate_fn: Callable[[Any], Any]


def by_part(
  parts: Mapping[str, Part],
) -> optax.GradientTransformationExtraArgs:
  """Each parameter by the part of the first pattern that matches its path.

  The learning rates are those of the parts; of the trainer's only the factor
  counts by which it scales that of a run (`learning_rate_scale`).

  Args:
    parts: pattern of whole paths, such as 'method/methods_lora/.*' -> part.

  Raises:
    ValueError: no parts; at `init`, a pattern matches nothing, or a parameter
      none of them.
  """
  if not parts:
    raise ValueError('by_part needs at least one part.')

  def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: _first(parts, path), params
    )

  def own(part: Part) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra):
      rate = part.learning_rate_fn(extra['step'])
      extra['learning_rate'] = rate * extra['learning_rate_scale']
      return part.optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(part.optimizer.init, update)

  inner = optax.partition({p: own(part) for p, part in parts.items()}, labels)

  def init(params: Any) -> Any:
    paths = list(train_state.flatten(params))
    _check_patterns(parts, paths, 'which has a part of its own')
    return inner.init(params)

  return optax.GradientTransformationExtraArgs(init, inner.update)


def _first(patterns: Mapping[str, Any], path: Any) -> str:
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  for pattern in patterns:
    if re.fullmatch(pattern, name):
      return pattern
  raise ValueError(
    f'No part trains {name!r}: there are {", ".join(map(repr, patterns))}.'
  )


def _check_patterns(
  patterns: Mapping[str, Any], paths: list[str], what: str
) -> None:
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise ValueError(
        f'No trained parameter matches {pattern!r}, {what}.'
        f'{deltas.near_misses(pattern, paths)}'
      )


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
    _check_patterns(factors, paths, 'whose learning rate is scaled')
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
