"""GLUE as text to text: `glue_sst2`, `taskless_glue_sst2`, and so on.

`register(vocabulary)` makes a task of each set in both forms, and the mixture
`glue_mnli_and_dev` (with its taskless form), which trains on MNLI and evaluates
on both of its validation sets. Rows come from TFDS, which downloads them.

Source: Wang et al. 2019, arXiv 1804.07461; formats as in `preprocessors.py`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, cast

import seqio

from prompt_jax import feature_converters
from prompt_jax import metrics

from . import postprocessors
from . import preprocessors

_ENTAILMENT = ('entailment', 'not_entailment')
_NLI = ('entailment', 'neutral', 'contradiction')
_SENTENCES = ('sentence1', 'sentence2')
_NLI_FIELDS = ('hypothesis', 'premise')
_SPLITS = ('train', 'validation', 'test')


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

# Of every task with labels: their texts, for rank classification.
LABELS = {
  f'{form}glue_{name}': spec.labels
  for name, spec in SPECS.items()
  for form in ('', 'taskless_')
  if spec.labels
}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers GLUE with a vocabulary, in place of what was there.

  Returns:
    The names of the tasks and mixtures.
  """
  names = []
  for form in ('', 'taskless_'):
    for name, spec in SPECS.items():
      names.append(
        add_task(
          f'{form}glue_{name}',
          f'glue/{name}:2.0.0',
          spec.splits,
          [_text(spec, taskless=bool(form))],
          _postprocessor(spec),
          spec.metric_fns,
          vocabulary,
        )
      )
    mnli = [f'{form}glue_mnli{end}' for end in ('', '_matched', '_mismatched')]
    names.append(add_mixture(f'{form}glue_mnli_and_dev', mnli))
  return names


def add_task(
  name: str,
  tfds_name: str,
  splits: Sequence[str],
  texts: Sequence[Callable[..., Any]],
  postprocess_fn: Callable[..., Any],
  metric_fns: Sequence[Callable[..., Any]],
  vocabulary: seqio.Vocabulary,
) -> str:
  """Registers one TFDS task in place of its namesake; gives its name.

  Args:
    name: of the task.
    tfds_name: data set, config and version.
    splits: named here so that asking for them needs no download.
    texts: dataset preprocessors, rows to `inputs` and `targets`.
    postprocess_fn: seqio's.
    metric_fns: seqio's.
    vocabulary: of inputs and targets.
  """
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=cast(
      Any, seqio.TfdsDataSource(tfds_name=tfds_name, splits=list(splits))
    ),
    preprocessors=[
      *texts,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      feature_converters.trim_and_append_eos,
    ],
    postprocess_fn=postprocess_fn,
    metric_fns=list(metric_fns),
    output_features=feature_converters.output_features(vocabulary),
  )
  return name


def add_mixture(name: str, tasks: Sequence[str]) -> str:
  """Registers a mixture of equal rates in place of its namesake."""
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add(name, list(tasks), default_rate=1.0)
  return name


def mapped(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
  """A dataset preprocessor from a function of one row."""

  def preprocessor(dataset: Any) -> Any:
    return dataset.map(
      lambda row: function(row, **kwargs), num_parallel_calls=-1
    )

  return preprocessor


def _text(spec: Spec, taskless: bool) -> Callable[..., Any]:
  name = '' if taskless else spec.prefix
  if not spec.labels:
    return mapped(preprocessors.stsb, name=name)
  return mapped(
    preprocessors.classification,
    name=name, fields=spec.fields, labels=spec.labels,
  )  # fmt: skip


def _postprocessor(spec: Spec) -> Callable[..., Any]:
  if not spec.labels:
    return postprocessors.number
  return postprocessors.LabelId(spec.labels)
