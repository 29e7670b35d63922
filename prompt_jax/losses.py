"""Cross entropy with z-loss and label smoothing, and how it is normalized.

For: turning logits and targets into the scalar that training minimizes, with
the meaning that T5X gives to every option. Not for: metrics that are reported
(`prompt_jax.metrics`), or losses that belong to one method, which live with it.

Shapes: `B` batch, `U` target length, `V` vocabulary; `*b` is any leading shape.
"""

from collections.abc import Mapping
import difflib
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


@enum.unique
class SpecialLossNormalizingFactor(enum.Enum):
  """Normalizing factors that are computed from the batch.

  Attributes:
    NUM_REAL_TARGET_TOKENS: the sum of the loss weights; without weights, the
      number of targets that are not padding.
    NUM_TOTAL_TARGET_TOKENS: B * U, padding included.
    AVERAGE_PER_SEQUENCE: the weights are divided by their sum over their own
      sequence (their own segment, if packed) and the factor is the number of
      sequences, so that a long target counts no more than a short one.

  Source: T5X, `t5x/losses.py`.
  """

  NUM_REAL_TARGET_TOKENS = 1
  NUM_TOTAL_TARGET_TOKENS = 2
  AVERAGE_PER_SEQUENCE = 3


LossNormalizingFactor = float | int | Array | str | SpecialLossNormalizingFactor


