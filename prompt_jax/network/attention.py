"""Multi-head attention, its cache, and T5's relative position bias.

T5 does not divide the logits by sqrt(K): the initial query kernel is divided
instead.  Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1; checked
against google-research/t5x `t5x/examples/t5/layers.py`.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from prompt_jax import deltas
from prompt_jax.network import layers
from prompt_jax.network.layers import T5Config


def relative_position_bucket(
  relative_position: Int[Array, 'U T'],
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> Int[Array, 'U T']:
  """The bucket of each distance, key position minus query position.

  Half of the buckets (of each sign, if bidirectional) are for exact distances,
  the others grow logarithmically up to `max_distance`; all beyond share the
  last one.
  """
  bucket = jnp.zeros_like(relative_position)
  distance = -relative_position
  if bidirectional:
    num_buckets //= 2
    bucket = jnp.where(distance < 0, num_buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(distance, 0)
  exact = num_buckets // 2
  # The epsilon keeps log(0) out of the branch that is not taken.
  ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  grown = jnp.log(ratio) / np.float32(np.log(max_distance / exact))
  large = exact + (grown * (num_buckets - exact)).astype(jnp.int32)
  large = jnp.minimum(large, num_buckets - 1)
  return bucket + jnp.where(distance < exact, distance, large)


def query_init(head_dim: int) -> layers.Initializer:
  """T5 folds the logits' 1/sqrt(K) into the initial query kernel."""
  return lambda *args: layers.attention_init(*args) * head_dim**-0.5


class RelativePositionBias(nn.Module):
  """A learned number for each head and bucket of distances.

  T5 shares the table between the layers of a stack, so the bias is computed
  once, outside the scan over layers.

  Attributes:
    config: of the network.
    bidirectional: keys may stand after the query (encoder).
  """

  config: T5Config
  bidirectional: bool

  @nn.compact
  def __call__(
    self, query_length: int, key_length: int, offset: Any = 0
  ) -> Float[Array, '1 H U T']:
    """Bias of queries at `offset`, `offset + 1`, ... against keys from 0.

    Prefix slots that are to precede the text are keys at -P, ..., -1.
    """
    c = self.config
    table = layers.param(
      self,
      'rel_embedding',
      nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (c.num_heads, c.relpos_num_buckets),
      ('heads', 'relpos_buckets'),
    )
    query = jnp.arange(query_length, dtype=jnp.int32)[:, None] + offset
    before = deltas.slots_before_text(self)
    key = jnp.arange(-before, key_length, dtype=jnp.int32)
    relative = key[None, :] - query
    bucket = relative_position_bucket(
      relative,
      self.bidirectional,
      c.relpos_num_buckets,
      c.relpos_max_distance,
    )
    return jnp.take(table.astype(c.dtype), bucket, axis=1)[None]


def attend(
  query: Float[Array, 'B U H K'],
  key: Float[Array, 'B S H K'],
  value: Float[Array, 'B S H K'],
  bias: Float[Array, '#B H U S'] | None,
  mask: Bool[Array, '#B 1 #U S'],
  implementation: str,
) -> Float[Array, 'B U H K']:
  """`softmax(q k^T + bias) v`, the softmax in float32, no 1/sqrt(K).

  Args:
    query: queries.
    key: keys.
    value: values.
    bias: added to the logits.
    mask: True where a query may see a key.
    implementation: 'xla' or 'cudnn' of `jax.nn.dot_product_attention`, or
      'einsum': the same with heads in front of positions, which XLA's CPU
      products take without strides (`benchmarks/README.md`); 'auto' chooses
      by the backend.
  """
  if implementation == 'auto':
    implementation = 'einsum' if jax.default_backend() == 'cpu' else 'xla'
  if implementation != 'einsum':
    kernel: Any = implementation
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      bias,
      mask,
      scale=1.0,
      implementation=kernel,
    )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  logits = jnp.matmul(
    q, jnp.swapaxes(k, 2, 3), preferred_element_type=jnp.float32
  )
  # One addend of the logits' smallest shape: a mask of padding is [B, 1, 1, S].
  logits += jnp.where(mask, np.float32(0), np.float32(-1e10))
  if bias is not None:
    logits += bias.astype(jnp.float32)
  y = jax.nn.softmax(logits).astype(v.dtype) @ v
  return jnp.swapaxes(y, 1, 2)


