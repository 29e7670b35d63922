"""The formats of PPT: from a file's documents to the ids of examples.

For `prompt_pretraining.py`, which says what they are. Plain numpy and lists; a
sentence is the ids of its pieces, a document a list of sentences.
"""

from collections.abc import Sequence
import pathlib
import re

import numpy as np
import seqio

from prompt_jax import row_files
from prompt_jax.row_files import UserDataError

Ids = list[int]
Example = tuple[Ids, int]  # inputs, and the index of the word
FORMATS = (
  'next_sentence',
  'next_sentence_selection',
  'unified',
  'single_sentence',
)
LETTERS = 'ABCDEFGHIJKLMNOPQ'
WORDS = {
  'next_sentence': ('no', 'maybe', 'yes'),
  'next_sentence_selection': tuple(LETTERS[:6]),
  'unified': tuple(LETTERS[:16]),
  'single_sentence': ('terrible', 'bad', 'maybe', 'good', 'great'),
}
# Pieces of the query and of an option at most, and options of the query's own
# document beside the right one, by the number of options.
SIX = (389, 86, 1)
LIMITS = {
  **dict.fromkeys((2, 3, 4), (400, 50, 1)),
  5: (400, 40, 1),
  6: (300, 40, 1),
  7: (250, 30, 2),
  8: (200, 30, 2),
  9: (200, 30, 2),
  10: (150, 20, 2),
  **dict.fromkeys(range(11, 17), (150, 20, 3)),
}
_RATIO = 100.0  # between the lengths of two sentences
_SENTENCE_END = re.compile(
  r'(?:(?<=[.!?])|(?<=[.!?]["\'\u201d\u2019)\]]))\s+'
  r'(?=["\'\u201c\u2018(\[]*[A-Z0-9])'
)


class Pieces:
  """The ids that formats put between texts.

  Attributes:
    encode: a text without EOS.
    sentinels: X and Y.
    words: of the labels, one piece each.
    letters: of the options, as many as there are at most.
    question: '?', before the options and before the cue.
    stop: '.', after a letter and after an option.
    cue: what stands before the last X.

  Raises:
    ValueError: a word is not one piece, two are the same, or the vocabulary has
      no sentinels.
  """

  def __init__(
    self,
    vocabulary: seqio.Vocabulary,
    words: Sequence[str],
    letters: Sequence[str] = (),
    question: str = '?',
    stop: str = '.',
    cue: str = 'The correct one is',
  ):
    self._vocabulary = vocabulary
    first = vocabulary.vocab_size - 1
    own = '<extra_id_1>' in vocabulary.decode([first - 1])
    if vocabulary.extra_ids < 2 and not own:
      raise ValueError(
        f'The vocabulary has {vocabulary.extra_ids} sentinels; the formats of '
        'PPT need two: load it with extra_ids = 100, as T5 has.'
      )
    self.sentinels = first, first - 1
    self.words = [self._one(word) for word in words]
    if len(set(self.words)) < len(self.words):
      raise ValueError(f'Two of the words {list(words)} are the same piece.')
    self.letters = [self._one(letter) for letter in letters]
    self.question, self.stop = self._mark(question), self._mark(stop)
    self.cue = self.encode(cue)

  def encode(self, text: str) -> Ids:
    """Ids of a text, without EOS."""
    return list(map(int, self._vocabulary.encode(text)))

  def _one(self, word: str) -> int:
    ids = self.encode(word)
    if len(ids) != 1 or ids[0] == self._vocabulary.unk_id:
      raise ValueError(
        f'{word!r} is {len(ids)} pieces of the vocabulary, or unknown to it; a '
        'label must be one piece. Give other words.'
      )
    return ids[0]

  def _mark(self, text: str) -> int:
    """The last piece: before a mark SentencePiece puts one for the space."""
    return self.encode(text)[-1]

  def targets(self, label: int) -> Ids:
    """`X word Y`."""
    return [self.sentinels[0], self.words[label], self.sentinels[1]]


