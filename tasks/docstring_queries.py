"""The docstrings of this machine as ids, and queries about them.

    is numpy : compute the sum along an axis -> yes

Ids in numpy's arrays; `docstrings.py` makes tasks of them, and
`docstring_corpus.py` finds the texts. Not for another vocabulary.
"""

import collections
import dataclasses
import functools
import hashlib

import numpy as np

from . import docstring_corpus
from .docstring_corpus import ATTRIBUTES
from .pocket_language import EOS
from .pocket_language import PAD
from .pocket_language import UNK
from .pocket_language import closed_up

FORMS = ('attr', 'is', 'or')
# What pretraining never asks.
NEVER_ASKED = (('is', 'kind'), ('is', 'arguments'), ('or', 'library'))
# Words of questions and answers; they have the first ids.
QUESTION_WORDS = (
  *': is or yes no without with first second third'.split(),
  *ATTRIBUTES,
  *(value for values in ATTRIBUTES.values() for value in values),
)
_IDS = {word: i for i, word in enumerate(QUESTION_WORDS, UNK + 1)}
SIZE = 2048
SENTINELS = 8

PROMPT_LENGTH = 4  # 'numpy or python :'
TEXT_LENGTH = docstring_corpus.LENGTH
TARGETS_LENGTH = 5
SPLITS = ('train', 'validation', 'test')
# Of 20 summaries, as many are in each split.
_SHARES = (14, 3, 3)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The summaries as ids.

  Attributes:
    words: of the vocabulary, without sentinels.
    texts: ids [summaries, TEXT_LENGTH] with padding at the end; all different.
    values: of the attributes, as indices [summaries, attributes].
    splits: index of the split of each summary.
  """

  words: tuple[str, ...]
  texts: np.ndarray
  values: np.ndarray
  splits: np.ndarray

  @property
  def size(self) -> int:
    """Ids, sentinels included."""
    return UNK + 1 + len(self.words) + SENTINELS


@functools.cache
def corpus() -> Corpus:
  """The corpus of this machine; the first call ever takes a minute."""
  records = docstring_corpus.records()
  texts = [record['words'].split() for record in records]
  splits = np.array([_split(record['words']) for record in records])
  counts = collections.Counter(
    word
    for text, split in zip(texts, splits, strict=True)
    if SPLITS[split] == 'train'
    for word in text
    if word not in _IDS
  )
  room = SIZE - UNK - 1 - len(QUESTION_WORDS) - SENTINELS
  frequent = sorted(counts, key=lambda word: (-counts[word], word))[:room]
  words = (*QUESTION_WORDS, *frequent)
  ids = {word: i for i, word in enumerate(words, UNK + 1)}
  rows = np.full((len(texts), TEXT_LENGTH), PAD, np.int32)
  for row, text in zip(rows, texts, strict=True):
    row[: len(text)] = [ids.get(word, UNK) for word in text]
  values = np.array(
    [
      [known.index(record[a]) for a, known in ATTRIBUTES.items()]
      for record in records
    ]
  )
  # Those that differ in unknown words only are one text.
  different = np.sort(np.unique(rows, axis=0, return_index=True)[1])
  return Corpus(words, rows[different], values[different], splits[different])


def ids(text: str) -> np.ndarray:
  """Ids of the words of a question, int32 [words].

  Raises:
    KeyError: a word is not of `QUESTION_WORDS`.
  """
  return np.array([_IDS[word] for word in text.split()], np.int32)


def queries(
  rng: np.random.Generator, split: str, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Questions about summaries of a split, in forms that are asked.

  'attr :' wants the value, 'is value :' yes or no, 'value or value :' the one
  that holds; the summary follows. Form and attribute are drawn, then the value,
  then a summary that has it.

  Returns:
    Inputs [n, PROMPT_LENGTH + TEXT_LENGTH + 1] with EOS, ids of the answers
    [n], and what was asked, [n, 2]: numbers of the form and of the attribute.
  """
  asked = _ASKED[rng.integers(len(_ASKED), size=n)]
  form, attribute = asked.T
  count = _COUNTS[attribute]
  value = (rng.random(n) * count).astype(np.int64)
  other = (value + 1 + (rng.random(n) * (count - 1)).astype(np.int64)) % count
  right, wrong = _VALUE_IDS[attribute, value], _VALUE_IDS[attribute, other]
  coin = rng.random(n) < 0.5
  one, two = np.where(coin, [right, wrong], [wrong, right])
  prompts = [
    columns(_ATTRIBUTE_IDS[attribute], _IDS[':'], PAD, PAD),
    columns(np.full(n, _IDS['is']), one, _IDS[':'], PAD),
    columns(one, _IDS['or'], two, _IDS[':']),
  ]
  prompt = np.stack(prompts)[form, np.arange(n)]
  said = np.where(coin, _IDS['yes'], _IDS['no'])
  answers = np.where(form == FORMS.index('is'), said, right)
  texts = corpus().texts[_having(rng, split, attribute, value)]
  return with_prompt(texts, prompt), answers.astype(np.int32), asked


