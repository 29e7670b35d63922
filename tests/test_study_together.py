"""Runs that train as one program are the runs that train alone."""

import functools

import jax
import numpy as np
import pytest
import runs

from prompt_jax import evaluation
from prompt_jax import optimizers
from prompt_jax import schedules
from prompt_jax import train_state
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.study import together

CONFIG = evaluation.EvalConfig(batch_size=21, decode=False)
MEMBERS = (
  together.Member('user_data', 0),
  together.Member('user_data', 1),
  together.Member('user_data', 0, 0.25),
)
KINDS = {
  'prompt': {'method': SoftPrompt(4)},
  'fine_tuning': {'method': None, 'trainable_patterns': ('.*',)},
}
# Adafactor's first updates are signs: whole networks differ by them where a
# gradient is next to nothing.
RECIPES = {
  'prompt': (runs._OPTIMIZER, 0.1),
  'fine_tuning': (optimizers.sgd(), 1e-3),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  runs.write_data(folder, train=45)
  return folder


@functools.cache
def _found(data, kind):
  run = runs.make(data, **KINDS[kind])
  optimizer, rate = RECIPES[kind]
  outcomes, base, cost = together.train(
    run,
    MEMBERS,
    total_steps=12,
    batch_size=8,
    optimizer=optimizer,
    learning_rate_fn=schedules.constant(rate),
    eval_config=CONFIG,
    test_split='validation',
    eval_period=4,
    best_metric='rank_accuracy',
  )
  return base, outcomes, cost


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_each_is_as_if_alone(data, tmp_path, kind):
  base, outcomes, _ = _found(data, kind)
  optimizer, rate = RECIPES[kind]
  for k, member in enumerate(MEMBERS):
    alone = runs.make(data, seed=member.seed, **KINDS[kind])
    alone.__dict__['_base'] = base
    folder = tmp_path / str(k)
    runs.go(
      alone,
      folder,
      resident_rows=45,
      optimizer=optimizer,
      learning_rate=rate * member.learning_rate_scale,
      log_period=4,
      eval_period=4,
      eval_config=CONFIG,
      best_metric='rank_accuracy',
    )
    lines = runs.metrics(folder)
    losses = [x['loss'] for x in lines if x['split'] == 'train']
    ranked = [x['rank_accuracy'] for x in lines if x['split'] != 'train']
    history = outcomes[k].history
    assert [x[0] for x in history] == [4, 8, 12]
    np.testing.assert_allclose([x[1] for x in history], losses, rtol=1e-5)
    np.testing.assert_allclose([x[2] for x in history], ranked)
    got, want = (
      {name: np.asarray(x) for name, x in train_state.flatten(tree).items()}
      for tree in (outcomes[k].trainable, _best(alone, folder, base))
    )
    assert got.keys() == want.keys()
    for name, x in want.items():
      np.testing.assert_allclose(got[name], x, atol=2e-5, err_msg=name)
    # The best one was tested, here on the split that chose it.
    assert outcomes[k].metrics['validation']['rank_accuracy'] == max(ranked)
    assert outcomes[k].finite


def _best(run, folder, base):
  return run.load_trainable(str(folder / 'best.safetensors'), base)


@pytest.mark.slow
def test_members_differ(data):
  _, outcomes, cost = _found(data, 'prompt')
  prompts = [o.trainable['method']['prompt'] for o in outcomes]
  assert prompts[0].shape == (4, 16)
  assert len({x.tobytes() for x in prompts}) == 3
  assert cost.flops is not None and cost.flops > 0
  assert cost.step_seconds > 0


@pytest.mark.slow
def test_run_that_is_not_finite_leaves_the_others(data):
  _, want, _ = _found(data, 'prompt')
  members = (*MEMBERS[:2], together.Member('user_data', 0, 1e32))
  found, *_ = together.train(
    runs.make(data),
    members,
    total_steps=12,
    batch_size=8,
    optimizer=runs._OPTIMIZER,
    learning_rate_fn=schedules.constant(0.1),
    eval_config=CONFIG,
    eval_period=4,
  )
  assert [o.finite for o in found] == [True, True, False]
  for a, b in zip(found[:2], want[:2], strict=True):
    jax.tree.map(np.testing.assert_array_equal, a.trainable, b.trainable)


@pytest.mark.slow
def test_nothing_to_train(data):
  run = runs.make(data, method=None)
  outcomes, _, cost = together.train(
    run,
    [together.Member('user_data')],
    total_steps=0,
    batch_size=8,
    optimizer=optimizers.sgd(),
    learning_rate_fn=schedules.constant(0.1),
    eval_config=CONFIG,
  )
  base = run.load()
  empty = {'method': {}, 'network': {}}
  alone = evaluation.Evaluation(run, CONFIG)(empty, base.frozen)
  got = outcomes[0].metrics['validation']
  assert got['rank_accuracy'] == alone['user_data']['rank_accuracy']
  assert cost.flops == 0


def test_task_without_labels(data):
  run = runs.make(data, data={'labels': None})
  with pytest.raises(ValueError, match="'user_data' has no labels"):
    together.train(
      run,
      [together.Member('user_data')],
      total_steps=1,
      batch_size=8,
      optimizer=optimizers.sgd(),
      learning_rate_fn=schedules.constant(0.1),
      eval_config=CONFIG,
    )


def test_task_that_does_not_fit(data):
  run = runs.make(data)
  with pytest.raises(ValueError, match='at most 44 rows'):
    together.train(
      run,
      [together.Member('user_data')],
      total_steps=1,
      batch_size=8,
      optimizer=runs._OPTIMIZER,
      learning_rate_fn=schedules.constant(0.1),
      eval_config=CONFIG,
      resident_rows=44,
    )
