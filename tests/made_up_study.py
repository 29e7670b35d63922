"""A study that never ran: study.json and results.jsonl with given numbers."""

import itertools
import json

from prompt_jax.study import ledger
from prompt_jax.study import results as results_lib

SIZES = {'d8': 3_232, 'd16': 12_608, 'd32': 49_664, 'd64': 197_504}
METHODS = {
  'prompt_design': 'Prompt design',
  'soft_prompt': 'Prompt tuning',
  'fine_tune': 'Model tuning',
}
TASKS = {
  'mood': {'label': 'mood', 'chance': 50.0},
  'agent': {'label': 'agent', 'chance': 30.0},
}


def study(cells, **fields):
  return {
    'name': 'made_up',
    'title': 'A made-up study',
    'note': 'Nothing here was measured.',
    'metric': 'rank_accuracy',
    'reference_method': 'fine_tune',
    'methods': METHODS,
    'sizes': list(SIZES),
    'tasks': TASKS,
    'overlay': [],
    'cells': cells,
    **fields,
  }


def cell(stage='tune', **settings):
  key = '-'.join(str(value) for value in settings.values())
  return {'key': f'{stage}-{key}', 'stage': stage, 'settings': settings}


def record(cell, test, validation=None, trained=256, **fields):
  """A finished cell; `test` and `validation` are accuracies."""
  width = int(cell['settings']['size'][1:])
  body = SIZES.get(cell['settings']['size'], 48 * width**2)
  return {
    **cell,
    'status': 'done',
    'error': None,
    'config': {'T5Config.emb_dim': str(width)},
    'metrics': {
      'validation': {
        'rank_accuracy': test if validation is None else validation
      },
      'test': {'rank_accuracy': test, 'accuracy': test / 2},
    },
    'parameters': {
      'total': body + 962 * width,
      'non_embedding': body,
      'trained': trained,
    },
    'cost': {
      'steps': 600,
      'train_flops': 1e6 * body if trained else None,
      'step_seconds': 0.004,
      'train_seconds': 3.0,
      'wall_seconds': 9.0,
      'peak_bytes': 3 << 20,
      'trained_bytes': 4 * trained,
      'runs_together': 12,
    },
    'origin': {
      'base': 'b',
      'data': 'd',
      'code': '0.1.0',
      'versions': {'jax': '0.10.2'},
      'device': 'cpu (2 cores)',
      'time': '2026-01-01T00:00:00Z',
    },
    **fields,
  }


def accuracy(method, size, task, base_seed, seed, rate):
  """Prompt tuning's gap falls 40, 20, 6, 0.5; +-1 over seeds, +2 a base."""
  if method == 'fine_tune':
    return 96.0 + seed - 1 + (0 if rate == 0.1 else -3)
  if method == 'prompt_design':
    return TASKS[task]['chance'] + 2 * list(SIZES).index(size)
  gap = {'d8': 40.0, 'd16': 20.0, 'd32': 6.0, 'd64': 0.5}[size]
  return 96.0 - gap + seed - 1 + 2 * base_seed - (0 if rate == 0.3 else 5)


def write(directory, base_seeds=(0,), seeds=(0, 1, 2), rates=(0.1, 0.3)):
  """A whole study; returns its cells."""
  directory.mkdir(parents=True, exist_ok=True)
  cells, records = [], []
  for size, base in itertools.product(SIZES, base_seeds):
    cells.append(cell('pretrain', size=size, base_seed=base))
    records.append(record(cells[-1], test=90.0 + base))
    for method, task in itertools.product(METHODS, TASKS):
      trains = method != 'prompt_design'
      for rate, seed in itertools.product(
        rates if trains else [None], seeds if trains else [0]
      ):
        settings = {
          'method': method,
          'size': size,
          'task': task,
          'base_seed': base,
          'seed': seed,
        }
        if trains:
          settings['LEARNING_RATE'] = rate
        cells.append(cell(**settings))
        test = accuracy(method, size, task, base, seed, rate)
        trained = {'prompt_design': 0, 'soft_prompt': 256}.get(method, 10**4)
        records.append(record(cells[-1], test, trained=trained))
  (directory / 'study.json').write_text(json.dumps(study(cells)))
  ledger.Ledger(directory / 'results.jsonl').append(records)
  return cells


def results_of(scored, sizes=('d8',), **fields):
  """Results of cells given as (settings, test, validation), one base seed."""
  cells, records = [], {}
  seeds = {'base_seed': 0, 'seed': 0}
  for settings, test, validation in scored:
    named = {'method': 'fine_tune', 'size': sizes[0], 'task': 'mood'}
    found = cell(**{**named, **seeds, **settings})
    cells.append(found)
    records[found['key']] = record(found, test, validation)
  values = study(cells, sizes=list(sizes), **fields)
  return results_lib.collect(results_lib.Study(**values), records)


def two_sizes(**methods):
  """Each method's accuracies at two sizes, the same on all tasks and seeds."""
  scored = [
    ({'method': name, 'size': size, 'task': task, 'seed': seed}, test, None)
    for name, tests in methods.items()
    for size, test in zip(('d8', 'd16'), tests, strict=True)
    for task in TASKS
    for seed in (0, 1)
  ]
  return results_of(scored, sizes=('d8', 'd16'))
