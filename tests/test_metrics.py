"""Metrics against hand-computed values and against the libraries."""

import functools
import inspect

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from prompt_jax import metrics


@pytest.mark.parametrize(
  'targets, predictions, expected',
  [
    ([0, 1, 2, 1], [0, 1, 1, -1], 50.0),
    (['yes', 'no', 'no'], ['yes', 'No', ''], 100 / 3),
    ([[1, 2], [3]], [[1, 2], [3, 4]], 50.0),
    ([0], [0], 100.0),
  ],
)
def test_accuracy_and_exact_match(targets, predictions, expected):
  found = metrics.accuracy(targets, predictions)
  assert found == {'accuracy': pytest.approx(expected)}
  found = metrics.exact_match(targets, predictions)
  assert found == {'exact_match': pytest.approx(expected)}
  found = metrics.all_match(targets, predictions)
  assert found == {'exact_match': 100.0 if expected == 100 else 0.0}


def test_f1_of_valid_predictions_is_the_library_s():
  rng = np.random.default_rng(0)
  gold, said = rng.integers(0, 2, (2, 50))
  expected = 100 * sklearn_metrics.f1_score(gold, said)
  assert metrics.f1(gold, said)['f1'] == pytest.approx(expected)


def test_f1_counts_invalid_predictions_as_wrong_on_both_sides():
  # A missed positive and a false one: one hit, P = R = 1/2.
  assert metrics.f1([1, 1, 0, 0], [1, -1, -1, 0]) == {'f1': 50.0}
  named = functools.partial(
    metrics.f1, positive_label='equivalent', negative_label='not_equivalent'
  )
  targets = ['equivalent', 'equivalent', 'not_equivalent', 'not_equivalent']
  said = ['equivalent', '', 'banana', 'not_equivalent']
  assert named(targets, said) == {'f1': 50.0}
  with pytest.raises(ValueError, match="'equivalent' is neither"):
    metrics.f1(targets, said)


def test_f1_without_positives_is_zero():
  assert metrics.f1([0, 0], [0, 0]) == {'f1': 0.0}


@pytest.mark.parametrize('labels', [3, ['a', 'b', 'c']])
def test_mean_multiclass_f1(labels):
  rng = np.random.default_rng(1)
  gold, said = rng.integers(0, 3, (2, 40))
  said[:4] = -1
  expected = sklearn_metrics.f1_score(
    gold, said, labels=range(3), average='macro', zero_division=0
  )
  if labels != 3:
    gold = [labels[i] for i in gold]
    said = [labels[i] if i >= 0 else 'nonsense' for i in said]
  found = metrics.mean_multiclass_f1(labels)(gold, said)
  assert found == {'mean_3class_f1': pytest.approx(100 * expected)}


def test_matthews_corrcoef():
  gold, said = [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]
  # TP 2, TN 1, FP 1, FN 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2).
  found = metrics.matthews_corrcoef(gold, said)
  assert found == {'matthews_corrcoef': pytest.approx(100 / 6)}
  # A prediction that is no label lowers it.
  worse = metrics.matthews_corrcoef(gold, [1, -1, 0, 0, 1])
  assert worse['matthews_corrcoef'] < 100 / 6


def test_correlations():
  gold, said = [0.0, 1.0, 2.0, 5.0], ['0.2', '1.0', '3.5', '3.0']
  numbers = [float(text) for text in said]
  found = metrics.pearson_corrcoef(gold, said)['pearson_corrcoef']
  assert found == pytest.approx(100 * np.corrcoef(gold, numbers)[0, 1])
  found = metrics.spearman_corrcoef(gold, said)['spearman_corrcoef']
  # Ranks 1 2 3 4 and 1 2 4 3: 1 - 6 * (1 + 1) / (4 * 15).
  assert found == pytest.approx(80.0)


