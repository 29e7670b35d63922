"""T5: encoder, decoder, and both together, with T5X's parameter names.

A reader who knows T5X's `t5x/examples/t5/network.py` finds its modules here,
with three differences: layers are scanned by default while the relative
position bias is computed once a stack, outside the scan; an id from V on is a
soft token (see `deltas.py`); and cross-attention keys are cached in decoding.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prompt_jax import deltas
from prompt_jax.network import attention
from prompt_jax.network import layers
from prompt_jax.network.layers import T5Config

__all__ = ['T5', 'Decoder', 'Encoder', 'T5Config']

_REMAT = {
  'minimal': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


def _hidden(x: Array) -> Array:
  return nn.with_logical_constraint(x, ('batch', 'length', 'embed'))


class EncoderLayer(nn.Module):
  """`x + Attention(Norm(x))`, then `x + Mlp(Norm(x))`."""

  config: T5Config
  deterministic: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D'], bias: Any, mask: Any):
    drop = layers.dropout(self.config, self.deterministic)
    x = deltas.adapt_layer_input(self, x)
    h = layers.RMSNorm(name='pre_attention_layer_norm')(x)
    h = attention.Attention(self.config, self.deterministic, name='attention')(
      h, None, bias, mask
    )
    x = _hidden(x + drop(h))
    h = layers.RMSNorm(name='pre_mlp_layer_norm')(x)
    h = layers.Mlp(self.config, self.deterministic, name='mlp')(h)
    x = _hidden(x + drop(h))
    _sow_hidden(self, x)
    return x, None


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention if there is an encoder, Mlp."""

  config: T5Config
  deterministic: bool = True
  decode_length: int = 0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B U D'],
    bias: Any,
    mask: Any,
    encoded: Any,
    cross_mask: Any,
    position: Any,
    keep: Any,
  ):
    c, deterministic = self.config, self.deterministic
    drop = layers.dropout(c, deterministic)
    h = layers.RMSNorm(name='pre_self_attention_layer_norm')(x)
    h = attention.Attention(
      c, deterministic, self.decode_length, name='self_attention'
    )(h, None, bias, mask, position, keep)
    x = _hidden(x + drop(h))
    if encoded is not None:
      h = layers.RMSNorm(name='pre_cross_attention_layer_norm')(x)
      h = attention.Attention(
        c, deterministic, name='encoder_decoder_attention'
      )(h, encoded, None, cross_mask, position)
      x = _hidden(x + drop(h))
    h = layers.RMSNorm(name='pre_mlp_layer_norm')(x)
    x = _hidden(x + drop(layers.Mlp(c, deterministic, name='mlp')(h)))
    _sow_hidden(self, x)
    return x, None


def _sow_hidden(module: Any, x: Array) -> None:
  """Hands the layer's output to whoever asks for `intermediates`."""
  module.sow(
    'intermediates',
    'hidden',
    x,
    reduce_fn=lambda _, new: new,
    init_fn=lambda: None,
  )


def run_layers(layer: Any, config: T5Config, length: int, x, *shared, **kw):
  """X through `length` layers, scanned or in a loop; `shared` goes to all."""
  if config.remat_policy != 'none':
    layer = nn.remat(
      layer,
      policy=_REMAT[config.remat_policy],
      prevent_cse=not config.scan_layers,
    )
  if not config.scan_layers:
    for i in range(length):
      x, _ = layer(config, **kw, name=f'layers_{i}')(x, *shared)
    return x
  unroll = config.scan_unroll
  if unroll is None:
    unroll = 0 if jax.default_backend() == 'cpu' else 1
  broadcast: Any = nn.broadcast  # its type says int
  scanned: Any = nn.scan(
    layer,
    variable_axes=dict.fromkeys(
      ('params', 'deltas', 'cache', 'intermediates'), 0
    ),
    split_rngs={'params': True, 'dropout': True},
    in_axes=broadcast,
    length=length,
    unroll=unroll or length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return scanned(config, **kw, name='layers')(x, *shared)[0]


class Encoder(nn.Module):
  """The encoder's layers between embedding and final norm."""

  config: T5Config
  shared_embedding: layers.Embed
  deterministic: bool = True

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T D']:
    """The output of each position; zeros where there is padding."""
    c, length = self.config, tokens.shape[1]
    drop = layers.dropout(c, self.deterministic)
    mask = encoder_mask(tokens, segment_ids, segment_ids)
    x = drop(_hidden(self.shared_embedding(tokens)))
    bias = attention.RelativePositionBias(
      c, bidirectional=True, name='relpos_bias'
    )(length, length)
    x = run_layers(
      EncoderLayer,
      c,
      c.num_encoder_layers,
      x,
      bias,
      mask,
      deterministic=self.deterministic,
    )
    x = drop(layers.RMSNorm(name='encoder_norm')(x))
    # As flaxformer does: an example that is all padding has a defined output.
    return jnp.where((tokens > 0)[:, :, None], x, jnp.zeros((), x.dtype))


class Decoder(nn.Module):
  """The decoder from token ids to logits; with or without an encoder.

  Attributes:
    config: of the network.
    shared_embedding: the encoder's token embedding, or None: one of its own.
    deterministic: no dropout.
    decode_length: positions of the cache; 0 when not decoding.
  """

  config: T5Config
  shared_embedding: layers.Embed | None = None
  deterministic: bool = True
  decode_length: int = 0

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B U'],
    mask: Bool[Array, '#B 1 U S'],
    encoded: Float[Array, 'B T D'] | None = None,
    cross_mask: Any = None,
    position: Any = None,
    keep: Any = None,
  ) -> Float[Array, 'B U V']:
    """Logits for the token after each of `tokens`.

    Args:
      tokens: ids, from the decoder's start (0) on; soft tokens from V on.
      mask: True where a query (U) may see a key (S).
      encoded: the encoder's output, if there is an encoder.
      cross_mask: True where a query may see an encoder position.
      position: None, or in decoding where `tokens` stand; the collection
        `cache` then holds the keys and values of what came before.
      keep: None, or in decoding True for examples whose cache stays, [B].
    """
    c = self.config
    embedder = self.shared_embedding
    if embedder is None:
      embedder = layers.Embed(c, name='token_embedder')
    drop = layers.dropout(c, self.deterministic)
    x = drop(_hidden(embedder(tokens)))
    bias = attention.RelativePositionBias(
      c, bidirectional=False, name='relpos_bias'
    )(tokens.shape[1], mask.shape[-1], 0 if position is None else position)
    x = run_layers(
      DecoderLayer,
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
    )
    x = drop(layers.RMSNorm(name='decoder_norm')(x))
    if c.logits_via_embedding:
      logits = embedder.attend(x)
    else:
      logits = layers.LogitsDense(c, name='logits_dense')(x)
    return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))


