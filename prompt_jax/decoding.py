"""Decoding from a step function: greedy, sampling and beam search.

For: turning `tokens_to_logits`, one cached step of any decoder, into token
sequences under jit. Forced tokens (decoder prompts, prefixes) and soft tokens
are plain ids here. Not for: building the cache, scoring given targets, text.

Conventions shared by both searches. Row t of `inputs` [B, U] is what the
decoder reads at position t: a nonzero id is forced, 0 is free, and position 0
reads 0 (the start token) unless told otherwise. Sequences are what follows each
position, so `sequences[..., t]` is the forced `inputs[:, t + 1]` or a generated
token; they hold EOS once generated, then zeros. A forced EOS ends nothing.
Forced ids may lie at or above the V columns of the logits (soft tokens): they
are fed to the step and are never generated. With `initial_index` the first
step stands there: what comes before must be in the cache already (prefill), and
its ids are copied from `inputs`.

Letters: B batch, K decodes (beams) per row, N = B * K, U length, V vocabulary.

Source: semantics of google-research/t5x `t5x/decoding.py`; differences are
stated where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Cache = Any
Index = int | Int[Array, '']
TokensToLogits = Callable[
  [Int[Array, 'N 1'], Int[Array, ''], Cache], tuple[Float[Array, 'N V'], Cache]
]

# Score of a beam that was never filled, and the least score of a real one.
NEG_INF = -1.0e7
# Below this a temperature is zero: 1 / temperature would overflow the logits.
MIN_TEMPERATURE = 1.0e-4


def flat_batch_beam_expand(x: Array, num_decodes: int, axis: int = 0) -> Array:
  """Repeats each batch entry `num_decodes` times in place: B -> B * K."""
  return jnp.repeat(x, num_decodes, axis=axis)


def expand_cache(cache: Cache, num_decodes: int, axis: int = 0) -> Cache:
  """`flat_batch_beam_expand` of every leaf: `axis` is 1 for scanned layers."""
  return jax.tree.map(
    lambda x: flat_batch_beam_expand(x, num_decodes, axis), cache
  )


def brevity_penalty(alpha: float, length: Array | int) -> Float[Array, ' ...']:
  """((5 + length) / 6) ** alpha; Wu et al. 2016 (1609.08144), section 7."""
  return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


class _Samples(NamedTuple):
  position: Array  # [] what the next step reads
  sequences: Array  # [N, U + 1] decoder inputs, one past the end
  ended: Array  # [N] bool
  scores: Array  # [N]
  rng: Array
  cache: Cache


def temperature_sample(
  inputs: Int[Array, 'B U'],
  cache: Cache,
  tokens_to_logits: TokensToLogits,
  eos_id: int = 1,
  num_decodes: int = 1,
  rng: Array | None = None,
  temperature: float = 1.0,
  topk: int = 0,
  topp: float = 0.0,
  *,
  rescale_log_probs: bool = True,
  initial_index: Index = 0,
  cache_batch_axis: int = 0,
) -> tuple[Int[Array, 'B K U'], Float[Array, 'B K']]:
  """Greedy decoding (`topk=1` or `temperature=0`) or sampling.

  Tokens are drawn from softmax(logits / temperature), cut to the top k or to
  the smallest set of mass at least topp (ties at the edge are all kept). Stops
  when every row has generated EOS.

  Args:
    inputs: forced tokens; U bounds the length.
    cache: what `tokens_to_logits` reads and writes, with batch B.
    tokens_to_logits: one step: ids, position, cache to logits, cache.
    eos_id: id that ends a sequence.
    num_decodes: K, samples per row.
    rng: key of the draws; needed unless decoding is greedy.
    temperature: Python number >= 0; 0 is greedy.
    topk: if nonzero, sample among the k likeliest tokens.
    topp: if nonzero, nucleus sampling with this mass, in (0, 1].
    rescale_log_probs: score tokens under the distribution sampled from, so
      that greedy scores are 0; otherwise under softmax(logits).
    initial_index: position of the first step.
    cache_batch_axis: batch axis of every cache leaf, 1 for scanned layers.

  Returns:
    Sequences and scores (sums of log-probabilities of generated tokens, EOS
    included), sorted by increasing score along K.

  Raises:
    ValueError: an argument is out of range or two exclude each other.

  Source: Holtzman et al. 2020, arXiv 1904.09751 (top-p); T5X
  `temperature_sample`, whose draws it repeats for the same key. Unlike there,
  a nonzero `inputs[:, 0]` is read, and sampling without a key is an error.
  """
  _check_common(inputs, cache, num_decodes, cache_batch_axis)
  _check_sampling(temperature, topk, topp)
  if topk == 1 or temperature < MIN_TEMPERATURE:
    temperature = 0.0
  elif rng is None:
    raise ValueError(
      'Sampling needs rng=jax.random.key(seed); greedy decoding (topk=1 or '
      'temperature=0) does not.'
    )
  batch, length = inputs.shape
  forced, read = _prepare(inputs, num_decodes, initial_index)

  def step(state: _Samples) -> _Samples:
    key, rng = jax.random.split(state.rng)
    ids = lax.dynamic_index_in_dim(state.sequences, state.position, axis=1)
    logits, cache = tokens_to_logits(ids, state.position, state.cache)
    logits = logits.astype(jnp.float32)
    tokens, log_probs = _choose(logits, key, temperature, topk, topp)
    if not rescale_log_probs:
      log_probs = jax.nn.log_softmax(logits)
    log_probs = _pick(log_probs, tokens[:, None])[:, 0]
    position = state.position + 1
    forced_next = lax.dynamic_index_in_dim(forced, position, 1, keepdims=False)
    free = (forced_next == 0) & ~state.ended
    tokens = jnp.where(free, tokens, jnp.where(state.ended, 0, forced_next))
    return _Samples(
      position,
      state.sequences.at[:, position].set(tokens),
      state.ended | (free & (tokens == eos_id)),
      state.scores + jnp.where(free, log_probs, 0.0),
      rng,
      cache,
    )

  final = lax.while_loop(
    lambda state: (state.position < length) & ~jnp.all(state.ended),
    step,
    _Samples(
      jnp.asarray(initial_index, jnp.int32),
      read,
      jnp.zeros(batch * num_decodes, bool),
      jnp.zeros(batch * num_decodes, jnp.float32),
      jax.random.key(0) if rng is None else rng,
      expand_cache(cache, num_decodes, cache_batch_axis),
    ),
  )
  sequences = final.sequences[:, 1:].reshape(batch, num_decodes, length)
  scores, order = _top_increasing(final.scores.reshape(batch, -1), num_decodes)
  return _pick(sequences, order), scores


def _choose(
  logits: Float[Array, 'N V'],
  key: Array,
  temperature: float,
  topk: int,
  topp: float,
) -> tuple[Int[Array, ' N'], Float[Array, 'N V']]:
  """Next tokens, and all log-probabilities that they were chosen from."""
  if topk > logits.shape[-1]:
    raise ValueError(f'topk={topk} exceeds the {logits.shape[-1]} logits.')
  if not temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros_like(logits)
  scaled = _mask_logits(logits / temperature, topk, topp)
  tokens = jax.random.categorical(key, scaled).astype(jnp.int32)
  return tokens, jax.nn.log_softmax(scaled)


def _mask_logits(
  logits: Float[Array, 'N V'], topk: int, topp: float
) -> Float[Array, 'N V']:
  """Sets everything outside the top-k or top-p set to `NEG_INF`."""
  if topk:
    edge = lax.top_k(logits, topk)[0][:, -1:]
    return jnp.where(logits >= edge, logits, NEG_INF)
  if topp:
    probs = jax.nn.softmax(logits)
    ranked = -jnp.sort(-probs, axis=-1)
    # A token belongs to the set if those before it do not reach topp.
    inside = jnp.cumsum(ranked, axis=-1) - ranked < topp
    edge = jnp.min(jnp.where(inside, ranked, 1.0), axis=-1, keepdims=True)
    return jnp.where(probs >= edge, logits, NEG_INF)
  return logits


class _Beams(NamedTuple):
  position: Array  # [] what the next step reads
  live_log_probs: Array  # [B, K] increasing; -inf is no beam
  live_sequences: Array  # [B, K, U + 1] decoder inputs, one past the end
  finished_scores: Array  # [B, K] increasing; -inf is an empty place
  finished_sequences: Array  # [B, K, U + 1]
  cache: Cache  # batch B * K


def beam_search(
  inputs: Int[Array, 'B U'],
  cache: Cache,
  tokens_to_logits: TokensToLogits,
  eos_id: int = 1,
  num_decodes: int = 4,
  alpha: float = 0.6,
  *,
  initial_index: Index = 0,
  cache_batch_axis: int = 0,
) -> tuple[Int[Array, 'B K U'], Float[Array, 'B K']]:
  """Beam search with a length penalty: score = log p / ((5 + n) / 6)^alpha.

  n counts the tokens of the sequence, EOS and forced ones included; log p sums
  over generated tokens only. Every step keeps the 2K likeliest continuations,
  so that K live ones are left if K of them finish. Stops when no live beam of
  any row can still enter the finished ones.

  Args:
    inputs: forced tokens; U bounds the length.
    cache: what `tokens_to_logits` reads and writes, with batch B. It is
      gathered at every step: what all beams of a row share (keys and values of
      the encoder) is cheaper in a closure, through `expand_cache`.
    tokens_to_logits: one step: ids, position, cache to logits, cache.
    eos_id: id that ends a sequence.
    num_decodes: K, beams per row; at most V.
    alpha: strength of the length penalty, >= 0.
    initial_index: position of the first step.
    cache_batch_axis: batch axis of every cache leaf, 1 for scanned layers.

  Returns:
    Sequences and scores, sorted by increasing score: the best is last. Where no
    beam of a row finished, these are its live beams and their scores are plain
    sums of log-probabilities. Places never filled are zeros scored -1e7.

  Raises:
    ValueError: an argument is out of range.

  Source: Wu et al. 2016, arXiv 1609.08144, section 7; T5X `beam_search`.
  Unlike there, forced tokens between free ones keep the beams and their
  scores, and a forced EOS does not finish a beam.
  """
  _check_common(inputs, cache, num_decodes, cache_batch_axis)
  if alpha < 0:
    raise ValueError(f'alpha={alpha}, expected >= 0 (0 is no penalty).')
  batch, length = inputs.shape
  forced, read = _prepare(inputs, num_decodes, initial_index)
  read = read.reshape(batch, num_decodes, -1)
  forced = forced[::num_decodes]
  rows = jnp.arange(batch)[:, None] * num_decodes

  def step(state: _Beams) -> _Beams:
    ids = lax.dynamic_index_in_dim(state.live_sequences, state.position, 2)
    logits, cache = tokens_to_logits(
      ids.reshape(-1, 1), state.position, state.cache
    )
    position = state.position + 1
    forced_next = lax.dynamic_index_in_dim(forced, position, axis=1)
    log_probs, parents, tokens = _candidates(
      logits.astype(jnp.float32), state.live_log_probs, forced_next
    )
    sequences = _pick(state.live_sequences, parents)
    sequences = sequences.at[:, :, position].set(tokens)

    ended = (forced_next == 0) & (tokens == eos_id)
    live = jnp.where(ended, -jnp.inf, log_probs)
    live, kept = _top_increasing(live, num_decodes)
    parents = (rows + _pick(parents, kept)).reshape(-1)
    scores = log_probs / brevity_penalty(alpha, position)
    scores = jnp.where(ended, scores, -jnp.inf)
    finished, best = _top_increasing(
      jnp.concatenate([state.finished_scores, scores], axis=1), num_decodes
    )
    pool = jnp.concatenate([state.finished_sequences, sequences], axis=1)
    return _Beams(
      position,
      live,
      _pick(sequences, kept),
      finished,
      _pick(pool, best),
      jax.tree.map(lambda x: jnp.take(x, parents, cache_batch_axis), cache),
    )

  def can_improve(state: _Beams) -> Bool[Array, '']:
    # Log-probabilities only fall, so a live beam's best score is its present
    # sum under the penalty of the longest sequence.
    bound = state.live_log_probs[:, -1] / brevity_penalty(alpha, length)
    settled = state.finished_scores[:, 0] >= bound
    return (state.position < length) & ~jnp.all(settled)

  empty = jnp.full((batch, num_decodes), -jnp.inf)
  start = _Beams(
    jnp.asarray(initial_index, jnp.int32),
    # One live beam: K equal ones would stay equal for ever.
    empty.at[:, -1].set(0.0),
    read,
    empty,
    jnp.zeros_like(read),
    expand_cache(cache, num_decodes, cache_batch_axis),
  )
  return _best_beams(lax.while_loop(can_improve, step, start))


def _candidates(
  logits: Float[Array, 'N V'],
  live_log_probs: Float[Array, 'B K'],
  forced_next: Int[Array, 'B 1'],
) -> tuple[Float[Array, 'B J'], Int[Array, 'B J'], Int[Array, 'B J']]:
  """Log-probability (decreasing), beam and token of a row's 2K likeliest.

  A forced token carries every live beam on, unchanged and in order.
  """
  batch, beams = live_log_probs.shape
  vocab = logits.shape[-1]
  if beams > vocab:
    raise ValueError(f'num_decodes={beams} exceeds the {vocab} logits.')
  log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, vocab)
  log_probs = (log_probs + live_log_probs[:, :, None]).reshape(batch, -1)
  log_probs, index = lax.top_k(log_probs, 2 * beams)
  log_probs = jnp.where(log_probs > NEG_INF, log_probs, -jnp.inf)

  free = forced_next == 0
  carried = jnp.flip(live_log_probs, axis=1)
  carried = jnp.pad(carried, ((0, 0), (0, beams)), constant_values=-jnp.inf)
  order = jnp.maximum(beams - 1 - jnp.arange(2 * beams), 0)
  return (
    jnp.where(free, log_probs, carried),
    jnp.where(free, index // vocab, order[None]),
    jnp.where(free, index % vocab, forced_next),
  )


def _best_beams(
  state: _Beams,
) -> tuple[Int[Array, 'B K U'], Float[Array, 'B K']]:
  """Finished beams, or the live ones of rows where none finished."""
  none = (state.finished_scores[:, -1] <= NEG_INF)[:, None]
  scores = jnp.where(none, state.live_log_probs, state.finished_scores)
  sequences = jnp.where(
    none[:, :, None], state.live_sequences, state.finished_sequences
  )
  filled = scores > NEG_INF
  sequences = jnp.where(filled[:, :, None], sequences[:, :, 1:], 0)
  return sequences, jnp.where(filled, scores, NEG_INF)


def _pick(x: Array, index: Int[Array, 'B J']) -> Array:
  """x[b, index[b, j]] for x [B, I, ...]."""
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _top_increasing(
  scores: Float[Array, 'B I'], k: int
) -> tuple[Float[Array, 'B K'], Int[Array, 'B K']]:
  top, index = lax.top_k(scores, k)
  return jnp.flip(top, axis=1), jnp.flip(index, axis=1)


def _prepare(
  inputs: Int[Array, 'B U'], num_decodes: int, initial_index: Index
) -> tuple[Int[Array, 'N W'], Int[Array, 'N W']]:
  """Expanded inputs with a free place at the end; what is read of them."""
  padded = jnp.pad(inputs.astype(jnp.int32), ((0, 0), (0, 1)))
  forced = flat_batch_beam_expand(padded, num_decodes)
  places = jnp.arange(forced.shape[1])[None]
  return forced, jnp.where(places <= initial_index, forced, 0)


def _check_common(
  inputs: Array, cache: Cache, num_decodes: int, cache_batch_axis: int
) -> None:
  if num_decodes < 1:
    raise ValueError(f'num_decodes={num_decodes}, expected at least 1.')
  for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
    if leaf.shape[cache_batch_axis:][:1] != inputs.shape[:1]:
      raise ValueError(
        f'Cache leaf {jax.tree_util.keystr(path)} has shape {leaf.shape}, '
        f'expected the batch of {inputs.shape[0]} on axis {cache_batch_axis}; '
        'set cache_batch_axis (1 for scanned layers, else 0).'
      )


def _check_sampling(temperature: float, topk: int, topp: float) -> None:
  if temperature < 0:
    raise ValueError(f'temperature={temperature}, expected >= 0 (0 is greedy).')
  if topk < 0 or not 0 <= topp <= 1:
    raise ValueError(f'topk={topk}, topp={topp}: expected >= 0, and 0 to 1.')
  if topk and topp:
    raise ValueError(f'topk={topk} and topp={topp} are both set; set one to 0.')
