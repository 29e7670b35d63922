"""Several examples in a row, as seqio packs them, many times as fast.

The rows are those of `seqio.utils.trim_and_pack_dataset`, id for id: a block of
examples is cut into rows where the next example has no room. seqio appends one
example after another in a loop of TensorFlow's; here the loop is over lengths
alone, and the tokens are moved all at once.

Not for where soft tokens go: `feature_converters.py`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf


def features(
  inputs: tf.Tensor,
  targets: tf.Tensor,
  room: Mapping[str, int],
  vocab_size: int,
  bos_id: int,
) -> dict[str, tf.Tensor]:
  """Model features of M packed rows of an encoder-decoder, as seqio's.

  Args:
    inputs: ids of N examples, int32 [N, T], padded with 0 at the end.
    targets: the same, [N, U].
    room: `inputs` and `targets` of a row.
    vocab_size: ids from here on are soft tokens, which nothing predicts.
    bos_id: what the decoder reads first.
  """
  sizes = [room['inputs'], room['targets']]
  packed = tf.numpy_function(
    lambda *ids: pack(ids, sizes),
    [inputs, targets],
    [tf.int32] * 6,
    stateful=False,
  )
  for i, x in enumerate(packed):
    x.set_shape([None, sizes[i // 3]])
  inputs, input_positions, input_segments = packed[:3]
  targets, target_positions, target_segments = packed[3:]

  def shifted(x: tf.Tensor, first: int) -> tf.Tensor:
    return tf.pad(x[:, :-1], [[0, 0], [1, 0]], constant_values=first)

  same = target_segments == shifted(target_segments, 0)
  text = tf.where(targets >= vocab_size, 0, targets)
  return {
    'encoder_input_tokens': inputs,
    'encoder_positions': input_positions,
    'encoder_segment_ids': input_segments,
    'decoder_target_tokens': text,
    'decoder_input_tokens': tf.where(same, shifted(targets, bos_id), bos_id),
    'decoder_loss_weights': tf.cast(text != 0, tf.int32),
    'decoder_positions': target_positions,
    'decoder_segment_ids': target_segments,
  }


def pack(ids: Sequence[np.ndarray], room: Sequence[int]) -> list[np.ndarray]:
  """Packs N examples into M rows.

  Args:
    ids: of each feature, int32 [N, length], padded with 0 at the end.
    room: length of a row, for each feature.

  Returns:
    For each feature its ids, positions in the example and segment ids (1, 2,
    ... for the examples of a row; 0: padding), int32 [M, room] each.
  """
  sizes = np.stack([np.count_nonzero(x, axis=1) for x in ids], axis=1)
  rows, starts = places(sizes, room)
  found: list[np.ndarray] = []
  for x, size, start, length in zip(ids, sizes.T, starts.T, room, strict=True):
    column = np.arange(x.shape[1], dtype=np.int32)
    is_text = column < size[:, None]
    positions = np.broadcast_to(column, x.shape)[is_text]
    at = np.repeat(rows * length + start, size) + positions
    tokens, place = np.zeros((2, rows[-1] + 1, length), np.int32)
    tokens.reshape(-1)[at] = x[is_text]
    place.reshape(-1)[at] = positions
    segments = np.cumsum(place == 0, axis=1, dtype=np.int32) * (tokens != 0)
    found += [tokens, place, segments]
  return found


def places(
  sizes: np.ndarray, room: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """The row of each example [N], and where it starts there [N, features].

  A row ends for good where any feature of the next example has no room.

  Args:
    sizes: tokens of each feature, [N, features].
    room: length of a row, for each feature.
  """
  rows, starts = [], []
  row, used = 0, [0] * len(room)
  for size in sizes.tolist():
    ends = [a + b for a, b in zip(used, size, strict=True)]
    if any(a > b for a, b in zip(ends, room, strict=True)):
      row, used, ends = row + 1, [0] * len(room), size
    rows.append(row)
    starts.append(used)
    used = ends
  return np.array(rows), np.array(starts)
