"""What benchmarks/data.py counts and says, on rows made here."""

import importlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'benchmarks'))
# What is imported from there is no package of ours: pyright does not find it.
data: Any = importlib.import_module('data')


def batch(rows):
  """A padded batch: soft token 9, then 2 tokens of text, a target."""
  return {
    'encoder_input_tokens': np.array([[9, 3, 1, 0]] * rows),
    'decoder_target_tokens': np.array([[4, 0]] * rows),
  }


def test_soft_tokens_and_padding_are_no_tokens_of_text():
  assert data.num_tokens(batch(5), vocab_size=9) == 5 * 3


def test_rates_are_counted_without_the_first_window(monkeypatch):
  clock = iter([0, 100, *(t for i in range(9) for t in (i, i + 0.5))])
  monkeypatch.setattr(data.time, 'perf_counter', lambda: next(clock))
  # A window of 4 examples is a batch of 4; the first took 100 s.
  found = data.measure(iter([batch(4)] * 9), 4, 3, 9)
  assert found.examples == [8.0] * 3 and found.tokens == [24.0] * 3
  assert found.median == 8.0


def test_a_line_has_ratios_and_the_verdict_the_slowest():
  rates = {
    way: data.Rate([speed] * 3, [10 * speed] * 3)
    for way, speed in (
      ('cold', 50.0), ('rows', 100.0), ('cache', 400.0), ('resident', 9000.0)
    )
  }  # fmt: skip
  lines = data.rows_of('x', rates, {'tiny': 200.0})
  assert [line['from'] for line in lines] == list(rates)
  assert lines[2] == {
    'layout': 'x', 'from': 'cache', 'examples / s': '400 (400 to 400)',
    'tokens / s': '4,000', 'times cold': '8.00', 'times tiny': '2.0',
  }  # fmt: skip
  said = data.verdict('x', rates, {'tiny': 200.0})
  assert 'take tiny 200' in said and 'DOES NOT OUTRUN them from rows' in said
  assert 'pipeline outruns' in data.verdict('x', rates, {'tiny': 99.0})


def test_without_data_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PROMPT_JAX_SHARED', str(tmp_path))
  assert data.main(['--quick']) == 1
  said = capsys.readouterr().out
  assert f'No data: there is no {tmp_path}' in said
  assert 'PROMPT_JAX_SHARED names' in said


@pytest.mark.slow
def test_it_runs(shared, capsys):
  del shared  # skips where it is not
  arguments = ['--quick', '--texts', 'SST-2', '--rows', '300']
  assert data.main(arguments) == 0
  said = capsys.readouterr().out
  assert (
    'SST-2: 300 rows' in said and '| SST-2, packed into 256 | cache' in said
  )
