"""LM-BFF's templates: what T5 puts into two blanks around the label word.

An input is a text with its label word between two blanks,

    {text} <X> great <Y>

and T5 answers `<X> part1 <Y> part2 <Z>`. The two parts that go best with all N
training examples make a template, `{text} part1 <mask> part2`: those of the
highest sum over the examples of log p(answer), found by a wide beam.

Source: Gao et al. 2021, arXiv 2012.15723, section 5.2; checked against
princeton-nlp/LM-BFF `tools/generate_template.py`, which averages the logits of
the examples instead of their log-probabilities: `mean_logits`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from prompt_jax.search.examples import Examples

AGGREGATES = ('sum_log_probs', 'mean_logits')
# Prefixes of one length [K, t] -> log-probabilities of what follows [K, V].
NextLogProbs = Callable[[Int[np.ndarray, 'K t']], Float[np.ndarray, 'K V']]


class Parts(NamedTuple):
  """An answer.

  Attributes:
    score: its log-probability, with its end.
    part1: ids between <X> and <Y>.
    part2: ids after <Y>.
  """

  score: float
  part1: tuple[int, ...]
  part2: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Grammar:
  """`X part1 Y part2`, and an end.

  Attributes:
    x: id of <X>, the first.
    y: of <Y>, once.
    ends: of <Z> and EOS; which of them ends an answer does not matter.
    allowed: what the parts may hold, bool [V].
    stops: tokens that end in a full stop or are one, of which no two stand side
      by side, bool [V].
  """

  x: int
  y: int
  ends: tuple[int, ...]
  allowed: np.ndarray
  stops: np.ndarray

  def mask(self, prefix: Sequence[int], last: bool = False) -> np.ndarray:
    """What may follow, ends included, bool [V]; <Y> alone if it comes last."""
    if last and self.y not in prefix:
      return np.arange(len(self.allowed)) == self.y
    out = self.allowed.copy()
    if self.stops[prefix[-1]]:
      out &= ~self.stops
    if self.y in prefix:
      out[list(self.ends)] = True
    else:
      out[self.y] = True
    return out

  def parts(self, score: float, ids: Sequence[int]) -> Parts:
    """An answer without its end."""
    at = list(ids).index(self.y)
    return Parts(float(score), tuple(ids[1:at]), tuple(ids[at + 1 :]))


def grammar(vocabulary: Any, size: int) -> Grammar:
  """That of a vocabulary with three sentinels.

  Args:
    vocabulary: a seqio vocabulary.
    size: V, of the logits.
  """
  x, y, z = (vocabulary.vocab_size - 1 - i for i in range(3))
  special = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, None}
  allowed, stops = np.zeros(size, bool), np.zeros(size, bool)
  for i in range(vocabulary.vocab_size - vocabulary.extra_ids):
    text = '' if i in special else vocabulary.decode([i]).strip()
    # No lone spaces, no rows of dots, nothing that a template reads.
    wrong = not text.isprintable() or re.search(r'[{}|<>]|\.\.|…', text)
    allowed[i] = bool(text) and not wrong
    stops[i] = text.endswith('.')
  return Grammar(x, y, (z, vocabulary.eos_id), allowed, stops)


def search(
  next_log_probs: NextLogProbs,
  grammar: Grammar,
  beam: int,
  max_tokens: int = 20,
) -> list[Parts]:
  """The answers of the highest scores that a beam finds, the best first.

  Exhaustive where `beam` is no less than the number of prefixes of a length.

  Args:
    next_log_probs: summed over the examples.
    grammar: what is an answer.
    beam: prefixes that are kept; as many answers come back at most.
    max_tokens: of both parts, with <Y>, which the last of them must be where it
      has not come.
  """
  prefixes, scores = np.array([[grammar.x]]), np.zeros(1)
  done: list[tuple[float, tuple[int, ...]]] = []
  ends = list(grammar.ends)
  for length in range(max_tokens + 1):
    found = np.asarray(next_log_probs(prefixes), np.float64)
    last = length == max_tokens - 1
    masks = np.stack([grammar.mask(row, last) for row in prefixes.tolist()])
    table = scores[:, None] + np.where(masks, found, -np.inf)
    ended = table[:, ends].max(axis=1)
    done += [
      (float(score), tuple(row))
      for score, row in zip(ended, prefixes.tolist(), strict=True)
      if np.isfinite(score)
    ]
    done = sorted(done, key=lambda x: (-x[0], x[1]))[:beam]
    table[:, ends] = -np.inf
    order = np.argsort(-table, axis=None, kind='stable')[:beam]
    order = order[np.isfinite(table.ravel()[order])]
    if length == max_tokens or not len(order):
      break
    rows, tokens = np.unravel_index(order, table.shape)
    scores = table[rows, tokens]
    prefixes = np.concatenate([prefixes[rows], tokens[:, None]], axis=1)
    # What goes on can only lose.
    if len(done) == beam and scores[0] <= done[-1][0]:
      break
  return [grammar.parts(score, ids) for score, ids in done]


def model_log_probs(
  model: Any,
  frozen: Any,
  examples: Examples,
  max_tokens: int,
  aggregate: str = 'sum_log_probs',
) -> NextLogProbs:
  """What a model says of the next token, over all examples.

  The encoder reads the examples once; the decoder reads each prefix for all of
  them, one prefix after another, so that memory does not grow with the beam.

  Args:
    model: an `EncoderDecoderModel`.
    frozen: its parameters.
    examples: only their tokens are looked at.
    max_tokens: as in `search`.
    aggregate: 'sum_log_probs', or 'mean_logits', of which the log softmax is
      taken then, as the reference does.
  """
  network, length = model.network, max_tokens + 2  # the start token, and <X>
  tokens = examples.tokens
  params = {'params': frozen}
  encode = functools.partial(network.apply, method='encode')
  encoded = jax.jit(encode)(params, tokens)

  @jax.jit
  def read(params: Any, encoded: Any, prefixes: Any, at: Any) -> Any:
    def one(prefix: Any) -> Any:
      inputs = jnp.broadcast_to(prefix, (len(tokens), length))
      logits = network.apply(params, encoded, tokens, inputs, method='decode')
      logits = jnp.take(logits, at, axis=1).astype(jnp.float32)
      if aggregate == 'mean_logits':
        return jax.nn.log_softmax(jnp.mean(logits, axis=0))
      return jnp.sum(jax.nn.log_softmax(logits, axis=-1), axis=0)

    return jax.lax.map(one, prefixes)

  def next_log_probs(prefixes: Any) -> np.ndarray:
    rows, given = prefixes.shape
    # Numbers of rows are powers of two: few programs to compile.
    padded = np.zeros((1 << (rows - 1).bit_length(), length), np.int32)
    padded[:rows, 1 : given + 1] = prefixes
    found = read(params, encoded, padded, given)
    return np.asarray(found[:rows], np.float64)

  return next_log_probs


def text_after(vocabulary: Any, word: int, ids: Sequence[int]) -> str:
  """The text of tokens behind a word, with the space between, if any."""
  first = vocabulary.decode([word])
  return vocabulary.decode([word, *ids]).removeprefix(first)