@pytest.mark.parametrize('text', ['abc', '', 'nan', 'inf'])
def test_text_that_is_no_number_counts_as_minus_one(text):
  gold = [0.0, 1.0, 2.0, 5.0]
  expected = 100 * stats.pearsonr(gold, [0.0, 1.0, 2.0, -1.0])[0]
  found = metrics.pearson_corrcoef(gold, ['0', '1', '2', text])
  assert found == {'pearson_corrcoef': pytest.approx(expected)}
  expected = 100 * stats.spearmanr(gold, [0.0, 1.0, 2.0, -1.0])[0]
  found = metrics.spearman_corrcoef(gold, ['0', '1', '2', text])
  assert found == {'spearman_corrcoef': pytest.approx(expected)}


def test_undefined_correlations():
  same = metrics.pearson_corrcoef([0.0, 1.0], ['3', '3'])
  assert same == {'pearson_corrcoef': 0.0}
  assert metrics.spearman_corrcoef([1.0, 1.0], [3, 4])['spearman_corrcoef'] == 0
  with pytest.raises(ValueError, match='at least two'):
    metrics.pearson_corrcoef([1.0], [1.0])


def test_rouge():
  # Target 6 words, prediction 3: two shared words, one shared pair.
  found = metrics.rouge(['the cat sat on the mat'], ['The cat ran.'])
  assert found['rouge1'] == pytest.approx(100 * 2 * 2 / (6 + 3))
  assert found['rouge2'] == pytest.approx(100 * 2 * 1 / (5 + 2))
  assert found['rougeLsum'] == pytest.approx(100 * 2 * 2 / (6 + 3))
  # The mean over examples; an empty prediction is worth 0.
  found = metrics.rouge(['a b', 'c d'], ['a b', ''])
  assert found['rouge1'] == pytest.approx(50.0)
  # Sentences in another order: their longest subsequences still add up.
  for end in (' . ', ' .\n'):
    found = metrics.rouge([f'x y{end}z w'], ['z w\nx y'])
    assert found['rougeLsum'] == pytest.approx(100.0)
  assert metrics.rouge(['x y z w'], ['z w x y'])['rougeLsum'] < 100
  assert metrics.rouge(['running'], ['runs'])['rouge1'] == 0  # no stemming


def test_bleu():
  target = 'the quick brown fox jumps over the lazy dog'
  assert metrics.bleu([target], [target]) == {'bleu': pytest.approx(100.0)}
  # 1- to 4-gram precisions 4/5, 3/4, 2/3, 1/2, brevity exp(1 - 6/5).
  found = metrics.bleu(['a b c d f g'], ['a b c d e'])['bleu']
  expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * np.exp(1 - 6 / 5)
  assert found == pytest.approx(100 * expected)


def test_bleu_reads_references_by_example():
  targets = [['w x y z', 'a b c d e'], ['f g h i j']]
  predictions = ['a b c d e', 'f g h i j']
  assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(100.0)
  swapped = metrics.bleu(targets, predictions[::-1])
  assert swapped['bleu'] < 10


def test_squad():
  targets = [['The Beatles!', 'Beatles (band)'], ['in 1969'], ['Rome']]
  predictions = ['beatles', '1969', 'the city of Paris']
  # Words of the second: P = 1, R = 1/2.
  assert metrics.squad(targets, predictions) == {
    'em': pytest.approx(100 / 3),
    'f1': pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
  }
  # Repeated words count as often as they are in both.
  found = metrics.squad([['x x y']], ['x x x'])['f1']
  assert found == pytest.approx(100 * 2 / 3)
  for wrong in ('Rome', []):
    with pytest.raises(ValueError, match='at least one answer'):
      metrics.squad([wrong], ['Rome'])


