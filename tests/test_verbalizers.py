"""Verbalizers: small cases worked out by hand."""

import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import vocabularies
from prompt_jax.row_files import UserDataError
from prompt_jax.verbalizers import calibration
from prompt_jax.verbalizers import kpt
from prompt_jax.verbalizers import prototypical
from prompt_jax.verbalizers import states
from prompt_jax.verbalizers import words

# Padding 0, EOS 1, unknown 2, and a to f are 3 to 8.
WORDS = vocabularies.WordVocabulary(list('abcdef'))
TWO = words.label_words({'x': 'a', 'y': ['b', 'c']}, WORDS)
LOGITS = jnp.log(jnp.array([[9, 9, 9, 0.1, 0.2, 0.5, 9, 9, 9.0]]))


def label_words(given, **kwargs):
  return words.label_words(given, WORDS, **kwargs)


# ---- words -----------------------------------------------------------------


def test_words_as_tokens():
  assert TWO.labels == ('x', 'y') and TWO.words == (('a',), ('b', 'c'))
  assert TWO.ids[..., 0].tolist() == [[3, -1], [4, 5]]
  assert TWO.mask.tolist() == [[True, False], [True, True]]
  several = label_words({'x': 'a b', 'y': ['c', 'd e f']}, single=False)
  assert several.ids.tolist() == [
    [[3, 4, -1], [-1, -1, -1]], [[5, -1, -1], [6, 7, 8]]
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ({'x': 'a'}, 'two labels or more'),
    ({'x': 'a', 'y': []}, "label 'y' has no words"),
    ({'x': 'a', 'y': ' '}, "label 'y' has the word ' '; expected text"),
    ({'x': 'a', 'y': ['b', 3]}, "label 'y' has the word 3; expected text"),
    ({'x': 'a', 'y': 'q'}, r"'q' of the label 'y' is not in the vocabulary: it "
     r'is read as \[2\]'),
    ({'x': 'a', 'y': 'b c'}, r"'b c' of the label 'y' is not one token of the "
     r"vocabulary but 2: 'b', 'c' \(ids \[4, 5\]\)"),
    ({'x': 'a', 'y': ['b', ' a']}, r"'x' and 'y' share a word: 'a' and ' a'"),
    ({'x': ['a', 'a'], 'y': 'b'}, "label 'x' has a word twice"),
  ],
)  # fmt: skip
def test_bad_words(given, expected):
  with pytest.raises(ValueError, match=expected):
    label_words(given)


def test_the_tokens_of_a_word_are_said(shared):
  path = shared / 'data' / 't5_vocab' / 'spiece.model'
  vocabulary = vocabularies.sentencepiece(str(path))
  found = words.label_words({'0': 'terrible', '1': 'great'}, vocabulary)
  assert found.ids.ravel().tolist() == [9412, 248]
  with pytest.raises(ValueError, match=r"3: 'un', 'watch', 'able' \(ids"):
    words.label_words({'0': 'terrible', '1': 'unwatchable'}, vocabulary)


def test_scores_by_hand():
  found = words.word_log_probs(words.word_logits(LOGITS, TWO))
  # Of 0.1, 0.2 and 0.5, what they are of 0.8.
  np.testing.assert_allclose(
    np.exp(found), [[[0.125, 0.0], [0.25, 0.625]]], rtol=1e-6
  )
  want = {
    'mean': (math.log(0.25) + math.log(0.625)) / 2,
    'max': math.log(0.625),
    'sum': math.log(0.25 * 0.625),
    'logsumexp': math.log(0.875),
  }
  for reduction, y in want.items():
    scores = words.label_scores(found, reduction)
    np.testing.assert_allclose(scores, [[math.log(0.125), y]], rtol=1e-6)


def test_one_word_a_label_is_a_restricted_softmax():
  one = label_words({'x': 'c', 'y': 'a'})
  scores = words.label_scores(
    words.word_log_probs(words.word_logits(LOGITS, one))
  )
  np.testing.assert_allclose(np.exp(scores), [[5 / 6, 1 / 6]], rtol=1e-6)


