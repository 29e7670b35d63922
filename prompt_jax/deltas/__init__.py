"""Deltas: what a method lays on the frozen network (see `hooks.py`)."""

from prompt_jax.deltas.algebra import OwnScale
from prompt_jax.deltas.algebra import check
from prompt_jax.deltas.algebra import collection
from prompt_jax.deltas.algebra import combine
from prompt_jax.deltas.algebra import merge_into_weights
from prompt_jax.deltas.algebra import near_misses
from prompt_jax.deltas.algebra import repeat
from prompt_jax.deltas.hooks import ACTIVATIONS
from prompt_jax.deltas.hooks import KINDS
from prompt_jax.deltas.hooks import Adapter
from prompt_jax.deltas.hooks import Deltas
from prompt_jax.deltas.hooks import Routed
from prompt_jax.deltas.hooks import adapt_embedding
from prompt_jax.deltas.hooks import adapt_keys_values
from prompt_jax.deltas.hooks import adapt_layer_input
from prompt_jax.deltas.hooks import adapt_projection
from prompt_jax.deltas.hooks import adapt_sublayer
from prompt_jax.deltas.hooks import slots_before_text

__all__ = [
  'ACTIVATIONS',
  'KINDS',
  'Adapter',
  'Deltas',
  'OwnScale',
  'Routed',
  'adapt_embedding',
  'adapt_keys_values',
  'adapt_layer_input',
  'adapt_projection',
  'adapt_sublayer',
  'check',
  'collection',
  'combine',
  'merge_into_weights',
  'near_misses',
  'repeat',
  'slots_before_text',
]
