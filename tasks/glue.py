"""GLUE as text to text: `glue_sst2`, `taskless_glue_sst2`, and so on.

`register(vocabulary)` makes a task of each set in both forms, and the mixture
`glue_mnli_and_dev` (with its taskless form), which trains on MNLI and evaluates
on both of its validation sets. `glue_qqp_to_mrpc` trains on QQP and evaluates
on MRPC with QQP's words, `glue_mrpc_to_qqp` the other way round.


Source: Wang et al. 2019, arXiv 1804.07461; formats as in `preprocessors.py`.
Transfer: Lester et al. 2021, arXiv 2104.08691, section 4.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import seqio

from prompt_jax import metrics

from . import postprocessors
from . import preprocessors
from . import sources
from .sources import LABEL
from .sources import DataSet

_ENTAILMENT = ('entailment', 'not_entailment')
_NLI = ('entailment', 'neutral', 'contradiction')
_SENTENCES = ('sentence1', 'sentence2')
_NLI_FIELDS = ('hypothesis', 'premise')
_SPLITS = sources.SPLITS


@dataclasses.dataclass(frozen=True)
class Spec:
  """One set.

  Attributes:
    prefix: first word of the inputs.
    fields: columns of the inputs, in their order.
    labels: label i of the rows is labels[i]; () where there are no labels.
    metric_fns: official metrics.
    splits: what TFDS has.
  """

  prefix: str
  fields: tuple[str, ...]
  labels: tuple[str, ...]
  metric_fns: Sequence[Callable[..., Any]] = (metrics.accuracy,)
  splits: tuple[str, ...] = _SPLITS


SPECS = {
  'cola': Spec(
    'cola', ('sentence',), ('unacceptable', 'acceptable'),
    [metrics.matthews_corrcoef],
  ),
  'sst2': Spec('sst2', ('sentence',), ('negative', 'positive')),
  'mrpc': Spec(
    'mrpc', _SENTENCES, ('not_equivalent', 'equivalent'),
    [metrics.f1, metrics.accuracy],
  ),
  'qqp': Spec(
    'qqp', ('question1', 'question2'), ('not_duplicate', 'duplicate'),
    [metrics.f1, metrics.accuracy],
  ),
  'stsb': Spec(
    'stsb', _SENTENCES, (),
    [metrics.pearson_corrcoef, metrics.spearman_corrcoef],
  ),
  'mnli': Spec(
    'mnli', _NLI_FIELDS, _NLI,
    splits=('train', 'validation_matched', 'validation_mismatched',
            'test_matched', 'test_mismatched'),
  ),
  'mnli_matched': Spec('mnli', _NLI_FIELDS, _NLI, splits=_SPLITS[1:]),
  'mnli_mismatched': Spec('mnli', _NLI_FIELDS, _NLI, splits=_SPLITS[1:]),
  'qnli': Spec('qnli', ('question', 'sentence'), _ENTAILMENT),
  'rte': Spec('rte', _SENTENCES, _ENTAILMENT),
  'wnli': Spec('wnli', _SENTENCES, ('not_entailment', 'entailment')),
  # The diagnostic set: MNLI's form, test rows without labels.
  'ax': Spec('mnli', _NLI_FIELDS, _NLI, (), splits=('test',)),
}  # fmt: skip

# Of MNLI's folder what these two tasks read; they may have their own.
_ENDS = ('matched', 'mismatched')
_MNLI_FILES = {
  f'mnli_{end}': {s: f'{s}_{end}' for s in ('validation', 'test')}
  for end in _ENDS
}
# From the task that is trained on to the one that it is tried on.
TRANSFERS = (('qqp', 'mrpc'), ('mrpc', 'qqp'))
# Of every task with labels: their texts, for rank classification.
LABELS = {
  f'{form}glue_{name}': texts
  for form in ('', sources.TASKLESS)
  for name, texts in (
    *((name, spec.labels) for name, spec in SPECS.items()),
    *((f'{target}_from_{source}', SPECS[source].labels)
      for source, target in TRANSFERS),
  )
  if texts
}  # fmt: skip


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers GLUE with a vocabulary, in place of what was there.

  Returns:
    The names of the tasks and mixtures.
  """
  names = []
  for form in ('', sources.TASKLESS):
    for name, spec in SPECS.items():
      data = _data_set(name, spec, bool(form))
      names.append(sources.add(f'{form}glue_{name}', data, vocabulary))
    mnli = [f'{form}glue_mnli', *(f'{form}glue_mnli_{end}' for end in _ENDS)]
    names.append(sources.add_mixture(f'{form}glue_mnli_and_dev', mnli))
    for source, target in TRANSFERS:
      names += _register_transfer(form, source, target, vocabulary)
  return names


def _register_transfer(
  form: str, source: str, target: str, vocabulary: seqio.Vocabulary
) -> list[str]:
  """The target with the source's words, and the mixture of both."""
  # Both sets count the pairs that differ as 0.
  spec = dataclasses.replace(SPECS[target], labels=SPECS[source].labels)
  tried = f'{form}glue_{target}_from_{source}'
  data = dataclasses.replace(
    _data_set(target, spec, bool(form)),
    columns=columns(SPECS[target]),
    splits=('validation',),
    folders=(f'glue_{target}',),
    files={'validation': 'validation'},
  )
  sources.add(tried, data, vocabulary)
  mixture = f'{form}glue_{source}_to_{target}'
  return [tried, sources.add_mixture(mixture, [f'{form}glue_{source}', tried])]


def _data_set(name: str, spec: Spec, taskless: bool) -> DataSet:
  return DataSet(
    f'glue/{name}:2.0.0',
    columns(spec),
    [_text(spec, taskless)],
    _postprocessor(spec),
    spec.metric_fns,
    spec.labels,
    spec.splits,
    **_folders(name),
  )


def _folders(name: str) -> dict[str, Any]:
  if name not in _MNLI_FILES:
    return {'folders': (f'glue_{name}',)}
  return {
    'folders': (f'glue_{name}', 'glue_mnli'),
    'files_in': {'glue_mnli': _MNLI_FILES[name]},
  }


def columns(spec: Spec) -> dict[str, Any]:
  """Those of a set: its fields, its label, and the number of the row."""
  label = spec.labels or float
  return {**dict.fromkeys(spec.fields, str), LABEL: label, 'idx': int}


def _text(spec: Spec, taskless: bool) -> Callable[..., Any]:
  name = '' if taskless else spec.prefix
  if not spec.labels:
    return sources.mapped(preprocessors.stsb, name=name)
  return sources.mapped(
    preprocessors.classification,
    name=name, fields=spec.fields, labels=spec.labels,
  )  # fmt: skip


def _postprocessor(spec: Spec) -> Callable[..., Any]:
  if not spec.labels:
    return postprocessors.number
  return postprocessors.LabelId(spec.labels)
