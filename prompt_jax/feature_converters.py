"""From a task's tokens to a model's batch: soft tokens, packing, task ids.

The converters are seqio's, so `seqio.Evaluator` takes them, with one thing
added: the soft tokens are placed before anything is packed or padded, so every
example has its own, and a packed row holds as many prompts as examples.

Placement. `<soft:k>` in a text, SOFT_BASE + k in the tokens, becomes
`soft_ids[task, k]`. An example without any gets all P of them in front of its
inputs. Lengths are fixed: the encoder has `inputs` + P positions, the decoder
`targets`; a decoder-only model has `inputs` + P + `targets`. Text is trimmed to
`inputs` before soft tokens are put in front of it, so a prompt is never cut.
Soft tokens that a template placed count as text, and fit: `trim_and_append_eos`
trims the text around them.

A task may give rows of one fixed length with padding (id 0) at their end, which
is not text. Encoder-decoder examples are converted many at a time: one by one,
each operation of TensorFlow's costs more than its work.

Not for tokenizing (the tasks do) nor batching (`datasets.py`).
"""

from collections.abc import Mapping
import copy
import functools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from prompt_jax import packing
from prompt_jax.vocabularies import SOFT_BASE

# A task's own number, for methods that keep one prompt a task. Rank 1 with one
# element: seqio.Evaluator measures the first axis of every feature.
TASK_IDS = 'task_ids'
_TASK_IDS_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=0)

Example = dict[str, tf.Tensor]
# What to do where examples have no `task_ids`.
NUMBER_TASKS = (
  'A mixture numbers its tasks (runs/mixture.gin with NUMBER_TASKS = True), '
  'data of your own have a TASK_ID.'
)
_BLOCK = 64  # examples that are converted together


