"""Learning rate schedules: pure functions from the step to a float32 rate.

For: T5X's strings of factors, a constant, T-Few's lines. They are called inside
the jitted step, so the step may be traced. Not for: scaling the rate per run,
which is the trainer's; optax's schedules can be given wherever these can.
"""

from collections.abc import Callable
import difflib

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float
import numpy as np

Schedule = Callable[[ArrayLike], Float[Array, '']]


def require(ok: bool, name: str, expected: str, got: object) -> None:
  """Raises a ValueError that says what was expected, unless `ok`."""
  if not ok:
    raise ValueError(f'{name} must be {expected}, got {got!r}.')


def _check_rate(name: str, rate: float) -> None:
  number = isinstance(rate, int | float | np.number)
  ok = number and bool(np.isfinite(rate)) and rate >= 0
  require(ok, name, 'a finite number, at least 0', rate)


def constant(base: float) -> Schedule:
  """The schedule that is `base` at every step.

  Raises:
    ValueError: `base` is negative or not finite.
  """
  _check_rate('base', base)
  return lambda step: jnp.full(jnp.shape(step), base, jnp.float32)


def warmup_and_linear_decay(
  base_learning_rate: float,
  total_steps: int,
  warmup: float = 0.06,
  warmup_steps: int | None = None,
) -> Schedule:
  """T-Few's schedule: up to the base rate in a line, and down to 0 in another.

  With T = total_steps and w = warmup * T, or warmup_steps:

    base_learning_rate * min(s / w, (T - s) / (T - w)), and 0 from T on

  Args:
    base_learning_rate: the highest.
    total_steps: T.
    warmup: share of the steps in which the rate rises; 0 for none.
    warmup_steps: their number, in place of `warmup`. Of a run that is shorter
      the rate rises to its end.

  Raises:
    ValueError: a number is out of its range.

  Source: Liu et al. 2022, arXiv 2205.05638; r-three/t-few `configs/ia3.json`
  and `src/utils/get_scheduler.py` (`linear_decay_with_warmup`).
  """
  _check_rate('base_learning_rate', base_learning_rate)
  require(total_steps >= 1, 'total_steps', 'at least 1', total_steps)
  require(0 <= warmup < 1, 'warmup', 'at least 0 and below 1', warmup)
  w = warmup * total_steps
  if warmup_steps is not None:
    require(warmup_steps >= 0, 'warmup_steps', 'at least 0', warmup_steps)
    w = warmup_steps
  fall = total_steps - w if w < total_steps else 1

  def schedule(step):
    s = jnp.asarray(step, jnp.float32)
    down = jnp.maximum(0.0, (total_steps - s) / fall)
    up = s / w if w else jnp.ones_like(s)
    return jnp.asarray(base_learning_rate, jnp.float32) * jnp.minimum(up, down)

  return schedule


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20_000,
  steps_per_cycle: int = 100_000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Schedule:
  """T5X's schedules: a product of factors, never below `min_learning_rate`.

  With s = max(0, step - step_offset) and w = warmup_steps:

    constant                 base_learning_rate
    linear_warmup            min(1, s / w)
    linear_decay             base_learning_rate
                               * min(s / w, 1 + decay_factor * (w - s))
    rsqrt_decay              1 / sqrt(max(s, w))
    rsqrt_normalized_decay   sqrt(w) / sqrt(max(s, w))
    decay_every              decay_factor ^ floor(s / steps_per_decay)
    cosine_decay             (1 + cos(pi * frac(max(0, s - w)
                               / steps_per_cycle))) / 2

  Note that `linear_decay` holds the base rate and a warm-up already, that its
  `decay_factor` is a slope per step, and that `cosine_decay` starts anew after
  `steps_per_cycle`.

  Returns:
    A function from step, traced or not, to a float32 learning rate.

  Raises:
    ValueError: a factor is unknown, or a number is out of its range.

  Source: T5X, `t5x/utils.py`.
  """
  w, base = warmup_steps, base_learning_rate
  known: dict[str, Callable[[Array], ArrayLike]] = {
    'constant': lambda s: base,
    'linear_warmup': lambda s: jnp.minimum(1.0, s / w),
    'linear_decay': lambda s: (
      base * jnp.minimum(s / w, 1.0 + decay_factor * (w - s))
    ),
    'rsqrt_decay': lambda s: 1.0 / jnp.sqrt(jnp.maximum(s, w)),
    'rsqrt_normalized_decay': lambda s: jnp.sqrt(w / jnp.maximum(s, w)),
    'decay_every': lambda s: decay_factor ** (s // steps_per_decay),
    # The remainder first: late quotients would have few digits after the dot.
    'cosine_decay': lambda s: (
      0.5
      + 0.5
      * jnp.cos(
        jnp.pi * (jnp.maximum(0.0, s - w) % steps_per_cycle / steps_per_cycle)
      )
    ),
  }
  names = [name.strip() for name in factors.split('*')]
  for name in names:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f'. Did you mean {" or ".join(near)}? It' if near else '; it'
    if name not in known:
      raise ValueError(
        f'Unknown factor {name!r} in {factors!r}{hint} must be one of '
        f'{list(known)}.'
      )
  _check_rate('base_learning_rate', base)
  _check_rate('min_learning_rate', min_learning_rate)
  require(w >= 1, 'warmup_steps', 'at least 1', w)
  require(decay_factor >= 0, 'decay_factor', 'at least 0', decay_factor)
  require(
    steps_per_decay >= 1, 'steps_per_decay', 'at least 1', steps_per_decay
  )
  require(
    steps_per_cycle >= 1, 'steps_per_cycle', 'at least 1', steps_per_cycle
  )

  def schedule(step):
    # float32 holds every step up to 2^24 exactly.
    s = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
    rate = jnp.ones_like(s)
    for name in names:
      rate *= known[name](s)
    return jnp.maximum(rate, min_learning_rate)

  return schedule
