"""A family of tasks that a small network was pretrained on, in seconds.

A text has one word of each of four kinds, in any order. Every word is a yes or
a no by a table that only pretraining tells; there an input starts with a token
that asks for one of the kinds, and the target is the answer of its word. A
method sees a few examples without the question, and has to find it.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import models
from prompt_jax import optimizers
from prompt_jax import partitioning
from prompt_jax import schedules
from prompt_jax import train_state
from prompt_jax import trainer
from prompt_jax.network.layers import T5Config

KINDS, WORDS = 4, 10
NO, ASK, FIRST_WORD = 2, 4, 10  # ids; 0 and 1 are padding and EOS
CONFIG = T5Config(
  vocab_size=FIRST_WORD + KINDS * WORDS,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=2,
  num_decoder_layers=1,
  relpos_num_buckets=8,
  relpos_max_distance=16,
)
_SAYS = np.random.default_rng(0).permuted(
  np.tile(np.arange(WORDS) % 2, (KINDS, 1)), axis=1
)

Batch = Mapping[str, np.ndarray]


def texts(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Ids [n, 4] and the answer to each of the four questions, [n, 4]."""
  rng = np.random.default_rng(seed)
  words = rng.integers(0, WORDS, (count, KINDS))
  kinds = np.arange(KINDS)
  ids = FIRST_WORD + kinds * WORDS + words
  return rng.permuted(ids, axis=1), _SAYS[kinds, words]


def batch(first: np.ndarray, ids: np.ndarray, says: np.ndarray) -> Batch:
  """The texts behind `first` [n, P] with their answers [n]."""
  eos = np.ones((len(ids), 1), int)
  targets = np.stack([NO + says, eos[:, 0]], axis=1).astype(np.int32)
  return {
    'encoder_input_tokens': np.concatenate([first, ids, eos], 1).astype('i4'),
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': np.ones_like(targets),
  }


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Trains one method many times with one compiled program."""

  model: models.EncoderDecoderModel
  optimizer: Any
  learning_rate: float
  steps: int
  batch_size: int

  @functools.cached_property
  def _run(self) -> Any:
    step = functools.partial(
      trainer.train_step,
      model=self.model,
      optimizer=self.optimizer,
      learning_rate_fn=schedules.constant(self.learning_rate),
    )
    run = functools.partial(trainer.train_steps, step_fn=step)
    # These tests do compute: it pays to compile well.
    options = {'xla_backend_optimization_level': 3}
    return jax.jit(run, compiler_options=options)

  @functools.cached_property
  def _logits(self) -> Any:
    return jax.jit(self.model.logits)

  def train(self, params: Any, data: Batch, seed: int) -> Any:
    """The trained parameters, from these of the network."""
    state = trainer.init_state(
      jax.random.PRNGKey(seed),
      params,
      model=self.model,
      optimizer=self.optimizer,
    )
    rng = np.random.default_rng(seed)
    size = len(data['decoder_target_tokens'])
    rows = rng.integers(0, size, (self.steps, self.batch_size))
    state, _ = self._run(
      state,
      self.model.split(params)[1],
      data,
      jnp.asarray(rows, jnp.int32),
      jnp.asarray(self.steps),
    )
    return state.trainable

  def accuracy(self, params: Any, trainable: Any, data: Batch) -> float:
    """Of the first token of the targets."""
    frozen = self.model.split(params)[1]
    best = self._logits(frozen, trainable, data)[:, 0].argmax(-1)
    return float(np.mean(best == data['decoder_target_tokens'][:, 0]))


@functools.cache
def pretrained() -> Any:
  """Parameters of a network that answers what it is asked."""
  ids, says = texts(0, 20_000)
  kind = np.random.default_rng(1).integers(0, KINDS, len(ids))
  data = batch(ASK + kind[:, None], ids, says[np.arange(len(ids)), kind])
  model = models.EncoderDecoderModel(CONFIG, trainable_patterns=('.*',))
  params = jax.jit(model.init_network)(jax.random.PRNGKey(0))
  params = partitioning.unbox(params)
  run = Trainer(model, optimizers.adamw(), 3e-3, 1500, 64)
  trained = run.train(params, data, seed=0)
  found = train_state.flatten(trained['network'])
  return train_state.unflatten(jax.tree.map(np.asarray, found))


def score(
  method: Any,
  optimizer: Any,
  learning_rate: float,
  shots: int = 64,
  steps: int = 300,
  draws: int = 2,
) -> np.ndarray:
  """Accuracy on 1024 texts, learned from `shots` others, [draws, questions]."""
  model = models.EncoderDecoderModel(CONFIG, method=method)
  run = Trainer(model, optimizer, learning_rate, steps, 16)
  found = np.zeros((draws, KINDS))
  for draw, kind in np.ndindex(found.shape):
    ids, says = texts(100 * (draw + 1) + kind, shots + 1024)
    first = np.repeat(model.soft_ids, len(ids), axis=0)
    data = batch(first, ids, says[:, kind])
    few = {k: x[:shots] for k, x in data.items()}
    rest = {k: x[shots:] for k, x in data.items()}
    trainable = run.train(pretrained(), few, seed=kind)
    found[draw, kind] = run.accuracy(pretrained(), trainable, rest)
  return found
