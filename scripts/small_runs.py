"""What the experiments beside this file share: small models, few seconds.

Rows lie in memory, and all steps are one program. Not for runs that must be
stopped and go on (`prompt-jax train`).
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import numpy as np

from prompt_jax import models
from prompt_jax import optimizers
from prompt_jax import partitioning
from prompt_jax import schedules
from prompt_jax import trainer
from prompt_jax.network.layers import T5Config

# Also in tests, which elsewhere compile without optimizing.
_FAST = {'xla_backend_optimization_level': 3}


def model(config: T5Config, method: Any = None, **fields: Any) -> Any:
  """A model whose loss is a mean over target tokens."""
  return models.EncoderDecoderModel(
    config,
    method=method,
    z_loss=0.0,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
    **fields,
  )


def rows(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
  """Model features of ids [n, T] and [n, U]; padding is 0."""
  targets = targets.astype(np.int32)
  return {
    'encoder_input_tokens': inputs.astype(np.int32),
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


def prompted(
  of: Any, batch: Mapping[str, Any], tasks: np.ndarray | None = None
) -> dict[str, Any]:
  """The rows with the soft tokens of each row's task in front."""
  tokens = batch['encoder_input_tokens']
  if tasks is None:
    tasks = np.zeros(len(tokens), np.int32)
  soft = of.soft_ids[tasks if len(of.soft_ids) > 1 else 0 * tasks]
  return {
    **batch,
    'encoder_input_tokens': np.concatenate([soft, tokens], axis=1),
    'task_ids': tasks.astype(np.int32),
  }


def fit(
  of: Any,
  frozen: Any,
  params: Any,
  data: Mapping[str, np.ndarray],
  *,
  steps: int,
  learning_rate: float,
  batch_size: int,
  seed: int = 0,
  start: Any = None,
  **adamw: Any,
) -> tuple[Any, np.ndarray]:
  """Trainable parameters after AdamW with linear decay, and the losses.

  Args:
    of: the model.
    frozen: what is not trained, the method's constants among it.
    params: all parameters of the network.
    data: rows to draw from.
    steps: of training; the first 5 % warm up.
    learning_rate: the highest.
    batch_size: rows of a step.
    seed: of initial values and draws.
    start: trainable parameters to go on from.
    **adamw: of `optimizers.adamw`.
  """
  recipe = tuple(sorted(adamw.items()))
  optimizer, many = _program(of, steps, learning_rate, recipe)
  state = trainer.init_state(
    jax.random.PRNGKey(seed), params, model=of, optimizer=optimizer
  )
  if start is not None:
    state = state.replace(trainable=start)
  count = len(data['encoder_input_tokens'])
  order = np.random.default_rng(seed).integers(count, size=(steps, batch_size))
  state, found = many(state, frozen, dict(data), order.astype(np.int32), steps)
  return jax.device_get(state.trainable), np.asarray(found['loss'])


@functools.lru_cache(maxsize=2)
def _program(
  of: Any, steps: int, learning_rate: float, recipe: tuple[Any, ...]
) -> tuple[Any, Any]:
  """The optimizer, and all steps as one function."""
  optimizer = optimizers.adamw(**dict(recipe))
  warmup = max(steps // 20, 1)
  rate = schedules.create_learning_rate_scheduler(
    'linear_decay',
    learning_rate,
    warmup_steps=warmup,
    decay_factor=1 / (steps - warmup),
  )
  step = functools.partial(
    trainer.train_step, model=of, optimizer=optimizer, learning_rate_fn=rate
  )
  many = functools.partial(trainer.train_steps, step_fn=step)
  return optimizer, jax.jit(many, compiler_options=_FAST)


def base(config: T5Config, data: Any, **recipe: Any) -> Any:
  """A network trained from its random start."""
  full = model(config, trainable_patterns=('.*',))
  init = jax.jit(full.init_network)
  params = partitioning.unbox(init(jax.random.PRNGKey(0)))
  return fit(full, {}, params, data, **recipe)[0]['network']


@functools.partial(jax.jit, static_argnums=(0, 4))
def _right(of: Any, frozen: Any, trainable: Any, batch: Any, place: int) -> Any:
  best = of.logits(frozen, trainable, batch)[:, place].argmax(-1)
  return best == batch['decoder_target_tokens'][:, place]


def right(
  of: Any, frozen: Any, trainable: Any, batch: Any, place: int = 0
) -> np.ndarray:
  """Whether the token at a place of the targets is predicted, of each row."""
  return np.asarray(_right(of, frozen, trainable, batch, place))