class _SoftTokens(seqio.FeatureConverter):
  """What both converters do before and after seqio's conversion.

  Attributes:
    soft_ids: int32 [G, P], ids of the P soft tokens of each of G tasks.
    vocab_size: rows of the embedding table; ids from here on are soft tokens.
      Without soft tokens it may be left out, and text ids are not checked.
    pack: whether several examples share a row.

  Raises:
    ValueError: `soft_ids` is not a matrix, or holds ids of text tokens; when
      called, for several tasks and examples without `task_ids`.
    tf.errors.InvalidArgumentError: while iterating, for an example with
      `<soft:k>` and k >= P, a task id >= G, or a text id >= vocab_size.
  """

  def __init__(
    self,
    soft_ids: np.ndarray | None = None,
    vocab_size: int = SOFT_BASE,
    pack: bool = False,
    **kwargs: Any,
  ):
    super().__init__(pack=pack, **kwargs)
    if soft_ids is None:
      soft_ids = np.zeros((1, 0), np.int32)
    self.soft_ids = np.asarray(soft_ids, np.int32)
    self.vocab_size = vocab_size
    if self.soft_ids.ndim != 2 or not len(self.soft_ids):
      raise ValueError(
        'soft_ids must be [tasks, soft tokens] with at least one task; got '
        f'shape {self.soft_ids.shape}.'
      )
    if self.soft_ids.size and self.soft_ids.min() < vocab_size:
      raise ValueError(
        f'soft_ids holds {self.soft_ids.min()}, but the ids below vocab_size '
        f'{vocab_size} are text tokens.'
      )

  @property
  def num_soft_tokens(self) -> int:
    """P, the soft tokens of an example."""
    return self.soft_ids.shape[1]

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Converts `ds`; see the module.

    Args:
      ds: examples with `inputs`, `targets`, and `task_ids` where the task has
        them (a scalar, or one in a vector).
      task_feature_lengths: lengths of `inputs` and `targets`.
    """
    lengths = {k: v for k, v in task_feature_lengths.items() if k != TASK_IDS}
    spec: Any = ds.element_spec
    if TASK_IDS not in spec:
      if len(self.soft_ids) > 1:
        raise ValueError(
          f'The method keeps {len(self.soft_ids)} tasks apart, but the '
          'examples have no `task_ids` to tell whose they are. '
          f'{NUMBER_TASKS}'
        )
      return super().__call__(ds, lengths)
    ds = ds.map(_scalar_task_ids, num_parallel_calls=tf.data.AUTOTUNE)
    if self.pack:
      # Each task's id has done its work when its soft tokens are placed.
      return super().__call__(ds, lengths)
    # Whether a feature passes through is a property of seqio's converter, but
    # whether there is one is a property of the dataset.
    converter = copy.copy(self)
    converter._passthrough_features = {
      **self._passthrough_features, TASK_IDS: _TASK_IDS_SPEC
    }  # fmt: skip
    return super(_SoftTokens, converter).__call__(ds, {**lengths, TASK_IDS: 1})

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    spec: Any = ds.element_spec
    if spec['inputs'].shape[0] is not None:
      ds = ds.map(_without_padding, num_parallel_calls=tf.data.AUTOTUNE)
    ds = ds.map(self._place_one, num_parallel_calls=tf.data.AUTOTUNE)
    base: Any = super()  # one of seqio's converters
    return base._convert_features(ds, self._with_prompt(task_feature_lengths))

  def _pack_or_pad(
    self, ds: tf.data.Dataset, packed_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    # seqio asks for a length of every feature, but a scalar has none to pad to.
    lengths = {k: v for k, v in packed_lengths.items() if k != TASK_IDS}
    return super()._pack_or_pad(ds, lengths)

  def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Example:
    # Nothing predicts a soft token: it has no logit. The decoder still reads
    # it, since its input was shifted from the unmasked targets.
    base: Any = super()
    example = dict(base._convert_example(features))
    soft = example['decoder_target_tokens'] >= self.vocab_size
    for key in ('decoder_target_tokens', 'decoder_loss_weights'):
      example[key] = tf.where(soft, 0, example[key])
    return example

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Lengths of the batch's features."""
    base: Any = super()
    return base.get_model_feature_lengths(
      self._with_prompt(task_feature_lengths)
    )

  def _with_prompt(self, lengths: Mapping[str, int]) -> dict[str, int]:
    return {**lengths, 'inputs': lengths['inputs'] + self.num_soft_tokens}

  def _place_one(self, example: Example) -> Example:
    """One example with its soft tokens where they belong."""
    names = [key for key in ('inputs', 'targets', TASK_IDS) if key in example]
    rows = {name: example[name][None] for name in names}
    inputs, targets, placed = self._place(rows)
    length = tf.size(example['inputs'])
    length += tf.where(placed[0], 0, self.num_soft_tokens)
    return {**example, 'inputs': inputs[0, :length], 'targets': targets[0]}

  def _place(self, rows: Example) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Puts the soft tokens of each example's task where they belong.

    Args:
      rows: of N examples, `inputs` [N, T], `targets` [N, U] and perhaps
        `task_ids` [N].

    Returns:
      Inputs [N, T + P], targets [N, U], and whether the text held soft tokens,
      [N]; where it did, the inputs have P more padding at their end.
    """
    inputs, targets = rows['inputs'], rows['targets']
    tasks, length = self.soft_ids.shape
    one = tf.zeros(tf.shape(inputs)[:1], tf.int32)
    task = one if tasks == 1 else rows[TASK_IDS]
    wrong = tf.boolean_mask(task, (task < 0) | (task >= tasks))
    _check(
      tf.size(wrong) == 0,
      f'there are {tasks} tasks (soft_ids has {tasks} rows), but an '
      'example has task_ids ', tf.reduce_max(wrong),
    )  # fmt: skip
    prompts = tf.gather(self.soft_ids, tf.clip_by_value(task, 0, tasks - 1))
    soft = tf.concat([inputs, targets], axis=1) >= SOFT_BASE
    placed = tf.reduce_any(soft, axis=1)
    inputs = self._resolve(inputs, prompts)
    inputs = tf.where(
      placed[:, None],
      tf.pad(inputs, [[0, 0], [0, length]]),
      tf.concat([prompts, inputs], axis=1),
    )
    return inputs, self._resolve(targets, prompts), placed

  def _resolve(self, tokens: tf.Tensor, prompts: tf.Tensor) -> tf.Tensor:
    """SOFT_BASE + k to its row's `prompts[k]`; text ids as they are."""
    length = self.num_soft_tokens
    soft = tokens >= SOFT_BASE
    # Empty tokens have a maximum too, the smallest int32.
    largest = tf.reduce_max(tf.where(soft, tokens - SOFT_BASE, -1))
    _check(
      largest < length,
      f'the method has {length} soft tokens, <soft:0> to '
      f'<soft:{length - 1}>, but a text holds <soft:'
      if length
      else 'the method has no soft tokens, but a text holds <soft:',
      largest,
      '>',
    )
    largest = tf.reduce_max(tf.where(soft, 0, tokens))
    _check(
      largest < self.vocab_size,
      f'the model embeds {self.vocab_size} ids, but a text holds id ',
      largest,
      ': is this the vocabulary that the model was trained with?',
    )
    # One more id, so that text has something to look up.
    index = tf.where(soft, tf.minimum(tokens - SOFT_BASE, length), length)
    rows = tf.pad(prompts, [[0, 0], [0, 1]])
    return tf.where(soft, tf.gather(rows, index, batch_dims=1), tokens)


