"""The gap to model tuning, and the size at which it closes."""

import math

import made_up_study
from made_up_study import two_sizes
import pytest

from prompt_jax.study import gap
from prompt_jax.study import results as results_lib
from prompt_jax.study import tables

PARAMETERS = list(made_up_study.SIZES.values())


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  path = tmp_path_factory.mktemp('one')
  made_up_study.write(path)
  return results_lib.load(str(path))


@pytest.fixture(scope='module')
def three_bases(tmp_path_factory):
  path = tmp_path_factory.mktemp('three')
  made_up_study.write(path, base_seeds=(0, 1, 2))
  return results_lib.load(str(path))


def test_gap_is_taken_on_each_base_seed(three_bases):
  # Prompt tuning gains two points with each base seed; model tuning does not.
  assert three_bases.gaps('soft_prompt', 'd16') == {0: 20.0, 1: 18.0, 2: 16.0}
  assert three_bases.gaps('fine_tune', 'd8') == {0: 0.0, 1: 0.0, 2: 0.0}
  row = tables.gaps(three_bases).rows[1]
  assert row[0] == 'Prompt tuning'
  assert row[2] == '18.0 (20.0, 18.0, 16.0)'
  assert row[-1] == 'on 3 of 3 pretraining seeds'


def test_gap_that_does_not_fall():
  results = two_sizes(fine_tune=(90.0, 90.0), soft_prompt=(80.0, 80.0))
  assert tables.gaps(results).rows[1][1:] == ['10.0', '10.0', 'no']


@pytest.mark.parametrize(
  ('gaps', 'size'),
  [
    ((4.0, 3.0, 2.0, 1.5), math.inf),  # not extrapolated
    ((4.0, 0.5, 0.5, 1.5), math.inf),  # open again at the largest
    ((0.5, 0.5, -3.0, 1.0), -math.inf),
    ((4.0, 3.0, 1.0, 0.0), 10_000.0),
    ((4.0, 3.0, 2.0, 0.0), 10_000 * math.sqrt(10)),
    ((3.0, 0.0, 2.0, 0.0), 10_000 * math.sqrt(10)),  # closes for good
  ],
)
def test_crossing(gaps, size):
  parameters = [100, 1_000, 10_000, 100_000]
  assert gap.crossing(parameters, gaps) == pytest.approx(size)
  assert gap.crossing(parameters[::-1], gaps[::-1]) == pytest.approx(size)


def test_closing(results):
  found = gap.closing(results, 'soft_prompt')
  # From 6 to 0.5 points: one point after 10/11 of the way.
  x, y = PARAMETERS[2:]
  assert found.size == pytest.approx(x * (y / x) ** (10 / 11))
  assert found.low < found.size < found.high
  assert found.base_seeds == 1
  assert found == gap.closing(results, 'soft_prompt')  # the same every time
  assert str(found).startswith('170,000 parameters (95% interval: 1')
  assert gap.closing(results, 'soft_prompt', tolerance=0.1).size == math.inf
  text = str(gap.closing(results, 'prompt_design'))
  assert text.startswith('not within the measured sizes (95% interval: above')


def test_interval_is_wider_with_pretraining_seeds_that_differ(
  results, three_bases
):
  one = gap.closing(results, 'soft_prompt')
  three = gap.closing(three_bases, 'soft_prompt')
  assert three.base_seeds == 3
  assert three.low < one.low


def test_no_interval_where_seeds_agree():
  results = two_sizes(fine_tune=(90.0, 90.0), soft_prompt=(80.0, 89.5))
  found = gap.closing(results, 'soft_prompt')
  assert found.low == found.high == found.size
  assert gap.closing(results, 'prompt_design') is None
