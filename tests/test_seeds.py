"""Statistics over seeds, against values by hand."""

import math

import pytest

from prompt_jax import seeds

A = {13: 70.0, 21: 72.0, 42: 74.0, 87: 71.0, 100: 73.0}
B = {13: 69.0, 21: 70.0, 42: 71.0, 87: 67.0, 100: 68.0}


def test_spread_by_hand():
  s = seeds.spread([1.0, 2.0, 3.0, 6.0])
  assert (s.n, s.mean) == (4, 3.0)
  assert s.deviation == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3))
  assert math.isnan(seeds.spread([1.0]).deviation)
  with pytest.raises(ValueError, match='are numbers'):
    seeds.spread([1.0, float('nan')])


def test_paired_tests_by_hand():
  # Differences 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t = 3 sqrt(2), and
  # with 4 degrees of freedom p = 0.0132. All signs alike: 2 of 2^5 changes of
  # signs are as extreme, and of the ranks as well.
  for test, p in (('t', 0.013236), ('permutation', 2 / 32),
                  ('wilcoxon', 2 / 32)):  # fmt: skip
    found = seeds.compare(A, B, test)
    assert found.difference == pytest.approx(3.0)
    assert found.p == pytest.approx(p, abs=1e-5)
  assert 'cannot be below 0.0625' in str(seeds.compare(A, B))
  assert 'A - B = +3.00' in str(seeds.compare(A, B))


def test_pairs_go_by_seed_and_not_by_order():
  turned = dict(reversed(B.items()))
  assert seeds.compare(A, turned) == seeds.compare(A, B)


def test_no_difference_is_no_evidence():
  for test in seeds.TESTS:
    assert seeds.compare(A, A, test).p == 1.0


def test_refuses():
  with pytest.raises(ValueError, match=r'only one of both has \[7, 13\]'):
    seeds.compare({13: 1.0, 21: 2.0}, {7: 1.0, 21: 2.0})
  with pytest.raises(ValueError, match='two seeds or more'):
    seeds.compare({13: 1.0}, {13: 2.0})
  with pytest.raises(ValueError, match='must be one of t, permutation'):
    seeds.compare(A, B, 'z')