def cross_entropy_with_logits(
  logits: Float[Array, '*b V'],
  targets: Int[Array, '*b'],
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[Float[Array, '*b'], Float[Array, '*b']]:
  """Cross entropy per token, with the z-loss in it, and the z-loss alone.

  Without smoothing: logsumexp(z) - z_y + z_loss * logsumexp(z)^2. With
  smoothing eps the target distribution q is 1 - eps on y and eps / (V - 1)
  elsewhere, and the loss is the cross entropy with q minus the entropy of q, a
  constant, so that it is zero where the model predicts q.

  Both results are float32, whatever the logits are. The second is for logging:
  as in T5X, no gradient flows through it.

  Args:
    logits: unnormalized log probabilities.
    targets: ids in [0, V). An id outside gives NaN rather than a wrong number.
    label_smoothing: eps, a Python number in [0, 1).
    z_loss: coefficient of logsumexp(z)^2; T5 is trained with 1e-4.

  Returns:
    (loss per token, z-loss per token), before any loss weights.

  Raises:
    ValueError: the shapes do not fit, or `label_smoothing` is out of range.

  Source: the T5 1.1 recipe, as in T5X `t5x/losses.py`; z-loss from Mesh
    TensorFlow; label smoothing from Szegedy et al. 2016, section 7.
  """
  if logits.shape[:-1] != targets.shape:
    raise ValueError(
      'logits must be the shape of targets with the vocabulary appended: got '
      f'logits {logits.shape} and targets {targets.shape}.'
    )
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(
      f'label_smoothing must be in [0, 1), got {label_smoothing!r}.'
    )
  logits = logits.astype(jnp.float32)
  # Both terms of the loss are taken relative to the largest logit: their
  # difference then keeps its digits however far the logits have drifted.
  peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  shifted = logits - peak
  log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
  gold = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
  if label_smoothing:
    num_others = logits.shape[-1] - 1
    low = label_smoothing / num_others
    high = 1.0 - label_smoothing
    entropy = -(high * math.log(high) + label_smoothing * math.log(low + 1e-20))
    expected = (high - low) * gold + low * jnp.sum(shifted, axis=-1)
    loss = log_sum - expected - entropy
  else:
    loss = log_sum - gold
  token_z_loss = z_loss * jnp.square(log_sum + peak[..., 0])
  return loss + token_z_loss, jax.lax.stop_gradient(token_z_loss)


def _as_factor(name: str) -> SpecialLossNormalizingFactor:
  """The special factor of that name, in any case."""
  names = SpecialLossNormalizingFactor.__members__
  if name.upper() in names:
    return names[name.upper()]
  near = difflib.get_close_matches(name.upper(), names, n=3)
  raise ValueError(
    f'loss_normalizing_factor must be None, a number or one of {list(names)}, '
    f'got {name!r}.' + (f' Did you mean {" or ".join(near)}?' if near else '')
  )


def _sequence_weight_sums(
  weights: Float[Array, 'B U'], segment_ids: Int[Array, 'B U'] | None
) -> Float[Array, 'B U']:
  """For each position, the sum of the weights of its sequence."""
  if segment_ids is None:
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.broadcast_to(sums, weights.shape)

  def one_row(row, ids):
    # A segment has at least one token, so U + 1 ids (0 is padding) are enough.
    return jax.ops.segment_sum(row, ids, num_segments=row.shape[0] + 1)[ids]

  return jax.vmap(one_row)(weights, segment_ids)


def get_loss_normalizing_factor_and_weights(
  loss_normalizing_factor: LossNormalizingFactor | None,
  batch: Mapping[str, Any],
) -> tuple[float | int | Array | None, Shaped[Array, 'B U'] | None]:
  """The number to divide the loss by, and the weights of the tokens.

  None (the sum over tokens, the default of T5X) and numbers are handed back
  with the batch's own `decoder_loss_weights`. **If the batch has none, the
  weights are None and padding counts in the loss**, as in T5X. The special
  factors instead take weight 1 where the target is not 0.

  Args:
    loss_normalizing_factor: None, a number, a special factor or its name.
    batch: `decoder_target_tokens` [B, U]; `decoder_loss_weights` [B, U] and,
      if packed, `decoder_segment_ids` [B, U] are optional.

  Returns:
    (factor or None, weights or None).

  Raises:
    ValueError: the name of a factor is unknown, or a number is not positive.

  Source: T5X, `t5x/losses.py`.
  """
  factor = loss_normalizing_factor
  weights = batch.get('decoder_loss_weights')
  if isinstance(factor, str):
    factor = _as_factor(factor)
  if not isinstance(factor, SpecialLossNormalizingFactor):
    if isinstance(factor, int | float) and not factor > 0:
      raise ValueError(
        f'A loss_normalizing_factor must be above 0, got {factor!r}; None '
        'leaves the loss a sum over tokens.'
      )
    return factor, weights

  if weights is None:
    weights = batch['decoder_target_tokens'] > 0
  weights = jnp.asarray(weights, jnp.float32)
  if factor is SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
    return float(batch['decoder_target_tokens'].size), weights
  if factor is SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE:
    sums = _sequence_weight_sums(weights, batch.get('decoder_segment_ids'))
    # A sequence without any weight (padding) has none afterwards either.
    weights = jnp.where(sums == 0, 0.0, weights / jnp.where(sums == 0, 1, sums))
  return jnp.sum(weights), weights


def compute_weighted_cross_entropy(
  logits: Float[Array, '*b V'],
  targets: Int[Array, '*b'],
  weights: Shaped[Array, '*b'] | None = None,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  loss_normalizing_factor: float | int | Array | None = None,
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, '']]:
  """Sum over tokens of weight * loss, divided by a factor if there is one.

  Args:
    logits: unnormalized log probabilities.
    targets: ids in [0, V).
    weights: weight of each token's loss; None weighs all tokens 1, padding
      included.
    label_smoothing: see `cross_entropy_with_logits`.
    z_loss: see `cross_entropy_with_logits`.
    loss_normalizing_factor: what the sums are divided by; None leaves sums. The
      special factors are resolved before, by
      `get_loss_normalizing_factor_and_weights`.

  Returns:
    (loss with the z-loss in it, z-loss, sum of the weights), float32 scalars.
    The sum of the weights is not divided by the factor.

  Raises:
    ValueError: see `cross_entropy_with_logits`.

  Source: T5X, `t5x/losses.py`.
  """
  loss, token_z_loss = cross_entropy_with_logits(
    logits, targets, label_smoothing=label_smoothing, z_loss=z_loss
  )
  if weights is None:
    weights = jnp.ones_like(loss)
  weights = weights.astype(jnp.float32)
  loss = jnp.sum(loss * weights)
  total_z_loss = jnp.sum(token_z_loss * weights)
  if loss_normalizing_factor is not None:
    loss = loss / loss_normalizing_factor
    total_z_loss = total_z_loss / loss_normalizing_factor
  return loss, total_z_loss, jnp.sum(weights)
