"""T5's objectives for plain text, as preprocessors of tokens.

`span_corruption`: of L tokens, N = round(0.15 L) are noise, in round(N / 3)
spans between as many spans that stay, each of at least one token. In the inputs
every noise span is a sentinel, in the targets every span that stays:

    tokens   Thank you for inviting me to your party last week
    inputs   Thank you <0> me to your party <1>
    targets  <0> for inviting <1> last week

(and EOS after both; more noise than 0.15, to show two spans). A piece ends with
noise, so that no sentinel closes the targets. Sentinels count down from the
last id. The text is cut into pieces of the one length that makes the inputs as
long as they may be.
`prefix_lm`: a piece is cut at a random token, into inputs and targets.
`full_lm`: documents, each with EOS, one after the other, in pieces; no inputs.

Draws are stateless: they depend on the seed of `get_dataset` alone.

Source: Raffel et al. 2020, arXiv 1910.10683, sections 3.1.4, 3.2.3 and 3.3, and
google-research/text-to-text-transfer-transformer `t5/data/preprocessors.py`
(`span_corruption`, `prefix_lm`, `full_lm`).
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0
# Lengths where none are given, to count tokens: T5's.
LENGTHS = {'inputs': 512, 'targets': 512}

_CHUNK = 65536  # tokens of a document at most
_DOCUMENTS = 128  # that are joined before they are cut


def _cuts_to_lengths(function: Any) -> Any:
  """Tells `datasets.length_report` that lengths make the examples."""
  function.cuts_to_lengths = True
  return function


@_cuts_to_lengths
def span_corruption(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, Any],
  sequence_length: Mapping[str, int] | None = None,
  noise_density: float = NOISE_DENSITY,
  mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tf.data.Dataset:
  """Pieces of text with spans of noise; see the module.

  Args:
    dataset: documents, token ids `targets`.
    output_features: of the task.
    sequence_length: of inputs and targets, EOS included.
    noise_density: share of the tokens that are noise.
    mean_noise_span_length: in tokens.

  Raises:
    ValueError: the targets are longer than their length, or the vocabulary has
      fewer sentinels than there are spans.
  """
  lengths = {**LENGTHS, **(sequence_length or {})}
  vocabulary = output_features['targets'].vocabulary
  noise = (noise_density, mean_noise_span_length)
  length, targets_length = random_spans_helper(lengths['inputs'], *noise)
  if lengths['targets'] < targets_length:
    raise ValueError(
      f'Span corruption of inputs of {lengths["inputs"]} tokens has targets of '
      f'{targets_length}, but TASK_FEATURE_LENGTHS has room for '
      f'{lengths["targets"]}.'
    )
  num_spans = _counts(length, *noise)[1]
  if num_spans > vocabulary.extra_ids:
    raise ValueError(
      f'Span corruption of inputs of {lengths["inputs"]} tokens needs '
      f'{num_spans} sentinels, but the vocabulary has {vocabulary.extra_ids}: '
      'use shorter inputs, or a vocabulary with more extra ids.'
    )

  def corrupt(row: Any, seeds: Any) -> Any:
    tokens = row['targets']
    is_noise = random_spans_noise_mask(tf.size(tokens), *noise, seeds)
    first = vocabulary.vocab_size - 1
    return {
      'inputs': spans_to_sentinels(tokens, is_noise, first),
      'targets': spans_to_sentinels(tokens, tf.logical_not(is_noise), first),
    }

  pieces = _pieces(_joined(_chunks(dataset)), length)
  return _drawn(corrupt, 2)(pieces)


@_cuts_to_lengths
def prefix_lm(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, Any],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """Pieces that are cut into inputs and targets at a random token.

  Pieces of a document are as long as the inputs may be, EOS aside; the inputs
  have 1 to length - 1 tokens of them, each as often.
  """
  lengths = {**LENGTHS, **(sequence_length or {})}
  length = min(lengths['inputs'], lengths['targets']) - 1

  def cut(row: Any, seed: Any) -> Any:
    tokens = row['targets']
    at = tf.random.stateless_uniform(
      [], seed, minval=1, maxval=tf.size(tokens), dtype=tf.int32
    )
    return {'inputs': tokens[:at], 'targets': tokens[at:]}

  # One token cannot be cut.
  pieces = _pieces(_chunks(dataset), length)
  pieces = pieces.filter(lambda row: tf.size(row['targets']) > 1)
  return _drawn(cut, 1)(pieces)


@_cuts_to_lengths
def full_lm(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, Any],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """Pieces of documents that follow each other, EOS at the end of each one.

  A piece is as long as the targets and ends where it does: the feature has no
  EOS of its own (`add_eos`). The inputs are empty, but for the EOS that the
  task puts there: for decoders.
  """
  eos = output_features['targets'].vocabulary.eos_id

  def ended(row: Any) -> Any:
    tokens = row['targets']
    return {'targets': tf.concat([tokens, [tf.cast(eos, tokens.dtype)]], 0)}

  length = {**LENGTHS, **(sequence_length or {})}['targets']
  pieces = _pieces(_joined(_chunks(dataset).map(ended)), length)
  return pieces.map(lambda row: {'inputs': row['targets'][:0], **row})


def random_spans_helper(
  inputs_length: int,
  noise_density: float = NOISE_DENSITY,
  mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
  """(tokens of a piece of text, length of its targets), for inputs of a length.

  The longest piece whose inputs, with a sentinel for each span and EOS, are no
  longer than `inputs_length`.
  """

  def lengths(length: int) -> tuple[int, int]:
    noise, spans = _counts(length, noise_density, mean_noise_span_length)
    return length - noise + spans + 1, noise + spans + 1

  length = inputs_length - 1
  while lengths(length + 1)[0] <= inputs_length:
    length += 1
  targets_length = lengths(length)[1]
  # As in T5: with half of it noise, both lengths are the same round number.
  if noise_density == 0.5 and targets_length > inputs_length:
    return length - 1, targets_length - 1
  return length, targets_length


def random_spans_noise_mask(
  length: Any,
  noise_density: float,
  mean_noise_span_length: float,
  seeds: Any,
) -> tf.Tensor:
  """Which tokens are noise, bool [length]; it begins with one that is not.

  All masks with these numbers of tokens and spans are equally likely. They are
  computed as `random_spans_helper` does; T5 rounds float32 here, and where half
  a token decides, targets lose their end.

  Args:
    length: number of tokens, at least 2: a single one is no noise.
    noise_density: share of noise.
    mean_noise_span_length: in tokens.
    seeds: two seeds, int32 [2, 2].
  """
  total = tf.maximum(length, 2)
  num_noise = _rounded(tf.cast(total, tf.float64) * noise_density)
  num_noise = tf.clip_by_value(num_noise, 1, total - 1)
  num_spans = _rounded(tf.cast(num_noise, tf.float64) / mean_noise_span_length)
  # At most as many as there are tokens that stay.
  most = tf.minimum(num_noise, total - num_noise)
  num_spans = tf.clip_by_value(num_spans, 1, most)
  noise = _random_segmentation(num_noise, num_spans, seeds[0])
  rest = _random_segmentation(total - num_noise, num_spans, seeds[1])
  lengths = tf.reshape(tf.stack([rest, noise], axis=1), [-1])
  kinds = tf.range(2 * num_spans) % 2 == 1
  return tf.repeat(kinds, lengths)[:length]


def spans_to_sentinels(
  tokens: tf.Tensor, mask: tf.Tensor, first: int
) -> tf.Tensor:
  """The tokens with each run of True in the mask as one sentinel.

  Args:
    tokens: ids [length].
    mask: bool [length].
    first: id of the first sentinel; the second is `first` - 1.
  """
  follows = mask & tf.concat([[False], mask[:-1]], axis=0)
  starts = tf.math.logical_xor(mask, follows)
  sentinels = first + 1 - tf.cumsum(tf.cast(starts, tokens.dtype))
  kept = tf.where(starts, sentinels, tokens)
  return tf.boolean_mask(kept, tf.logical_not(follows))


def _counts(
  length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """(noise tokens, spans) of a piece."""
  noise = round(length * noise_density)
  return noise, round(noise / mean_noise_span_length)


def _rounded(number: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.round(number), tf.int32)


def _random_segmentation(items: Any, segments: Any, seed: Any) -> tf.Tensor:
  """Lengths of segments of at least one item each, int32 [segments]."""
  starts = tf.cast(tf.range(items - 1) < segments - 1, tf.int32)
  starts = tf.concat([[0], seqio.stateless_shuffle(starts, seed)], axis=0)
  segment = tf.cumsum(starts)
  return tf.math.segment_sum(tf.ones_like(segment), segment)


def _drawn(function: Any, num_seeds: int) -> Any:
  """Over a dataset, with a new seed (or `seeds`) for every row."""
  return seqio.map_over_dataset(function, num_seeds=num_seeds)


def _chunks(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Of a long document one part, drawn at random; no empty ones."""

  def chunk(row: Any, seed: Any) -> Any:
    tokens = row['targets']
    number = (tf.size(tokens) - 1) // _CHUNK + 1
    at = _CHUNK * tf.random.stateless_uniform(
      [], seed, maxval=number, dtype=tf.int32
    )
    return {'targets': tokens[at : at + _CHUNK]}

  dataset = dataset.filter(lambda row: tf.size(row['targets']) > 0)
  return _drawn(chunk, 1)(dataset)


def _joined(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Many documents as one, so that few pieces are short."""
  batches = dataset.ragged_batch(_DOCUMENTS)
  return batches.map(lambda row: {'targets': row['targets'].flat_values})


def _pieces(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Pieces of a length; the last of a document may be shorter."""

  def cut(row: Any) -> tf.data.Dataset:
    tokens = row['targets']
    starts = tf.data.Dataset.from_tensor_slices(
      tf.range(0, tf.size(tokens), length)
    )
    return starts.map(lambda at: {'targets': tokens[at : at + length]})

  return dataset.flat_map(cut)