# ---- formats -----------------------------------------------------------------


def pair(pieces: Pieces, one: Ids, two: Ids, room: int) -> Ids:
  """`s1 X s2`; of a pair that is too long both lose their end, in proportion.

  Args:
    pieces: of the vocabulary.
    one: s1.
    two: s2.
    room: pieces at most.
  """
  left = room - 1
  if len(one) + len(two) > left:
    share = left * len(one) // (len(one) + len(two))
    share = min(max(share, 1), left - 1)
    one, two = one[:share], two[: left - share]
  return [*one, pieces.sentinels[0], *two]


def choice(
  pieces: Pieces,
  query: Ids,
  options: Sequence[Ids],
  room: int,
  max_query: int,
  max_option: int,
) -> Ids:
  """`query ? A. option. B. option. ... ? cue X`.

  Query and options are cut at their limits, and if that is still too long, all
  of them in proportion (the released code cuts the end, with the X).

  Raises:
    ValueError: more options than letters, or no room for a piece of each.
  """
  if len(options) > len(pieces.letters):
    raise ValueError(
      f'{len(options)} options, but {len(pieces.letters)} letters.'
    )
  parts = [query[:max_query], *(option[:max_option] for option in options)]
  left = room - (3 + len(pieces.cue) + 3 * len(options))
  length = sum(map(len, parts))
  if left < len(parts):
    raise ValueError(
      f'{room} pieces of inputs are too few for {len(options)} options.'
    )
  if length > left:
    spare = left - len(parts)  # a piece of each, and the rest in proportion
    parts = [x[: 1 + spare * len(x) // length] for x in parts]
  query, *options = parts
  out = [*query, pieces.question]
  for letter, option in zip(pieces.letters, options, strict=False):
    out += [letter, pieces.stop, *option, pieces.stop]
  return [*out, pieces.question, *pieces.cue, pieces.sentinels[0]]


def single(pieces: Pieces, sentence: Ids, room: int) -> Ids:
  """`s X`."""
  return [*sentence[: room - 1], pieces.sentinels[0]]


# ---- examples of documents ---------------------------------------------------

Documents = Sequence[Sequence[Ids]]


def _below(rng: np.random.Generator, n: int) -> int:
  return int(rng.integers(n))


def _beside(rng: np.random.Generator, i: int, n: int) -> int:
  """The sentence before or after sentence i of n."""
  if i in (0, n - 1):
    return 1 if i == 0 else n - 2
  return i + (1 if rng.random() < 0.5 else -1)


def _apart(rng: np.random.Generator, i: int, n: int, count: int) -> list[int]:
  """Sentences that are neither sentence i of n nor beside it; [] of too few."""
  others = [j for j in range(n) if abs(j - i) > 1]
  if len(others) < count:
    return []
  return rng.choice(others, count, replace=False).tolist()


def _elsewhere(
  rng: np.random.Generator, documents: Documents, d: int, count: int
) -> list[Ids]:
  """Sentences of other documents, as different ones as there are."""
  others = np.delete(np.arange(len(documents)), d)
  replace = len(others) < count
  chosen = rng.choice(others, count, replace=replace).tolist()
  return [documents[k][_below(rng, len(documents[k]))] for k in chosen]


def next_sentence(
  rng: np.random.Generator, documents: Documents, d: int, i: int
) -> tuple[Ids, Ids, int] | None:
  """s1, s2 and the label: each a third of the draws; None of unlike lengths."""
  document = documents[d]
  label = _below(rng, 3)
  if label == 0:
    [other] = _elsewhere(rng, documents, d, 1)
  elif label == 1:
    found = _apart(rng, i, len(document), 1)
    if not found:
      return None
    other = document[found[0]]
  else:
    other = document[_beside(rng, i, len(document))]
  ratio = len(document[i]) / len(other)
  if not 1 / _RATIO <= ratio <= _RATIO:
    return None
  return document[i], other, label


def selection(
  rng: np.random.Generator,
  documents: Documents,
  d: int,
  i: int,
  count: int,
  same: int,
) -> tuple[Ids, list[Ids], int] | None:
  """Query, options and the index of the right one; None of a short document.

  Args:
    rng: draws.
    documents: sentences of all.
    d: the query's document.
    i: the query's sentence.
    count: of options.
    same: options of the query's document beside the right one; at most, for the
      rest are of other documents.
  """
  document = documents[d]
  same = min(same, count - 1)
  near = _apart(rng, i, len(document), same)
  if len(near) < same:
    return None
  options = [document[_beside(rng, i, len(document))]]
  options += [document[j] for j in near]
  options += _elsewhere(rng, documents, d, count - 1 - same)
  order = rng.permutation(count).tolist()
  return document[i], [options[k] for k in order], order.index(0)


def examples(
  documents: Documents,
  format: str,
  pieces: Pieces,
  room: int,
  passes: int = 1,
  seed: int = 0,
) -> list[Example]:
  """An example of each sentence and pass, but for those that cannot have one.

  Args:
    documents: ids of the sentences of each, two documents at least.
    format: of the first three of `FORMATS`.
    pieces: of the vocabulary.
    room: pieces of inputs at most.
    passes: over the documents, with other draws each.
    seed: of the draws.
  """
  rng = np.random.Generator(np.random.PCG64([seed, FORMATS.index(format)]))
  out: list[Example] = []
  for _ in range(passes):
    for d, document in enumerate(documents):
      for i in range(len(document)):
        if format == 'next_sentence':
          made = next_sentence(rng, documents, d, i)
          if made:
            out.append((pair(pieces, made[0], made[1], room), made[2]))
          continue
        count = 6 if format != 'unified' else 2 + _below(rng, 15)
        *limits, same = LIMITS[count] if format == 'unified' else SIX
        chosen = selection(rng, documents, d, i, count, same)
        if chosen:
          inputs = choice(pieces, *chosen[:2], room, *limits)
          out.append((inputs, chosen[2]))
  return out


# ---- files -------------------------------------------------------------------


def read_documents(path: str) -> list[str]:
  """The texts of a file: see the module.

  Raises:
    UserDataError: no such file, or a row without `text`.
  """
  file = pathlib.Path(path)
  if file.suffix == '.jsonl':
    rows = list(row_files.read_rows(file))
    for line, row in rows:
      if not isinstance(row.get('text'), str):
        raise UserDataError(
          f'{path}, line {line}: no column `text` with a document.'
        )
    return [row['text'] for _, row in rows]
  if not file.is_file():
    raise UserDataError(f'{path}: there is no such file.')
  text = file.read_text(encoding='utf-8')
  parts = re.split(r'\n\s*\n', text.strip())
  return parts if len(parts) > 1 else parts[0].splitlines()


def sentences(text: str) -> list[str]:
  """A text cut after full stops, where a capital or a number follows.

  >>> sentences('"No!" said Mr. Lorry. He left at 5.30 sharp. Why?')
  ['"No!" said Mr.', 'Lorry.', 'He left at 5.30 sharp.', 'Why?']
  """
  return [' '.join(s.split()) for s in _SENTENCE_END.split(text) if s.strip()]


def encoded(
  texts: Sequence[str],
  pieces: Pieces,
  min_tokens: int,
  min_sentences: int,
  sentence_per_line: bool,
) -> Documents:
  """Documents without sentences that are too short, and those of enough."""
  cut = str.splitlines if sentence_per_line else sentences
  found = [
    [ids for ids in map(pieces.encode, cut(text)) if len(ids) >= min_tokens]
    for text in texts
  ]
  return [document for document in found if len(document) >= min_sentences]
