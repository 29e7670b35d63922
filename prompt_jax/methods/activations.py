"""Keys and values of the frozen network, and prefixes that start at them."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.network import decoder_only
from prompt_jax.network import t5
from prompt_jax.network.layers import T5Config

# Where a prefix may stand: the stack, and the attention in each of its layers.
ATTENTIONS = {
  'encoder_self': ('encoder', 'attention'),
  'decoder_self': ('decoder', 'self_attention'),
  'cross': ('decoder', 'encoder_decoder_attention'),
}
KeysValues = tuple[Any, Any]


def num_layers(config: T5Config, attention: str) -> int:
  """L of the attention's stack; 0 where the network has no such attention."""
  if not config.num_encoder_layers and attention != 'decoder_self':
    return 0
  if attention == 'encoder_self':
    return config.num_encoder_layers
  return config.num_decoder_layers


def paths(config: T5Config, attention: str) -> list[str]:
  """The attention's modules: one of all scanned layers, or one a layer."""
  stack, name = ATTENTIONS[attention]
  layers = num_layers(config, attention)
  if config.scan_layers:
    return [f'{stack}/layers/{name}'] if layers else []
  return [f'{stack}/layers_{i}/{name}' for i in range(layers)]


@functools.partial(jax.jit, static_argnums=0)
def keys_and_values(
  config: T5Config, params: Any, inputs: Any, targets: Any
) -> dict[str, KeysValues]:
  """What each attention of the frozen network reads of some tokens.

  Args:
    config: of the network.
    params: all parameters of the network.
    inputs: what the encoder reads, ids [B, T]; of no matter where there is
      none.
    targets: what the decoder reads, from its position 0 on, ids [B, U].

  Returns:
    attention -> float32 keys and values, [L, B, T or U, H, K] each.
  """
  config = dataclasses.replace(config, dtype='float32', remat_policy='none')
  if config.num_encoder_layers:
    network, tokens = t5.T5(config), (inputs, targets)
  else:
    network, tokens = decoder_only.DecoderOnly(config), (targets,)
  _, state = network.apply(
    {'params': params},
    *tokens,
    capture_intermediates=lambda module, _: module.name in ('key', 'value'),
    mutable=['intermediates'],
  )
  found = train_state.flatten(state['intermediates'])

  def collect(attention: str, name: str) -> Any:
    layers = [
      found[f'{path}/{name}/__call__'][0] for path in paths(config, attention)
    ]
    x = layers[0] if config.scan_layers else jnp.stack(layers)
    return x.reshape(*x.shape[:-1], config.num_heads, config.head_dim)

  return {
    attention: (collect(attention, 'key'), collect(attention, 'value'))
    for attention in ATTENTIONS
    if num_layers(config, attention)
  }


@dataclasses.dataclass(frozen=True)
class RealActivations:
  """A prefix starts at the keys and values of a text in the frozen network.

  The encoder's and the cross-attention's are those of `text`, the decoder's
  those of `target_text`, each cut at the prefix's length with a warning.

  Attributes:
    text: what the encoder reads.
    vocabulary: a seqio vocabulary.
    target_text: what the decoder reads; None for `text`.
    fit_steps: with the MLP, steps of Adam on the mean squared error.
    fit_learning_rate: of those steps.

  Raises:
    ValueError: no text, steps below 1, or a rate not above 0; when called, a
      text of fewer pieces than the prefix is long.

  Source: Li & Liang 2021, arXiv 2101.00190, section 7.4 (as known from the
  paper); the fit is checked against XiangLi1999/PrefixTuning
  `seq2seq/prefixTuning.py` (`lowdata_init_train3`), the two texts against
  r-three/t-few `src/models/prefix_tuning.py`.
  """

  text: str
  vocabulary: Any
  target_text: str | None = None
  fit_steps: int = 500
  fit_learning_rate: float = 1e-4

  def __post_init__(self):
    for field in ('text', 'target_text'):
      value = getattr(self, field)
      optional = field == 'target_text' and value is None
      if not optional and not (isinstance(value, str) and value):
        raise ValueError(
          f'RealActivations.{field} must be a text that is not empty, got '
          f'{value!r}.'
        )
    if not isinstance(self.fit_steps, int) or self.fit_steps < 1:
      raise ValueError(
        'RealActivations.fit_steps must be a whole number of at least 1, got '
        f'{self.fit_steps!r}.'
      )
    rate = self.fit_learning_rate
    if not isinstance(rate, int | float) or not rate > 0:
      raise ValueError(
        f'RealActivations.fit_learning_rate must be above 0, got {rate!r}.'
      )

  def __call__(self, context: base.Context, length: int) -> dict[str, Any]:
    """Attention -> keys and values [L, P, H, K] of a prefix so long."""
    ids = self._pieces(self.text, length)
    targets = ids
    if self.target_text is not None:
      targets = self._pieces(self.target_text, length)
    found = keys_and_values(context.config, context.params, ids, targets)
    return {k: (key[:, 0], value[:, 0]) for k, (key, value) in found.items()}

  def fit(self, mlp: Callable[[Any], Any], params: Any, wanted: Any) -> Any:
    """The parameters, after `fit_steps` of mean (mlp(params) - wanted)^2."""
    optimizer = optax.adam(self.fit_learning_rate)

    def loss(params: Any) -> Any:
      return jnp.mean((mlp(params) - wanted) ** 2)

    def step(_: Any, carry: Any) -> Any:
      params, state = carry
      grads = jax.grad(loss)(params)
      # optax's Adam raises a float to an integer.
      with jax.numpy_dtype_promotion('standard'):
        updates, state = optimizer.update(grads, state)
      return optax.apply_updates(params, updates), state

    start = params, optimizer.init(params)
    return jax.lax.fori_loop(0, self.fit_steps, step, start)[0]

  def _pieces(self, text: str, length: int) -> np.ndarray:
    ids = np.asarray(self.vocabulary.encode(text), np.int32)
    if len(ids) < length:
      raise ValueError(
        f'The text {text!r} has {len(ids)} pieces, fewer than the {length} of '
        'the prefix. Give a longer text, or a shorter prefix.'
      )
    if len(ids) > length:
      logging.warning(
        'A text of %d pieces for a prefix of length %d: the last %d are left '
        'out.',
        len(ids),
        length,
        len(ids) - length,
      )
    return ids[None, :length]
