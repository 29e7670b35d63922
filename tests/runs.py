"""Small runs for tests of the loop and of the command line.

A model of one layer a stack on bytes, and a sentiment task of a few rows that
is written where a test wants it.
"""

import dataclasses
import functools
import json
import pathlib
import random
from typing import Any

import jax

from prompt_jax import models
from prompt_jax import optimizers
from prompt_jax import partitioning
from prompt_jax import reporting
from prompt_jax import run as run_lib
from prompt_jax import schedules
from prompt_jax import train
from prompt_jax import user_data
from prompt_jax import vocabularies
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network.layers import T5Config

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {'inputs': 24, 'targets': 4}
CONFIG = T5Config(
  vocab_size=384,  # bytes
  emb_dim=16,
  num_heads=4,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
  dropout_rate=0.1,
)
_WORDS = (('bad', 'awful', 'poor', 'dull'), ('good', 'great', 'fine', 'lovely'))


def write_data(folder: pathlib.Path, train: int = 64, dev: int = 21) -> None:
  """Writes train.jsonl and dev.jsonl."""
  rng = random.Random(0)
  for name, rows in (('train', train), ('dev', dev)):
    with open(folder / f'{name}.jsonl', 'w') as f:
      for i in range(rows):
        label = rng.randrange(2)
        text = f'{rng.choice(_WORDS[label])} film {i}'
        f.write(json.dumps({'text': text, 'label': label}) + '\n')


# ---- in this process ---------------------------------------------------------


class Mesh(partitioning.Partitioner):
  """A partitioner over the first devices only."""

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    devices = jax.devices()[: self.data * self.model]
    auto = (jax.sharding.AxisType.Auto,) * 2
    shape = (self.data, self.model)
    return jax.make_mesh(
      shape, ('data', 'model'), axis_types=auto, devices=devices
    )


class Run(run_lib.Run):
  """A run that draws its random base once."""

  @functools.cached_property
  def _base(self) -> run_lib.Base:
    return super().load()

  def load(self) -> run_lib.Base:
    return self._base


@functools.cache
def _made(config: T5Config, model: type, **fields: Any) -> Any:
  vocabulary = vocabularies.bytes_vocabulary()
  return model(config, vocabulary=vocabulary, **fields)


def make(
  folder: pathlib.Path,
  mesh: tuple[int, int] = (1, 1),
  model: type = models.EncoderDecoderModel,
  config: dict[str, Any] | None = None,
  data: dict[str, Any] | None = None,
  **fields: Any,
) -> run_lib.Run:
  """A run on the data in `folder`.

  Args:
    folder: with train.jsonl and dev.jsonl.
    mesh: devices on the axes data and model.
    model: class of the model.
    config: other fields of the network's configuration.
    data: other fields of the data.
    **fields: other fields of `Run`, of the model `method` and
      `trainable_patterns`.
  """
  of_model = {
    k: fields.pop(k) for k in ('method', 'trainable_patterns') if k in fields
  }
  of_model = of_model or {'method': SoftPrompt(4)}
  own = user_data.UserData(
    **{
      'train_data': str(folder / 'train.jsonl'),
      'eval_data': str(folder / 'dev.jsonl'),
      'inputs': 'review: {text}',
      'targets': '{label}',
      'labels': ('no', 'yes'),
      **(data or {}),
    }
  )
  cls = run_lib.Run if 'initial_checkpoint_path' in fields else Run
  return cls(
    **{
      'model': _made(
        dataclasses.replace(CONFIG, **(config or {})), model, **of_model
      ),
      'mixture_or_task_name': 'user_data',
      'task_feature_lengths': LENGTHS,
      'partitioner': Mesh(*mesh),
      'user_data': own,
      **fields,
    }
  )


_compiled: dict[Any, Any] = {}


def _compile_once(run: run_lib.Run, abstract: Any, step_fn: Any) -> Any:
  """`train._compile` that gives equal runs of this process one program."""
  key = (run.partitioner.mesh, _parts(step_fn))
  try:
    hash(key)
  except TypeError:  # a Chain has a dict of its methods
    return _compile(run, abstract, step_fn)
  if key not in _compiled:
    _compiled[key] = _compile(run, abstract, step_fn)
  return _compiled[key]


def _parts(x: Any) -> Any:
  """What a partial function is made of, which its equality does not tell."""
  if not isinstance(x, functools.partial):
    return x
  return (x.func, *((k, _parts(v)) for k, v in sorted(x.keywords.items())))


_compile, train._compile = train._compile, _compile_once
_OPTIMIZER = optimizers.adafactor(
  multiply_by_parameter_scale=False, weight_decay_rate=1e-5
)
_constant = functools.cache(schedules.constant)


def go(run: run_lib.Run, model_dir: pathlib.Path, **kwargs: Any) -> Any:
  """`train.train` with small numbers."""
  rate = kwargs.pop('learning_rate', 0.3)
  return train.train(
    run,
    **{
      'model_dir': str(model_dir),
      'total_steps': 12,
      'batch_size': 8,
      'resident_rows': 0,
      'optimizer': _OPTIMIZER,
      'learning_rate_fn': _constant(rate),
      'log_period': 3,
      'eval_period': 6,
      'checkpoint_period': 4,
      **kwargs,
    },
  )


def metrics(model_dir: pathlib.Path) -> list[dict[str, Any]]:
  """metrics.jsonl without what depends on the clock."""
  lines = reporting.read_metrics(model_dir / 'metrics.jsonl')
  return [
    {k: v for k, v in line.items() if not k.endswith('_per_second')}
    for line in lines
  ]


def losses(model_dir: pathlib.Path) -> dict[int, float]:
  """Training loss by step."""
  lines = metrics(model_dir)
  return {x['step']: x['loss'] for x in lines if x['split'] == 'train'}


def trained(model_dir: pathlib.Path) -> bytes:
  """The bytes of trainable.safetensors."""
  return (model_dir / 'trainable.safetensors').read_bytes()