def test_multirc():
  def answers(values):
    groups = [{'group': 'q1'}, {'group': 'q1'}, {'group': 'q2'}]
    return [g | {'value': v} for g, v in zip(groups, values, strict=True)]

  targets, said = answers([1, 0, 1]), answers([1, 1, 1])
  # P = 2/3 and R = 1 over all answers; one question of two wholly right.
  found = metrics.multirc_f1_over_all_answers(targets, said)
  assert found == {'f1': pytest.approx(80.0)}
  by_question = metrics.mean_group_metric(metrics.all_match)
  assert by_question(targets, said) == {'exact_match': 50.0}


def test_mean_group_metric_weights_groups_equally():
  targets = [{'id': i, 'x': 0} for i in (7, 7, 7, 8)]
  said = [{'x': x} for x in (0, 0, 1, 1)]
  mean = metrics.mean_group_metric(metrics.accuracy, 'id', 'x')
  found = mean(targets, said)
  assert found == {'accuracy': pytest.approx(100 * (2 / 3 + 0) / 2)}


def test_rank_classification():
  scores = np.array([[-4.0, -3.0], [-1.0, -np.inf], [-2.0, -9.0]])
  gold = np.array([1, 0, 1])
  rank = metrics.rank_classification_metric
  assert rank(scores, gold) == {'accuracy': pytest.approx(200 / 3)}
  # Means over tokens: -4/4 beats -3/1, -2/1 loses to -9/9.
  lengths = np.array([[4, 1], [1, 1], [1, 9]])
  found = rank(scores, gold, lengths)
  assert found == {'accuracy': pytest.approx(200 / 3)}
  assert rank(scores, np.array([0, 0, 1]), lengths) == {'accuracy': 100.0}
  assert rank(scores, gold, lengths, beta=0.0) == rank(scores, gold)


@pytest.mark.parametrize(
  'scores, gold, lengths, message',
  [
    (np.zeros((2, 2)), np.array([0]), None, r'\(2, 2\) and \(1,\)'),
    (np.zeros((0, 2)), np.zeros(0, int), None, 'at least 1'),
    (np.full((1, 2), np.nan), np.array([0]), None, 'nan'),
    (np.zeros((1, 2)), np.array([2]), None, 'indices of 2 choices'),
    (np.zeros((1, 2)), np.array([0]), np.array([[1, 0]]), 'at least 1'),
  ],
)
def test_rank_classification_refuses(scores, gold, lengths, message):
  with pytest.raises(ValueError, match=message):
    metrics.rank_classification_metric(scores, gold, lengths)


SEQIO_METRICS = {
  'accuracy': metrics.accuracy,
  'exact_match': metrics.exact_match,
  'all_match': metrics.all_match,
  'f1': metrics.f1,
  'mean_multiclass_f1': metrics.mean_multiclass_f1(3),
  'matthews_corrcoef': metrics.matthews_corrcoef,
  'pearson_corrcoef': metrics.pearson_corrcoef,
  'spearman_corrcoef': metrics.spearman_corrcoef,
  'rouge': metrics.rouge,
  'bleu': metrics.bleu,
  'squad': metrics.squad,
  'multirc': metrics.multirc_f1_over_all_answers,
  'mean_group_metric': metrics.mean_group_metric(metrics.accuracy),
}


@pytest.mark.parametrize('metric', SEQIO_METRICS.values(), ids=SEQIO_METRICS)
def test_every_metric_refuses_what_cannot_be_paired(metric):
  if metric is metrics.multirc_f1_over_all_answers:
    one = {'value': 1}
  else:
    one = 1
  with pytest.raises(ValueError, match='0 targets and 0 predictions'):
    metric([], [])
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metric([one, one], [one])


@pytest.mark.parametrize('metric', SEQIO_METRICS.values(), ids=SEQIO_METRICS)
def test_every_metric_has_the_signature_that_seqio_wants(metric):
  # seqio tells a prediction metric by its arguments without a default.
  parameters = inspect.signature(metric).parameters.values()
  required = [
    p.name for p in parameters if p.default is inspect.Parameter.empty
  ]
  assert required == ['targets', 'predictions']
