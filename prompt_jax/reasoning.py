"""Chain of thought, and self-consistency: a vote over sampled reasoning.

    pool = [(d.question, reasoning.worked(rationale, answer)) ...]
    InContext(pool, k=8)                       # demonstrations that reason
    answer = reasoning.answer(text)            # of one decode
    chosen = reasoning.vote(texts, log_probs)  # of many

`prompt-jax infer` with `--gin.DECODE_FN=@decoding.temperature_sample` and
`--gin.NUM_DECODES=40` writes texts and log-probabilities; `prompt-jax vote`, or
`vote_file`, reads them.

Source: Wei et al. 2022, arXiv 2201.11903 (demonstrations with rationales);
Kojima et al. 2022, arXiv 2205.11916 (the cue without them); Wang et al. 2022,
arXiv 2203.11171 (self-consistency), as known from the papers.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import pathlib
import re

import numpy as np

from prompt_jax import row_files
from prompt_jax.row_files import UserDataError

MARKER = 'The answer is'
CUE = "Let's think step by step."
# Behind a first call's reasoning, to get its answer by a second one.
EXTRACTION_CUE = 'Therefore, the answer is'
# Alone, or in front of a unit: not of 1/2, 10:30, 2024-05-01, 1.2.3, 2 1/2, 2^5
# and 5 pm, whose rest matters. Possessive, or 10:30 would be a 1.
_NUMBER = re.compile(
  r'[-+]?\$?\d[\d,]*+(?:\.\d++)?+(?![/:.\-]\d|\s+[\d/]|\s*[ap]\.?m\b)'
  r"""(?=$|[\s%°$€£a-z.,;:!?)\]"'-])"""
)

WEIGHTS = ('equal', 'probability')


def worked(rationale: str, answer: str, marker: str = MARKER) -> str:
  """The target of a demonstration: the rationale, then the marked answer.

  >>> worked('2 and 3 are 5', '5')
  '2 and 3 are 5. The answer is 5.'
  """
  text = rationale.strip()
  if text and text[-1] not in '.!?':
    text += '.'
  end = answer.strip().rstrip('.')
  return f'{text} {marker} {end}.'.strip()


def zero_shot(question: str, cue: str = CUE) -> str:
  """The first call without demonstrations: the question and the cue."""
  return f'{question.strip()}\n{cue}'


def extraction(
  question: str, reasoning: str, cue: str = CUE, end: str = EXTRACTION_CUE
) -> str:
  """The second call: what the first one said, and a cue for the answer."""
  return f'{zero_shot(question, cue)} {reasoning.strip()}\n{end}'


def normal(text: str) -> str:
  """An answer to compare: a number alone where it is one, with a unit or not.

  >>> normal(' $1,250.00 dollars. '), normal('(B)'), normal('Yes!')
  ('1250', 'b', 'yes')
  >>> normal('1/2.'), normal('10:30'), normal('5 %')
  ('1/2', '10:30', '5')
  """
  text = text.strip().lower()
  number = _NUMBER.match(text)
  if number:
    value = float(re.sub(r'[$,]', '', number[0]))
    return str(int(value)) if value.is_integer() else repr(value)
  return ' '.join(text.strip(' .!?,;:()[]"\'').split())


def answer(
  text: str,
  marker: str = MARKER,
  parse: Callable[[str], str] = normal,
) -> str | None:
  """The answer behind the last marker; None where there is none.

  Args:
    text: what the model says.
    marker: in front of the answer, capitals aside.
    parse: from the line behind it to what is compared.
  """
  place = text.lower().rfind(marker.lower())
  if place < 0:
    return None
  rest = text[place + len(marker) :].lstrip(' :')
  return parse(rest.split('\n')[0]) or None


@dataclasses.dataclass(frozen=True)
class Vote:
  """What several decodes say together.

  Attributes:
    answer: that has most votes; None where no decode has one.
    share: its share of the votes, 0 to 1.
    parsed: decodes that have an answer.
    total: decodes.
  """

  answer: str | None
  share: float
  parsed: int
  total: int


