"""Models: a network, a method laid on it, and the loss."""

from prompt_jax.models.decoder_only import DecoderOnlyModel
from prompt_jax.models.encoder_decoder import Batch
from prompt_jax.models.encoder_decoder import EncoderDecoderModel
from prompt_jax.models.encoder_decoder import greedy

__all__ = ['Batch', 'DecoderOnlyModel', 'EncoderDecoderModel', 'greedy']