def encoder_mask(
  tokens: Int[Array, 'B T'],
  query_segments: Int[Array, 'B U'] | None,
  key_segments: Int[Array, 'B T'] | None,
) -> Bool[Array, 'B 1 #U T']:
  """True at keys that are no padding and, if packed, of the same example."""
  mask = (jnp.asarray(tokens) > 0)[:, None, None, :]
  if query_segments is None or key_segments is None:
    return mask
  same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
  return mask & same


def decoder_mask(
  length: int,
  segment_ids: Int[Array, 'B U'] | None = None,
  causal_attention: Int[Array, 'B U'] | None = None,
) -> Bool[Array, '#B 1 U U']:
  """True at keys that are not later and, if packed, of the same example.

  Padding stands after the text, so that causality hides it already.

  Args:
    length: U.
    segment_ids: which packed example each position belongs to.
    causal_attention: 1 at the inputs of a prefix language model, which see
      each other in both directions (seqio's `decoder_causal_attention`).
  """
  mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
  if causal_attention is not None:
    inputs = causal_attention.astype(bool)
    mask = mask | (inputs[:, None, :, None] & inputs[:, None, None, :])
  if segment_ids is not None:
    query, key = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
    mask = mask & (query == key)
  return mask


class T5(nn.Module):
  """T5 1.0 and 1.1.

  Source: Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202
  (gated activations of 1.1); checked against google-research/t5x
  `t5x/examples/t5/network.py` and google/flaxformer.
  """

  config: T5Config
  deterministic: bool = True
  decode_length: int = 0

  def setup(self):
    """Makes the two stacks over one embedding."""
    c = self.config
    self.token_embedder = layers.Embed(c)
    self.encoder = Encoder(c, self.token_embedder, self.deterministic)
    self.decoder = Decoder(
      c, self.token_embedder, self.deterministic, self.decode_length
    )

  def encode(
    self,
    encoder_input_tokens: Int[Array, 'B T'],
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T D']:
    """The encoder's output, soft tokens' positions included."""
    return self.encoder(encoder_input_tokens, encoder_segment_ids)

  def decode(
    self,
    encoded: Float[Array, 'B T D'],
    encoder_input_tokens: Int[Array, 'B T'],
    decoder_input_tokens: Int[Array, 'B U'],
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
    decoder_segment_ids: Int[Array, 'B U'] | None = None,
  ) -> Float[Array, 'B U V']:
    """Logits of all target positions at once."""
    return self.decoder(
      decoder_input_tokens,
      decoder_mask(decoder_input_tokens.shape[1], decoder_segment_ids),
      encoded,
      encoder_mask(
        encoder_input_tokens, decoder_segment_ids, encoder_segment_ids
      ),
    )

  def decode_step(
    self,
    encoded: Float[Array, 'B T D'],
    encoder_input_tokens: Int[Array, 'B T'],
    tokens: Int[Array, 'B 1'],
    position: Any,
  ) -> Float[Array, 'B 1 V']:
    """Logits after one more token; keys and values are in `cache`.

    With an empty `cache` (mutable) it is made; `encoded` is read only then.
    """
    seen = jnp.arange(self.decode_length) <= position
    mask = jnp.broadcast_to(
      seen[None, None, None], (tokens.shape[0], 1, 1, self.decode_length)
    )
    cross = encoder_mask(encoder_input_tokens, None, None)
    return self.decoder(tokens, mask, encoded, cross, position)

  def __call__(
    self,
    encoder_input_tokens: Int[Array, 'B T'],
    decoder_input_tokens: Int[Array, 'B U'],
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
    decoder_segment_ids: Int[Array, 'B U'] | None = None,
  ) -> Float[Array, 'B U V']:
    """Logits [B, U, V] for the token after each decoder input token."""
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
    )
