"""Metrics of generated text against several references; scale 0-100.

As `metrics.py`, but a target is a list of texts. Data-to-text sets repeat an
input for each of its references: `over_groups` brings them together, so that
each input counts once, against all of its texts.

METEOR, NIST, CIDEr and learned metrics are not here: no kept library has them
without a download.
"""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any

import numpy as np

Metrics = dict[str, float]
References = Sequence[Sequence[str]]


def rouge(targets: References, predictions: Sequence[str]) -> Metrics:
  """ROUGE-1, ROUGE-2 and ROUGE-Lsum, the best F-measure over the references.

  Source: Lin 2004, aclanthology W04-1013; package rouge-score.
  """
  _check(targets, predictions)
  from rouge_score import rouge_scorer

  keys = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = rouge_scorer.RougeScorer(keys)
  scores = [
    scorer.score_multi(list(texts), said)
    for texts, said in zip(targets, predictions, strict=True)
  ]
  return {
    key: 100.0 * float(np.mean([score[key].fmeasure for score in scores]))
    for key in keys
  }


def chrf(targets: References, predictions: Sequence[str]) -> Metrics:
  """Corpus chrF++, character 6-grams and word 2-grams.

  Source: Popovic 2017, aclanthology W17-4770; package sacrebleu.
  """
  _check(targets, predictions)
  from sacrebleu.metrics.chrf import CHRF

  score = CHRF(word_order=2).corpus_score(list(predictions), _streams(targets))
  return {'chrf': float(score.score)}


def ter(targets: References, predictions: Sequence[str]) -> Metrics:
  """Translation edit rate: edits a reference word, less is better.

  Source: Snover et al. 2006, aclanthology 2006.amta-papers.25; package
  sacrebleu.
  """
  _check(targets, predictions)
  from sacrebleu.metrics.ter import TER

  score = TER().corpus_score(list(predictions), _streams(targets))
  return {'ter': float(score.score)}


def over_groups(
  metric_fn: Callable[[Any, Any], Metrics],
) -> Callable[[Sequence[Any], Sequence[str]], Metrics]:
  """The metric with each group once: its first prediction, all its references.

  Targets are {'group': what the input says, 'value': list of references}.
  """

  @functools.wraps(metric_fn)
  def metric(targets: Sequence[Any], predictions: Sequence[str]) -> Metrics:
    _check([target['value'] for target in targets], predictions)
    references = collections.defaultdict(dict)  # in order, each once
    said = {}
    for target, prediction in zip(targets, predictions, strict=True):
      references[target['group']].update(dict.fromkeys(target['value']))
      said.setdefault(target['group'], prediction)
    return metric_fn([list(texts) for texts in references.values()],
                     list(said.values()))  # fmt: skip

  return metric


def _check(targets: Any, predictions: Any) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(
      'A metric needs as many predictions as targets and at least one; got '
      f'{len(targets)} targets and {len(predictions)} predictions.'
    )
  wrong = [t for t in targets if isinstance(t, str) or not len(t)]
  if wrong:
    raise ValueError(
      f'Expected a list of at least one reference an example, got {wrong[0]!r}.'
    )


def _streams(targets: References) -> Any:
  """The i-th references of all examples together, None where there is none."""
  most = max(map(len, targets))
  return [
    [texts[i] if i < len(texts) else None for texts in targets]
    for i in range(most)
  ]