def test_words_that_are_not_there_and_their_order_do_not_matter():
  turned = label_words({'x': ['a'], 'y': ['c', 'b']})
  wider = label_words({'y': ['b', 'c'], 'x': ['a'], 'z': ['d', 'e', 'f']})
  scores = [
    words.label_scores(words.word_logits(LOGITS, x)) for x in (TWO, turned)
  ]
  np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)
  third = words.label_scores(words.word_logits(LOGITS, wider))
  np.testing.assert_allclose(scores[0], third[:, [1, 0]], rtol=1e-6)


def test_words_of_several_tokens():
  several = label_words({'x': 'a c', 'y': 'b'}, single=False)
  logits = jnp.arange(9.0)[None]
  for pieces, want in (('first', 3.0), ('mean', 4.0), ('max', 5.0)):
    found = words.word_logits(logits, several, pieces)
    np.testing.assert_allclose(found, [[[want], [4.0]]])


def test_gradients_are_finite_where_words_are_missing():
  def loss(logits):
    found = words.word_log_probs(words.word_logits(logits, TWO))
    return words.label_scores(found)[0, 0]

  assert np.isfinite(jax.grad(loss)(LOGITS)).all()


def test_bad_scores():
  with pytest.raises(ValueError, match="got 'men'. Did you mean 'mean'"):
    words.label_scores(jnp.zeros((1, 2, 2)), 'men')
  with pytest.raises(ValueError, match='weights are those of a mean'):
    words.label_scores(jnp.zeros((1, 2, 2)), 'sum', jnp.zeros((2, 2)))
  with pytest.raises(ValueError, match='pieces must be one of'):
    words.word_logits(LOGITS, TWO, 'last')
  with pytest.raises(ValueError, match='has the id 5, but there are 4 logits'):
    words.word_logits(LOGITS[:, :4], TWO)


# ---- calibration -----------------------------------------------------------


def test_calibration_by_hand():
  prior = calibration.content_free_prior([[0.6, 0.2], [0.3, 0.1]])
  np.testing.assert_allclose(prior, [0.75, 0.25], rtol=1e-6)
  # 0.6 / 0.75 = 0.8 and 0.4 / 0.25 = 1.6: a third and two.
  found = calibration.calibrate(jnp.array([[0.6, 0.4], [0.75, 0.25]]), prior)
  np.testing.assert_allclose(found, [[1 / 3, 2 / 3], [0.5, 0.5]], rtol=1e-6)
  even = calibration.calibrate(jnp.array([[0.6, 0.4]]), jnp.array([0.5, 0.5]))
  np.testing.assert_allclose(even, [[0.6, 0.4]], rtol=1e-6)


def test_bad_priors():
  for bad in ([[0.5, 0.0]], [[-0.1, 0.4]]):
    with pytest.raises(ValueError, match='must be above 0, got'):
      calibration.content_free_prior(bad)
  with pytest.raises(ValueError, match='must be .inputs, labels., got shape'):
    calibration.content_free_prior([0.5, 0.5])


def test_content_free_rows():
  rows = calibration.content_free_rows(['a', 'b'], ['N/A', ''])
  assert rows == [{'a': 'N/A', 'b': 'N/A'}, {'a': '', 'b': ''}]


# ---- KPT -------------------------------------------------------------------


def test_expansion():
  seeds = {'x': 'a', 'y': 'b'}
  related = {'x': ['c', 'd', 'c', 'b'], 'y': ['d', 'e', 'b']}
  # d is listed for both, b is the seed of y.
  assert kpt.expand(seeds, related) == {'x': ['a', 'c'], 'y': ['b', 'e']}
  assert kpt.expand(seeds, {}) == {'x': ['a'], 'y': ['b']}
  with pytest.raises(ValueError, match="'z', which is no label"):
    kpt.expand(seeds, {'z': ['c']})


def test_a_file_of_words(tmp_path):
  path = tmp_path / 'words.txt'
  path.write_text('# x\nx: c, d ,, a b\n\ny: e\n')
  assert kpt.read_words(path) == {'x': ['c', 'd', 'a b'], 'y': ['e']}
  for bad in ('x c', 'x:', 'x: , ', ': a', 'x: a\nx: b'):
    path.write_text(f'w: a\n{bad}\n')
    with pytest.raises(UserDataError, match='words.txt, line [23]: expected `'):
      kpt.read_words(path)