def vote(
  texts: Sequence[str],
  log_probs: Sequence[float] | None = None,
  weights: str = 'equal',
  marker: str = MARKER,
  parse: Callable[[str], str] = normal,
) -> Vote:
  """The majority of the decodes that have an answer.

  Of answers with equally many votes the one whose log-probabilities sum to the
  most; then the one that is seen first.

  Args:
    texts: decodes of one input.
    log_probs: of each; None: ties go to the first.
    weights: 'equal', a vote a decode; 'probability', exp(log p) divided by the
      sum over the decodes with an answer (which needs log_probs).
    marker: as `answer`.
    parse: as `answer`.

  Raises:
    ValueError: no texts, another number of log_probs, or unknown weights.
  """
  if not texts or (log_probs is not None and len(log_probs) != len(texts)):
    count = None if log_probs is None else len(log_probs)
    raise ValueError(
      'Expected texts, one or more, and as many log_probs; got '
      f'{len(texts)} and {count}.'
    )
  if weights not in WEIGHTS or (weights == 'probability' and log_probs is None):
    raise ValueError(
      f'weights must be one of {", ".join(WEIGHTS)}, the latter with '
      f'log_probs; got {weights!r}.'
    )
  found = [answer(text, marker, parse) for text in texts]
  known = [i for i, a in enumerate(found) if a is not None]
  if not known:
    return Vote(None, 0.0, 0, len(texts))
  logs = np.zeros(len(texts)) if log_probs is None else np.asarray(log_probs)
  shares: dict[str, list[float]] = {}
  sums: dict[str, list[float]] = {}
  top = max(logs[i] for i in known)
  for i in known:
    said = str(found[i])
    weight = math.exp(logs[i] - top) if weights == 'probability' else 1.0
    shares.setdefault(said, []).append(weight)
    sums.setdefault(said, []).append(float(logs[i]))
  # fsum: the same whatever the order. Of equals `max` takes the first.
  counts = {said: math.fsum(found) for said, found in shares.items()}
  best = max(counts, key=lambda a: (counts[a], math.fsum(sums[a])))
  share = counts[best] / math.fsum(counts.values())
  return Vote(best, share, len(known), len(texts))


def vote_file(
  path: str | pathlib.Path,
  weights: str = 'equal',
  marker: str = MARKER,
  parse: Callable[[str], str] = normal,
) -> tuple[dict[str, float], list[Vote]]:
  """Accuracy of the vote over a file of `prompt-jax infer`.

  Args:
    path: JSON lines with `predictions`, `scores` and `targets`.
    weights: as `vote`.
    marker: as `vote`; the targets' answer stands behind it, or is all of them.
    parse: as `vote`.

  Returns:
    `vote_accuracy`, that of the likeliest decode alone (`first_accuracy`), and
    the share of inputs without any answer (`no_answer`), in per cent; and the
    votes. An input without an answer is wrong.

  Raises:
    UserDataError: no such file, or a row that lacks something.
  """
  votes, right, first = [], [], []
  for line, row in row_files.read_rows(path):
    missing = [k for k in ('predictions', 'targets') if k not in row]
    if missing:
      raise UserDataError(f'{path}, line {line}: no {missing[0]!r}.')
    gold = answer(row['targets'], marker, parse) or parse(row['targets'])
    texts = row['predictions']
    found = vote(texts, row.get('scores'), weights, marker, parse)
    votes.append(found)
    right.append(found.answer == gold)
    first.append(answer(texts[0], marker, parse) == gold)
  if not votes:
    raise UserDataError(f'{path}: no rows.')
  return {
    'vote_accuracy': 100.0 * float(np.mean(right)),
    'first_accuracy': 100.0 * float(np.mean(first)),
    'no_answer': 100.0 * float(np.mean([v.answer is None for v in votes])),
  }, votes


def vote_decodes(decodes: str, weights: str = 'equal') -> dict[str, float]:
  """`prompt-jax vote`: prints what `vote_file` says of a file, in per cent.

  Args:
    decodes: the file.
    weights: as `vote`.

  Raises:
    ValueError: as `vote_file` and `vote`.
  """
  scores, votes = vote_file(decodes, weights)
  for name, value in scores.items():
    print(f'{name:<16}{value:.2f}')
  print(f'{"inputs":<16}{len(votes)}')
  return scores
