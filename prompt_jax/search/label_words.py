"""LM-BFF's label words: likely at the blank, and accurate together.

1.  The words of a class are the k of the highest sum over its examples of
    log p(word at the blank), of the model as it is.
2.  Of the combinations, a word a class, none twice, those that classify the
    training examples best are kept.
3.  They are ranked by the examples of the development set.

Source: Gao et al. 2021, arXiv 2012.15723, section 5.1, as known from the paper;
princeton-nlp/LM-BFF takes the mean logit in 1. There the model is tuned with
each combination before 3; here it is not.
"""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from prompt_jax.search import examples as examples_lib
from prompt_jax.search.examples import Examples

_MOST = 4_000_000  # combinations that are looked at
_BLOCK = 4096


class Choice(NamedTuple):
  """A word of each class.

  Attributes:
    ids: of the words, [C].
    accuracy: from 0 to 1.
    loss: the mean of -log p(word of the own class).
  """

  ids: tuple[int, ...]
  accuracy: float
  loss: float


def class_log_probs(
  model: Any, frozen: Any, examples: Examples, classes: int, batch_size: int
) -> Float[np.ndarray, 'C V']:
  """The sum of log p(w at the blank) over the examples of each class."""
  total = np.zeros((classes, model.config.vocab_size))
  for rows, batch in examples.batches(batch_size):
    logits = examples_lib.blank_logits(
      model, frozen, examples_lib.NOTHING, batch
    )
    found = np.asarray(jax.nn.log_softmax(logits), np.float64)
    number = rows.stop - rows.start
    np.add.at(total, batch['labels'][:number], found[:number])
  return total


def likely(
  total: Float[np.ndarray, 'C V'], allowed: np.ndarray, number: int
) -> Int[np.ndarray, 'C k']:
  """Ids of the k words of each class, the likeliest first.

  Args:
    total: `class_log_probs`.
    allowed: words that may be taken, bool [V].
    number: k; fewer where there are no more words.

  Raises:
    ValueError: fewer words than classes, or too many combinations: it says
      which k would do.
  """
  classes, count = len(total), int(allowed.sum())
  if count < classes:
    raise ValueError(
      f'The vocabulary has {count} words, too few for {classes} labels.'
    )
  number = min(number, count)
  if number**classes > _MOST:
    most = int(_MOST ** (1 / classes) + 1e-9)
    raise ValueError(
      f'{number} words for each of {classes} labels are {number**classes:,} '
      f'combinations, more than {_MOST:,}: take WORD_CANDIDATES={most} or '
      'fewer.'
    )
  scores = np.where(allowed, total[:, : len(allowed)], -np.inf)
  return np.argsort(-scores, axis=1, kind='stable')[:, :number]


def word_log_probs(
  model: Any,
  frozen: Any,
  examples: Examples,
  ids: Int[np.ndarray, 'C k'],
  batch_size: int,
) -> Float[np.ndarray, 'N C k']:
  """Log p at the blank of the candidates of each class."""
  out = np.zeros((len(examples), *ids.shape), np.float32)
  for rows, batch in examples.batches(batch_size):
    logits = examples_lib.blank_logits(
      model, frozen, examples_lib.NOTHING, batch
    )
    found = jnp.take(jax.nn.log_softmax(logits), ids, axis=-1)
    out[rows] = np.asarray(found)[: rows.stop - rows.start]
  return out


def choose(
  log_probs: Float[np.ndarray, 'N C k'],
  labels: Int[np.ndarray, ' N'],
  ids: Int[np.ndarray, 'C k'],
  number: int,
) -> list[tuple[tuple[int, ...], float, float]]:
  """The combinations of the highest accuracy; of equal ones the least loss.

  Args:
    log_probs: `word_log_probs`.
    labels: of the examples.
    ids: of the candidates.
    number: that are kept.

  Returns:
    The place of each class's word among its candidates, accuracy and loss.
  """
  best: list[tuple[tuple[int, ...], float, float]] = []
  classes = np.arange(ids.shape[0])
  for places in _blocks(ids):
    # [N, block, C]: of each combination, log p of the words.
    found = log_probs[:, classes, places]
    right = found.argmax(-1) == labels[:, None]
    own = np.take_along_axis(found, labels[:, None, None], -1)[..., 0]
    scored = zip(
      map(tuple, places.tolist()),
      right.mean(0).tolist(),
      (-own.mean(0, dtype=np.float64)).tolist(),
      strict=True,
    )
    best = sorted([*best, *scored], key=lambda x: (-x[1], x[2], x[0]))[:number]
  return best


def _blocks(ids: Int[np.ndarray, 'C k']) -> Iterator[np.ndarray]:
  """Combinations of places, none with a word twice, [block, C] each."""
  classes, number = ids.shape
  combinations = itertools.product(range(number), repeat=classes)
  while block := list(itertools.islice(combinations, _BLOCK)):
    places = np.array(block)
    words = np.sort(ids[np.arange(classes), places], axis=1)
    places = places[(np.diff(words, axis=1) > 0).all(axis=1)]
    if len(places):
      yield places


def search(
  model: Any,
  frozen: Any,
  train: Examples,
  dev: Examples,
  allowed: np.ndarray,
  classes: int,
  candidates: int,
  kept: int,
  batch_size: int,
) -> list[Choice]:
  """The three steps; the best combination first.

  Args:
    model: an `EncoderDecoderModel`.
    frozen: its parameters.
    train: examples of the first two steps.
    dev: examples of the third.
    allowed: words that may be taken, bool [V].
    classes: C.
    candidates: k.
    kept: combinations of the second step.
    batch_size: examples of a program call.

  Raises:
    ValueError: as `likely`.
  """
  total = class_log_probs(model, frozen, train, classes, batch_size)
  ids = likely(total, allowed, candidates)
  found = word_log_probs(model, frozen, train, ids, batch_size)
  places = [place for place, _, _ in choose(found, train.labels, ids, kept)]
  found = word_log_probs(model, frozen, dev, ids, batch_size)
  order = np.arange(classes)
  out = []
  for place in places:
    scores = found[:, order, place]
    own = scores[np.arange(len(scores)), dev.labels]
    right = scores.argmax(1) == dev.labels
    chosen = tuple(ids[order, place].tolist())
    loss = -float(own.mean(dtype=np.float64))
    out.append(Choice(chosen, float(right.mean()), loss))
  # Of equal ones, the better in training comes first: the sort is stable.
  return sorted(out, key=lambda x: (-x.accuracy, x.loss))
