"""A narrow T5 whose layers read those of a wide one: LST's side network.

Its parameters have the names of the wide one's, beside `down` (D_0 and D_i),
`up` (U) and `alpha` (the gates); its embedding and its output projection are
the wide one's own. The equation is in `ladder.py`. The wide one's outputs h_i
come in the collection `intermediates`, at the paths of the layers here.
"""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_jax.network import attention
from prompt_jax.network import decoder_only
from prompt_jax.network import layers
from prompt_jax.network import t5
from prompt_jax.network.layers import T5Config

# As the reference draws its linear layers, far from what a kernel's width asks.
_linear_init = nn.initializers.normal(0.01)
_DOWN, _UP = ('embed', 'adapter_mid'), ('adapter_mid', 'embed')


class Linear(nn.Module):
  """`y = x W + b`, between the widths of the two networks."""

  features: int
  axes: tuple[str, str]

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T E']:
    """Projects x."""
    shape = (x.shape[-1], self.features)
    kernel = layers.param(self, 'kernel', _linear_init, shape, self.axes)
    zeros = nn.initializers.zeros
    bias = layers.param(self, 'bias', zeros, shape[1:], self.axes[1:])
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _step_up(module: Any, s: Float[Array, 'B T E']) -> Float[Array, 'B T E']:
  """`g s + (1 - g) D(h)`, h being what the frozen layer has put out."""
  h = module.get_variable('intermediates', 'hidden')
  alpha = layers.param(module, 'alpha', nn.initializers.zeros, (), ())
  gate = nn.sigmoid(alpha / module.temperature).astype(s.dtype)
  return gate * s + (1 - gate) * Linear(s.shape[-1], _DOWN, name='down')(h)


class _BehindGate(nn.Module, kw_only=True):
  """What makes a T5 layer one of the side network; `shared` is the layer's."""

  temperature: float

  @nn.compact
  def __call__(self, x: Float[Array, 'B T E'], *shared: Any):
    layer: Any = super()  # the next class of the two that it is mixed into
    return layer.__call__(_step_up(self, x), *shared)


class SideEncoderLayer(_BehindGate, t5.EncoderLayer):
  """An encoder layer behind its gate."""


class SideDecoderLayer(_BehindGate, t5.DecoderLayer):
  """A decoder layer behind its gate."""


class SideEncoder(t5.Encoder, kw_only=True):
  """As `t5.Encoder`, of another width than its embedding.

  Attributes:
    side: sizes of the side network; `config` is the frozen one's.
    temperature: of the gates.
  """

  side: T5Config
  temperature: float

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T E']:
    """The output of each position; zeros where there is padding."""
    c, length = self.side, tokens.shape[1]
    drop = layers.dropout(c, self.deterministic)
    x = drop(self.shared_embedding(tokens))
    x = Linear(c.emb_dim, _DOWN, name='down')(x)
    bias = attention.RelativePositionBias(
      c, bidirectional=True, name='relpos_bias'
    )(length, length)
    x = t5.run_layers(
      SideEncoderLayer,
      c,
      c.num_encoder_layers,
      x,
      bias,
      t5.encoder_mask(tokens, segment_ids, segment_ids),
      deterministic=self.deterministic,
      temperature=self.temperature,
    )
    x = drop(layers.RMSNorm(name='encoder_norm')(x))
    return jnp.where((tokens > 0)[:, :, None], x, jnp.zeros((), x.dtype))


class SideDecoder(t5.Decoder, kw_only=True):
  """As `t5.Decoder`, of another width than its embedding and its logits.

  Attributes:
    side: sizes of the side network; `config` is the frozen one's.
    temperature: of the gates.
  """

  side: T5Config
  temperature: float

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B U'],
    mask: Any,
    encoded: Float[Array, 'B T E'] | None = None,
    cross_mask: Any = None,
    position: Any = None,
    keep: Any = None,
  ) -> Float[Array, 'B U V']:
    """Logits for the token after each of `tokens`; arguments as there."""
    c = self.side
    embedder = self.shared_embedding
    if embedder is None:
      embedder = layers.Embed(self.config, name='token_embedder')
    drop = layers.dropout(c, self.deterministic)
    x = Linear(c.emb_dim, _DOWN, name='down')(drop(embedder(tokens)))
    bias = attention.RelativePositionBias(
      c, bidirectional=False, name='relpos_bias'
    )(tokens.shape[1], mask.shape[-1], 0 if position is None else position)
    x = t5.run_layers(
      SideDecoderLayer,
      c,
      c.num_decoder_layers,
      x,
      bias,
      mask,
      encoded,
      cross_mask,
      position,
      keep,
      deterministic=self.deterministic,
      decode_length=self.decode_length,
      temperature=self.temperature,
    )
    x = drop(layers.RMSNorm(name='decoder_norm')(x))
    y = Linear(self.config.emb_dim, _UP, name='up')(x)
    if self.config.logits_via_embedding:
      logits = embedder.attend(y)
    else:
      logits = layers.LogitsDense(self.config, name='logits_dense')(y)
    return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))


class SideT5(t5.T5, kw_only=True):
  """T5 with the stacks above: what calls them stays."""

  side: T5Config
  temperature: float

  def setup(self):
    """Makes the two stacks over the frozen network's embedding."""
    c, deterministic = self.config, self.deterministic
    own = {'side': self.side, 'temperature': self.temperature}
    self.token_embedder = layers.Embed(c)
    self.encoder = SideEncoder(c, self.token_embedder, deterministic, **own)
    self.decoder = SideDecoder(
      c, self.token_embedder, deterministic, self.decode_length, **own
    )


class SideDecoderOnly(decoder_only.DecoderOnly, kw_only=True):
  """A decoder-only network with the stack above."""

  side: T5Config
  temperature: float

  def setup(self):
    """Makes the stack."""
    self.decoder = SideDecoder(
      self.config,
      None,
      self.deterministic,
      self.decode_length,
      side=self.side,
      temperature=self.temperature,
    )
