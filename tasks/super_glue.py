"""SuperGLUE as text to text: `super_glue_boolq`, `taskless_super_glue_boolq`.

`register(vocabulary)` makes the tasks in both forms. WSC is T5's: the model
names what the marked pronoun means, which can only be trained on rows whose
candidate is right. So `super_glue_wsc` is a mixture of `super_glue_wsc_train`
and `super_glue_wsc_eval`. Rows come from TFDS, which downloads them.

Source: Wang et al. 2019, arXiv 1905.00537; formats as in `preprocessors.py`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import seqio

from prompt_jax import metrics

from . import glue
from . import postprocessors
from . import preprocessors
from .glue import Spec

_BOOLEAN = ('False', 'True')
_ENTAILMENT = ('entailment', 'not_entailment')
_NLI_FIELDS = ('hypothesis', 'premise')
_ACCURACY = (metrics.accuracy,)


def record_squad(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
  """`squad` over ReCoRD's queries, each once.

  The rows repeat a query for each of its answers, and all of them hold all
  answers, so one says it all.
  """
  unique = {}
  for target, prediction in zip(targets, predictions, strict=True):
    unique.setdefault(target['group'], (target['value'], prediction['value']))
  golds, said = zip(*unique.values(), strict=True)
  return metrics.squad(golds, said)


SPECS = {
  'boolq': Spec('boolq', ('passage', 'question'), _BOOLEAN),
  'cb': Spec(
    'cb', _NLI_FIELDS, ('entailment', 'contradiction', 'neutral'),
    [metrics.mean_multiclass_f1(3), metrics.accuracy],
  ),
  'copa': Spec(
    'copa', ('choice1', 'choice2', 'premise', 'question'),
    ('choice1', 'choice2'),
  ),
  'multirc': Spec(
    'multirc', ('question', 'answer', 'paragraph'), _BOOLEAN,
    [metrics.multirc_f1_over_all_answers,
     metrics.mean_group_metric(metrics.all_match)],
  ),
  'record': Spec(
    'record', ('query', 'entities', 'passage'), (), [record_squad]
  ),
  'rte': Spec('rte', _NLI_FIELDS, _ENTAILMENT),
  'wic': Spec('wic', ('sentence1', 'sentence2', 'word'), _BOOLEAN),
  # Diagnostic sets in RTE's form, test rows without labels.
  'axb': Spec('rte', _NLI_FIELDS, _ENTAILMENT, (), splits=('test',)),
  'axg': Spec('rte', _NLI_FIELDS, _ENTAILMENT, (), splits=('test',)),
}  # fmt: skip

# Of every task with fixed labels: their texts, for rank classification.
LABELS = {
  f'{form}super_glue_{name}': spec.labels
  for name, spec in SPECS.items()
  for form in ('', 'taskless_')
  if spec.labels
}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers SuperGLUE with a vocabulary, in place of what was there.

  Returns:
    The names of the tasks and mixtures.
  """
  names = []
  for form in ('', 'taskless_'):
    for name, spec in SPECS.items():
      names.append(
        glue.add_task(
          f'{form}super_glue_{name}',
          f'super_glue/{name}:1.0.2',
          spec.splits,
          _texts(name, spec, '' if form else spec.prefix),
          _postprocessor(name, spec),
          spec.metric_fns,
          vocabulary,
        )
      )
    names += _register_wsc(form, vocabulary)
  return names


def _register_wsc(form: str, vocabulary: seqio.Vocabulary) -> list[str]:
  text = glue.mapped(preprocessors.wsc, name='' if form else 'wsc')
  parts = {
    'train': (['train'], [_right_referents, text], ()),
    'eval': (['validation', 'test'], [text], _ACCURACY),
  }
  names = [
    glue.add_task(
      f'{form}super_glue_wsc_{part}', 'super_glue/wsc.fixed:1.0.2', splits,
      texts, postprocessors.wsc, metric_fns, vocabulary,
    )
    for part, (splits, texts, metric_fns) in parts.items()
  ]  # fmt: skip
  return [*names, glue.add_mixture(f'{form}super_glue_wsc', names)]


def _right_referents(dataset: Any) -> Any:
  return dataset.filter(preprocessors.is_right_referent)


def _texts(name: str, spec: Spec, prefix: str) -> list[Callable[..., Any]]:
  if name == 'record':
    return [functools.partial(preprocessors.record, name=prefix)]
  if name == 'multirc':
    return [glue.mapped(preprocessors.multirc, name=prefix, labels=spec.labels)]
  text = glue.mapped(
    preprocessors.classification,
    name=prefix, fields=spec.fields, labels=spec.labels,
  )  # fmt: skip
  if name == 'axb':
    return [glue.mapped(preprocessors.rename_sentences), text]
  return [text]


def _postprocessor(name: str, spec: Spec) -> Callable[..., Any]:
  if name == 'record':
    return postprocessors.record
  if name == 'multirc':
    return postprocessors.MultiRCAnswer(spec.labels)
  return postprocessors.LabelId(spec.labels)
