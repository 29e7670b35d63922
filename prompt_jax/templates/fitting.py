"""Which part of a text gives way where the text is too long.

Fixed words, soft tokens, blanks, words that are chosen and `{column|keep}` are
never cut. Columns that are `{column|cut}` give way first, all others only when
nothing of those is left. Of the columns that give way the longest does: all of
them are cut to the same number of characters, the largest with which the text
fits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from prompt_jax.templates.language import CUT
from prompt_jax.templates.language import PLAIN

_NO_CAP = 1 << 30


def fitted(
  texts: tf.Tensor,
  rules: Sequence[int] | tf.Tensor,
  feature: Any,
  length: int | None,
  template: str,
) -> tf.Tensor:
  """The text of parts, cut until it has at most `length` tokens with EOS.

  Args:
    texts: string [n], parts of a text.
    rules: of each part, FIXED, PLAIN or CUT.
    feature: seqio's, for its vocabulary.
    length: None for no cutting.
    template: for the message.

  Raises:
    tf.errors.InvalidArgumentError: while iterating: what is never cut is too
      long.
  """
  if length is None:
    return tf.strings.reduce_join(texts)
  rules = tf.convert_to_tensor(rules, tf.int32)
  room = length - int(feature.add_eos)

  def cut(cap: tf.Tensor, plain_cap: tf.Tensor) -> tf.Tensor:
    caps = tf.where(rules == PLAIN, plain_cap, _NO_CAP)
    caps = tf.where(rules == CUT, cap, caps)
    short = tf.strings.substr(texts, tf.zeros_like(caps), caps, 'UTF8_CHAR')
    return tf.strings.reduce_join(short)

  def tokens(text: tf.Tensor) -> tf.Tensor:
    return tf.size(feature.vocabulary.encode_tf(text))

  def fits(text: tf.Tensor) -> tf.Tensor:
    return tokens(text) <= room

  longest = tf.reduce_max(tf.strings.length(texts, 'UTF8_CHAR'))
  none, zero = tf.constant(_NO_CAP), tf.constant(0)

  def first() -> tf.Tensor:
    return largest(lambda cap: cut(cap, none), fits, longest)

  def then() -> tf.Tensor:
    bare = cut(zero, zero)
    message = tf.strings.join(
      [
        'the words of a template and the columns that it keeps take ',
        tf.strings.as_string(tokens(bare)),
        f' tokens, but there is room for {room} (task_feature_lengths less '
        f'EOS). The template: {template} The text begins: ',
        tf.strings.substr(bare, 0, 80),
      ]
    )  # fmt: skip
    tf.debugging.Assert(fits(bare), [message])
    return largest(lambda cap: cut(zero, cap), fits, longest)

  whole = tf.strings.reduce_join(texts)
  return tf.cond(
    fits(whole),
    lambda: whole,
    lambda: tf.cond(fits(cut(zero, none)), first, then),
  )


def largest(
  text: Callable[[tf.Tensor], tf.Tensor],
  fits: Callable[[tf.Tensor], tf.Tensor],
  end: tf.Tensor,
) -> tf.Tensor:
  """`text(cap)` that fits, for a cap found by halving [0, end).

  `text(0)` fits. A longer text may have fewer tokens, so a larger cap may fit
  as well, by a character or two.
  """

  def step(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    middle = (low + high) // 2
    good = fits(text(middle))
    return tf.where(good, middle, low), tf.where(good, high, middle)

  low, _ = tf.while_loop(
    lambda low, high: high - low > 1, step, (tf.constant(0), end)
  )
  return text(low)


class Fitting:
  """A preprocessor for rows whose texts were rendered before, in parts.

  Reads `<key>/parts`, string [n], and `<key>/rules` and writes `<key>`.

  Args:
    templates: of each key, what it is written as.
  """

  def __init__(self, templates: dict[str, str]):
    self.templates = dict(templates)

  def __call__(
    self,
    dataset: tf.data.Dataset,
    output_features: Any,
    sequence_length: Any = None,
  ) -> tf.data.Dataset:
    """Cuts the texts of a dataset."""
    lengths = sequence_length or {}

    def fit(row: dict[str, Any]) -> dict[str, Any]:
      row = dict(row)
      for key, template in self.templates.items():
        texts, rules = row.pop(f'{key}/parts'), row.pop(f'{key}/rules')
        length = lengths.get(key)
        feature = output_features[key]
        row[key] = fitted(texts, rules, feature, length, template)
      return row

    return dataset.map(fit, num_parallel_calls=tf.data.AUTOTUNE)
