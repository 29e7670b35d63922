"""Several templates for one task: their label scores as one.

Source: Schick & Schuetze 2021, arXiv 2001.07676, section 3.3 (PET: uniform
weights, or each pattern's accuracy before training), as known from the paper.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

SPACES = ('probability', 'log_probability')


def ensemble(
  log_probs: Float[Array, 'N B C'],
  weights: Sequence[float] | Float[Array, ' N'] | None = None,
  space: str = 'probability',
) -> Float[Array, 'B C']:
  """Log-probabilities of the labels by N templates together.

  With p_n the label probabilities of template n, normalised over the C labels,
  and weights w_n that are brought to a sum of 1:

      probability       log sum_n w_n p_n
      log_probability   log softmax_c sum_n w_n log p_n

  Args:
    log_probs: scores of the labels; any constant of a row does not matter.
    weights: at least 0; None for equal ones.
    space: 'probability' or 'log_probability'.

  Raises:
    ValueError: another space, or weights of another number, negative or all 0.
  """
  scores = jnp.asarray(log_probs)
  if space not in SPACES:
    raise ValueError(
      f'space must be one of {", ".join(SPACES)}, got {space!r}.'
    )
  given = np.ones(len(scores)) if weights is None else np.asarray(weights)
  good = given.shape == scores.shape[:1] and (given >= 0).all()
  if not good or given.sum() <= 0:
    raise ValueError(
      f'weights must be {len(scores)} numbers of at least 0, one a template '
      f'and not all 0, got {given.tolist()}.'
    )
  w = jnp.asarray(given / given.sum(), scores.dtype)[:, None, None]
  logs = jax.nn.log_softmax(scores, axis=-1)
  if space == 'probability':
    return jax.nn.logsumexp(logs, axis=0, b=w)
  return jax.nn.log_softmax(jnp.sum(w * logs, axis=0), axis=-1)


def accuracy_weights(accuracies: Sequence[float]) -> np.ndarray:
  """Weights that are accuracies on held-out rows, with a sum of 1.

  Raises:
    ValueError: none, a negative one, or all are 0.
  """
  found = np.asarray(accuracies, np.float64)
  if not found.size or (found < 0).any() or found.sum() == 0:
    raise ValueError(
      'Accuracies must be one number a template, of at least 0 and not all 0; '
      f'got {found.tolist()}.'
    )
  return found / found.sum()
