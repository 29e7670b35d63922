"""Vocabularies whose text may hold soft tokens.

A soft token is written `<soft:k>`: number k of the prompt of the example's own
task. Here it is only a token id, `SOFT_BASE + k`; which row of which prompt it
addresses is decided in `feature_converters.py`, so a vocabulary knows nothing
of models. Not for training vocabularies.
"""

from collections.abc import Iterable, Sequence
import hashlib
import re
from typing import Any

from absl import logging
import numpy as np
from sentencepiece import sentencepiece_model_pb2
import seqio
import tensorflow as tf

# Above every embedding table, and small enough that SOFT_BASE + k is an int32.
SOFT_BASE = 1 << 24

# Six digits at most: far above any prompt length, below any overflow.
_SOFT = r'<soft:(\d{1,6})>'
_SOFT_START = '<soft:'
_MALFORMED = (
  'malformed soft token: write <soft:k> with k of one to six digits, as in '
  '"It was <soft:0>", in the text: '
)
# Splits a text into text, number, text, ...; NUL cannot be typed by accident.
_SEPARATOR = '\0soft\0'


class SoftTokenVocabulary(seqio.Vocabulary):
  """A vocabulary that also reads and writes `<soft:k>`.

  `encode('It was <soft:0> .')` is the inner vocabulary's ids of 'It was ', then
  SOFT_BASE + 0, then those of ' .'. Each stretch of text is encoded by itself,
  so a SentencePiece model starts a new word after a soft token. Sizes and
  special ids are those of the inner vocabulary.

  Attributes:
    inner: the vocabulary of the text around the soft tokens.

  Raises:
    ValueError: the text holds a malformed soft token, such as '<soft:x>'. In
      `encode_tf` TensorFlow's InvalidArgumentError has the same message.
  """

  def __init__(self, inner: seqio.Vocabulary):
    if isinstance(inner, SoftTokenVocabulary):
      raise ValueError('The vocabulary reads soft tokens already.')
    super().__init__(extra_ids=inner.extra_ids)
    self.inner = inner
    self._traced: Any = None

  @property
  def bos_id(self) -> int | None:
    """The id that begins a text, or None."""
    return self.inner.bos_id

  @property
  def eos_id(self) -> int | None:
    """The id that ends a text."""
    return self.inner.eos_id

  @property
  def unk_id(self) -> int | None:
    """The id that stands for what has no id."""
    return self.inner.unk_id

  @property
  def vocab_size(self) -> int:
    """Number of text ids, sentinels included; soft tokens do not count."""
    return self.inner.vocab_size

  @property
  def _base_vocab_size(self) -> int:
    return self.inner._base_vocab_size

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, SoftTokenVocabulary) and self.inner == other.inner

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_traced': None}

  def __hash__(self) -> int:
    return hash((type(self.inner).__name__, self.inner.vocab_size))

  def __repr__(self) -> str:
    return f'SoftTokenVocabulary({self.inner})'

  __str__ = __repr__

  def _encode(self, s: Any) -> Sequence[int]:
    text = s.decode() if isinstance(s, bytes) else s
    ids = []
    for i, part in enumerate(re.split(_SOFT, text)):
      if i % 2:
        ids.append(SOFT_BASE + int(part))
      elif _SOFT_START in part:
        raise ValueError(_MALFORMED + repr(text))
      elif part:
        ids.extend(self.inner.encode(part))
    return ids

  def _encode_tf(self, s: tf.Tensor) -> Any:
    # Every feature of every task encodes: traced once, pipelines start in half
    # the time.
    if self._traced is None:
      self._traced = tf.function(self._interleave, autograph=False)
    return self._traced(tf.convert_to_tensor(s))

  def _interleave(self, s: tf.Tensor) -> Any:
    """Ids of a text, or a ragged [N, length] of N texts."""
    marked = tf.strings.regex_replace(s, _SOFT, rf'{_SEPARATOR}\1{_SEPARATOR}')
    parts = tf.strings.split(marked, _SEPARATOR)
    # Numbers are the odd parts of their text.
    if s.shape.rank == 0:
      flat = parts
      odd = tf.range(tf.size(parts)) % 2 == 1
    else:
      flat = parts.flat_values
      odd = tf.ragged.range(parts.row_lengths()).flat_values % 2 == 1
    text = tf.where(odd, '', flat)
    malformed = tf.strings.regex_full_match(text, f'(?s).*{_SOFT_START}.*')
    tf.debugging.Assert(
      tf.logical_not(tf.reduce_any(malformed)),
      [_MALFORMED, tf.boolean_mask(text, malformed)],
    )
    ids, lengths = self._encode_many(text)
    # Each id with the number of its part; a stable sort puts the soft tokens
    # between the texts around them.
    where = tf.cast(tf.where(odd)[:, 0], tf.int32)
    soft = SOFT_BASE + tf.strings.to_number(tf.gather(flat, where), tf.int32)
    place = tf.concat([tf.repeat(tf.range(tf.size(flat)), lengths), where], 0)
    ids = tf.gather(tf.concat([ids, soft], 0), tf.argsort(place, stable=True))
    if s.shape.rank == 0:
      return ids
    ends = tf.cumsum(lengths + tf.cast(odd, lengths.dtype))
    splits = tf.gather(tf.pad(ends, [[1, 0]]), parts.row_splits)
    ragged: Any = tf.RaggedTensor
    return ragged.from_row_splits(ids, splits, validate=False)

  def _encode_many(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Inner ids of N texts, one after another, and the N lengths."""
    if not isinstance(self.inner, seqio.ByteVocabulary):
      rows = self.inner.encode_tf(texts)
      return rows.flat_values, rows.row_lengths()
    # ByteVocabulary takes one text only, but a byte is an id.
    ids = self.inner.encode_tf(tf.strings.reduce_join(texts))
    return ids, tf.cast(tf.strings.length(texts), tf.int64)

  def _decode(self, ids: Sequence[int]) -> str:
    parts, run = [], []
    for token in ids:
      if token < SOFT_BASE:
        run.append(token)
        continue
      parts += [self.inner.decode(run), f'<soft:{token - SOFT_BASE}>']
      run = []
    parts.append(self.inner.decode(run))
    # Bytes keep their own spaces; pieces lose theirs at the ends of a stretch.
    between = '' if isinstance(self.inner, seqio.ByteVocabulary) else ' '
    return between.join(part for part in parts if part)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids` up to and with the first EOS."""
    tokens = [int(i) for i in ids]
    if self.eos_id in tokens:
      tokens = tokens[: tokens.index(self.eos_id) + 1]
    return self._decode(tokens)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    # Rarely used, and never in training: Python is quick enough.
    if ids.shape.rank == 1:
      return self._decode_tf(ids[None])[0]

    def decode(rows):
      return np.array([self.decode(row).encode() for row in rows], object)

    text = tf.numpy_function(decode, [ids], tf.string)
    return tf.ensure_shape(text, ids.shape[:1])

  def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """Text of ids [length] or [N, length]."""
    return self._decode_tf(tf.convert_to_tensor(ids))


class WordVocabulary(seqio.Vocabulary):
  """A word is an id: padding 0, EOS 1, unknown words 2, then the words.

  Text is split at ASCII white space. The sentinel `<extra_id_i>` is id
  `vocab_size - 1 - i`, as in T5. Made of a list, so it needs no file.

  Attributes:
    words: the words, from id 3 on.

  Raises:
    ValueError: a word comes twice, or is no word.
  """

  def __init__(self, words: Sequence[str], extra_ids: int = 0):
    super().__init__(extra_ids=extra_ids)
    self.words = tuple(words)
    sentinels = [f'<extra_id_{i}>' for i in reversed(range(extra_ids))]
    self._pieces = ['<pad>', '</s>', '<unk>', *words, *sentinels]
    self._ids = {piece: i for i, piece in enumerate(self._pieces)}
    self._table: Any = None
    wrong = [w for i, w in enumerate(self._pieces) if self._ids[w] != i]
    wrong += [word for word in words if len(word.encode().split()) != 1]
    if wrong:
      raise ValueError(
        f'The words must be different and without spaces; got {wrong[0]!r}'
        f'{" twice" if wrong[0] in self._pieces[: self._ids[wrong[0]]] else ""}'
        '.'
      )

  @property
  def eos_id(self) -> int:
    """1."""
    return 1

  @property
  def unk_id(self) -> int:
    """2, for words that are not listed."""
    return 2

  @property
  def vocab_size(self) -> int:
    """Number of ids, sentinels included."""
    return self._base_vocab_size

  @property
  def _base_vocab_size(self) -> int:
    # With the sentinels, which seqio would else decode as unknown.
    return len(self._pieces)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, WordVocabulary) and self._pieces == other._pieces

  def __hash__(self) -> int:
    return hash(self.words)

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_table': None}

  def _encode(self, s: Any) -> Sequence[int]:
    words = (s if isinstance(s, bytes) else s.encode()).split()
    return [self._ids.get(word.decode(), self.unk_id) for word in words]

  def _encode_tf(self, s: tf.Tensor) -> Any:
    if self._table is None:
      with tf.init_scope():  # once, outside of the program that asks first
        self._table = tf.lookup.StaticHashTable(
          tf.lookup.KeyValueTensorInitializer(
            self._pieces, range(self.vocab_size), tf.string, tf.int32
          ),
          self.unk_id,
        )
    words = tf.strings.split(s)
    if isinstance(words, tf.RaggedTensor):
      return words.with_flat_values(self._table.lookup(words.flat_values))
    return self._table.lookup(words)

  def _decode(self, ids: Iterable[int]) -> str:
    special = (self.pad_id, self.eos_id)
    return ' '.join(self._pieces[i] for i in ids if i not in special)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    text = tf.gather(['', '', *self._pieces[2:]], ids)
    text = tf.strings.reduce_join(text, axis=-1, separator=' ')
    return tf.strings.strip(tf.strings.regex_replace(text, ' +', ' '))


