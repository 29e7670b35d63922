"""Prompt recycling (Lester et al. 2022): a prompt of one model for another.

Both models embed the same vocabulary, so what a prompt is for the target t is
learned from words, without labels: E_s [W, D_s] and E_t [W, D_t] are the
embeddings of W words, P_s [P, D_s] is the prompt.

    v2v_lin   P_t = P_s argmin_M |E_s M - E_t|
    v2v_nn    P_t = relu(P_s A + a) B + b, of the least half mean squared error
              of E_t by E_s; A [D_s, 4 D_t]
    lin_comb  P_t = X^T E_t with the shortest X of the least |E_s^T X - P_s^T|

What a recycled prompt does to a model's output does not transfer: compare by
rank classification.

Source: Lester et al. 2022, arXiv 2208.05577; checked against
google-research/prompt-tuning `prompt_tuning/recycling/recycle.py`.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

Embedding = Float[np.ndarray, 'V D']
Prompt = Float[np.ndarray, '*G P D']


def _words(
  source: Embedding,
  target: Embedding,
  prompt: Prompt,
  words: Int[np.ndarray, ' W'] | Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The embeddings of the words in both models, and the prompt, in float64.

  Raises:
    ValueError: arrays that do not fit each other, or ids that are no rows.
  """
  source, target, prompt = (
    np.asarray(x, np.float64) for x in (source, target, prompt)
  )
  if prompt.shape[-1] != source.shape[-1]:
    raise ValueError(
      f'The prompt has width {prompt.shape[-1]}, but the source model '
      f'{source.shape[-1]}: it belongs to another model.'
    )
  rows = min(len(source), len(target))
  if words is None:
    if len(source) != len(target):
      raise ValueError(
        f'The models embed {len(source)} and {len(target)} ids; give `words`, '
        'ids that mean the same in both.'
      )
    return source, target, prompt
  ids = np.asarray(words)
  if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f'`words` must be a list of ids, got shape {ids.shape} of {ids.dtype}.'
    )
  if ids.min() < 0 or ids.max() >= rows:
    raise ValueError(
      f'`words` holds ids from {ids.min()} to {ids.max()}, but the embeddings '
      f'have {rows} rows.'
    )
  return source[ids], target[ids], prompt


def v2v_lin(
  source: Embedding, target: Embedding, prompt: Prompt, words: Any = None
) -> Prompt:
  """The prompt by the linear map that takes words to words best.

  Args:
    source: embedding of the model s.
    target: embedding of the model t.
    prompt: of s.
    words: ids of the rows to learn from; None for all.
  """
  source, target, prompt = _words(source, target, prompt, words)
  matrix = np.linalg.lstsq(source, target, rcond=None)[0]
  return (prompt @ matrix).astype(np.float32)


def lin_comb(
  source: Embedding, target: Embedding, prompt: Prompt, words: Any = None
) -> Prompt:
  """The prompt as the same combination of words; arguments as of `v2v_lin`.

  With more words than dimensions the combination is not determined; it is the
  one with the smallest weights.
  """
  source, target, prompt = _words(source, target, prompt, words)
  flat = prompt.reshape(-1, prompt.shape[-1])
  weights = np.linalg.lstsq(source.T, flat.T, rcond=None)[0]
  found = weights.T @ target
  return found.reshape(*prompt.shape[:-1], -1).astype(np.float32)


