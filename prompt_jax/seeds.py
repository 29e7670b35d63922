"""Scores over seeds: mean and deviation, and whether two methods differ.

    print(seeds.compare({13: 71.2, 21: 69.0}, {13: 66.1, 21: 68.2}))

`prompt-jax compare_seeds` reads the scores from runs.

Seeds are pairs: both methods have seen the same rows under each. With five of
them an exact test of ranks or signs cannot give a two-sided p below 2 / 2^5 =
0.0625, which `compare` says.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from scipy import stats

TESTS = ('t', 'permutation', 'wilcoxon')


@dataclasses.dataclass(frozen=True)
class Spread:
  """Scores of one method.

  Attributes:
    n: seeds.
    mean: over seeds.
    deviation: of the sample, with n - 1; nan for one seed.
  """

  n: int
  mean: float
  deviation: float

  def __str__(self) -> str:
    return f'{self.mean:.2f} +- {self.deviation:.2f} (n = {self.n})'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two methods over the same seeds.

  Attributes:
    a: the first.
    b: the second.
    difference: mean of a - b.
    p: two-sided, of the null that both are alike.
    test: which.
    least_p: the smallest p that the test can give with so many seeds.
  """

  a: Spread
  b: Spread
  difference: float
  p: float
  test: str
  least_p: float

  def __str__(self) -> str:
    bound = f'; it cannot be below {self.least_p:.3g}' if self.least_p else ''
    return (
      f'A {self.a}, B {self.b}: A - B = {self.difference:+.2f}, '
      f'p = {self.p:.3g} ({self.test}, paired, two-sided{bound})'
    )


def spread(scores: Sequence[float]) -> Spread:
  """Mean and deviation.

  Raises:
    ValueError: no scores, or one that is nan.
  """
  if not len(scores) or np.isnan(scores).any():
    raise ValueError(f'Expected scores that are numbers, got {list(scores)}.')
  deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else np.nan
  return Spread(len(scores), float(np.mean(scores)), deviation)


def compare(
  a: Mapping[int, float], b: Mapping[int, float], test: str = 'permutation'
) -> Comparison:
  """A paired test of a against b.

  Args:
    a: seed -> score.
    b: the same seeds.
    test: 't', Student's of the differences; 'permutation', of their mean under
      all changes of signs (10,000 draws above 13 seeds); 'wilcoxon', signed
      ranks.

  Raises:
    ValueError: other seeds, fewer than two, or an unknown test.
  """
  if test not in TESTS:
    raise ValueError(f'test must be one of {", ".join(TESTS)}, got {test!r}.')
  only = sorted(set(a) ^ set(b))
  if only:
    raise ValueError(
      f'A paired test needs the same seeds: only one of both has {only}.'
    )
  if len(a) < 2:
    raise ValueError(f'A test needs two seeds or more, got {len(a)}.')
  seeds = sorted(a)
  x, y = (np.array([s[seed] for seed in seeds], float) for s in (a, b))
  one, other = spread(list(x)), spread(list(y))
  least = 2.0 ** (1 - len(seeds))
  if np.ptp(x - y) == 0:  # no spread: no test says more
    p = 1.0 if x[0] == y[0] else (0.0 if test == 't' else least)
  elif test == 't':
    p = float(stats.ttest_rel(x, y).pvalue)
  elif test == 'wilcoxon':
    ranks: Any = stats.wilcoxon(x, y)
    p = float(ranks.pvalue)
  else:
    found: Any = stats.permutation_test(
      (x, y),
      lambda x, y, axis: np.mean(x - y, axis=axis),
      permutation_type='samples',
      n_resamples=10_000,
      rng=np.random.default_rng(0),
    )
    p = float(found.pvalue)
  return Comparison(
    one, other, float(np.mean(x - y)), p, test, 0.0 if test == 't' else least
  )


def compare_runs(
  result: Sequence[str],
  reference: Sequence[str],
  metric: str = 'rank_accuracy',
  split: str = 'validation',
  test: str = 'permutation',
) -> dict[str, Comparison]:
  """`prompt-jax compare_seeds`: prints the comparison of each task.

  Args:
    result: SEED=PATH of the first method, a run or a file of `prompt-jax eval`.
    reference: the same of the other.
    metric: that both have.
    split: of runs.
    test: as `compare`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a text that is no SEED=PATH, a seed twice, a file without the
      metric, one that has other tasks, or as `compare`.
  """
  a, b = (_by_task(texts, metric, split) for texts in (result, reference))
  if set(a) != set(b):
    raise ValueError(
      f'The results have the tasks {sorted(a)}, the references {sorted(b)}.'
    )
  out = {task: compare(a[task], b[task], test) for task in a}
  for task, found in out.items():
    print(f'{task}, {metric}: {found}')
  return out


def _by_task(
  texts: Sequence[str], metric: str, split: str
) -> dict[str, dict[int, float]]:
  """Task -> seed -> score."""
  from prompt_jax import recovery

  out: dict[str, dict[int, float]] = {}
  for text in texts:
    seed, equals, path = text.partition('=')
    if not (seed.isdigit() and equals and path):
      raise ValueError(f'Expected SEED=PATH, as in 13=RUN, got {text!r}.')
    for task, score in recovery.read_scores([path], metric, split).items():
      if int(seed) in out.setdefault(task, {}):
        raise ValueError(f'Seed {seed} of {task} is there twice: {text!r}.')
      out[task][int(seed)] = score
  return out
