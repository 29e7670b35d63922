"""Deep hidden prompts: soft tokens of its own in front of every encoder layer.

The hidden form of P-tuning v2 (Liu et al. 2021), between prompt tuning and
prefix tuning: the values go through the frozen projections.
"""

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import projections

_COMBINE = ('replace', 'add')


class HiddenPrompt(nn.Module):
  """At soft token j the input of layer l is P_l[j], or has it added.

  Soft tokens are those of the data, wherever they stand in the encoder's input
  (see `SoftPrompt`), so that packed rows and mixed tasks need nothing more.
  Their embeddings are zeros, not trained: `replace` overwrites what stands in
  front of the first layer, and `add` adds to it, where one of the two is
  enough. That makes L P D numbers. The reference has (L + 1) P D: of its prompt
  at the embedding `replace` makes no use (its gradient is 0), and in `add` it
  is the sum with that of the first layer that counts.

  Attributes:
    length: P, soft tokens of one task.
    combine: 'replace' or 'add'.
    num_tasks: G, prompts kept apart; an example of task g uses prompt g.
    prompt_init: initial value of one layer's prompt [P, D].

  Raises:
    ValueError: an attribute is out of its range; when called, the network has
      no encoder, or the deltas are to be exported.

  Source: Liu et al. 2021, arXiv 2110.07602, and for `add` Qin & Eisner 2021,
  arXiv 2104.06599 (as known from the papers); checked against
  google-research/prompt-tuning `prompt_tuning/extended/train/per_layer.py`.
  """

  length: int = 20
  combine: str = 'replace'
  num_tasks: int = 1
  prompt_init: initializers.PromptInitializer = initializers.RandomUniform()

  def __post_init__(self):
    projections.check_whole_numbers(self, 'length', 'num_tasks')
    if self.combine not in _COMBINE:
      raise ValueError(
        f"HiddenPrompt.combine must be 'replace' or 'add', got "
        f'{self.combine!r}.{deltas.near_misses(str(self.combine), _COMBINE)}'
      )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group), for the data side."""
    return self.num_tasks, self.length

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays the prompts on the layers' inputs."""
    c = context.config
    if not c.num_encoder_layers:
      raise ValueError(
        'HiddenPrompt acts on the layers of an encoder, and a decoder-only '
        'network has none. Take PrefixTuning.'
      )
    if context.exporting:
      raise ValueError(
        'HiddenPrompt acts where the soft tokens stand in the inputs, so it '
        'cannot be exported; its trainable.safetensors is what it needs.'
      )
    prompts = self._prompts(context)
    rows = self.num_tasks * self.length
    out = {
      f'{context.embedder}/rows': deltas.Routed(jnp.zeros((1, rows, c.emb_dim)))
    }
    if context.tokens is None:  # parameters are being made
      return out
    row = jnp.asarray(context.tokens) - context.first_soft_id
    group = jnp.where((row >= 0) & (row < rows), row + 1, 0)
    for path, prompt in prompts.items():
      lead = prompt.shape[:1] if c.scan_layers else ()
      value = prompt.reshape(*lead, rows, c.emb_dim)
      # Row 0 is of all other positions, whose x stays: x * 1 + 0.
      value = jnp.concatenate([jnp.zeros_like(value[..., :1, :]), value], -2)
      gate = jnp.ones((*lead, rows + 1, 1))
      if self.combine == 'replace':
        gate = gate.at[..., 1:, :].set(0)
      out[f'{path}/hidden'] = deltas.Routed(
        (gate, value), jnp.broadcast_to(group, (*lead, *group.shape))
      )
    return out

  def _prompts(self, context: base.Context) -> dict[str, Any]:
    """Path -> P_l, [(L,) (G,) P, D] each, which are parameters."""
    c = context.config
    shape: tuple[int, ...] = (self.length, c.emb_dim)
    axes: tuple[str, ...] = ('prompt', 'prompt_embed')
    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
    paths = [f'encoder/layers_{i}' for i in range(c.num_encoder_layers)]
    if c.scan_layers:
      paths = ['encoder/layers']
      shape, axes = (c.num_encoder_layers, *shape), ('layers', *axes)

    def draw(rng: Any, shape: tuple[int, ...], dtype: Any) -> Any:
      one = shape[-2:]
      rngs = jax.random.split(rng, math.prod(shape[:-2]))
      each = [self.prompt_init(r, one, context.embedding) for r in rngs]
      return jnp.stack(each).reshape(shape).astype(dtype)

    own = base.params_at(
      self, {f'{path}/prompt': (draw, shape, axes) for path in paths}
    )
    return {path: own[f'{path}/prompt'] for path in paths}
