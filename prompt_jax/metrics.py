"""Metric functions for `seqio.Task(metric_fns=...)`, in T5's names and scale.

For: `metric(targets, predictions) -> {name: value}` over lists with one entry
per example, values in percent (0-100). Not for: turning text into labels or
numbers (a task's postprocessor does that), or losses.

An answer that is no label is wrong, never left out: T5's postprocessors turn it
into -1, which equals no target. `f1` and the correlations say what it costs
there. Empty lists, and lists of different lengths, are a ValueError.

Source: google-research/text-to-text-transfer-transformer
`t5/evaluation/metrics.py` and `qa_utils.py`; differences are stated where they
are.
"""

import collections
from collections.abc import Callable, Hashable, Sequence
import math
import re
import string
from typing import Any

from jaxtyping import Bool, Float, Int
import numpy as np

Metrics = dict[str, float]
MetricFn = Callable[[Sequence[Any], Sequence[Any]], Metrics]


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Metrics:
  """Percentage of predictions that equal their target."""
  return {'accuracy': _percent_equal(targets, predictions)}


def exact_match(targets: Sequence[Any], predictions: Sequence[Any]) -> Metrics:
  """Percentage of predictions equal to their target, text as it is.

  T5's `sequence_accuracy`; `squad` is the one that normalises text.
  """
  return {'exact_match': _percent_equal(targets, predictions)}


def all_match(targets: Sequence[Any], predictions: Sequence[Any]) -> Metrics:
  """100 if every prediction equals its target, else 0.

  For groups: MultiRC's exact match is `mean_group_metric(all_match, ...)`.
  """
  equal = _percent_equal(targets, predictions) == 100.0
  return {'exact_match': 100.0 * equal}


def f1(
  targets: Sequence[Any],
  predictions: Sequence[Any],
  positive_label: Any = 1,
  negative_label: Any = 0,
) -> Metrics:
  """Binary F1 of the positive label, 2 P R / (P + R); 0 if none is right.

  A prediction that is neither label counts as the one that its target is not
  (T5's `f1_score_with_invalid`): also where the target is negative, it costs.

  Raises:
    ValueError: a target is neither label.
  """
  _check_pairs(targets, predictions)
  labels = (negative_label, positive_label)
  strange = [target for target in targets if target not in labels]
  if strange:
    raise ValueError(
      f'Target {strange[0]!r} is neither the positive label '
      f'{positive_label!r} nor the negative label {negative_label!r}; bind '
      'both with functools.partial(f1, positive_label=..., negative_label=...).'
    )
  gold = np.array([target == positive_label for target in targets])
  said = np.array([prediction == positive_label for prediction in predictions])
  known = np.array([prediction in labels for prediction in predictions])
  return {'f1': 100.0 * _f1(gold, np.where(known, said, ~gold))}


def mean_multiclass_f1(labels: int | Sequence[Hashable]) -> MetricFn:
  """Metric `mean_{C}class_f1`: unweighted mean of the F1 of each label.

  Args:
    labels: the C labels, or C itself for the labels 0 ... C - 1.
  """
  names = list(range(labels)) if isinstance(labels, int) else list(labels)

  def mean_f1(targets: Sequence[Any], predictions: Sequence[Any]) -> Metrics:
    _check_pairs(targets, predictions)
    scores = [
      _f1(
        np.array([target == name for target in targets]),
        np.array([prediction == name for prediction in predictions]),
      )
      for name in names
    ]
    return {f'mean_{len(names)}class_f1': 100.0 * float(np.mean(scores))}

  return mean_f1


