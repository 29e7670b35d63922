"""ATTEMPT (Asai et al. 2022): a mixture of source prompts for each input."""

from collections.abc import Sequence
import math
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import saved_prompts
from prompt_jax.network import layers

_EPSILON = 1e-5  # of the layer norm, PyTorch's


class Attempt(nn.Module):
  """The target's prompt plus frozen source prompts, weighted by the input.

  For an input x and prompts P_1 .. P_S of source tasks and P_t of its own:

      x^ = max over the text's tokens of Emb(x);  p_j = max over rows of P_j
      h = LayerNorm(SiLU(x^ down) up)
      a = softmax over j = 1 .. S, t of p_j . h / T
      prompt(x) = P_t + a_1 P_1 + ... + a_S P_S + a_t P_t

  with down [D, M] and up [M, D]. Padding and soft tokens are no text (the
  released code takes padding into the maximum). Of several target tasks each
  has a P_t of its own, by `task_ids`; the rest they share.

  Attributes:
    sources: the source prompts: files (`saved_prompts`) or initializers.
    length: P, soft tokens.
    num_tasks: G, target tasks.
    hidden_dim: M.
    temperature: T; None for e D, which is the released 2087 at D = 768.
    prompt_init: initial value of P_t.

  Raises:
    ValueError: no source; a length, number of tasks or hidden_dim below 1; a
      temperature that is not above 0. When called: a source of another shape,
      base or vocabulary than the others; packed rows, whose examples would need
      prompts each; exporting, since the prompt depends on the input.

  Source: Asai et al. 2022, arXiv 2205.11961, section 3; checked against
  AkariAsai/ATTEMPT `attempt/third_party/models/t5/modeling_t5.py`.
  """

  sources: Sequence[str | initializers.PromptInitializer]
  length: int = 100
  num_tasks: int = 1
  hidden_dim: int = 100
  temperature: float | None = None
  prompt_init: initializers.PromptInitializer = initializers.SampledVocab()

  def __post_init__(self):
    for field in ('length', 'num_tasks', 'hidden_dim'):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'Attempt.{field} must be a whole number of at least 1, got '
          f'{value!r}.'
        )
    if isinstance(self.sources, str) or not self.sources:
      raise ValueError(
        'Attempt.sources must be a list of at least one source prompt, got '
        f'{self.sources!r}.'
      )
    t = self.temperature
    number = isinstance(t, int | float) and math.isfinite(t)
    if t is not None and not (number and t > 0):
      raise ValueError(
        f'Attempt.temperature must be None or a number above 0, got {t!r}.'
      )
    super().__post_init__()

  @property
  def soft_tokens(self) -> tuple[int, int]:
    """(groups, rows of one group): rows are each example's, so there is one."""
    return 1, self.length

  @property
  def source_files(self) -> tuple[str, ...]:
    """Those of which the run checks base and vocabulary."""
    return tuple(s for s in self.sources if isinstance(s, str))

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays each example's prompt on the token embedding."""
    if context.packed:
      raise ValueError(
        'ATTEMPT makes a prompt for each input, so it is not for packed rows, '
        'which hold several: set PACK = False.'
      )
    if context.exporting:
      raise ValueError(
        'ATTEMPT cannot be exported: it makes a prompt for each input. Keep '
        'trainable.safetensors and the source prompts.'
      )
    width = context.config.emb_dim
    sources = self.variable('constants', 'sources', self._read, context).value
    target = self._target(context)
    shape, axes = (width, self.hidden_dim), ('prompt_embed', 'adapter_mid')
    # As the released code draws its added layers.
    init = nn.initializers.normal(0.01)
    down = layers.param(self, 'down', init, shape, axes)
    up = layers.param(self, 'up', init, shape[::-1], axes[::-1])
    one, zero = nn.initializers.ones, nn.initializers.zeros
    scale = layers.param(self, 'norm_scale', one, (width,), ('prompt_embed',))
    shift = layers.param(self, 'norm_bias', zero, (width,), ('prompt_embed',))
    if context.tokens is None:  # parameters are being made
      return {}
    if self.num_tasks > 1:
      if context.task_ids is None:
        raise ValueError(
          f'Attempt keeps {self.num_tasks} tasks apart, but the batch has no '
          '`task_ids` [B]. Give the tasks a `task_ids` feature.'
        )
      target = jnp.take(target, context.task_ids, axis=0)
    text = (context.tokens > 0) & (context.tokens < context.embedding.shape[0])
    x = jnp.take(context.embedding, jnp.where(text, context.tokens, 0), axis=0)
    h = nn.silu(_maximum(x.astype(jnp.float32), text) @ down) @ up
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(variance + _EPSILON) * scale + shift
    temperature = self.temperature or math.e * width
    sources = sources.astype(jnp.float32)
    rows = mixture(attention(h, sources, target, temperature), sources, target)
    return {f'{context.embedder}/rows': deltas.Routed(rows)}

  def _target(self, context: base.Context) -> Float[Array, '*G P D']:
    """The target's prompt, or those of all target tasks."""
    shape: tuple[int, ...] = (self.length, context.config.emb_dim)
    axes: tuple[str, ...] = ('prompt', 'prompt_embed')

    def one(rng: Any) -> Any:
      prompt = self.prompt_init(rng, shape[-2:], context.embedding)
      return jnp.asarray(prompt, jnp.float32)

    def init(rng: Any, shape: Any, dtype: Any) -> Any:
      if self.num_tasks == 1:
        return one(rng)
      return jnp.stack([one(r) for r in jax.random.split(rng, shape[0])])

    if self.num_tasks > 1:
      shape, axes = (self.num_tasks, *shape), ('task', *axes)
    return layers.param(self, 'prompt', init, shape, axes)

  def _read(self, context: base.Context) -> Float[Array, 'S P D']:
    """The source prompts."""
    shape = (self.length, context.config.emb_dim)
    files = [source for source in self.sources if isinstance(source, str)]
    if files:
      saved_prompts.check_alike([saved_prompts.read(path) for path in files])
    else:
      logging.warning('ATTEMPT: none of the sources is the file of a prompt.')
    found = []
    for i, source in enumerate(self.sources):
      if isinstance(source, str):
        prompts = saved_prompts.read(source).prompts
      else:
        prompts = source(jax.random.PRNGKey(i), shape, context.embedding)[None]
      if prompts.shape[1:] != shape:
        raise ValueError(
          f'{source}: the prompt has shape {prompts.shape[1:]}, expected '
          f'{shape} (prompt length, emb_dim of the network).'
        )
      found.append(jnp.asarray(prompts, jnp.float32))
    return jnp.concatenate(found)