def corrupted(
  rng: np.random.Generator, texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A word of each half of every text as a sentinel.

  Returns:
    Inputs as `queries`, and targets [n, TARGETS_LENGTH] with EOS.
  """
  rows, length = np.arange(len(texts)), np.sum(texts != PAD, 1)
  half = length // 2
  first = (rng.random(len(texts)) * half).astype(np.int64)
  second = half + (rng.random(len(texts)) * (length - half)).astype(np.int64)
  masks = corpus().size - 1, corpus().size - 2  # <extra_id_0>, <extra_id_1>
  masked = texts.copy()
  masked[rows, first], masked[rows, second] = masks
  targets = [texts[rows, first], masks[1], texts[rows, second], EOS]
  return (
    with_prompt(masked, np.full(PROMPT_LENGTH, PAD)),
    columns(np.full(len(texts), masks[0]), *targets),
  )


def _split(words: str) -> int:
  number = int(hashlib.sha256(words.encode()).hexdigest()[:8], 16)
  return int(np.searchsorted(np.cumsum(_SHARES), number % 20, 'right'))


def _having(
  rng: np.random.Generator,
  split: str,
  attribute: np.ndarray,
  value: np.ndarray,
) -> np.ndarray:
  """For each pair, a summary of the split whose attribute has the value."""
  here = np.flatnonzero(corpus().splits == SPLITS.index(split))
  out = np.empty(len(attribute), np.int64)
  for a, (name, known) in enumerate(ATTRIBUTES.items()):
    for v, word in enumerate(known):
      wanted = (attribute == a) & (value == v)
      pool = here[corpus().values[here, a] == v]
      if not len(pool):
        raise docstring_corpus.CorpusError(
          f'No docstring of the {split} split is of {name} {word}: there are '
          'too few to ask about.'
        )
      out[wanted] = pool[rng.integers(len(pool), size=wanted.sum())]
  return out


def with_prompt(texts: np.ndarray, prompt: np.ndarray) -> np.ndarray:
  """Prompt [words] or [n, words], then text and EOS, then padding.

  Returns:
    Ids [n, words + TEXT_LENGTH + 1], int32.
  """
  n, words = len(texts), prompt.shape[-1]
  parts = [np.broadcast_to(prompt, (n, words)), texts, np.full((n, 1), EOS)]
  return closed_up(np.concatenate(parts, 1), words + TEXT_LENGTH + 1)


def columns(first: np.ndarray, *others: np.ndarray | int) -> np.ndarray:
  """Ids [n], or one for all, as columns, int32."""
  return np.stack(np.broadcast_arrays(first, *others), 1).astype(np.int32)


_COUNTS = np.array([len(values) for values in ATTRIBUTES.values()])
_ATTRIBUTE_IDS = ids(' '.join(ATTRIBUTES))
_VALUE_IDS = np.array(
  [np.resize(ids(' '.join(v)), max(_COUNTS)) for v in ATTRIBUTES.values()]
)
_ASKED = np.array(
  [
    (FORMS.index(form), i)
    for form in FORMS
    for i, attribute in enumerate(ATTRIBUTES)
    if (form, attribute) not in NEVER_ASKED
  ]
)