def sentencepiece(path: str, extra_ids: int = 100) -> SoftTokenVocabulary:
  """The vocabulary in a SentencePiece model file, T5's `spiece.model`.

  The model of T5 and T5 1.1 has 32000 pieces; with 100 extra ids the sentinel
  `<extra_id_i>` is id 32099 - i. Files that hold the sentinels themselves
  (T5X's `cc_all.32000.100extra`) get no more of them.

  Args:
    path: the file; remote paths work as far as TensorFlow reads them.
    extra_ids: sentinels to add after the pieces.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a SentencePiece model.
  """
  path = str(path)
  if not tf.io.gfile.exists(path):
    raise FileNotFoundError(
      f'No SentencePiece model at {path!r}. Set VOCABULARY_PATH to the '
      "model's own file; T5's is called spiece.model or sentencepiece.model."
    )
  if tf.io.gfile.isdir(path):
    raise ValueError(
      f'{path!r} is a folder; a SentencePiece model is one file, such as '
      'spiece.model.'
    )
  protos: Any = sentencepiece_model_pb2
  model = protos.ModelProto()
  content = _read(path)
  try:
    model.ParseFromString(content)
  except Exception as error:  # protobuf's errors have no public base class
    raise ValueError(_not_a_model(path, content)) from error
  if not model.pieces:
    raise ValueError(_not_a_model(path, content))
  own = sum('<extra_id_' in piece.piece for piece in model.pieces)
  if own and extra_ids:
    logging.info('%s has %d sentinels of its own: none are added.', path, own)
    extra_ids = 0
  return SoftTokenVocabulary(
    seqio.SentencePieceVocabulary(path, extra_ids=extra_ids)
  )


