"""A decoder-only T5X-style language model: T5's decoder without the encoder."""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_jax.network import t5
from prompt_jax.network.layers import T5Config


class DecoderOnly(nn.Module):
  """A (prefix) language model; all parameters are under `decoder`.

  Source: checked against google-research/t5x
  `t5x/examples/decoder_only/network.py` (names, tied and rescaled logits in
  its base configuration).
  """

  config: T5Config
  deterministic: bool = True
  decode_length: int = 0

  def setup(self):
    """Makes the stack."""
    self.decoder = t5.Decoder(
      self.config, None, self.deterministic, self.decode_length
    )

  def prefill(
    self,
    tokens: Int[Array, 'B U'],
    causal_attention: Int[Array, 'B U'] | None = None,
  ) -> Float[Array, 'B U V']:
    """Logits of all positions; their keys and values go into `cache`."""
    mask = self._mask(tokens, None, causal_attention)
    return self.decoder(tokens, mask, position=0)

  def decode_step(
    self,
    prefix_length: Int[Array, 'B'],
    tokens: Int[Array, 'B 1'],
    position: Any,
  ) -> Float[Array, 'B 1 V']:
    """Logits after one more token; keys and values are in `cache`.

    Those of an example's first `prefix_length` positions stay as `prefill`
    has put them.
    """
    seen = jnp.arange(self.decode_length) <= position
    mask = jnp.broadcast_to(
      seen[None, None, None], (tokens.shape[0], 1, 1, self.decode_length)
    )
    keep = position < prefix_length
    return self.decoder(tokens, mask, position=position, keep=keep)

  def _mask(self, tokens: Any, segment_ids: Any, causal_attention: Any) -> Any:
    mask = t5.decoder_mask(tokens.shape[1], segment_ids, causal_attention)
    return jnp.broadcast_to(mask, (tokens.shape[0], *mask.shape[1:]))

  def __call__(
    self,
    decoder_input_tokens: Int[Array, 'B U'],
    decoder_segment_ids: Int[Array, 'B U'] | None = None,
    decoder_causal_attention: Int[Array, 'B U'] | None = None,
  ) -> Float[Array, 'B U V']:
    """Logits [B, U, V] for the token after each input token."""
    mask = self._mask(
      decoder_input_tokens, decoder_segment_ids, decoder_causal_attention
    )
    return self.decoder(decoder_input_tokens, mask)
