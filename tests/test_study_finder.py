"""The learning-rate finder: its rule, its files, and runs without labels."""

import json
import math

import commands
import numpy as np
import pytest
import runs

from prompt_jax import cli
from prompt_jax import evaluation
from prompt_jax import schedules
from prompt_jax.study import finder
from prompt_jax.study.finder import Trial

CONFIG = evaluation.EvalConfig(batch_size=21, decode=False)
UNTRAINED = Trial(0.0, 10.0, 50.0)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  runs.write_data(folder)
  return folder


def trials(losses, metrics=None):
  rates = finder.grid(0.1, 4, 1)
  metrics = metrics or [None] * len(rates)
  return [Trial(*x) for x in zip(rates, losses, metrics, strict=True)]


# ---- the rule ----------------------------------------------------------------


def test_grid():
  found = finder.grid(0.3, 4.0, 2)
  assert len(found) == 9 and found[4] == 0.3
  assert found[0] == 0.003 and found[-1] == 30.0
  ratios = np.diff(np.log10(found))
  np.testing.assert_allclose(ratios, 0.5, atol=1e-3)


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    ((0.0, 4, 2), 'LEARNING_RATE must be a number above 0'),
    ((None, 4, 2), 'LEARNING_RATE must be a number above 0'),
    ((0.3, 0.5, 2), 'DECADES = 0.5 with RATES_PER_DECADE = 2 is no grid'),
  ],
)
def test_no_grid(args, said):
  with pytest.raises(ValueError, match=said):
    finder.grid(*args)


@pytest.mark.parametrize(
  ('losses', 'metrics', 'rate', 'plateau', 'chosen_by'),
  [
    # One rate stands out.
    ([9, 8, 5, 6, 9], [50, 60, 80, 70, 50], 0.1, (0.1, 0.1), 'accuracy'),
    # The middle of three, though neither loss nor metric is best there.
    ([9, 4, 5, 4, 9], [50, 80, 79.5, 79, 50], 0.1, (0.01, 1), 'accuracy'),
    # Of two in the middle the lower loss.
    ([9, 4, 3, 8, 9], [50, 80, 80, 70, 50], 0.1, (0.01, 0.1), 'accuracy'),
    ([9, 3, 4, 8, 9], [50, 80, 80, 70, 50], 0.01, (0.01, 0.1), 'accuracy'),
    # A plateau has no holes, nor rates that are worse than no training.
    ([9, 4, 8, 4.1, 9], [50, 80, 70, 80, 50], 0.01, (0.01, 0.01), 'accuracy'),
    ([9, 5, 4, 99, 9], [50, 60, 80, 99, 50], 0.1, (0.1, 0.1), 'accuracy'),
    ([9, 5, 4, None, 9], [50, 60, 80, None, 50], 0.1, (0.1, 0.1), 'accuracy'),
    # A small gain may be chance.
    ([9, 8, 7, 2, 9], [54, 50, 50, 50, 50], 1, (1, 1), 'loss'),
    ([9, 8, 7, 2, 9], None, 1, (1, 1), 'loss'),
  ],
)
def test_rule(losses, metrics, rate, plateau, chosen_by):
  found = finder.suggest(trials(losses, metrics), UNTRAINED, 'accuracy')
  assert (found.rate, found.plateau) == (rate, plateau)
  assert found.chosen_by == chosen_by
  assert f'--gin.LEARNING_RATE={rate:g}' in found.text
  assert 'widen' not in found.text


@pytest.mark.parametrize(
  ('losses', 'end'),
  [([2, 8, 9, 9, 9], 'lowest'), ([9, 9, 8, 2.1, 2], 'highest')],
)
def test_end_of_the_grid(losses, end):
  text = finder.suggest(trials(losses), UNTRAINED, 'accuracy').text
  assert f'reaches the {end} rate of the grid: widen it' in text
  assert text.count('widen') == 1