def test_rare_words_go_but_seeds():
  made = label_words({'x': ['a', 'c'], 'y': ['b', 'd e']}, single=False)
  prior = np.array([0.2, 0.2, 0.2, 0.01, 0.1, 0.05, 0.1, 0.02, 0.12])
  # Of nine, the lowest third are a, e and c (3, 7 and 5).
  found = kpt.by_frequency(made, prior, 1 / 3)
  assert found.words == (('a',), ('b',))
  assert kpt.by_frequency(made, prior, 0.0).words == made.words
  assert kpt.by_frequency(made, prior, 0.24).words == (('a', 'c'), ('b',))
  with pytest.raises(ValueError, match='fraction must be in'):
    kpt.by_frequency(made, prior, 1.0)


def test_relevance_by_hand():
  made = label_words({'x': ['a', 'c'], 'y': ['b', 'd'], 'z': ['e', 'f']})
  logits = np.zeros((3, 9))
  # Less their mean, over three texts: a, b and e are the seeds.
  logits[:, 3] = 7 + np.array([2, -1, -1])
  logits[:, 4] = np.array([-1, 2, -1])
  logits[:, 7] = np.array([0, 1, -1])
  logits[:, 5] = 3 * logits[:, 4]  # c goes with b, which is not its label's
  logits[:, 6] = np.array([0, 1, -1])
  logits[:, 8] = 0
  found = kpt.relevance(made, logits)
  by = math.sqrt(6)
  cos_ye = 3 / (by * math.sqrt(2))
  # a: own 1; others -1/2 and 0: not above 0.
  assert found[0, 0] == np.inf
  assert found[0, 1] == 0  # own -1/2
  # b: own 1, others -1/2 and cos; d: own cos, others with a 0, with e 1.
  np.testing.assert_allclose(found[1], [2 / (cos_ye - 0.5), 2 * cos_ye])
  assert found[2, 1] == 0  # says nothing of any label
  kept = kpt.by_relevance(made, logits)
  assert kept.words == (('a',), ('b', 'd'), ('e',))
  assert kept.ids[..., 0].tolist() == [[3, -1], [4, 6], [7, -1]]
  kept = kpt.by_relevance(made, logits, least=1.8)
  assert kept.words == (('a',), ('b',), ('e',))


def test_calibrated_support_is_uniform():
  prior = kpt.contextual_prior(LOGITS)
  np.testing.assert_allclose(prior, np.exp(LOGITS[0]) / 54.8, rtol=1e-6)
  own = kpt.word_prior(TWO, prior)
  assert own[0, 1] == 0
  found = words.word_log_probs(words.word_logits(LOGITS, TWO), own)
  np.testing.assert_allclose(
    np.exp(found), [[[1 / 3, 0], [1 / 3, 1 / 3]]], rtol=1e-5
  )


def test_weights_of_words():
  found = words.word_log_probs(words.word_logits(LOGITS, TWO))
  even = words.label_scores(found, weights=jnp.zeros((2, 2)))
  np.testing.assert_allclose(even, words.label_scores(found), rtol=1e-6)
  # softmax of (log 3, 0) is 3/4 and 1/4; the word that is missing has none.
  weights = jnp.array([[0.0, 9.0], [math.log(3), 0.0]])
  scores = words.label_scores(found, weights=weights)
  y = 0.75 * math.log(0.25) + 0.25 * math.log(0.625)
  np.testing.assert_allclose(scores, [[math.log(0.125), y]], rtol=1e-6)


def test_weights_are_learned():
  # Label 1 is told by its second word; the first says the contrary.
  log_probs = jax.nn.log_softmax(
    jnp.array([[[0.0, 0.0], [2.0, -4.0]], [[0.0, 0.0], [-2.0, 4.0]]])
    .reshape(2, 4)
  ).reshape(2, 2, 2)  # fmt: skip
  labels = jnp.array([0, 1])
  weights = kpt.fit_weights(log_probs, labels)
  assert weights.shape == (2, 2) and weights[1, 1] > weights[1, 0] + 1
  before = words.label_scores(log_probs)
  after = words.label_scores(log_probs, weights=weights)

  def loss(scores):
    logs = jax.nn.log_softmax(scores, axis=-1)
    return -np.mean([logs[0, 0], logs[1, 1]])

  assert loss(after) < loss(before) - 0.1


# ---- ProtoVerb -------------------------------------------------------------

UNIT = jnp.eye(2)
LABELS = jnp.array([0, 1])
SOFTMAX = -math.log(math.e / (math.e + 1))  # of a cosine 1 against a 0


