"""The last layers of each stack: patterns for `trainable_patterns`."""

from collections.abc import Sequence

from prompt_jax.network.layers import T5Config


def patterns(
  config: T5Config,
  encoder_layers: int = 1,
  decoder_layers: int = 1,
  also: Sequence[str] = (),
) -> tuple[str, ...]:
  """Patterns of all parameters of the last layers, their norms included.

  Gradients stop below the first of them: that of a stacked parameter is one
  array, so the network's layers must not be scanned. With an encoder layer
  among them gradients go through the whole decoder, whose every layer reads the
  encoder's output; with `encoder_layers=0` they stop in the decoder.

  Args:
    config: of the network.
    encoder_layers: how many of the encoder's; 0 for none.
    decoder_layers: how many of the decoder's.
    also: more patterns, such as 'decoder/logits_dense/kernel'.

  Raises:
    ValueError: the network has not so many layers, or they are scanned; none
      at all is asked for.

  Source: the usual partial fine-tuning, as Houlsby et al. 2019, arXiv
  1902.00751, section 3 compare with (as known from the paper).
  """
  if config.scan_layers:
    raise ValueError(
      'The last layers cannot be told from the others where the layers are '
      'scanned: bind t5.T5Config.scan_layers = False.'
    )
  out = []
  for stack, number, total in (
    ('encoder', encoder_layers, config.num_encoder_layers),
    ('decoder', decoder_layers, config.num_decoder_layers),
  ):
    if not isinstance(number, int) or not 0 <= number <= total:
      raise ValueError(
        f'{stack}_layers must be a whole number from 0 to {total}, the layers '
        f'of the {stack}, got {number!r}.'
      )
    layers = range(total - number, total)
    out += [f'{stack}/layers_{i}/.*' for i in layers]
  if not out:
    raise ValueError(
      'Neither encoder_layers nor decoder_layers is above 0: nothing to train.'
    )
  return (*out, *also)