def bytes_vocabulary(extra_ids: int = 125) -> SoftTokenVocabulary:
  """ByT5's vocabulary: an id a byte, byte b is 3 + b.

  Args:
    extra_ids: sentinels after the 259 ids; ByT5 has 125, so 384 rows.

  Source: Xue et al. 2022, arXiv 2105.13626, section 3.
  """
  return SoftTokenVocabulary(seqio.ByteVocabulary(extra_ids=extra_ids))


def check_fits(vocabulary: seqio.Vocabulary, embedding_rows: int) -> None:
  """Checks that every text id has a row in the embedding table.

  A larger table is fine: T5 has 32128 rows for 32100 ids.

  Raises:
    ValueError: the vocabulary has more ids than the table has rows.
  """
  if vocabulary.vocab_size > embedding_rows:
    raise ValueError(
      f'The vocabulary has {vocabulary.vocab_size} ids, but the model '
      f'embeds {embedding_rows}: ids from {embedding_rows} on would have no '
      'row. Use the vocabulary that the model was trained with, or fewer '
      'extra_ids.'
    )


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
  """16 hex digits that differ where two vocabularies encode differently.

  Hashes the model file's bytes, or the words, and the number of extra ids, so
  the place of the file does not matter.
  """
  if isinstance(vocabulary, SoftTokenVocabulary):
    vocabulary = vocabulary.inner
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    content = _read(vocabulary.sentencepiece_model_file)
  elif isinstance(vocabulary, WordVocabulary):
    content = ' '.join(vocabulary.words).encode()
  else:
    content = str(vocabulary.vocab_size).encode()
  digest = hashlib.sha256(type(vocabulary).__name__.encode())
  digest.update(f' {vocabulary.extra_ids} '.encode())
  digest.update(content)
  return digest.hexdigest()[:16]


def _read(path: str) -> bytes:
  with tf.io.gfile.GFile(path, 'rb') as file:
    return file.read()


def _not_a_model(path: str, content: bytes) -> str:
  return (
    f'{path!r} is not a SentencePiece model: {len(content)} bytes that start '
    f'with {content[:24]!r}. A text pointer instead of the file, or an '
    'unfinished download, are the usual reasons.'
  )