def test_prototype_loss_by_hand():
  # Features that are their labels' prototypes: cosines 1 and 0.
  loss = prototypical.prototype_loss(3 * UNIT, LABELS, 5 * UNIT)
  np.testing.assert_allclose(loss, SOFTMAX / 2, rtol=1e-5)
  turned = prototypical.prototype_loss(UNIT, 1 - LABELS, UNIT)
  np.testing.assert_allclose(turned, -math.log(1 / (math.e + 1)) / 2, rtol=1e-5)


def test_instance_loss_by_hand():
  v = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
  labels = jnp.array([0, 0, 1])
  # For b of label 0: four pairs, each e / (e + 1); for b of label 1: one pair,
  # and two others, e / (e + 2).
  want = 4 * SOFTMAX - math.log(math.e / (math.e + 2))
  loss = prototypical.instance_loss(v, labels)
  np.testing.assert_allclose(loss, want / 9, rtol=1e-5)


def test_orthogonal_prototypes_at_the_features_are_a_minimum():
  # Of cosines: with features and prototypes turned apart it only gets worse.
  start = prototypical.Prototypes(jnp.eye(2), UNIT)
  loss = prototypical.loss(start, UNIT, LABELS)
  for angle in (-0.3, 0.2, 1.0):
    c, s = math.cos(angle), math.sin(angle)
    moved = prototypical.Prototypes(
      jnp.eye(2), UNIT @ jnp.array([[c, -s], [s, c]])
    )
    assert prototypical.loss(moved, UNIT, LABELS) > loss


def test_prototypes_are_learned():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(3, 8))
  labels = np.arange(30) % 3
  x = (centres[labels] + 0.1 * rng.normal(size=(30, 8))).astype(np.float32)
  start = prototypical.init(jax.random.key(0), 8, 3, dim=4)
  assert start.projection.shape == (8, 4) and start.prototypes.shape == (3, 4)
  made = prototypical.fit(start, x, labels, steps=200, learning_rate=0.02)
  assert prototypical.loss(made, x, labels) < prototypical.loss(
    start, x, labels
  )
  found = prototypical.scores(made, x)
  assert (np.argmax(found, axis=-1) == labels).all()
  with pytest.raises(ValueError, match=r'no example of the labels \[2\]'):
    prototypical.fit(start, x[:2], labels[:2])
  with pytest.raises(ValueError, match=r'must be \[examples, 8\], got'):
    prototypical.fit(start, x[:, :5], labels)


def test_verbalizers_together():
  one = jnp.array([[1.0, 3.0]])
  two = jnp.array([[5.0, 1.0, 3.0]])
  np.testing.assert_allclose(prototypical.combined(one), [[-1, 1]], rtol=1e-6)
  z = math.sqrt(1.5)
  np.testing.assert_allclose(
    prototypical.combined(two, 7 * two - 2), [[z, -z, 0]], rtol=1e-5, atol=1e-6
  )
  assert (prototypical.combined(jnp.ones((1, 2))) == 0).all()


# ---- what a model says at the blank ----------------------------------------


def test_logits_and_states_at_the_blank():
  model = models.EncoderDecoderModel(helpers.SMALL)
  frozen = partitioning.unbox(
    jax.jit(model.init_network)(jax.random.PRNGKey(0))
  )
  batch = helpers.random_batch(helpers.SMALL, rows=3)
  batch['decoder_input_tokens'][:, 1:] %= 50
  batch['decoder_input_tokens'][0, 2] = 63  # the sentinel, not in every row
  batch['decoder_input_tokens'][1, 1] = 63
  at_blank = jax.jit(states.at_blank, static_argnums=(0, 4))
  logits, found = at_blank(model, frozen, helpers.NOTHING, batch, 63)
  want = np.asarray(jax.jit(model.logits)(frozen, helpers.NOTHING, batch))
  close = {'rtol': 1e-5, 'atol': 1e-5}
  np.testing.assert_allclose(logits, want[[0, 1, 2], [2, 1, 0]], **close)
  kernel = frozen['decoder']['logits_dense']['kernel']
  np.testing.assert_allclose(found @ kernel, logits, **close)
  first, _ = at_blank(model, frozen, helpers.NOTHING, batch, None)
  np.testing.assert_allclose(first, want[:, 0], **close)