def matthews_corrcoef(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> Metrics:
  """Matthews correlation of labels (CoLA), -100 to 100.

  A prediction that is no label is a class of its own, as in T5.
  """
  _check_pairs(targets, predictions)
  from sklearn import metrics

  score = metrics.matthews_corrcoef(targets, predictions)
  return {'matthews_corrcoef': 100.0 * float(score)}


def pearson_corrcoef(
  targets: Sequence[float], predictions: Sequence[float | str]
) -> Metrics:
  """Pearson correlation (STS-B), -100 to 100.

  Text that is no finite number counts as -1, which is off STS-B's scale, as
  with T5's `string_to_float`. Where the correlation is undefined because
  targets or predictions are all equal, it is 0 (T5: nan).

  Raises:
    ValueError: fewer than two examples.
  """
  from scipy import stats

  score = _correlation(stats.pearsonr, targets, predictions)
  return {'pearson_corrcoef': score}


def spearman_corrcoef(
  targets: Sequence[float], predictions: Sequence[float | str]
) -> Metrics:
  """Spearman rank correlation (STS-B); text and ties as `pearson_corrcoef`.

  Raises:
    ValueError: fewer than two examples.
  """
  from scipy import stats

  score = _correlation(stats.spearmanr, targets, predictions)
  return {'spearman_corrcoef': score}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
  """ROUGE-1, ROUGE-2 and ROUGE-Lsum: mean F-measure, without stemming.

  Sentences of ROUGE-Lsum end at newlines, and at ' . ' as in T5: no sentence
  splitter is needed. T5 gives the median of random bootstrap means, which
  scatters around the mean that this gives.

  Source: Lin 2004, aclanthology W04-1013; package rouge-score.
  """
  _check_pairs(targets, predictions)
  from rouge_score import rouge_scorer

  keys = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = rouge_scorer.RougeScorer(keys)
  scores = [
    scorer.score(target.replace(' . ', ' .\n'), said.replace(' . ', ' .\n'))
    for target, said in zip(targets, predictions, strict=True)
  ]
  return {
    key: 100.0 * float(np.mean([score[key].fmeasure for score in scores]))
    for key in keys
  }


def bleu(
  targets: Sequence[str | Sequence[str]], predictions: Sequence[str]
) -> Metrics:
  """Corpus BLEU with sacrebleu's `intl` tokenizer and `exp` smoothing.

  Args:
    targets: a reference per example, or a list of references per example
      (their number may differ; T5 takes the transpose of this).
    predictions: one text per example.

  Source: Post 2018, arXiv 1804.08771; package sacrebleu.
  """
  _check_pairs(targets, predictions)
  import sacrebleu

  references = [[t] if isinstance(t, str) else list(t) for t in targets]
  most = max(len(texts) for texts in references)
  # sacrebleu wants the i-th references of all examples together.
  streams: Any = [
    [texts[i] if i < len(texts) else None for texts in references]
    for i in range(most)
  ]
  score = sacrebleu.corpus_bleu(
    list(predictions), streams, smooth_method='exp', tokenize='intl'
  )
  return {'bleu': float(score.score)}


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> Metrics:
  """Exact match and word F1 of SQuAD, the best over an example's answers.

  Both are taken after lower-casing and removing punctuation, articles and
  extra space.

  Args:
    targets: a list of accepted answers per example.
    predictions: one text per example.

  Raises:
    ValueError: an example has no answer, or is a text instead of a list.

  Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1, and the
  evaluation script of SQuAD 1.1.
  """
  _check_pairs(targets, predictions)
  matches, overlaps = [], []
  for answers, prediction in zip(targets, predictions, strict=True):
    if isinstance(answers, str) or not len(answers):
      raise ValueError(
        f'squad expects a list of at least one answer per example, got '
        f'{answers!r}.'
      )
    said = _normalize_answer(prediction)
    golds = [_normalize_answer(answer) for answer in answers]
    matches.append(said in golds)
    overlaps.append(max(_word_f1(gold, said) for gold in golds))
  return {
    'em': 100.0 * float(np.mean(matches)),
    'f1': 100.0 * float(np.mean(overlaps)),
  }


def multirc_f1_over_all_answers(
  targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]
) -> Metrics:
  """`f1` over the entries 'value' (0 or 1) of all answers of all questions."""
  return f1([t['value'] for t in targets], [p['value'] for p in predictions])


