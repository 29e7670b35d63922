"""A study of two sizes, three methods and one task that trains in seconds."""

import json
import pathlib
from typing import Any

import runs

from prompt_jax.study import plan

ROOT = pathlib.Path(__file__).parent
SIZE = """
from __gin__ import dynamic_registration
from prompt_jax.network import t5
include 'models/mini_bytes.gin'
t5.T5Config:
  emb_dim = {width}
  head_dim = 8
  mlp_dim = {width}
  num_encoder_layers = 1
  num_decoder_layers = 1
"""
STUDY = """
from __gin__ import dynamic_registration
from prompt_jax.study import plan

plan.Study:
  name = 'toy'
  title = 'Toy'
  note = 'A toy.'
  sizes = {'a': ('A.gin',), 'b': ('B.gin',)}
  tasks = {'toy': @plan.Task()}
  methods = {
      'soft_prompt': @prompt/plan.Recipe(), 'fine_tune': @model/plan.Recipe(),
      'prompt_design': @design/plan.Recipe(),
  }
  seeds = (0, 1)
  pretraining = @pretraining/plan.Recipe()
  bindings = {
      'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 8},
      'BATCH_SIZE': 8, 'EVAL_BATCH_SIZE': 24, 'DROPOUT_RATE': 0.0,
      'TRAIN_DATA': 'train.jsonl', 'EVAL_DATA': 'dev.jsonl',
      'INPUTS': 'review: {text}', 'TARGETS': '{label}', 'LABELS': ('no', 'yes'),
      'evaluation.EvalConfig.decode': False,
  }

plan.Task:
  label = 'toy'
  chance = 50.0
  name = 'user_data'

pretraining/plan.Recipe:
  label = 'pretraining'
  gin_files = ('methods/fine_tune.gin', 'runs/train.gin')
  bindings = {'TRAIN_STEPS': 8, 'LOG_PERIOD': 4, 'CHECKPOINT_PERIOD': 4}
  task_name = 'user_data'

prompt/plan.Recipe:
  label = 'Prompt tuning'
  gin_files = ('methods/soft_prompt.gin',)
  bindings = {
      'TRAIN_STEPS': 6, 'EVAL_PERIOD': 3, 'PROMPT_LENGTH': 3,
      'TEST_SPLIT': 'validation',
  }
  grid = {'LEARNING_RATE': (0.1, 0.3)}

model/plan.Recipe:
  label = 'Model tuning'
  gin_files = ('methods/fine_tune.gin',)
  bindings = {'TRAIN_STEPS': 6, 'EVAL_PERIOD': 3, 'TEST_SPLIT': 'validation'}

design/plan.Recipe:
  label = 'Prompt design'
  gin_files = ('methods/fine_tune.gin',)
  bindings = {
      'TRAIN_STEPS': 0, 'TRAINABLE_PATTERNS': (), 'TEST_SPLIT': 'validation',
  }
  seeds = (0,)
"""
NUM_CELLS = 2 * (1 + 2 * 2 + 2 + 1)


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes data and gin files; the study's file."""
  runs.write_data(folder, train=32)
  for name, width in (('A', 8), ('B', 16)):
    (folder / f'{name}.gin').write_text(SIZE.format(width=width))
  text = STUDY
  for name in ('A.gin', 'B.gin', 'train.jsonl', 'dev.jsonl'):
    text = text.replace(f"'{name}'", repr(str(folder / name)))
  (folder / 'toy.gin').write_text(text)
  return folder / 'toy.gin'


def made(**fields: Any) -> plan.Study:
  """A study that is only looked at."""
  task = plan.Task('toy', 50.0, 'glue_sst2')
  prompt = plan.Recipe(
    'Prompt tuning',
    ('methods/soft_prompt.gin',),
    {'TRAIN_STEPS': 10, 'VOCABULARY_PATH': ''},
    {'LEARNING_RATE': (0.1, 0.3)},
  )
  model = plan.Recipe(
    'Model tuning',
    ('methods/fine_tune.gin',),
    {'TRAIN_STEPS': 10, 'VOCABULARY_PATH': ''},
  )
  return plan.Study(
    **{
      'name': 'toy',
      'title': 'Toy',
      'note': '',
      'sizes': {'a': ('models/tiny.gin',), 'b': ('models/mini.gin',)},
      'tasks': {'toy': task},
      'methods': {'soft_prompt': prompt, 'fine_tune': model},
      'seeds': (0, 1),
      'checkpoints': {'a': '/a', 'b': '/b'},
      **fields,
    }
  )


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The ledger, whatever it says."""
  lines = (folder / 'results.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]
