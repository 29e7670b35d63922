"""Metrics of generated text against values by hand."""

import pytest

from prompt_jax import metrics
from prompt_jax import text_metrics


def test_rouge_takes_the_best_reference():
  # Unigrams: 2 of 3 said, 2 of 2 meant: 2 P R / (P + R) = 0.8; bigrams 1 of 2
  # and 1 of 1: 2/3. The other reference has nothing.
  scores = text_metrics.rouge([['the cat', 'x y']], ['the cat sat'])
  assert scores == pytest.approx(
    {'rouge1': 80, 'rouge2': 200 / 3, 'rougeLsum': 80}
  )


def test_ter_counts_edits_by_words_of_the_references():
  # One word of four to change; then the second reference, as it is.
  assert text_metrics.ter([['a b c d']], ['a b c x']) == {'ter': 25.0}
  assert text_metrics.ter([['a b c d', 'a b c x']], ['a b c x']) == {'ter': 0.0}


def test_chrf_by_hand():
  assert text_metrics.chrf([['abc', 'xyz']], ['xyz']) == {'chrf': 100.0}
  # Orders that both texts are too short for do not count. Of 'ab' against
  # 'ac': characters 1 of 2 (F 0.5), pairs 0 of 1, words 0 of 1: the mean
  # precision and recall are 1/6, so F is, too.
  found = text_metrics.chrf([['ac']], ['ab'])
  assert found['chrf'] == pytest.approx(100 / 6)


def test_groups_count_once_with_all_their_references():
  seen = []

  def metric(references, predictions):
    seen.extend(zip(references, predictions, strict=True))
    return {'n': len(predictions)}

  targets = [
    {'group': 'a', 'value': ['1', '2']},
    {'group': 'b', 'value': ['4']},
    {'group': 'a', 'value': ['3', '1']},
  ]
  grouped = text_metrics.over_groups(metric)
  assert grouped(targets, ['x', 'y', 'z']) == {'n': 2}
  assert seen == [(['1', '2', '3'], 'x'), (['4'], 'y')]
  assert text_metrics.over_groups(metrics.bleu).__name__ == 'bleu'
  bleu = text_metrics.over_groups(metrics.bleu)
  said = ['the cat sat down', 'no', 'no']
  targets[0]['value'] = ['a dog', 'the cat sat down']
  targets[1]['value'] = ['no']
  # 1- and 2-grams all right, and the one 3- and 4-gram.
  assert bleu(targets, said)['bleu'] == pytest.approx(100)


@pytest.mark.parametrize(
  'metric', [text_metrics.rouge, text_metrics.chrf, text_metrics.ter]
)
def test_bad_lists(metric):
  with pytest.raises(ValueError, match='as many predictions as targets'):
    metric([['a']], [])
  with pytest.raises(ValueError, match="at least one reference .* got 'a'"):
    metric(['a'], ['a'])
  with pytest.raises(ValueError, match=r'got \[\]'):
    metric([[]], ['a'])
