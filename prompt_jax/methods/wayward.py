"""Wayward prompts (Khashabi et al. 2021): prompts that stay near a text."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections
from prompt_jax.network import layers


class Wayward(nn.Module):
  """A soft prompt with a penalty on its distance to a text, its start.

  With the n pieces w of the text, `prompt` starts at Emb(w), and to the loss of
  training is added

      gamma / n  sum_i || prompt[i] - Emb(w[i]) ||^2,

  of each task where there are several. The loss is a sum over the batch's
  tokens, as a rule, so what gamma weighs depends on the batch's size.

  Attributes:
    discrete_prompt: the text, or its ids.
    vocabulary: a seqio vocabulary; for a text.
    gamma: weight of the penalty.
    num_tasks: G, prompts kept apart.

  Raises:
    ValueError: no text or no pieces, a text without a vocabulary, a negative
      gamma, a number of tasks below 1; when parameters are made, an id that the
      embedding has not.

  Source: Khashabi et al. 2021, arXiv 2112.08348; checked against
  google-research/prompt-tuning `prompt_tuning/extended/train/wayward.py`.
  """

  discrete_prompt: str | Sequence[int] = ()
  vocabulary: Any = None
  gamma: float = 0.01
  num_tasks: int = 1

  def __post_init__(self):
    given = self.discrete_prompt
    if not isinstance(given, str):
      whole = isinstance(given, Sequence) and all(
        isinstance(i, int) and i >= 0 for i in given
      )
      if not whole or not given:
        raise ValueError(
          'Wayward.discrete_prompt must be a text or the ids of its pieces, '
          f"such as 'Is this review positive or negative ?'; got {given!r}."
        )
      self.discrete_prompt = tuple(given)  # gin hands over a list
    elif self.vocabulary is None:
      raise ValueError(
        f'Wayward.vocabulary must be given to read the text {given!r}.'
      )
    if not isinstance(self.gamma, int | float) or not self.gamma >= 0:
      raise ValueError(
        f'Wayward.gamma must be a number of at least 0, got {self.gamma!r}.'
      )
    projections.check_whole_numbers(self, 'num_tasks')
    super().__post_init__()

  @property
  def pieces(self) -> np.ndarray:
    """Ids of the text, int32 [n], without EOS."""
    found = self.discrete_prompt
    if isinstance(found, str):
      found = self.vocabulary.encode(found)
      if not len(found):
        raise ValueError(
          f'Wayward.discrete_prompt {self.discrete_prompt!r} has no pieces in '
          'the vocabulary.'
        )
    return np.asarray(found, np.int32)

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, len(self.pieces)

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the prompts on the token embedding, and the penalty on the loss."""
    pieces, size = self.pieces, context.config.vocab_size
    if pieces.max() >= size:
      raise ValueError(
        f'Wayward.discrete_prompt has the id {pieces.max()}, but the embedding '
        f'has {size} rows: it is of another vocabulary.'
      )
    target = jnp.take(context.embedding, pieces, axis=0).astype(jnp.float32)
    target = jax.lax.stop_gradient(target)
    shape: tuple[int, ...] = target.shape
    axes: tuple[str, ...] = ('prompt', 'prompt_embed')
    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
    prompt = layers.param(
      self,
      'prompt',
      lambda rng, shape, dtype: jnp.broadcast_to(target, shape).astype(dtype),
      shape,
      axes,
    )
    distance = jnp.sum(jnp.square(prompt - target)) / len(pieces)
    self.sow('losses', 'wayward', self.gamma * distance)
    rows = prompt.reshape(1, -1, target.shape[-1])
    return {f'{context.embedder}/rows': deltas.Routed(rows)}
