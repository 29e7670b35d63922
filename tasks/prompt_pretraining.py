"""PPT, pre-trained prompt tuning (Gu et al. 2022): tasks made of any text.

A prompt is pretrained where labels cost nothing, and then starts a downstream
task in the same format. With the sentinels X and Y of T5, targets are always
`X word Y`, and the inputs of the formats are

    next_sentence            s1 X s2: does s2 stand beside s1 (yes), elsewhere
                             in its document (maybe), or in another (no)?
    next_sentence_selection  query ? A. option. B. option. ... ? cue X: which
                             of six stands beside the query? One of the others
                             is of its document, four are of other documents.
    unified                  the same with 2 to 16 options, each number as often
    single_sentence          s X: of five, which label has a classifier given?

The soft tokens stand in front, as everywhere (`feature_converters.py`).

A text file holds documents, apart by empty lines, or, where it has no empty
line, one a line; a JSONL file has a document in the column `text` of each row.
All of it is read into memory, and each sentence is the s1 or the query of one
example of every pass. `PretrainingText` stands where `user_data.UserData` does
(runs/pretrain_prompt.gin); `FormattedRows` makes downstream tasks of rows.

Source: Gu et al. 2022, arXiv 2109.04332, section 3, as known from the paper;
numbers checked against thu-coai/PPT `tools/preprocess_pretrain_data_*.py`.
There a document with a short sentence is left out; here only the sentence is.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
import seqio

from prompt_jax import deltas
from prompt_jax import metrics
from prompt_jax import row_files
from prompt_jax import user_data
from prompt_jax.row_files import UserDataError

from . import arrays
from .prompt_formats import FORMATS
from .prompt_formats import LIMITS
from .prompt_formats import SIX
from .prompt_formats import WORDS
from .prompt_formats import Example
from .prompt_formats import Pieces
from .prompt_formats import choice
from .prompt_formats import encoded
from .prompt_formats import examples
from .prompt_formats import pair
from .prompt_formats import read_documents
from .prompt_formats import single

# ---- tasks -------------------------------------------------------------------


class _Word:
  """The number of the first label in a text; -1 where there is none."""

  def __init__(self, words: Sequence[str]):
    self.words = tuple(words)

  def __call__(self, text: str, **unused: Any) -> int:
    found = [w for w in re.findall(r'\w+', text) if w in self.words]
    return self.words.index(found[0]) if found else -1


def _words(data: Any) -> tuple[str, ...]:
  """The words of the labels.

  Raises:
    ValueError: an unknown format, or a number that is no count.
  """
  if data.format not in FORMATS:
    raise ValueError(
      f'The format must be one of {", ".join(FORMATS)}, got {data.format!r}.'
      f'{deltas.near_misses(str(data.format), FORMATS)}'
    )
  for field in ('max_inputs', 'passes', 'min_tokens', 'min_sentences'):
    value = getattr(data, field, 1)
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{type(data).__name__}.{field} must be a whole number of at least 1, '
        f'got {value!r}.'
      )
  return tuple(data.words or WORDS[data.format])


def _pieces(data: Any, vocabulary: seqio.Vocabulary) -> Pieces:
  """The ids between texts; raises what `Pieces` raises."""
  words = _words(data)
  chosen = data.format in ('next_sentence_selection', 'unified')
  letters = words if chosen else ()
  return Pieces(vocabulary, words, letters, *data.marks)


def _register(
  data: Any, name: str, vocabulary: seqio.Vocabulary
) -> user_data.UserTask:
  """Registers what `data.examples` makes of its files as a task."""
  pieces = _pieces(data, vocabulary)
  files = {'train': data.train_data, 'validation': data.eval_data}
  files = {split: path for split, path in files.items() if path is not None}

  def rows(split: str) -> arrays.Rows:
    found = _read(data, split, files[split], vocabulary)
    inputs = np.zeros((len(found), max(len(x) for x, _ in found)), np.int32)
    for row, (ids, _) in zip(inputs, found, strict=True):
      row[: len(ids)] = ids
    targets = np.array([pieces.targets(label) for _, label in found], np.int32)
    return {'inputs': inputs, 'targets': targets}

  sizes = {
    split: len(_read(data, split, path, vocabulary))
    for split, path in files.items()
  }
  words = _Word(_words(data))
  arrays.add(name, vocabulary, rows, sizes, words, metrics.accuracy)
  # As a user's own task: the next one of that name takes its place.
  user_data._registered.add(name)
  return user_data.UserTask(name, sizes, dict.fromkeys(sizes, 0), ())


@functools.lru_cache(maxsize=4)
def _read(
  data: Any, split: str, path: str, vocabulary: seqio.Vocabulary
) -> list[Example]:
  """The examples of a file, which training and evaluation both ask for."""
  found = data.examples(path, split, _pieces(data, vocabulary))
  if not found:
    raise UserDataError(f'{path}: no example can be made of it.')
  return found


@dataclasses.dataclass(frozen=True)
class PretrainingText:
  """Files of text as a task to pretrain a prompt on.

  For `single_sentence` they are JSONL with `text`, a sentence, and its class:
  `label`, a word or 0 to 4, or `label_scores`, which `prompt-jax score` writes
  for a classifier with five labels, the worst first.

  Attributes:
    train_data: file of split `train`, or None.
    eval_data: file of split `validation`, or None.
    format: one of `FORMATS`.
    max_inputs: pieces of inputs at most; TASK_FEATURE_LENGTHS must have room.
    words: of the labels, each one piece; None for the paper's, `WORDS`.
    marks: '?', '.' and the cue of `Pieces`.
    passes: over the sentences, with other draws each.
    seed: of the draws; those of evaluation are others.
    min_tokens: pieces of a sentence at least; shorter ones are left out.
    min_sentences: of a document at least.
    sentence_per_line: lines are sentences; else texts are cut (`sentences`).
    confidence: of `label_scores`, the least probability of the best label.
  """

  train_data: str | None = None
  eval_data: str | None = None
  format: str = 'next_sentence'
  max_inputs: int = 512
  words: Sequence[str] | None = None
  marks: Sequence[str] = ('?', '.', 'The correct one is')
  passes: int = 1
  seed: int = 0
  min_tokens: int = 5
  min_sentences: int = 6
  sentence_per_line: bool = False
  confidence: float = 0.0
  # Answers are decoded, not ranked: sentinels are in no label's text.
  labels = None

  def __post_init__(self):
    words = _hashable(self, 'words', 'marks') or _words(self)
    if len(words) != len(WORDS[self.format]):
      raise ValueError(
        f'{self.format} has {len(WORDS[self.format])} labels, got the words '
        f'{words}.'
      )

  @property
  def given(self) -> bool:
    """Whether there are any files."""
    return bool(self.train_data or self.eval_data)

  def register(
    self, name: str, vocabulary: seqio.Vocabulary
  ) -> user_data.UserTask:
    """Registers the files as the task `name`.

    Raises:
      UserDataError: a file or row is wrong, or gives no example.
      ValueError: a label that is not one piece, or no sentinels.
    """
    return _register(self, name, vocabulary)

  def examples(self, path: str, split: str, pieces: Pieces) -> list[Example]:
    """Those of a file."""
    if self.format == 'single_sentence':
      return self._single(path, pieces)
    documents = encoded(
      read_documents(path),
      pieces,
      self.min_tokens,
      self.min_sentences,
      self.sentence_per_line,
    )
    if len(documents) < 2:
      raise UserDataError(
        f'{path}: {len(documents)} documents of at least {self.min_sentences} '
        f'sentences of at least {self.min_tokens} pieces; two are needed. '
        'Documents are apart by empty lines, or the rows of a .jsonl file.'
      )
    seed = 2 * self.seed + (split != 'train')
    room, passes = self.max_inputs, self.passes
    return examples(documents, self.format, pieces, room, passes, seed)

  def _single(self, path: str, pieces: Pieces) -> list[Example]:
    out = []
    for line, row in row_files.read_rows(path):
      where = f'{path}, line {line}'
      if not isinstance(row.get('text'), str):
        raise UserDataError(f'{where}: no column `text` with a sentence.')
      label = self._class(row, where)
      if label is not None:
        ids = pieces.encode(row['text'])
        out.append((single(pieces, ids, self.max_inputs), label))
    return out

  def _class(self, row: Mapping[str, Any], where: str) -> int | None:
    """Of a row; None where the classifier was not sure."""
    scores, words = row.get('label_scores'), _words(self)
    if scores is None:
      return _index(row.get('label'), words, where)
    if len(scores) != len(words):
      raise UserDataError(
        f'{where}: label_scores of {len(scores)} labels, expected {len(words)}.'
      )
    values = list(map(float, scores.values()))
    share = [math.exp(x - max(values)) for x in values]
    sure = 1.0 / math.fsum(share) >= self.confidence
    return values.index(max(values)) if sure else None


@dataclasses.dataclass(frozen=True)
class FormattedRows:
  """Rows of a downstream task in the format of a pretrained prompt.

      next_sentence    inputs='{hypothesis}', second='{premise}',
                       classes=('contradiction', 'neutral', 'entailment')
      unified, ...     inputs='{question}', options=('{a}', '{b}', '{c}')
      single_sentence  inputs='{sentence}', classes=('negative', 'positive'),
                       words=('terrible', 'great')

  The class of a row stands for the word of the same place, which of options is
  their letter.

  Attributes:
    train_data: .jsonl, .csv or .tsv file of split `train`, or None.
    eval_data: file of split `validation`, or None.
    inputs: template of the sentence, of the first one or of the query, with the
      names of columns in braces.
    second: of a pair's second sentence.
    options: templates of the options.
    label: the column of the label.
    classes: the labels; a row may have their numbers from 0. None: numbers.
    format: one of `FORMATS`.
    max_inputs: as of `PretrainingText`.
    words: as of `PretrainingText`, but as many as there are classes.
    marks: as of `PretrainingText`.
  """

  train_data: str | None = None
  eval_data: str | None = None
  inputs: str | None = None
  second: str | None = None
  options: Sequence[str] = ()
  label: str = 'label'
  classes: Sequence[str] | None = None
  format: str = 'next_sentence'
  max_inputs: int = 512
  words: Sequence[str] | None = None
  marks: Sequence[str] = ('?', '.', 'The correct one is')
  labels = None

  def __post_init__(self):
    words = _hashable(self, 'words', 'marks', 'options', 'classes')
    words = words or _words(self)
    if self.classes is not None and len(self.classes) > len(words):
      raise ValueError(
        f'{len(self.classes)} classes {self.classes}, but {len(words)} words '
        f'{words}.'
      )
    needs = {'next_sentence': 'second', 'single_sentence': 'inputs'}
    for field in ('inputs', needs.get(self.format, 'options')):
      if self.given and not getattr(self, field):
        raise ValueError(f'{self.format} needs the template `{field}`.')

  @property
  def given(self) -> bool:
    """Whether there are any files."""
    return bool(self.train_data or self.eval_data)

  def register(
    self, name: str, vocabulary: seqio.Vocabulary
  ) -> user_data.UserTask:
    """Registers the files as the task `name`; see `PretrainingText`."""
    return _register(self, name, vocabulary)

  def examples(self, path: str, split: str, pieces: Pieces) -> list[Example]:
    """Those of a file."""
    del split
    known = self.classes or tuple(map(str, range(len(_words(self)))))
    limits = LIMITS.get(len(self.options), SIX)[:2]
    out = []
    for line, row in row_files.read_rows(path):
      where = f'{path}, line {line}'

      def ids(template: str | None, row: Any = row, where: str = where) -> Any:
        return pieces.encode(_filled(template or '', row, where))

      one, room = ids(self.inputs), self.max_inputs
      if self.format == 'next_sentence':
        made = pair(pieces, one, ids(self.second), room)
      elif self.format == 'single_sentence':
        made = single(pieces, one, room)
      else:
        options = [ids(option) for option in self.options]
        made = choice(pieces, one, options, room, *limits)
      out.append((made, _index(row.get(self.label), known, where)))
    return out


def _hashable(data: Any, *fields: str) -> Sequence[str] | None:
  """Makes tuples of gin's lists; the words, if there are some."""
  for field in fields:
    if getattr(data, field) is not None:
      object.__setattr__(data, field, tuple(getattr(data, field)))
  _words(data)
  return data.words


def _index(label: Any, known: Sequence[str], where: str) -> int:
  """Of a label, by its text or else by its number."""
  if str(label) in known:
    return list(known).index(str(label))
  if str(label).isdigit() and int(label) < len(known):
    return int(label)
  raise UserDataError(
    f'{where}: label {label!r}, expected one of {", ".join(known)}, or a '
    f'number from 0 to {len(known) - 1}.{deltas.near_misses(str(label), known)}'
  )


def _filled(template: str, row: Mapping[str, Any], where: str) -> str:
  try:
    return template.format_map(row)
  except KeyError as e:
    raise UserDataError(
      f'{where}: no column {e}, which template {template!r} needs.'
      f'{deltas.near_misses(e.args[0], row)} The columns: {", ".join(row)}.'
    ) from None