class EncDecFeatureConverter(_SoftTokens, seqio.EncDecFeatureConverter):
  """Batches of an encoder-decoder: see the module and `_SoftTokens`.

  Gives encoder_input_tokens [T + P], decoder_input_tokens,
  decoder_target_tokens and decoder_loss_weights [U], task_ids [] where the task
  has them; packed, segment ids and positions instead of task_ids.

  Raises:
    tf.errors.InvalidArgumentError: while iterating, for an example that is
      longer than `task_feature_lengths`.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._apply_length_check = False  # that of a block is one

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    spec: Any = ds.element_spec
    lengths = dict(task_feature_lengths)
    if self.pack and TASK_IDS in spec:  # for the soft tokens alone
      lengths[TASK_IDS] = 1
    if spec.keys() != lengths.keys():
      ds = ds.map(lambda x: {key: x[key] for key in lengths})
    # Padded to the length of a row, or packed to that of the longest.
    shapes: Any = {
      key: [] if key == TASK_IDS else [None if self.pack else length]
      for key, length in lengths.items()
    }
    convert = functools.partial(self._pack_block, lengths=lengths)
    size = max(self._with_prompt(task_feature_lengths).values())  # seqio's
    blocks = ds.padded_batch(size if self.pack else _BLOCK, shapes)
    return blocks.map(
      convert if self.pack else self._convert_block,
      num_parallel_calls=tf.data.AUTOTUNE,
    ).unbatch()

  def _pack_block(self, rows: Example, lengths: Mapping[str, int]) -> Example:
    """Model features of N padded examples, packed as by seqio."""
    for key in ('inputs', 'targets'):
      _check(
        tf.shape(rows[key])[1] <= lengths[key],
        f'{key} may have {lengths[key]} tokens, but an example has ',
        tf.shape(rows[key])[1],
      )
    inputs, targets, _ = self._place(rows)
    room = self._with_prompt(lengths)
    return packing.features(inputs, targets, room, self.vocab_size, self.bos_id)

  def _convert_block(self, rows: Example) -> Example:
    """Model features of N padded examples, as seqio's of each of them."""
    inputs, targets, _ = self._place(rows)
    before = tf.pad(
      targets[:, :-1], [[0, 0], [1, 0]], constant_values=self.bos_id
    )
    text = tf.where(targets >= self.vocab_size, 0, targets)
    features = {
      'encoder_input_tokens': inputs,
      'decoder_target_tokens': text,
      'decoder_input_tokens': before,
      'decoder_loss_weights': tf.cast(text != 0, tf.int32),
    }
    return features | {
      key: rows[key] for key in self._passthrough_features if key in rows
    }


class DecoderOnlyFeatureConverter(_SoftTokens, seqio.PrefixLMFeatureConverter):
  """Batches of a decoder-only model: inputs, then targets, in one sequence.

  The decoder_* features are [T + P + U]. `decoder_causal_attention` is 1 on the
  inputs, soft tokens among them, and on the position that reads the last of
  them (seqio's PrefixLM); the loss is on the targets.
  """


def add_task_id(index: int) -> Any:
  """A preprocessor that gives every example of a task its number.

  The task also needs the feature: `output_features(..., task_ids=True)`. Tasks
  of one mixture must all have it.
  """

  def preprocessor(dataset: tf.data.Dataset) -> tf.data.Dataset:
    number = tf.constant([index], tf.int32)
    return dataset.map(
      lambda example: {**example, TASK_IDS: number},
      num_parallel_calls=tf.data.AUTOTUNE,
    )

  return preprocessor


def output_features(
  vocabulary: seqio.Vocabulary, task_ids: bool = False
) -> dict[str, Any]:
  """What our tasks give: inputs and targets with EOS, and perhaps task_ids."""
  features = {
    'inputs': seqio.Feature(vocabulary, add_eos=True, required=False),
    'targets': seqio.Feature(vocabulary, add_eos=True),
  }
  if task_ids:
    features[TASK_IDS] = seqio.Feature(
      seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.int32
    )
  return features


def trim_and_append_eos(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, Any],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """Trims the end of the text, never a soft token, and appends EOS.

  A preprocessor, to stand last, in place of
  `seqio.preprocessors.append_eos_after_trim`, from which it differs only for
  texts that hold soft tokens.
  """

  def trim(tokens: tf.Tensor, length: int) -> tf.Tensor:
    soft = tokens >= SOFT_BASE
    text = tf.cast(tf.logical_not(soft), tf.int32)
    room = length - tf.reduce_sum(tf.cast(soft, tf.int32))
    return tokens[soft | (tf.cumsum(text) <= room)]

  def per_example(example: Example) -> Example:
    for key, feature in output_features.items():
      if not feature.add_eos or key not in example:
        continue
      tokens = example[key]
      length = (sequence_length or {}).get(key)
      if length is not None:
        tokens = trim(tokens, length - 1)
      eos = tf.constant([feature.vocabulary.eos_id], tokens.dtype)
      example = {**example, key: tf.concat([tokens, eos], axis=0)}
    return example

  return dataset.map(per_example, num_parallel_calls=tf.data.AUTOTUNE)


def _without_padding(example: Example) -> Example:
  text = {key: example[key] for key in ('inputs', 'targets')}
  return {**example, **{k: tf.boolean_mask(x, x != 0) for k, x in text.items()}}


def _scalar_task_ids(example: Example) -> Example:
  number = tf.cast(tf.reshape(example[TASK_IDS], []), tf.int32)
  return {**example, TASK_IDS: number}


def _check(
  condition: tf.Tensor, before: str, value: tf.Tensor, after: str = ''
) -> None:
  """Fails with a message that holds `value` where `condition` does not hold."""
  message = tf.strings.join([before, tf.strings.as_string(value), after])
  tf.debugging.Assert(condition, [message])