def mean_group_metric(
  metric_fn: MetricFn, group_key: str = 'group', value_key: str = 'value'
) -> MetricFn:
  """A metric that is the mean of `metric_fn` over groups of examples.

  Targets and predictions are dicts; examples whose targets agree in `group_key`
  form a group. The groups must be whole: over a random part of the examples
  the mean is another one.

  Args:
    metric_fn: metric of one group.
    group_key: entry of a target that names its group.
    value_key: entry of targets and predictions that `metric_fn` reads.
  """

  def mean_metric(
    targets: Sequence[Any], predictions: Sequence[Any]
  ) -> Metrics:
    _check_pairs(targets, predictions)
    groups = collections.defaultdict(lambda: ([], []))
    for target, prediction in zip(targets, predictions, strict=True):
      golds, said = groups[target[group_key]]
      golds.append(target[value_key])
      said.append(prediction[value_key])
    scores = [metric_fn(golds, said) for golds, said in groups.values()]
    return {
      key: float(np.mean([score[key] for score in scores])) for key in scores[0]
    }

  return mean_metric


def rank_classification_metric(
  scores: Float[np.ndarray, 'N C'],
  gold: Int[np.ndarray, ' N'],
  lengths: Int[np.ndarray, 'N C'] | None = None,
  beta: float = 1.0,
) -> Metrics:
  """Accuracy of the likeliest choice: argmax over c of score / length^beta.

  Args:
    scores: log-likelihood of each of an example's C choices; -inf where an
      example has fewer.
    gold: index of the right choice.
    lengths: tokens of each choice, EOS included; None: no normalisation, as
      T0 and T5X rank.
    beta: power of the length; 1 is the mean over tokens (T-Few).

  Raises:
    ValueError: shapes do not agree, or a score is nan.

  Source: Liu et al. 2022, arXiv 2205.05638, section 3.2 (length
  normalization); T5's `rank_classification`.
  """
  scores, gold = np.asarray(scores), np.asarray(gold)
  if scores.ndim != 2 or gold.shape != scores.shape[:1] or not scores.size:
    raise ValueError(
      'rank_classification_metric expects scores [N, C] and gold [N], N and C '
      f'at least 1; got {scores.shape} and {gold.shape}.'
    )
  if np.isnan(scores).any():
    raise ValueError('A score is nan: no choice can be ranked by it.')
  if gold.min() < 0 or gold.max() >= scores.shape[1]:
    raise ValueError(
      f'gold holds {gold.min()} to {gold.max()}, expected indices of '
      f'{scores.shape[1]} choices.'
    )
  if lengths is not None:
    lengths = np.asarray(lengths)
    if lengths.shape != scores.shape or lengths.min() < 1:
      raise ValueError(
        f'lengths must be at least 1 and of shape {scores.shape}; got shape '
        f'{lengths.shape}.'
      )
    scores = scores / lengths**beta
  return accuracy(gold.tolist(), scores.argmax(axis=-1).tolist())


def _check_pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(
      'A metric needs as many predictions as targets and at least one; got '
      f'{len(targets)} targets and {len(predictions)} predictions.'
    )


def _percent_equal(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
  _check_pairs(targets, predictions)
  pairs = zip(targets, predictions, strict=True)
  equal = [np.array_equal(target, said) for target, said in pairs]
  return 100.0 * float(np.mean(equal))


def _f1(gold: Bool[np.ndarray, ' N'], said: Bool[np.ndarray, ' N']) -> float:
  # 2 P R / (P + R) with P = right / said and R = right / gold.
  return 2.0 * float((gold & said).sum()) / max(gold.sum() + said.sum(), 1)


def _number(value: float | str) -> float:
  try:
    number = float(value)
  except ValueError:
    return -1.0
  return number if math.isfinite(number) else -1.0


def _correlation(
  correlate: Callable[[Any, Any], Any],
  targets: Sequence[float],
  predictions: Sequence[float | str],
) -> float:
  _check_pairs(targets, predictions)
  if len(targets) < 2:
    raise ValueError('A correlation needs at least two examples, got 1.')
  gold = np.array([float(target) for target in targets])
  said = np.array([_number(prediction) for prediction in predictions])
  if np.ptp(gold) == 0 or np.ptp(said) == 0:
    return 0.0
  return 100.0 * float(correlate(gold, said)[0])


def _normalize_answer(text: str) -> str:
  text = text.lower().translate(str.maketrans('', '', string.punctuation))
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _word_f1(gold: str, said: str) -> float:
  gold_words, said_words = gold.split(), said.split()
  common = collections.Counter(gold_words) & collections.Counter(said_words)
  return 2 * common.total() / max(len(gold_words) + len(said_words), 1)