def test_nothing_is_better_than_no_training():
  found = finder.suggest(trials([10, 11, 12, None, None]), UNTRAINED, 'x')
  assert found.rate is None and found.plateau is None
  assert found.text.startswith('No rate is better than no training')


def test_loss_that_is_never_finite():
  with pytest.raises(FloatingPointError, match='without any training'):
    finder.suggest(trials([None] * 5), Trial(0.0, None, None), 'x')


def test_picture_marks_what_diverged():
  found = trials([9, 5, 4, 99, None], [50, 60, 80, 99, None])
  made = finder.suggest(found, UNTRAINED, 'rank_accuracy')
  figure = finder.draw(found, UNTRAINED, made, 'rank_accuracy', 'a task')
  loss, accuracy = figure.axes
  assert (loss.get_ylabel(), accuracy.get_ylabel()) == ('loss', 'rank accuracy')
  assert loss.get_xscale() == 'log'
  lines = {line.get_label(): list(line.get_xdata()) for line in loss.lines}
  assert lines['diverged'] == [1.0, 10.0]
  assert [0.001, 0.01, 0.1] in lines.values()
  assert list(accuracy.lines[0].get_ydata()) == [50, 60, 80]


# ---- runs --------------------------------------------------------------------


@pytest.mark.slow
def test_command(data, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)
  of_train = dict.fromkeys(('LOG_PERIOD', 'EVAL_PERIOD', 'CHECKPOINT_PERIOD'))
  _, *args = commands.train(
    data, model_dir=tmp_path, RATES_PER_DECADE=1, **of_train
  )
  args = [x.replace('runs/train.gin', 'runs/find_lr.gin') for x in args]
  assert commands.here('find_lr', *args) == 0
  out = capsys.readouterr().out
  found = json.loads((tmp_path / 'learning_rate.json').read_text())
  assert found['task'] == 'user_data' and found['steps'] == 24
  assert found['metric'] == 'rank_accuracy'
  rates = [t['rate'] for t in found['trials']]
  assert rates == [0.003, 0.03, 0.3, 3.0, 30.0]
  assert len({t['loss'] for t in found['trials']}) == 5
  assert all(0 <= t['metric'] <= 100 for t in found['trials'])
  # The lowest rate is next to no training, at the same batches.
  low, zero = found['trials'][0]['loss'], found['untrained']['loss']
  assert low == pytest.approx(zero, rel=0.02)
  firsts = [line.split(' ')[0] for line in out.splitlines()[2:8]]
  assert firsts == ['0', '0.003', '0.03', '0.3', '3', '30']
  assert found['suggestion']['text'] in out
  assert (tmp_path / 'learning_rate.png').read_bytes()[1:4] == b'PNG'
  assert not (tmp_path / 'config.gin').exists()  # this is no run


def test_command_with_the_file_of_train(data, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)
  _, *args = commands.train(data, model_dir=tmp_path)
  assert commands.here('find_lr', *args) == 1
  assert 'Give --gin_file=runs/find_lr.gin' in capsys.readouterr().err


@pytest.mark.parametrize('without', ['labels', 'eval_data'])
def test_nothing_to_rank(data, without):
  made = runs.make(data, data={without: None})
  made.register_tasks()
  assert not finder._has_labels(made, CONFIG)


@pytest.mark.slow
def test_loss_alone(data, tmp_path):
  # The last rate is too high for float32.
  middle = 1e30
  made = finder.find_lr(
    runs.make(data, data={'labels': None}),
    model_dir=str(tmp_path),
    learning_rate=middle,
    total_steps=4,
    batch_size=8,
    optimizer=runs._OPTIMIZER,
    learning_rate_fn=schedules.constant(middle),
    eval_config=CONFIG,
    decades=2,
    per_decade=1,
  )
  found = json.loads((tmp_path / 'learning_rate.json').read_text())
  assert found['metric'] is None
  assert math.isfinite(found['untrained']['loss'])
  assert found['trials'][-1]['loss'] is None
  assert all(t['metric'] is None for t in found['trials'])
  assert made.rate is None and 'lower LEARNING_RATE' in made.text
