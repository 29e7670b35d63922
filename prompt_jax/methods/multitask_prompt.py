"""Multi-task prompts: one part that all tasks share, and one of each task."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import projections
from prompt_jax.network import layers

COMBINE = ('add', 'concat', 'concat_features', 'project')


class MultitaskPrompt(nn.Module):
  """Soft tokens of G tasks that a shared part S and an own part T[g] make.

  With `n` for `part_size`, the prompt of task g, [P, D], by `combine`:

      add              S + T[g]              S [P, D],      T[g] [P, D]
      concat           S in front of T[g]    S [P - n, D],  T[g] [n, D]
      concat_features  S to the left of it   S [P, D - n],  T[g] [P, n]
      project          S W + b               S [P, n],      T[g] [n + 1, D],
                                             rows of W and then b

  An example of task g (`task_ids`) uses prompt g.

  Attributes:
    length: P, soft tokens of one task.
    num_tasks: G.
    combine: one of the four.
    part_size: n; None for 'add', which has no such size.
    shared_init: initial value of S.
    task_init: initial value of each T[g]. Initializers that read the embedding
      see of it the features that the part has in the prompt.

  Raises:
    ValueError: a size below 1, an unknown `combine`, no `part_size` where one
      is needed or one where none is; when parameters are made, a part that
      leaves nothing of the prompt to the other.

  Source: google-research/prompt-tuning
  `prompt_tuning/extended/multitask_prompts.py`, whose numbers the tests hold.
  There the first token of the input is the task and is cut off, and T[g] is one
  flat vector, for 'project' the transpose of W and then b.
  """

  length: int = 100
  num_tasks: int = 1
  combine: str = 'add'
  part_size: int | None = None
  shared_init: initializers.PromptInitializer = initializers.RandomUniform()
  task_init: initializers.PromptInitializer = initializers.RandomUniform()

  def __post_init__(self):
    if self.combine not in COMBINE:
      raise ValueError(
        f'MultitaskPrompt.combine must be one of {", ".join(COMBINE)}, got '
        f'{self.combine!r}.{deltas.near_misses(str(self.combine), COMBINE)}'
      )
    sizes = () if self.combine == 'add' else ('part_size',)
    if not sizes and self.part_size is not None:
      raise ValueError(
        "MultitaskPrompt.part_size must be None with combine='add', whose "
        f'parts are as large as the prompt; got {self.part_size!r}.'
      )
    projections.check_whole_numbers(self, 'length', 'num_tasks', *sizes)
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the prompts of all tasks on the token embedding."""
    width = context.config.emb_dim
    shape, own_shape = self._shapes(width)
    table = context.embedding

    def init_shared(rng: Any, shape: Any, dtype: Any) -> Any:
      found = self.shared_init(rng, shape, table[:, : shape[1]])
      return jnp.asarray(found, dtype)

    def init_own(rng: Any, shape: Any, dtype: Any) -> Any:
      found = [
        self.task_init(rng, shape[1:], table[:, -shape[2] :])
        for rng in jax.random.split(rng, shape[0])
      ]
      return jnp.asarray(jnp.stack(found), dtype)

    axes = ('prompt', 'prompt_embed')
    shared = layers.param(self, 'shared_prompt', init_shared, shape, axes)
    own_shape = (self.num_tasks, *own_shape)
    axes = ('task', *axes)
    own = layers.param(self, 'task_prompts', init_own, own_shape, axes)
    rows = self._combined(shared, own).reshape(1, -1, width)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _shapes(self, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Those of S and of T[g]."""
    if self.part_size is None:
      return (self.length, width), (self.length, width)
    n = self.part_size
    whole = self.length if self.combine == 'concat' else width
    if n >= whole:
      what = 'length' if self.combine == 'concat' else 'emb_dim'
      raise ValueError(
        f'MultitaskPrompt.part_size must be below the {what}, {whole}, with '
        f'combine={self.combine!r}; got {n}.'
      )
    if self.combine == 'concat':
      return (self.length - n, width), (n, width)
    if self.combine == 'concat_features':
      return (self.length, width - n), (self.length, n)
    return (self.length, n), (n + 1, width)

  def _combined(self, shared: Any, own: Any) -> Any:
    """The prompts of all tasks, [G, P, D]."""
    if self.combine == 'add':
      return shared + own
    if self.combine == 'project':
      return shared @ own[:, :-1] + own[:, -1:]
    shared = jnp.broadcast_to(shared, (len(own), *shared.shape))
    axis = 1 if self.combine == 'concat' else 2
    return jnp.concatenate([shared, own], axis)