def drop_weights(
  value: Float[Array, 'B S H K'], rate: float, rng: Any
) -> Float[Array, 'B S H K']:
  """Attention dropout, as a dropout of whole value rows of a head.

  T5X draws one mask for all queries, so that to drop the weights of a key is
  to drop its value: `(p * m) v = p (m * v)`. The weights themselves need not be
  touched, and any kernel computes them.
  """
  keep = jax.random.bernoulli(rng, 1.0 - rate, (*value.shape[:3], 1))
  return jnp.where(keep, value / np.asarray(1.0 - rate, value.dtype), 0)


class Attention(nn.Module):
  """`softmax(q k^T + bias) v`, projected back to the residual stream.

  Hooks act here on keys and values (`prefix`) and on the result (`parallel`,
  `bottleneck`).

  Attributes:
    config: of the network.
    deterministic: no dropout.
    decode_length: 0, or the number of positions of the self-attention's cache.
  """

  config: T5Config
  deterministic: bool = True
  decode_length: int = 0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B U D'],
    context: Float[Array, 'B T D'] | None,
    bias: Float[Array, '#B H U _'] | None,
    mask: Bool[Array, '#B 1 #U S'],
    position: Any = None,
    keep: Any = None,
  ) -> Float[Array, 'B U D']:
    """Queries from x; keys and values from `context`, or from x if None.

    With a `position` they come from the `cache`, into which x's are put there,
    but for the examples where `keep` [B] is True.
    """
    c = self.config
    query = self._project(x, 'query')
    if position is None:
      key, value = self._keys_values(x if context is None else context)
    elif context is None:
      key, value = self._append(x, position, keep)
    else:
      key, value = self._computed_once(context)
    key, value, bias, mask = deltas.adapt_keys_values(
      self, key, value, bias, mask
    )
    if not self.deterministic and c.dropout_rate:
      value = drop_weights(value, c.dropout_rate, self.make_rng('dropout'))
    y = attend(query, key, value, bias, mask, c.attention_implementation)
    y = y.reshape(*x.shape[:2], -1)
    out = layers.Dense(
      c.emb_dim, ('joined_kv', 'embed'), layers.attention_init, name='out'
    )
    return deltas.adapt_sublayer(self, x, out(y))

  def _project(self, x: Array, name: str) -> Array:
    c = self.config
    init = query_init(c.head_dim) if name == 'query' else layers.attention_init
    dense = layers.Dense(
      c.num_heads * c.head_dim, ('embed', 'joined_kv'), init, name=name
    )
    y = dense(x).reshape(*x.shape[:2], c.num_heads, c.head_dim)
    return nn.with_logical_constraint(y, ('batch', 'length', 'heads', 'kv'))

  def _keys_values(self, context: Array) -> tuple[Array, Array]:
    return self._project(context, 'key'), self._project(context, 'value')

  def _append(self, x: Array, position: Any, keep: Any) -> tuple[Array, Array]:
    """Keys and values of all positions so far, x's among them."""
    found = []
    for name, new in zip(
      ('cached_key', 'cached_value'), self._keys_values(x), strict=True
    ):
      shape = (new.shape[0], self.decode_length, *new.shape[2:])
      cached = self.variable('cache', name, jnp.zeros, shape, new.dtype)
      if keep is not None:
        old = jax.lax.dynamic_slice_in_dim(
          cached.value, position, new.shape[1], axis=1
        )
        new = jnp.where(keep[:, None, None, None], old, new)
      cached.value = jax.lax.dynamic_update_slice_in_dim(
        cached.value, new, position, axis=1
      )
      found.append(cached.value)
    return found[0], found[1]

  def _computed_once(self, context: Array) -> tuple[Array, Array]:
    """The encoder's keys and values do not change from step to step."""
    if not self.has_variable('cache', 'cached_key'):
      key, value = self._keys_values(context)
      self.put_variable('cache', 'cached_key', key)
      self.put_variable('cache', 'cached_value', value)
    return (
      self.get_variable('cache', 'cached_key'),
      self.get_variable('cache', 'cached_value'),
    )
