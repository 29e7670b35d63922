"""Templates as a seqio preprocessor: operations of TensorFlow, no Python a row.

    preprocessors=[
      seqio.CacheDatasetPlaceholder(),
      Rendering('{sentence|cut} It was <mask>.', '<mask> {label: bad | good}'),
      seqio.preprocessors.tokenize,
      feature_converters.trim_and_append_eos,
    ]

Cost. A text is tokenized once more, to see whether it fits, and where it does
not about fifteen times, to find what does (see `fitting.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from prompt_jax.templates import fitting
from prompt_jax.templates import language
from prompt_jax.templates import masks as masks_lib
from prompt_jax.templates.language import FIXED
from prompt_jax.templates.language import Condition
from prompt_jax.templates.language import Field
from prompt_jax.templates.language import Mask
from prompt_jax.templates.language import Piece
from prompt_jax.templates.language import Template
from prompt_jax.templates.language import TemplateError
from prompt_jax.templates.language import Words

Row = Mapping[str, Any]
NO_LABEL = '<unk>'  # of rows whose label is -1, as in TFDS's test splits


class Rendering:
  """A preprocessor that puts `inputs` and `targets` into each row.

  The other columns stay. Texts that are longer than `sequence_length` with EOS
  are cut as the templates say; without `sequence_length` nothing is.

  Args:
    inputs: template of the inputs, or what it is written as.
    targets: template of the targets.

  Raises:
    TemplateError: where the dataset has no such column, or one that holds
      neither text nor numbers.
    tf.errors.InvalidArgumentError: while iterating, for a row whose number has
      no word, or a text that cannot be cut as far as needed.
  """

  def __init__(self, inputs: str | Template, targets: str | Template):
    given = {'inputs': inputs, 'targets': targets}
    self.templates = {
      key: Template(x) if isinstance(x, str) else x for key, x in given.items()
    }

  def __call__(
    self,
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int] | None = None,
  ) -> tf.data.Dataset:
    """Renders the rows of a dataset."""
    spec: Any = dataset.element_spec
    for template in self.templates.values():
      _check(template, spec)
    blanks = masks_lib.by_feature(output_features, self.templates)
    lengths = sequence_length or {}

    def render(row: Row) -> dict[str, Any]:
      out = {}
      for key, template in self.templates.items():
        texts, rules = parts(template, row, blanks[key])
        feature = output_features[key]
        out[key] = fitting.fitted(
          texts, rules, feature, lengths.get(key), template.text
        )
      return {**row, **out}

    return dataset.map(render, num_parallel_calls=tf.data.AUTOTUNE)


def parts(
  template: Template, row: Row, masks: Sequence[str]
) -> tuple[tf.Tensor, list[int]]:
  """The text of a row in n parts, string [n], and their rules."""
  found = _parts(template.pieces, row, masks)
  texts = [text for text, _ in found] or [tf.constant('')]
  return tf.stack(texts), [rule for _, rule in found] or [FIXED]


def _parts(
  pieces: Sequence[Piece], row: Row, masks: Sequence[str]
) -> list[tuple[tf.Tensor, int]]:
  out: list[tuple[tf.Tensor, int]] = []
  for piece in pieces:
    if isinstance(piece, Words):
      out.append((tf.constant(piece.text), FIXED))
    elif isinstance(piece, Mask):
      out.append((tf.constant(masks[piece.index]), FIXED))
    elif isinstance(piece, Condition):
      holds = _holds(row[piece.name])
      for branch, shown in (
        (piece.then, holds),
        (piece.other, tf.logical_not(holds)),
      ):
        # Both are made; the text of the one that is not asked for is empty.
        found = _parts(branch, row, masks)
        out += [(tf.where(shown, text, ''), rule) for text, rule in found]
    else:
      out.append((_value(row[piece.name], piece), language.rule_of(piece)))
  return out


def _holds(value: tf.Tensor) -> tf.Tensor:
  if value.dtype == tf.string:
    return tf.strings.length(tf.strings.strip(value)) > 0
  return value if value.dtype == tf.bool else tf.constant(True)


def _value(value: tf.Tensor, field: Field) -> tf.Tensor:
  if field.choices:
    return _choice(value, field)
  if value.dtype == tf.string:
    return value
  if value.dtype == tf.bool:
    return tf.where(value, 'True', 'False')
  if value.dtype.is_floating:
    # As Python writes it: 2.0, not 2.
    text = tf.strings.as_string(value, shortest=True)
    whole = tf.strings.regex_full_match(text, r'-?\d+')
    return tf.where(whole, tf.strings.join([text, '.0']), text)
  return tf.strings.as_string(value)


def _choice(value: tf.Tensor, field: Field) -> tf.Tensor:
  """The word; a number of -1 is a row without a label."""
  size = len(field.choices)
  if value.dtype == tf.string:
    same = tf.equal(value, tf.constant(field.choices))
    number = tf.strings.regex_full_match(value, r'-?\d{1,9}')
    read = tf.strings.to_number(tf.where(number, value, '-2'), tf.int32)
    named = tf.cast(tf.argmax(same), tf.int32)
    index = tf.where(tf.reduce_any(same), named, read)
    said = value
  else:
    index = tf.cast(value, tf.int32)
    said = tf.strings.as_string(index)
  # Without quotes, which TensorFlow would write with a backslash.
  listed = ', '.join(f'{i} = {c}' for i, c in enumerate(field.choices))
  tf.debugging.Assert(
    (index >= -1) & (index < size),
    [
      tf.strings.join(
        [
          f'column {field.name} holds ', said,
          f', but the choices are: {listed}.',
        ]
      )
    ],
  )  # fmt: skip
  words = tf.constant([*field.choices, NO_LABEL])
  return tf.gather(words, tf.math.floormod(index, size + 1))


def _check(template: Template, spec: Mapping[str, Any]) -> None:
  """Refuses columns that are missing or cannot be shown."""
  template.check_columns(spec)
  for piece in template.named:
    found = spec[piece.name]
    if isinstance(found, tf.TensorSpec) and found.shape.rank == 0:
      chooses = isinstance(piece, Field) and piece.choices
      if not (chooses and found.dtype.is_floating):
        continue
    what = str(found) if isinstance(found, tf.TensorSpec) else 'several values'
    raise TemplateError(
      f'Template {template.text!r}: column {piece.name!r} holds {what}, '
      'expected one text or number a row'
      f'{language.pointer(template.text, piece.place)}'
    )
