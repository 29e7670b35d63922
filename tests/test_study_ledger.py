"""The ledger of a study: whole lines only, whoever writes and is killed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from prompt_jax.study import ledger as ledger_lib
from prompt_jax.study.ledger import Ledger
from prompt_jax.study.ledger import LedgerError


def record(key='a', status='done', accuracy=90.0, **fields):
  return {
    'key': key,
    'stage': 'tune',
    'status': status,
    'error': None if status == 'done' else 'it burnt',
    'metrics': {'test': {'rank_accuracy': accuracy}},
    'cost': {'train_seconds': 1.0},
    'origin': {'base': 'b', 'time': 't', 'versions': {'jax': '1'}},
    **fields,
  }


@pytest.fixture
def ledger(tmp_path):
  return Ledger(tmp_path / 'study' / 'results.jsonl')


def test_no_file_is_an_empty_ledger(ledger):
  assert ledger.read() == [] and ledger.latest() == {}
  ledger.append([])
  assert not ledger.path.exists()


def test_reads_what_was_appended_in_order(ledger):
  ledger.append([record('a'), record('b')])
  ledger.append([record('c\n', note='é\u2028')])
  assert [r['key'] for r in ledger.read()] == ['a', 'b', 'c\n']
  assert ledger.read()[2]['note'] == 'é\u2028'
  assert len(ledger.path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    ([1], 'an object was expected, got list'),
    ({'status': 'done'}, "'key' is to be a string, got None"),
    ({'key': 'a', 'status': 'ok'}, "got 'ok'"),
  ],
)
def test_what_is_no_record_is_not_written(ledger, bad, message):
  with pytest.raises(LedgerError, match=message):
    ledger.append([record(), bad])
  assert ledger.read() == []


# ---- cut off, or malformed ---------------------------------------------------


@pytest.mark.parametrize('cut', [1, 17, -2])
def test_half_a_last_line_is_left_out_and_swallows_nothing(ledger, cut, caplog):
  ledger.append([record('a'), record('b')])
  whole = ledger.path.read_bytes()
  first = whole.index(b'\n') + 1
  half = whole[: first + cut] if cut > 0 else whole[:cut]
  ledger.path.write_bytes(half)
  with caplog.at_level('WARNING'):
    assert [r['key'] for r in ledger.read()] == ['a']
  assert 'line 2 is cut off' in caplog.text
  assert ledger.path.read_bytes() == half  # a reader changes nothing
  ledger.append([record('c')])
  assert [r['key'] for r in ledger.read()] == ['a', 'c']


def test_line_that_lacks_only_its_newline_is_kept(ledger):
  ledger.append([record('a'), record('b')])
  ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
  assert [r['key'] for r in ledger.read()] == ['a', 'b']
  ledger.append([record('c')])
  assert [r['key'] for r in ledger.read()] == ['a', 'b', 'c']


def test_long_line_that_is_cut_off(ledger):
  ledger.append([record('a'), record('b', note='x' * 200_000)])
  ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
  ledger.append([record('c')])
  assert [r['key'] for r in ledger.read()] == ['a', 'c']


@pytest.mark.parametrize('line', [b'{"key": "b", ', b'\0\0\0', b'\xff', b'[1]'])
def test_malformed_line_in_the_middle_is_named(ledger, line):
  ledger.append([record('a')])
  text = ledger.path.read_bytes()
  ledger.path.write_bytes(text + line + b'\n' + text)
  with pytest.raises(LedgerError, match=r'Line 2 of .*results\.jsonl'):
    ledger.read()


# ---- which record counts -----------------------------------------------------


@pytest.mark.parametrize('order', [('failed', 'done'), ('done', 'failed')])
def test_done_beats_failed(ledger, order):
  ledger.append([record(status=status) for status in order])
  assert ledger.latest()['a']['status'] == 'done'


def test_last_failure_counts(ledger):
  ledger.append([record(status='failed', error=e) for e in ('x', 'y')])
  assert ledger.latest()['a']['error'] == 'y'


def test_same_result_twice(ledger):
  other = {'base': 'b', 'time': 'later', 'versions': {'jax': '2'}}
  again = record(cost={'train_seconds': 9.0}, origin={**other, 'device': 'x'})
  ledger.append([record(accuracy=float('nan')), record('b')])
  ledger.append([{**again, 'metrics': ledger.read()[0]['metrics']}])
  assert list(ledger.latest()) == ['a', 'b']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'accuracy': 91.5}, r'metrics\.test\.rank_accuracy: 90\.0 and 91\.5'),
    ({'origin': {'base': 'c'}}, r'origin\.base: "b" and "c"'),
    ({'extra': 1}, r'extra: absent and 1'),
  ],
)
def test_different_results_of_one_cell(ledger, change, message):
  ledger.append([record('b'), record(), record(**change)])
  with pytest.raises(LedgerError, match=message) as e:
    ledger.latest()
  assert 'Lines 2 and 3' in str(e.value)


# ---- a disk that is full -----------------------------------------------------


def test_full_disk_loses_nothing(ledger, monkeypatch):
  ledger.append([record('a')])
  before = ledger.path.read_bytes()
  write = os.write
  monkeypatch.setattr(os, 'write', lambda f, data: write(f, data[:20]))
  with pytest.raises(LedgerError, match='20 of .* bytes .* free some space'):
    ledger.append([record('b')])
  assert ledger.path.read_bytes() == before

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'write', write)
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(LedgerError, match='No space left on device'):
    ledger.append([record('b')])
  assert ledger.path.read_bytes() == before
  monkeypatch.undo()
  ledger.append([record('b')])
  assert [r['key'] for r in ledger.read()] == ['a', 'b']


def test_limit_on_the_file_size_is_a_full_disk(ledger):
  """A real short write: the kernel stops at RLIMIT_FSIZE."""
  ledger.append([record('a')])
  before = ledger.path.read_bytes()
  code = (
    'import resource, signal, sys\n'
    'from prompt_jax.study.ledger import Ledger, LedgerError\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    f'resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 50},) * 2)\n'
    'try:\n'
    "  Ledger(sys.argv[1]).append([{'key': 'b' * 99, 'status': 'done'}])\n"
    'except LedgerError as e:\n'
    '  print(e)\n'
  )
  ran = subprocess.run(
    [sys.executable, '-c', code, str(ledger.path)],
    capture_output=True,
    text=True,
  )
  assert 'only 50 of' in ran.stdout, ran
  assert ledger.path.read_bytes() == before


def test_place_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(LedgerError, match='could not be written'):
    Ledger(tmp_path / 'file' / 'results.jsonl').append([record()])
  (tmp_path / 'folder').mkdir()
  with pytest.raises(LedgerError, match='could not be read'):
    Ledger(tmp_path / 'folder').read()


# ---- several processes -------------------------------------------------------


WRITER = """
import sys
from prompt_jax.study.ledger import Ledger
path, name, count, size = sys.argv[1:]
book = Ledger(path)
for i in range(int(count)):
  book.append([
    {'key': f'{name}.{i}.{j}', 'status': 'done', 'x': name * int(size)}
    for j in range(2)
  ])
  print(i, flush=True)
