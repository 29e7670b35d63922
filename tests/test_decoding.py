"""Decoding of toy step functions whose every probability is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import decoding

EOS = 1
STATES = 13


def _toy(seed, vocab, forbidden=(), axis=0, hidden=0):
  """A step whose logits depend on all that was read, through the cache.

  The state is a hash of the tokens read so far; a cache that is not gathered
  with its beams gives other logits. Returns the step, an empty cache maker and
  log_probs(tokens) -> log-probabilities of the token after `tokens`.
  """
  table = np.random.default_rng(seed).normal(size=(STATES, vocab)) * 2
  table = table.astype(np.float32)
  table[:, list(forbidden)] = -np.inf

  def step(ids, position, cache):
    read = ids[:, 0] + jnp.expand_dims(position, 0)
    state = cache['state'].reshape(-1)
    new = ((state * 5 + read + 1) % STATES).reshape(cache['state'].shape)
    return jnp.asarray(table)[new.reshape(-1)], {'state': new}

  def cache(batch):
    shape = (1,) * axis + (batch,)
    return {'state': jnp.full(shape, hidden, jnp.int32)}

  def log_probs(tokens):
    state = hidden
    for position, token in enumerate(tokens):
      state = (state * 5 + token + position + 1) % STATES
    logits = table[state].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())

  return step, cache, log_probs


def _log_prob(log_probs, sequence, prefix=(0,)):
  read, total = list(prefix), 0.0
  for token in sequence:
    total += log_probs(read)[token]
    read.append(int(token))
  return total


def _until_eos(sequence):
  sequence = [int(token) for token in sequence]
  return sequence[: sequence.index(EOS) + 1] if EOS in sequence else sequence


def _free(batch, length):
  return jnp.zeros((batch, length), jnp.int32)


# --- Beam search -------------------------------------------------------------


@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
@pytest.mark.parametrize('axis', [0, 1])
def test_beams_that_hold_everything_equal_enumeration(alpha, axis):
  vocab, length, beams = 16, 4, 16
  words = (5, 9)
  forbidden = [i for i in range(vocab) if i not in (EOS, *words)]
  step, cache, log_probs = _toy(3, vocab, forbidden, axis)
  expected = []
  for n in range(length):
    for body in itertools.product(words, repeat=n):
      sequence = [*body, EOS]
      score = _log_prob(log_probs, sequence)
      score /= ((5 + len(sequence)) / 6) ** alpha
      expected.append((score, sequence + [0] * (length - len(sequence))))
  expected.sort()

  search = functools.partial(
    decoding.beam_search,
    tokens_to_logits=step,
    num_decodes=beams,
    alpha=alpha,
    cache_batch_axis=axis,
  )
  sequences, scores = jax.jit(search)(_free(2, length), cache(2))

  # 15 sequences end within the length; the 16th place is never filled.
  assert len(expected) == beams - 1
  for row in range(2):
    np.testing.assert_array_equal(
      sequences[row], [[0] * length, *(s for _, s in expected)]
    )
    np.testing.assert_allclose(
      scores[row], [-1e7, *(s for s, _ in expected)], atol=1e-5
    )


def _slow_beam_search(log_probs, prefix, length, beams, alpha):
  """Beam search on lists, without early stopping."""
  live, finished = [(0.0, list(prefix))], []
  for _ in range(length - len(prefix) + 1):
    candidates = [
      (score + float(value), [*read, token])
      for score, read in live
      for token, value in enumerate(log_probs(read))
    ]
    candidates = sorted(candidates, reverse=True)[: 2 * beams]
    for score, read in candidates:
      if read[-1] == EOS:
        n = len(read) - 1
        finished.append((score / ((5 + n) / 6) ** alpha, read))
    live = [c for c in candidates if c[1][-1] != EOS][:beams]
    finished = sorted(finished)[-beams:]
  return finished or sorted(live)


@pytest.mark.parametrize('seed, beams', [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_pruned_beams_equal_a_search_on_lists(seed, beams):
  vocab, length, alpha = 7, 6, 0.6
  step, cache, log_probs = _toy(seed, vocab)
  prefixes = [(0,), (0, 4), (0, 2, EOS, 6)]
  inputs = np.zeros((len(prefixes), length), np.int32)
  for row, prefix in enumerate(prefixes):
    inputs[row, : len(prefix)] = prefix

  sequences, scores = decoding.beam_search(
    jnp.asarray(inputs), cache(3), step, num_decodes=beams, alpha=alpha
  )

  for row, prefix in enumerate(prefixes):
    expected = _slow_beam_search(log_probs, prefix, length, beams, alpha)
    unfilled = [(-1e7, list(prefix[:1]))] * (beams - len(expected))
    for k, (score, read) in enumerate(unfilled + expected):
      read = read[1:] + [0] * (length + 1 - len(read))
      np.testing.assert_array_equal(sequences[row, k], read)
      np.testing.assert_allclose(scores[row, k], score, atol=1e-5)


def test_live_beams_are_returned_unpenalised_if_none_finished():
  step, cache, log_probs = _toy(0, 5, forbidden=[EOS])
  sequences, scores = decoding.beam_search(
    _free(1, 3), cache(1), step, num_decodes=4, alpha=0.6
  )
  assert (np.asarray(sequences) != EOS).all()
  assert (np.diff(scores[0]) >= 0).all()
  for sequence, score in zip(sequences[0], scores[0], strict=True):
    np.testing.assert_allclose(score, _log_prob(log_probs, sequence), atol=1e-5)


def test_live_places_never_filled_are_empty():
  forbidden = [0, EOS, 3]  # two sequences of length 1 are possible
  step, cache, _ = _toy(0, 5, forbidden=forbidden)
  sequences, scores = decoding.beam_search(
    _free(1, 1), cache(1), step, num_decodes=4
  )
  np.testing.assert_array_equal(scores[0, :2], [-1e7, -1e7])
  np.testing.assert_array_equal(sequences[0, :2, 0], [0, 0])
  assert sorted(np.asarray(sequences[0, 2:, 0])) == [2, 4]


def test_beam_search_keeps_beams_over_forced_tokens_between_free_ones():
  step, cache, log_probs = _toy(1, 6, forbidden=[EOS])
  inputs = jnp.array([[0, 0, 77, 0]])  # 77 stands for a soft token
  sequences, scores = decoding.beam_search(
    inputs, cache(1), step, num_decodes=6
  )
  sequences = np.asarray(sequences[0])
  np.testing.assert_array_equal(sequences[:, 1], 77)
  assert len(set(sequences[:, 0])) > 1
  for (a, _, c, d), score in zip(sequences, scores[0], strict=True):
    expected = _log_prob(log_probs, [a])
    expected += _log_prob(log_probs, [c, d], (0, a, 77))
    np.testing.assert_allclose(score, expected, atol=1e-5)


def test_beam_search_stops_as_soon_as_nothing_can_improve():
  def step(ids, position, cache):
    # EOS is nearly certain: one step settles a single beam.
    logits = jnp.zeros((ids.shape[0], 4)).at[:, EOS].set(20.0)
    return logits, {'steps': cache['steps'] + 1}

  seen = []

  def spy(ids, position, cache):
    jax.debug.callback(lambda p: seen.append(int(p)), position)
    return step(ids, position, cache)

  result = decoding.beam_search(
    _free(2, 50), {'steps': jnp.zeros(2, jnp.int32)}, spy, num_decodes=1
  )
  jax.block_until_ready(result)
  jax.effects_barrier()
  assert seen == [0]


# --- Greedy and sampling ------------------------------------------------------


def _greedy(log_probs, prefix, length):
  read = list(prefix)
  while len(read) <= length:
    read.append(int(np.argmax(log_probs(read))))
    if read[-1] == EOS:
      break
  return read[1:] + [0] * (length + 1 - len(read))


@pytest.mark.parametrize('arguments', [{'topk': 1}, {'temperature': 0.0}])
def test_greedy_takes_the_likeliest_and_scores_zero(arguments):
  prefixes = [(0,), (0, 3), (0, 3, 5, 2), (0, EOS, 99)]
  length = 8
  step, cache, log_probs = _toy(7, 9)
  inputs = np.zeros((4, length), np.int32)
  for row, prefix in enumerate(prefixes):
    inputs[row, : len(prefix)] = prefix
  decode = jax.jit(
    functools.partial(
      decoding.temperature_sample, tokens_to_logits=step, **arguments
    )
  )
  sequences, scores = decode(jnp.asarray(inputs), cache(4))
  assert sequences.shape == (4, 1, length)
  np.testing.assert_array_equal(scores, 0.0)
  for row, prefix in enumerate(prefixes):
    np.testing.assert_array_equal(
      sequences[row, 0], _greedy(log_probs, prefix, length)
    )

  _, scores = decoding.temperature_sample(
    jnp.asarray(inputs), cache(4), step, rescale_log_probs=False, **arguments
  )
  for row, prefix in enumerate(prefixes):
    generated = sequences[row, 0, len(prefix) - 1 :]
    expected = _log_prob(log_probs, _until_eos(generated), prefix)
    np.testing.assert_allclose(scores[row, 0], expected, atol=1e-5)


def test_a_nonzero_first_input_is_read():
  step, cache, log_probs = _toy(7, 9)
  inputs = jnp.zeros((1, 5), jnp.int32).at[0, :2].set(jnp.array([8, 4]))
  sequences, _ = decoding.temperature_sample(inputs, cache(1), step, topk=1)
  np.testing.assert_array_equal(sequences[0, 0], _greedy(log_probs, (8, 4), 5))


@pytest.mark.parametrize('beams', [False, True])
def test_starting_from_a_prefilled_cache_is_starting_from_the_prefix(beams):
  step, cache, _ = _toy(2, 9)
  inputs = jnp.zeros((2, 7), jnp.int32)
  inputs = inputs.at[:, 1:4].set(jnp.array([[5, 6, 0], [4, 3, 2]]))
  decode = (
    functools.partial(decoding.beam_search, num_decodes=3)
    if beams
    else functools.partial(decoding.temperature_sample, topk=1)
  )
  expected = decode(inputs, cache(2), step)
  filled = cache(2)
  for position in range(2):
    ids = inputs[:, position : position + 1]
    _, filled = step(ids, jnp.asarray(position), filled)
  found = decode(inputs, filled, step, initial_index=2)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_sampling_frequencies_scores_and_order():
  step, cache, log_probs = _toy(5, 4)
  temperature, count = 1.7, 4000
  sequences, scores = decoding.temperature_sample(
    _free(1, 1),
    cache(1),
    step,
    num_decodes=count,
    rng=jax.random.key(0),
    temperature=temperature,
  )
  logits = log_probs([0]) / temperature
  probs = np.exp(logits) / np.exp(logits).sum()
  drawn = np.asarray(sequences[0, :, 0])
  frequencies = np.bincount(drawn, minlength=4) / count
  # Four standard deviations of a binomial frequency.
  atol = 4 * np.sqrt(probs * (1 - probs) / count)
  assert (np.abs(frequencies - probs) < atol).all()
  assert (np.diff(scores[0]) >= 0).all()
  np.testing.assert_allclose(scores[0], np.log(probs)[drawn], atol=1e-5)


@pytest.mark.parametrize(
  'arguments, support',
  [
    ({'topk': 2}, [2, 4]),
    ({'topp': 0.39}, [4]),
    ({'topp': 0.41}, [2, 4]),
    ({'topp': 1.0}, [0, 1, 2, 3, 4]),
  ],
)
def test_top_k_and_top_p_support(arguments, support):
  probs = np.array([0.08, 0.12, 0.25, 0.15, 0.4], np.float32)

  def step(ids, position, cache):
    logits = jnp.log(jnp.asarray(probs))
    return jnp.tile(logits[None], (ids.shape[0], 1)), cache

  sequences, scores = decoding.temperature_sample(
    _free(1, 1), {}, step, num_decodes=600, rng=jax.random.key(1), **arguments
  )
  drawn = np.asarray(sequences[0, :, 0])
  assert sorted(set(drawn.tolist())) == support
  renormalised = np.log(probs / probs[support].sum())
  np.testing.assert_allclose(scores[0], renormalised[drawn], atol=1e-5)


def test_samples_end_at_eos_and_follow_the_cache():
  step, cache, log_probs = _toy(11, 5)
  decode = functools.partial(
    decoding.temperature_sample,
    _free(2, 6),
    cache(2),
    step,
    num_decodes=50,
  )
  sequences, scores = decode(rng=jax.random.key(3))
  for row, k in np.ndindex(2, 50):
    sequence = _until_eos(sequences[row, k])
    assert not np.asarray(sequences[row, k, len(sequence) :]).any()
    np.testing.assert_allclose(
      scores[row, k], _log_prob(log_probs, sequence), atol=1e-5
    )
  # Rows and decodes are independent draws; a key repeats its own.
  assert len({tuple(s) for s in np.asarray(sequences).reshape(100, 6)}) > 20
  again, _ = decode(rng=jax.random.key(3))
  other, _ = decode(rng=jax.random.key(4))
  np.testing.assert_array_equal(again, sequences)
  assert (other != sequences).any()


# --- Helpers and errors -------------------------------------------------------


def test_expand_cache_repeats_the_batch_in_place():
  cache = {'a': jnp.arange(6).reshape(1, 2, 3)}
  expanded = decoding.expand_cache(cache, 2, axis=1)['a']
  np.testing.assert_array_equal(
    expanded, [[[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]]
  )
  np.testing.assert_array_equal(
    decoding.flat_batch_beam_expand(jnp.array([3, 5]), 3), [3, 3, 3, 5, 5, 5]
  )


KEY = {'rng': jax.random.key(0)}


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({}, 'needs rng'),
    ({'topk': 2, 'topp': 0.5, **KEY}, 'both set'),
    ({'temperature': -1.0, **KEY}, 'temperature=-1.0'),
    ({'topk': -1, **KEY}, 'topk=-1'),
    ({'topk': 6, **KEY}, 'topk=6 exceeds the 5'),
    ({'topp': 1.5, **KEY}, 'topp=1.5'),
    ({'num_decodes': 0, **KEY}, 'num_decodes=0'),
    ({'cache_batch_axis': 1, 'topk': 1}, r"\['state'\] has shape \(2,\)"),
  ],
)
def test_sampling_refuses(arguments, message):
  step, cache, _ = _toy(0, 5)
  with pytest.raises(ValueError, match=message):
    decoding.temperature_sample(_free(2, 3), cache(2), step, **arguments)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'num_decodes': 6}, 'num_decodes=6 exceeds the 5'),
    ({'num_decodes': 0}, 'num_decodes=0'),
    ({'alpha': -0.1}, 'alpha=-0.1'),
  ],
)
def test_beam_search_refuses(arguments, message):
  step, cache, _ = _toy(0, 5)
  with pytest.raises(ValueError, match=message):
    decoding.beam_search(_free(2, 3), cache(2), step, **arguments)