def attention(
  h: Float[Array, 'B D'],
  sources: Float[Array, 'S P D'],
  target: Float[Array, '*B P D'],
  temperature: float,
) -> Float[Array, 'B S+1']:
  """How much of each source, and last of the target, an input takes."""
  keys = jnp.max(sources, axis=1)
  own = jnp.sum(h * jnp.max(target, axis=-2), axis=-1, keepdims=True)
  scores = jnp.concatenate([h @ keys.T, own], axis=-1)
  return jax.nn.softmax(scores / temperature)


def mixture(
  a: Float[Array, 'B S+1'],
  sources: Float[Array, 'S P D'],
  target: Float[Array, '*B P D'],
) -> Float[Array, 'B P D']:
  """`target + sum_j a_j P_j`, in which the target counts twice."""
  mixed = jnp.einsum('bs,spd->bpd', a[:, :-1], sources, precision='highest')
  return (1.0 + a[:, -1, None, None]) * target + mixed


def _maximum(
  x: Float[Array, 'B T D'], text: Bool[Array, 'B T']
) -> Float[Array, 'B D']:
  """The maximum over what is text; 0 for a row of padding."""
  x = jnp.max(jnp.where(text[..., None], x, -jnp.inf), axis=1)
  return jnp.where(jnp.any(text, axis=1)[:, None], x, 0.0)