"""


def start(path, name, count, size):
  """A process that says which appends have returned."""
  arguments = [str(x) for x in (path, name, count, size)]
  return subprocess.Popen(
    [sys.executable, '-c', WRITER, *arguments],
    stdout=subprocess.PIPE,
    text=True,
  )


def appended(name, count):
  return [f'{name}.{i}.{j}' for i in range(count) for j in range(2)]


def test_several_writers_at_once(ledger):
  writers = [start(ledger.path, name, 40, 5000) for name in 'xyz']
  while any(writer.poll() is None for writer in writers):
    ledger.read()  # at any moment, whole lines only
  keys = [r['key'] for r in ledger.read()]
  for name, writer in zip('xyz', writers, strict=True):
    writer.communicate()
    assert writer.returncode == 0
    assert [k for k in keys if k[0] == name] == appended(name, 40)


def test_writers_killed_at_random_moments(ledger):
  """Whatever was acknowledged is there, and what is there is whole."""
  rng = random.Random(0)
  said = {}
  for round_ in 'abcd':
    names = [f'{round_}{side}' for side in '12']
    writers = [start(ledger.path, name, 10**6, 500_000) for name in names]
    for writer in writers:
      assert writer.stdout is not None
      writer.stdout.readline()  # it has begun
    for name, writer in zip(names, writers, strict=True):
      time.sleep(rng.random() / 20)
      writer.send_signal(signal.SIGKILL)
      out, _ = writer.communicate()
      whole = out.split('\n')[:-1]
      said[name] = 1 + (int(whole[-1]) if whole else 0)
  ledger.append([record('last')])
  keys = [r['key'] for r in ledger.read()]
  assert keys[-1] == 'last'
  for name, count in said.items():
    own = [k for k in keys if k.startswith(name)]
    # One append may have begun, in part too, that was not acknowledged.
    assert 2 * count <= len(own) <= 2 * count + 2
    assert own == appended(name, count + 1)[: len(own)]


def test_flatten_and_deterministic():
  assert ledger_lib.flatten(json.loads('{"a": {"b": [1], "c": {}}}')) == {
    'a.b': [1]
  }
  found = ledger_lib.deterministic(record())
  assert 'origin.base' in found
  assert not {k for k in found if k.startswith('cost')}
  assert not {'origin.time', 'origin.versions.jax'} & found.keys()
