"""Compacter (Karimi Mahabadi et al. 2021): adapters of Kronecker products."""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_jax import deltas
from prompt_jax.methods import adapters
from prompt_jax.methods import base
from prompt_jax.network import layers


def kronecker_sum(
  rule: Float[Array, '... n n n'],
  left: Float[Array, '... n i R'],
  right: Float[Array, '... n R o'],
) -> Float[Array, '... ni no']:
  """`sum_i rule_i kron (left_i right_i)`; leading axes broadcast."""
  w = jnp.einsum('...iab,...icr,...ird->...acbd', rule, left, right)
  *lead, a, c, b, d = w.shape
  return w.reshape(*lead, a * c, b * d)


def _glorot_uniform(rng: Any, shape: Sequence[int], dtype: Any) -> Any:
  """Uniform in +-sqrt(12 / (fan in + fan out)): Glorot's, with gain sqrt(2)."""
  bound = math.sqrt(12 / (shape[-2] + shape[-1]))
  return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)


class Compacter(nn.Module):
  """Adapters after sublayers whose projections are sums of Kronecker products.

  `z` becomes `z + f(z W_d + a) W_u + b`, where each of W_d [D, m] and
  W_u [m, D] is

    W = sum_i A_i kron (S_i T_i),  i = 1, ..., n

  The "slow" A_i [n, n] are shared by both projections of all adapters; the
  "fast" S_i [D/n, R], T_i [R, m/n] (and S_i [m/n, R], T_i [R, D/n] on the way
  up) are each projection's own. W is made anew in each step, with all its
  D x m numbers.

  Trained: `phm_rule` [(G,) n, n, n]; and at the sublayer's path `down_left`,
  `down_right`, `up_left`, `up_right` (S and T above), `down_bias` (a) and
  `up_bias` (b), with leading axes (L,) of scanned layers and (G,) of tasks:
  n^3 numbers a task, and 2 R (D + m) + m + D a layer and task.

  Attributes:
    phm_dim: n; D and m must be multiples of it.
    reduction_factor: m is D // reduction_factor.
    phm_rank: R.
    targets: patterns of whole paths of sublayers; the default, self-attentions
      and feed-forward blocks, is Compacter's. Compacter++ has '.*/mlp' alone.
    activation: f, a name of `deltas.ACTIVATIONS`.
    phm_init_range: deviation of the normal distribution of the A_i at the
      start. S and T start in +-sqrt(12 / (rows + columns)), biases at 0. At
      1e-4 an adapter then adds some 1e-8 of z's size: rounding.
    num_tasks: G, tasks with an adapter and A_i of their own.

  Raises:
    ValueError: a field out of its range; a target that matches no sublayer; D
      or m that is no multiple of n.

  Source: Karimi Mahabadi et al. 2021, arXiv 2106.04647; checked against
  rabeehk/compacter `seq2seq/hypercomplex/layers.py` (order of the products,
  initial S and T), `seq2seq/third_party/models/t5/modeling_t5.py` (what is
  shared, initial A, sites) and `seq2seq/configs/compacter.json` (sizes,
  deviation, activation). With the layer norms of T5 base these are the 0.047%
  of all parameters in the paper's abstract (Compacter++) and its 0.073%
  (Compacter), which, like the symbols here, is as known from the paper, not
  confirmed in its text.
  """

  phm_dim: int = 4
  reduction_factor: int = 32
  phm_rank: int = 1
  targets: Sequence[str] = adapters.HOULSBY
  activation: str = 'gelu'
  phm_init_range: float = 1e-4
  num_tasks: int = 1

  def __post_init__(self):
    adapters.check_fields(self, 'phm_dim', 'reduction_factor', 'phm_rank')
    deviation = self.phm_init_range
    number = isinstance(deviation, int | float) and math.isfinite(deviation)
    if not number or deviation <= 0:
      raise ValueError(
        'Compacter.phm_init_range must be a finite number above 0 (with A at '
        f'0 no gradient would reach S and T), got {deviation!r}.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays an adapter on each target."""
    make = functools.partial(self._adapter, self._rule())
    return adapters.lay(self, context, 'bottleneck', self._specs, make)

  def _adapter(
    self, rule: Any, down_bias: Any, up_bias: Any, **factors: Any
  ) -> deltas.Adapter:
    down, up = (
      kronecker_sum(rule, factors[f'{way}_left'], factors[f'{way}_right'])
      for way in ('down', 'up')
    )
    return deltas.Adapter(down, down_bias, up, up_bias, self.activation)

  def _rule(self) -> Any:
    """The A_i of each task, [G, n, n, n]."""
    n = self.phm_dim
    shape: tuple[int, ...] = (n, n, n)
    axes: tuple[str | None, ...] = (None, None, None)
    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
    init = nn.initializers.normal(self.phm_init_range)
    rule = layers.param(self, 'phm_rule', init, shape, axes)
    return rule.reshape(-1, n, n, n)

  def _specs(self, width: int) -> Mapping[str, adapters.Spec]:
    n, rank, mid = self.phm_dim, self.phm_rank, width // self.reduction_factor
    if not mid or mid % n or width % n:
      raise ValueError(
        f'Compacter splits the width {width} and the bottleneck {width} // '
        f'{self.reduction_factor} = {mid} in {n} parts each, so both must be '
        'multiples of phm_dim above 0: choose another phm_dim or '
        'reduction_factor.'
      )
    zeros = nn.initializers.zeros
    terms, r = (n, None), (rank, 'rank')
    d, m = (width // n, None), (mid // n, None)
    return {
      'down_left': (_glorot_uniform, terms, d, r),
      'down_right': (_glorot_uniform, terms, r, m),
      'down_bias': (zeros, (mid, 'adapter_mid')),
      'up_left': (_glorot_uniform, terms, m, r),
      'up_right': (_glorot_uniform, terms, r, d),
      'up_bias': (zeros, (width, 'embed')),
    }
