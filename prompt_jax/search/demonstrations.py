"""LM-BFF's demonstrations: an example of each class behind the input.

    {text} It was <mask>. A fine film. It was great. A bore. It was bad.

Of each class one training example is drawn, never the input itself, from the
half that is most similar to the input.

Source: Gao et al. 2021, arXiv 2012.15723, section 6; checked against
princeton-nlp/LM-BFF `src/dataset.py`. Similarity is there the cosine of SBERT's
sentence embeddings; here, without a second model, that of the means of the base
model's own encoder states over the tokens of the columns.
"""

from collections.abc import Iterable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from prompt_jax.search.examples import Examples
from prompt_jax.templates.language import Template


def mean_states(
  model: Any, frozen: Any, examples: Examples, batch_size: int
) -> Float[np.ndarray, 'N D']:
  """The encoder's outputs, on average over the tokens of each example."""
  encode = functools.partial(model.network.apply, method='encode')

  @jax.jit
  def read(frozen: Any, tokens: Any) -> Any:
    x = encode({'params': frozen}, tokens).astype(jnp.float32)
    there = (tokens > 0)[..., None]
    number = jnp.maximum(jnp.sum(there, axis=1), 1)
    return jnp.sum(jnp.where(there, x, 0.0), axis=1) / number

  out = []
  for rows, batch in examples.batches(batch_size):
    found = np.asarray(read(frozen, batch['encoder_input_tokens']))
    out.append(found[: rows.stop - rows.start])
  return np.concatenate(out)


def similarities(
  queries: Float[np.ndarray, 'Q D'], others: Float[np.ndarray, 'N D']
) -> Float[np.ndarray, 'Q N']:
  """Cosines."""

  def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

  return unit(queries) @ unit(others).T


def pool(
  similar: Float[np.ndarray, ' N'],
  labels: Int[np.ndarray, ' N'],
  label: int,
  share: float,
  own: int | None = None,
) -> np.ndarray:
  """The examples of a class that may stand behind an input, the nearest first.

  Args:
    similar: of the input to each training example.
    labels: of the training examples.
    label: the class.
    share: of the class that is kept, the most similar; at least one.
    own: the input's own place among them, which is left out.

  Raises:
    ValueError: the class has no example beside the input itself.
  """
  found = np.flatnonzero(labels == label)
  found = found[found != own] if own is not None else found
  if not len(found):
    raise ValueError(
      f'The label {label} has no example but the one that it is to be put '
      'behind: demonstrations need two of each label.'
    )
  found = found[np.argsort(-similar[found], kind='stable')]
  return found[: max(1, int(np.ceil(share * len(found) - 1e-9)))]


def draw(
  similar: Float[np.ndarray, 'Q N'],
  labels: Int[np.ndarray, ' N'],
  classes: int,
  seed: int,
  share: float = 0.5,
  samples: int = 1,
  same: bool = False,
) -> Int[np.ndarray, 'Q S C']:
  """Training examples for each input, one a class, `samples` times.

  Args:
    similar: `similarities`.
    labels: of the training examples.
    classes: C.
    seed: of the draws.
    share: as in `pool`; the paper's is half.
    samples: S.
    same: the inputs are the training examples.

  Raises:
    ValueError: as `pool`.
  """
  rng = np.random.default_rng(seed)
  out = np.zeros((len(similar), samples, classes), np.int64)
  for i, row in enumerate(similar):
    for label in range(classes):
      found = pool(row, labels, label, share, i if same else None)
      out[i, :, label] = rng.choice(found, samples)
  return out


def text(template: Template, row: Mapping[str, Any], word: str) -> str:
  """An example with its label word in the blank, or behind the text."""
  if template.num_masks:
    return template.render(row, [f' {word}']).replace(f'  {word}', f' {word}')
  return f'{template.render(row).rstrip()} {word}'


def joined(texts: Iterable[str]) -> str:
  """Demonstrations as one text."""
  return ' '.join(' '.join(text.split()) for text in texts)
