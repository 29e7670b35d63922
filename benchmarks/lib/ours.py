"""prompt_jax's training step, and JAX's matrix product, as contestants."""

import argparse
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import workers
from prompt_jax import checkpoints
from prompt_jax import gin_utils
from prompt_jax import models
from prompt_jax import run as run_lib
from prompt_jax import trainer


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Prompt tuning as the packaged gin files have it.

  Attributes:
    model: network and method.
    optimizer: Adafactor.
    learning_rate_fn: constant.
  """

  model: models.EncoderDecoderModel
  optimizer: Any
  learning_rate_fn: Any

  def compile(self, run: run_lib.Run, abstract: Any, *args: Any) -> Any:
    """The step for these arguments, as `train.train` jits it."""
    step = functools.partial(
      trainer.train_step,
      model=self.model,
      optimizer=self.optimizer,
      learning_rate_fn=self.learning_rate_fn,
    )
    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    jitted = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(shardings, run.partitioner.replicated),
    )
    return jitted.lower(*args).compile()


def recipe(
  model: str, prompt: int, vocabulary_path: str = '', **fields: Any
) -> Recipe:
  """Reads a model's file, `methods/soft_prompt.gin` and `runs/train.gin`.

  Args:
    model: name of a file in `gin_configs/models`.
    prompt: P.
    vocabulary_path: a SentencePiece model, '' for none.
    **fields: of `T5Config`, over those of the file; no dropout by default.
  """
  bindings = {
    'PROMPT_LENGTH': prompt,
    'DROPOUT_RATE': 0.0,
    'DTYPE': 'float32',
    'VOCABULARY_PATH': vocabulary_path,
    'MIXTURE_OR_TASK_NAME': '',
    'TRAIN_STEPS': 1,
  }
  gin_utils.parse(
    [f'models/{model}.gin', 'methods/soft_prompt.gin', 'runs/train.gin'],
    [f'{k}={v!r}' for k, v in bindings.items()],
  )
  config = gin_utils.build('@t5.T5Config()')
  vocabulary = gin_utils.build('%VOCABULARY') if vocabulary_path else None
  return Recipe(
    model=models.EncoderDecoderModel(
      dataclasses.replace(config, **fields),
      vocabulary=vocabulary,
      method=gin_utils.build('%METHOD'),
    ),
    optimizer=gin_utils.build('%OPTIMIZER'),
    learning_rate_fn=gin_utils.build('%LEARNING_RATE_FN'),
  )


class Ours:
  """The step of prompt tuning on a random base.

  Attributes:
    info: platform, sizes, compile time, FLOPs and scratch memory of the
      program (the compiler counts the body of a loop once).

  Args:
    args: sizes of the step.
    fields: of `T5Config`.
  """

  def __init__(self, args: argparse.Namespace, fields: dict[str, Any]):
    logging.getLogger('absl').setLevel(logging.ERROR)  # the base is random
    imports = workers.resident_bytes()
    fields = {'dropout_rate': args.dropout, **fields}
    made = recipe(args.model, args.prompt, **fields)
    lengths = {'inputs': args.inputs, 'targets': args.targets}
    run = run_lib.Run(made.model, 'none', lengths)
    self._activate = run.partitioner.activate
    with self._activate():
      base = run.load()
      abstract = run.abstract_state(made.optimizer, base)
      self._state = run.init_state(made.optimizer, base, abstract)
      self._frozen = base.frozen
      batch = _batch(made.model, args)
      self._batch = run.partitioner.put_batch(batch)
      arguments = self._state, self._frozen, self._batch
      start = time.perf_counter()
      self._step = made.compile(run, abstract, *arguments)
      seconds = time.perf_counter() - start
    memory = self._step.memory_analysis()
    self.info = {
      'platform': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
      'version': f'jax {jax.__version__}',
      'sizes': dataclasses.asdict(made.model.config),
      'imports_bytes': imports,
      'compile_s': seconds,
      'flops': self._step.cost_analysis()['flops'],
      'scratch_bytes': memory.temp_size_in_bytes,
    }

  def step(self, count: int) -> None:
    """`count` updates, one after the other."""
    for _ in range(count):
      self._state, metrics = self._step(self._state, self._frozen, self._batch)
    jax.block_until_ready((self._state, metrics))
    if not bool(metrics['finite']):
      raise FloatingPointError('The loss or its gradient is not finite.')

  def finish(self, directory: str) -> dict[str, Any]:
    """Sizes of what a run writes, and the accelerator's peak memory."""
    device = jax.devices()[0].memory_stats() or {}
    root = pathlib.Path(directory)
    (root / 'trained').mkdir()
    path = root / 'trained' / 'trainable.safetensors'
    checkpoints.save_trainable(path, self._state.trainable, {})
    with self._activate():
      checkpointer = checkpoints.Checkpointer(str(root / 'run'))
      checkpointer.save(self._state, {})
      checkpointer.close()
    return {
      'device_bytes': device.get('peak_bytes_in_use'),
      'trained_bytes': workers.size_of(root / 'trained'),
      'checkpoint_bytes': workers.size_of(root / 'run'),
    }


def _batch(model: Any, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """The batch that all contestants get, soft tokens in front."""
  inputs, targets = workers.random_batch(
    args.batch, args.inputs, args.targets, model.config.vocab_size
  )
  soft = np.repeat(model.soft_ids, len(inputs), axis=0)
  return {
    'encoder_input_tokens': np.concatenate([soft, inputs], axis=1),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }


class Product:
  """A product of two square matrices: the machine's peak, as JAX reaches it."""

  def __init__(self, size: int, dtype: str):
    rng = np.random.default_rng(0)
    self._x, self._y = (
      jnp.asarray(rng.standard_normal((size, size)), dtype) for _ in range(2)
    )
    self._product = jax.jit(jnp.matmul)
    self.info = {'version': f'jax {jax.__version__}', 'flops': 2 * size**3}

  def step(self, count: int) -> None:
    """`count` products."""
    for _ in range(count):
      out = self._product(self._x, self._y)
    out.block_until_ready()

  def finish(self, directory: str) -> dict[str, Any]:
    """Nothing to say."""
    del directory
    return {}
