"""The parts of a T5 block that are not attention: Dense, Embed, Mlp, RMSNorm.

Parameters carry T5X's logical axis names; `partitioning.py` maps the names to
the mesh.  Not here: attention (`attention.py`) and the stacks (`t5.py`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_jax import deltas

Initializer = Callable[..., Array]

# T5X, t5x/examples/t5/layers.py: what each kernel is drawn from.
attention_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
dense_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and settings of a network; the names are those of T5X's T5Config.

  Attributes:
    vocab_size: V, rows of the embedding table (T5: 32128, more than the
      vocabulary's 32100 ids).
    emb_dim: D, width of the residual stream.
    num_heads: H.
    head_dim: K, width of one head. A field of its own: T5 1.1 small has
      H * K = 384 on D = 512.
    mlp_dim: F, inner width of the feed-forward block.
    num_encoder_layers: L of the encoder; 0 for a decoder-only network.
    num_decoder_layers: L of the decoder.
    mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
    logits_via_embedding: tie the output projection to the embedding and
      multiply the decoder's output by D ** -0.5 (T5 1.0).
    relpos_num_buckets: buckets of the relative position bias.
    relpos_max_distance: distance from which on all share the last bucket.
    dropout_rate: probability of zeroing; the mask is shared along the length.
    dtype: of the computation, 'float32' or 'bfloat16'. Softmax, norms and
      logits are float32 in either.
    scan_layers: stack the layers' parameters and trace one layer. Without it
      layers are `layers_0`, `layers_1`, ... as in T5X's minimal network.
    scan_unroll: layers in one iteration of the scan, 0 for all of them: the
      program is then a loop's, the parameters remain stacked. None, by what is
      faster (`benchmarks/README.md`): all on a CPU, one elsewhere.
    remat_policy: what the backward pass recomputes: 'none' nothing, 'minimal'
      all but products of activations with weights, 'full' each whole layer.
    attention_implementation: 'xla' or 'cudnn' of
      `jax.nn.dot_product_attention`; 'einsum', which is faster on a CPU; or
      'auto', which is 'einsum' on a CPU and 'xla' elsewhere.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: Sequence[str] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  relpos_num_buckets: int = 32
  relpos_max_distance: int = 128
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  scan_layers: bool = True
  scan_unroll: int | None = None
  remat_policy: str = 'none'
  attention_implementation: str = 'auto'

  def __post_init__(self):
    # gin hands over a list; a linen field must be hashable.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    for name in self.mlp_activations:
      _one_of('mlp_activations', name, deltas.ACTIVATIONS)
    _one_of('dtype', self.dtype, ('float32', 'bfloat16'))
    _one_of('remat_policy', self.remat_policy, ('none', 'minimal', 'full'))
    _one_of(
      'attention_implementation',
      self.attention_implementation,
      ('auto', 'xla', 'cudnn', 'einsum'),
    )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      low = 0 if field.name in ('num_encoder_layers', 'scan_unroll') else 1
      optional = field.type == int | None
      if field.type is not int and (not optional or value is None):
        continue
      if not (isinstance(value, int) and value >= low):
        raise ValueError(
          f'T5Config.{field.name} must be a whole number of at least {low}, '
          f'got {value!r}.'
        )
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(
        f'T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}.'
      )


def _one_of(field: str, value: str, allowed: Any) -> None:
  if value not in allowed:
    raise ValueError(
      f'T5Config.{field} must be one of {", ".join(allowed)}, got {value!r}.'
      f'{deltas.near_misses(str(value), allowed)}'
    )


def param(
  module: nn.Module,
  name: str,
  init: Initializer,
  shape: Sequence[int],
  axes: Sequence[str | None],
) -> Array:
  """A float32 parameter that knows the logical names of its axes."""
  # linen types the boxed initializer's result as the box, not as its array.
  boxed: Any = nn.with_logical_partitioning(init, tuple(axes))
  return module.param(name, boxed, tuple(shape), jnp.float32)


class Dense(nn.Module):
  """A projection without bias, `y = x W`; the first hook acts on it.

  Attributes:
    features: E, the output width.
    axes: logical names of W's two axes.
    kernel_init: how W is drawn.
  """

  features: int
  axes: tuple[str, str]
  kernel_init: Initializer = dense_init

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T E']:
    """Projects x."""
    shape = (x.shape[-1], self.features)
    kernel = param(self, 'kernel', self.kernel_init, shape, self.axes)
    return deltas.adapt_projection(self, x, kernel, product)


class Embed(nn.Module):
  """The token embedding; ids from V on are rows of a delta (second hook)."""

  config: T5Config

  def setup(self):
    """Makes the table."""
    c = self.config
    self.embedding = param(
      self,
      'embedding',
      nn.initializers.normal(1.0),
      (c.vocab_size, c.emb_dim),
      ('vocab', 'embed'),
    )

  def __call__(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    """Embeds tokens, soft ones too."""
    # A gather, not the one-hot product with which T5X shards the gradient of
    # a trained table: the table is frozen. An id beyond it becomes NaN.
    table = self.embedding.astype(self.config.dtype)

    def lookup(ids):
      return jnp.take(table, ids, axis=0)

    return deltas.adapt_embedding(
      self, lookup, jnp.asarray(tokens), self.config.vocab_size
    )

  def attend(self, y: Float[Array, 'B U D']) -> Float[Array, 'B U V']:
    """Logits by the tied table, `y D^-1/2 E^T` (T5 1.0), float32."""
    return float32_product(y * y.shape[-1] ** -0.5, self.embedding.T)


def product(
  x: Float[Array, 'B T D'], kernel: Float[Array, 'D E']
) -> Float[Array, 'B T E']:
  """`x W` in the dtype of x."""
  return x @ kernel.astype(x.dtype)


def float32_product(
  y: Float[Array, 'B U D'], kernel: Float[Array, 'D V']
) -> Float[Array, 'B U V']:
  """`y W` summed and returned in float32, whatever the kernel is kept in."""
  y = y.astype(kernel.dtype)
  return jnp.matmul(y, kernel, preferred_element_type=jnp.float32)


class LogitsDense(nn.Module):
  """The output projection of T5 1.1, `logits = y W` in float32."""

  config: T5Config

  @nn.compact
  def __call__(self, y: Float[Array, 'B U D']) -> Float[Array, 'B U V']:
    """Logits of y."""
    shape = (y.shape[-1], self.config.vocab_size)
    kernel = param(self, 'kernel', dense_init, shape, ('embed', 'vocab'))
    return deltas.adapt_projection(self, y, kernel, float32_product)


class RMSNorm(nn.Module):
  """`y = x / sqrt(mean(x^2) + 1e-6) * scale`; the mean in float32."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """Normalises x."""
    ones = nn.initializers.ones
    scale = param(self, 'scale', ones, (x.shape[-1],), ('embed',))
    x32 = x.astype(jnp.float32)
    mean2 = jnp.mean(jax.lax.square(x32), axis=-1, keepdims=True)
    y = (x32 * jax.lax.rsqrt(mean2 + 1e-6)).astype(x.dtype)
    return y * scale.astype(x.dtype)


def dropout(config: T5Config, deterministic: bool) -> nn.Dropout:
  """T5X's dropout: one mask for all positions of a sequence."""
  return nn.Dropout(config.dropout_rate, (-2,), deterministic)


class Mlp(nn.Module):
  """The feed-forward block, `(act_0(x W_0) * act_1(x W_1) ...) W_o`."""

  config: T5Config
  deterministic: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """Applies the block to x."""
    c = self.config
    gates = []
    for i, name in enumerate(c.mlp_activations):
      dense = 'wi' if len(c.mlp_activations) == 1 else f'wi_{i}'
      h = Dense(c.mlp_dim, ('embed', 'mlp'), name=dense)(x)
      gates.append(deltas.ACTIVATIONS[name](h))
    h = functools.reduce(jnp.multiply, gates)
    h = nn.with_logical_constraint(h, ('batch', 'length', 'mlp'))
    h = dropout(c, self.deterministic)(h)
    y = Dense(c.emb_dim, ('mlp', 'embed'), name='wo')(h)
    return deltas.adapt_sublayer(self, x, y)
