"""LoRA (Hu et al. 2021), rsLoRA and DoRA: changes of low rank in projections.

`y = (x W + c drop(x) A B) * s`, where s is 1, or in DoRA what gives the columns
of W + c A B lengths that are learned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections
from prompt_jax.network.layers import Initializer

SCALING: Mapping[str, Callable[[float, int], float]] = {
  'alpha_over_rank': lambda alpha, rank: alpha / rank,
  'alpha_over_sqrt_rank': lambda alpha, rank: alpha / rank**0.5,
  'one_over_rank': lambda alpha, rank: 1 / rank,
}


def _uniform(rng: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  bound = shape[-2] ** -0.5
  return jax.random.uniform(rng, shape, dtype, -bound, bound)


def _over_rank(rng: Any, shape: Sequence[int], dtype: Any = jnp.float32):
  return jax.random.normal(rng, shape, dtype) / shape[-1]


A_INIT: Mapping[str, Initializer] = {
  'uniform': _uniform,
  'normal': nn.initializers.normal(0.01),
  'normal_over_rank': _over_rank,
}


class LoRA(nn.Module):
  """`W + c A B` with A [D, R], B [R, E]; B starts at 0.

  With `dora` the columns of `W + c A B` are scaled to lengths m [E] of their
  own, which start at those of W:

    y = (x W + c drop(x) A B) * m / |W + c A B|

  where |.| is the length of each column and counts as constant in the
  gradient. Dropout touches the x of A alone, and no length.

  Attributes:
    rank: R, at most the smaller side of each W.
    alpha: of c; it belongs to what is learned, like A and B.
    scaling: c: 'alpha_over_rank' is LoRA's, 'alpha_over_sqrt_rank' rsLoRA's
      (updates as large at any rank), 'one_over_rank' T-Few's, without alpha.
    dropout_rate: of the x in x A, in training.
    targets: patterns of whole paths of projections.
    a_init: 'uniform' in +-1/sqrt(D) (loralib, PEFT), 'normal' of deviation
      0.01 (T-Few) or 'normal_over_rank' of 1/R (PEFT's "gaussian").
    dora: learn the lengths of columns too.
    num_tasks: G, changes kept apart; an example of task g uses those of g.

  Raises:
    ValueError: a rank or number of tasks below 1, a rank that a target cannot
      have, an alpha that is not above 0, a dropout rate outside [0, 1), an
      unknown name; a target that is not there.

  Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Kalajdzievski 2023,
  arXiv 2312.03732 (rsLoRA); Liu et al. 2024, arXiv 2402.09353, section 4
  (DoRA), all as known from the papers; checked against microsoft/LoRA
  `loralib/layers.py`, r-three/t-few `src/models/lora.py` and huggingface/peft
  `src/peft/tuners/lora/dora.py`, which in training also drops the x of
  `x W (m / |W + c A B| - 1)`.
  """

  rank: int = 8
  alpha: float = 16.0
  scaling: str = 'alpha_over_rank'
  dropout_rate: float = 0.0
  targets: str | Sequence[str] = ('.*/query', '.*/value')
  a_init: str = 'uniform'
  dora: bool = False
  num_tasks: int = 1

  def __post_init__(self):
    projections.check_whole_numbers(self, 'rank', 'num_tasks')
    _one_of('scaling', self.scaling, SCALING)
    _one_of('a_init', self.a_init, A_INIT)
    projections.as_patterns(self)
    if not isinstance(self.alpha, int | float) or not self.alpha > 0:
      raise ValueError(f'LoRA.alpha must be above 0, got {self.alpha!r}.')
    rate = self.dropout_rate
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
      raise ValueError(f'LoRA.dropout_rate must be in [0, 1), got {rate!r}.')
    super().__post_init__()

  @property
  def factor(self) -> float:
    """The constant c."""
    return SCALING[self.scaling](self.alpha, self.rank)

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays `low_rank`, and for DoRA `scale`, on the targets."""
    sites = projections.find(context, projections.as_patterns(self))
    specs: dict[str, projections.Spec] = {}
    for site in sites:
      specs |= self._specs(site, context)
    found = projections.tables(self, specs, self.num_tasks)
    out: deltas.Deltas = {}
    for site in sites:
      layers = site.shape[:-2]
      a = found[f'{site.path}/lora_a']
      b = self.factor * found[f'{site.path}/lora_b']  # so the delta has no c
      low_rank = context.route((a, b), layers)
      out[f'{site.path}/low_rank'] = deltas.Routed(
        low_rank.table, low_rank.group, self.dropout_rate
      )
      if self.dora:
        kernel = context.parameter(f'{site.path}/kernel')
        lengths = jax.lax.stop_gradient(column_lengths(kernel, a, b))
        scale = found[f'{site.path}/magnitude'] / lengths
        routed = context.route(scale, layers)
        out[f'{site.path}/scale'] = deltas.OwnScale(routed.table, routed.group)
    return out

  def _specs(
    self, site: base.Site, context: base.Context
  ) -> dict[str, projections.Spec]:
    """What is learned at one site."""
    *_, wide, width = site.shape
    *_, wide_axis, width_axis = site.axes
    if self.rank > min(wide, width):
      raise ValueError(
        f'LoRA.rank is {self.rank}, but {site.path} is a matrix of '
        f'{wide} x {width}: give it a rank of at most {min(wide, width)}.'
      )
    rank = (self.rank, 'lora_rank')
    zeros = nn.initializers.zeros
    specs: dict[str, projections.Spec] = {
      f'{site.path}/lora_a': (
        A_INIT[self.a_init],
        site,
        [(wide, wide_axis), rank],
      ),
      f'{site.path}/lora_b': (zeros, site, [rank, (width, width_axis)]),
    }
    if not self.dora:
      return specs

    def start(rng: Any, shape: Any, dtype: Any) -> Array:
      kernel = context.parameter(f'{site.path}/kernel')
      lengths = jnp.sqrt(_column_squares(kernel))
      groups = (*site.shape[:-2], self.num_tasks, width)
      return jnp.broadcast_to(lengths, groups).reshape(shape).astype(dtype)

    specs[f'{site.path}/magnitude'] = (start, site, [(width, width_axis)])
    return specs


def _one_of(field: str, value: Any, names: Mapping[str, Any]) -> None:
  if value not in names:
    raise ValueError(
      f'LoRA.{field} must be one of {", ".join(names)}, got {value!r}.'
      f'{deltas.near_misses(str(value), names)}'
    )


def _column_squares(kernel: Any) -> Float[Array, '*L 1 E']:
  return jnp.sum(jnp.square(kernel.astype(jnp.float32)), -2, keepdims=True)


def column_lengths(kernel: Any, a: Any, b: Any) -> Float[Array, '*L G E']:
  """`|W + A B|`, the length of each column.

  By `|w|^2 + 2 w.(A b) + |A b|^2`, so that no [D, E] for each group exists, and
  so that the length is that of W, digit for digit, where B is 0.

  Args:
    kernel: W, [(L,) D, E].
    a: A, [(L,) G, D, R].
    b: B, [(L,) G, R, E].
  """
  wide = kernel.astype(jnp.float32)[..., None, :, :]
  transposed = jnp.swapaxes(a, -1, -2)
  both = 2 * transposed @ wide + transposed @ a @ b
  squares = _column_squares(kernel) + jnp.sum(both * b, -2)
  # Above 0 where a column is 0, as its magnitude is.
  return jnp.sqrt(jnp.maximum(squares, 1e-30))
