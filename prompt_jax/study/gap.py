"""At what size the gap between a method and model tuning closes.

The rule: between two neighbouring sizes the gap is taken to be a straight line
in the logarithm of the non-embedding parameters; the gap closes where that line
falls to the tolerance for the last time, so that it stays closed at all larger
measured sizes. Nothing is extrapolated: where the gap is still open at the
largest size, the answer is that it does not close within the measured sizes.

The interval is that of a bootstrap over seeds. What a seed decides is drawn
together: a pretraining seed for all sizes and methods (it may also decide the
data), and below it tuning seeds for each size and method by themselves. With
one pretraining seed the interval covers tuning only, and is too narrow.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np

from prompt_jax.study import results as results_lib

Values = Mapping[int, Sequence[float]]  # by pretraining seed: tuning seeds

TOLERANCE = 1.0  # points of the metric (0..100)
_DRAWS = 2000
_COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Closing:
  """Where a gap closes, in non-embedding parameters.

  -inf says that it is closed from the smallest measured size on, inf that it
  is still open at the largest.
  """

  size: float
  low: float  # of the interval
  high: float
  base_seeds: int
  smallest: float  # measured
  largest: float
  tolerance: float = TOLERANCE

  def __str__(self) -> str:
    if self.size == math.inf:
      text = 'not within the measured sizes'
    elif self.size == -math.inf:
      text = f'closed at the smallest size ({self.smallest:,.0f}) already'
    else:
      text = f'{_rounded(self.size)} parameters'
    return f'{text} ({_COVERAGE:.0%} interval: {self._interval()})'

  def _interval(self) -> str:
    if self.low == self.high == math.inf:
      return f'above {self.largest:,.0f}'
    if self.low == self.high == -math.inf:
      return f'at most {self.smallest:,.0f}'
    low = 'below the smallest' if self.low == -math.inf else _rounded(self.low)
    high = 'above the largest' if self.high == math.inf else _rounded(self.high)
    return f'{low} to {high}'


def _rounded(size: float) -> str:
  """Two digits say enough of an estimate.

  >>> _rounded(56234.0)
  '56,000'
  """
  return f'{float(f"{size:.2g}"):,.0f}'


def crossing(
  parameters: Sequence[float],
  gaps: Sequence[float],
  tolerance: float = TOLERANCE,
) -> float:
  """The size from which on the gap is at most the tolerance.

  >>> round(crossing([100, 10_000], [3.0, 0.0], tolerance=1.5))
  1000

  Args:
    parameters: of the sizes, in any order; positive.
    gaps: at these sizes, in points of the metric.
    tolerance: below which a gap counts as closed.

  Returns:
    Parameters; -inf where it is closed at every size, inf where it is open at
    the largest.
  """
  order = np.argsort(parameters)
  x = np.log(np.asarray(parameters, float)[order])
  y = np.asarray(gaps, float)[order]
  is_open = np.flatnonzero(~(y <= tolerance))  # NaN is open
  if not len(is_open):
    return -math.inf
  i = int(is_open[-1])
  if i == len(y) - 1:
    return math.inf
  share = (y[i] - tolerance) / (y[i] - y[i + 1])
  return float(np.exp(x[i] + share * (x[i + 1] - x[i])))


def closing(
  results: results_lib.Results,
  method: str,
  task: str | None = None,
  tolerance: float = TOLERANCE,
  draws: int = _DRAWS,
) -> Closing | None:
  """Where a method's gap to the reference method closes.

  Args:
    results: of the study.
    method: name.
    task: name, or None for the mean over tasks.
    tolerance: points of the metric.
    draws: of the bootstrap.

  Returns:
    None where fewer than two sizes have both methods, or no pretraining seed
    has all of them; only pretraining seeds that do are used.
  """
  reference = results.study.reference_method
  parameters: list[float] = []
  pairs: list[tuple[Values, Values]] = []
  for size in results.study.sizes:
    a, b = (results.score(m, size, task) for m in (reference, method))
    count = results.budget(method, size).get('non_embedding')
    if a is not None and b is not None and count:
      pairs.append((a.by_base(), b.by_base()))
      parameters.append(count)
  if len(pairs) < 2:
    return None
  bases = sorted(set.intersection(*({*a} & {*b} for a, b in pairs)))
  if not bases:
    return None
  observed = [
    float(np.mean([np.mean(a[s]) - np.mean(b[s]) for s in bases]))
    for a, b in pairs
  ]
  drawn = _draw(pairs, bases, draws)
  found = [crossing(parameters, gaps, tolerance) for gaps in drawn]
  tail = (1 - _COVERAGE) / 2
  # Not interpolated: between a size and infinity there is nothing.
  low, high = np.quantile(found, [tail, 1 - tail], method='inverted_cdf')
  return Closing(
    size=crossing(parameters, observed, tolerance),
    low=float(low),
    high=float(high),
    base_seeds=len(bases),
    smallest=min(parameters),
    largest=max(parameters),
    tolerance=tolerance,
  )


def _draw(
  pairs: Sequence[tuple[Values, Values]], bases: Sequence[int], draws: int
) -> np.ndarray:
  """Gaps [draws, sizes] of resampled studies, always the same ones."""
  rng = np.random.default_rng(0)
  slots = len(bases)
  picked = rng.integers(slots, size=(draws, slots))  # for all sizes

  def means(values: Values) -> np.ndarray:
    """Resampled tuning seeds of the picked pretraining seeds: [draws]."""
    resampled = np.stack(
      [
        rng.choice(values[base], (draws, slots, len(values[base]))).mean(-1)
        for base in bases
      ],
      axis=-1,
    )  # [draws, slots, bases]: seeds picked twice are resampled twice
    return np.take_along_axis(resampled, picked[..., None], -1).mean((1, 2))

  return np.stack([means(a) - means(b) for a, b in pairs], axis=-1)