def v2v_nn(
  source: Embedding,
  target: Embedding,
  prompt: Prompt,
  words: Any = None,
  *,
  hidden_scale: int = 4,
  batch_size: int = 50,
  epochs: int = 25,
  learning_rate: float = 3e-4,
  seed: int = 0,
) -> Prompt:
  """The prompt by a small network that takes words to words; Adam.

  Args:
    source: embedding of the model s.
    target: embedding of the model t.
    prompt: of s.
    words: ids of the rows to learn from; None for all.
    hidden_scale: inner width over that of t.
    batch_size: words of a step; the last step of an epoch has the rest.
    epochs: passes over the words, shuffled.
    learning_rate: of Adam.
    seed: of the initial weights and the shuffling.

  Raises:
    ValueError: as the others; a number below 1.
  """
  counts = {'hidden_scale': hidden_scale, 'batch_size': batch_size}
  for name, value in {**counts, 'epochs': epochs}.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{name} must be a whole number of at least 1, got {value!r}.'
      )
  source, target, prompt = _words(source, target, prompt, words)
  x, y, p = (jnp.asarray(a, jnp.float32) for a in (source, target, prompt))
  init_rng, rng = jax.random.split(jax.random.PRNGKey(seed))
  params = _init(init_rng, x.shape[1], hidden_scale * y.shape[1], y.shape[1])
  optimizer = optax.adam(learning_rate)
  size = min(batch_size, len(x))
  full = len(x) - len(x) % size

  def step(carry: Any, rows: Any) -> Any:
    params, state = carry
    error = lambda w: jnp.mean(jnp.square(_network(w, x[rows]) - y[rows])) / 2  # noqa: E731
    loss, grads = jax.value_and_grad(error)(params)
    # optax's Adam raises a float to an integer: strict promotion rejects that.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  @jax.jit
  def epoch(carry: Any, rng: Any) -> Any:
    order = jax.random.permutation(rng, len(x))
    carry, losses = jax.lax.scan(step, carry, order[:full].reshape(-1, size))
    if full < len(x):
      carry, _ = step(carry, order[full:])
    return carry, losses[-1]

  carry, losses = (params, optimizer.init(params)), []
  for own in jax.random.split(rng, epochs):
    carry, loss = epoch(carry, own)
    losses.append(float(loss))
  logging.info(
    'v2v_nn: loss %.4g at first, %.4g at last.', losses[0], losses[-1]
  )
  return np.asarray(_network(carry[0], p))


def _init(rng: Any, inputs: int, hidden: int, outputs: int) -> dict[str, Array]:
  """Kernels as flax's Dense draws them, and biases of 0."""
  draw = jax.nn.initializers.lecun_normal()
  one, two = jax.random.split(rng)
  return {
    'A': draw(one, (inputs, hidden), jnp.float32),
    'a': jnp.zeros(hidden),
    'B': draw(two, (hidden, outputs), jnp.float32),
    'b': jnp.zeros(outputs),
  }


def _network(w: Mapping[str, Any], x: Float[Array, '... D']) -> Array:
  return jax.nn.relu(x @ w['A'] + w['a']) @ w['B'] + w['b']


METHODS: Mapping[str, Callable[..., Prompt]] = {
  'v2v-lin': v2v_lin,
  'v2v-nn': v2v_nn,
  'lin-comb': lin_comb,
}


# ---- words -------------------------------------------------------------------


def latin_words(
  vocabulary: Any, num_words: int = 4000, offset: int = 1000
) -> Int[np.ndarray, ' W']:
  """Ids of pieces that are Latin letters alone, in order, with some skipped.

  A stand-in for the paper's list of English pieces, which is read by
  `word_list`: this one also holds words of other languages.

  Args:
    vocabulary: a seqio vocabulary.
    num_words: W.
    offset: words to skip, the most frequent ones.

  Raises:
    ValueError: there are fewer.
  """
  pieces = [vocabulary.decode([i]) for i in range(vocabulary.vocab_size)]
  ids = [
    i for i, piece in enumerate(pieces) if re.fullmatch('[A-Za-z]+', piece)
  ]
  return _cut(ids, num_words, offset, 'The vocabulary')


def word_list(
  path: str, num_words: int = 4000, offset: int = 1000
) -> Int[np.ndarray, ' W']:
  """Ids of a JSON file {id: word}, in its order, with the first skipped.

  The paper's is `filtered-vocab-english-only.json`, beside its code.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another content, or fewer words.
  """
  try:
    ids = [int(i) for i in json.loads(pathlib.Path(path).read_text())]
  except (ValueError, TypeError) as e:
    raise ValueError(
      f'{path}: expected a JSON object of words by id, {{"8": "the"}}.'
    ) from e
  return _cut(ids, num_words, offset, path)


def _cut(ids: list[int], num_words: int, offset: int, where: str) -> np.ndarray:
  if len(ids) < offset + num_words:
    raise ValueError(
      f'{where} has {len(ids)} words, but {offset} are to be skipped and '
      f'{num_words} taken: ask for fewer.'
    )
  return np.array(ids[offset : offset + num_words])
