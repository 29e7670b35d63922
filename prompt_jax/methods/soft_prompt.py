"""Prompt tuning (Lester et al. 2021): P learned rows of the embedding."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.network import layers


class SoftPrompt(nn.Module):
  """Soft tokens with free embeddings: `Emb(V + g P + j) = prompt[g, j]`.

  Where the soft tokens stand is the data's business: in front of the encoder's
  input by default, anywhere through `<soft:k>` in the text.

  Attributes:
    length: P, soft tokens of one task.
    num_tasks: G, prompts kept apart; an example of task g uses prompt g.
    prompt_init: initial value of one prompt [P, D].

  Raises:
    ValueError: a length or number of tasks below 1.

  Source: Lester et al. 2021, arXiv 2104.08691, section 2; checked against
  google-research/prompt-tuning `prompt_tuning/prompts.py` and
  `prompt_tuning/train/layers.py` (which concatenate the same rows).
  """

  length: int = 100
  num_tasks: int = 1
  prompt_init: initializers.PromptInitializer = initializers.RandomUniform()

  def __post_init__(self):
    for field in ('length', 'num_tasks'):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'SoftPrompt.{field} must be a whole number of at least 1, got '
          f'{value!r}.'
        )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the prompts on the token embedding."""
    width = context.config.emb_dim
    shape: tuple[int, ...] = (self.length, width)
    axes: tuple[str, ...] = ('prompt', 'prompt_embed')
    init = self._init_one
    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
      init = self._init_all
    prompt = layers.param(
      self,
      'prompt',
      lambda rng, shape, dtype: init(rng, shape, context).astype(dtype),
      shape,
      axes,
    )
    rows = prompt.reshape(1, -1, width)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _init_one(self, rng: Any, shape: Any, context: base.Context) -> Any:
    return jnp.asarray(self.prompt_init(rng, shape, context.embedding))

  def _init_all(self, rng: Any, shape: Any, context: base.Context) -> Any:
    rngs = jax.random.split(rng, shape[0])
    return jnp.stack([self._init_one(r, shape[1:], context) for r in rngs])
