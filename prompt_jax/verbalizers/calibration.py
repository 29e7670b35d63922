"""Contextual calibration: what the model says of nothing is divided away.

Source: Zhao et al. 2021, arXiv 2102.09690, section 5, as known from the paper;
checked against tonyzhaozh/few-shot-learning `run_classification.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

# What stands in the place of a row's text.
CONTENT_FREE = ('N/A', '', '[MASK]')


def content_free_prior(probs: Float[Array, 'N C']) -> Float[Array, ' C']:
  """p_cf: the mean over content-free inputs, normalised over the labels.

  Args:
    probs: label probabilities of each of N content-free inputs.

  Raises:
    ValueError: no inputs, or a label without any probability, by which nothing
      can be divided.
  """
  found = jnp.asarray(probs)
  if found.ndim != 2 or not found.size:
    raise ValueError(
      'Probabilities of content-free inputs must be [inputs, labels], got '
      f'shape {found.shape}.'
    )
  mean = jnp.mean(found, axis=0)
  if not bool(jnp.all(mean > 0)):
    raise ValueError(
      'Label probabilities of content-free inputs must be above 0, got '
      f'{[round(float(p), 6) for p in mean]}.'
    )
  return mean / jnp.sum(mean)


def calibrate(
  probs: Float[Array, 'B C'], prior: Float[Array, ' C']
) -> Float[Array, 'B C']:
  """Q = (p / p_cf) / sum_c (p_c / p_cf,c).

  Args:
    probs: label probabilities, up to a factor a row.
    prior: `content_free_prior`.
  """
  divided = jnp.asarray(probs) / prior
  return divided / jnp.sum(divided, axis=-1, keepdims=True)


def content_free_rows(
  columns: Sequence[str], texts: Sequence[str] = CONTENT_FREE
) -> list[dict[str, str]]:
  """Rows whose columns hold a content-free text, to be rendered and scored."""
  return [dict.fromkeys(columns, text) for text in texts]
