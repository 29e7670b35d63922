"""Natural language inference beside GLUE: SNLI and ANLI, in MNLI's form.

    snli hypothesis: Two people leave a cave premise: ...    -> contradiction
    anli hypothesis: ... premise: ...                        -> entailment

Pairs without a label that annotators agree on are left out, as usual. A new set
is an entry of `DATA_SETS`. Metric: accuracy.

Source: Bowman et al. 2015, arXiv 1508.05326; Nie et al. 2020, arXiv 1910.14599.
"""

from collections.abc import Callable
from typing import Any

import seqio

from prompt_jax import metrics

from . import postprocessors
from . import preprocessors
from . import sources
from .sources import LABEL
from .sources import DataSet

LABELS = ('entailment', 'neutral', 'contradiction')
_FIELDS = ('hypothesis', 'premise')


def _set(
  prefix: str, tfds: str, premise: str = 'premise', **more: Any
) -> Callable[[str], DataSet]:
  """An entry; `premise` is the column of the premise."""

  def data_set(name: str) -> DataSet:
    return DataSet(
      tfds,
      {premise: str, 'hypothesis': str, LABEL: LABELS},
      [
        lambda dataset: dataset.filter(preprocessors.has_label),
        sources.mapped(preprocessors.renamed, names={premise: 'premise'}),
        sources.mapped(
          preprocessors.classification,
          name=name and prefix, fields=_FIELDS, labels=LABELS,
        ),
      ],
      postprocessors.LabelId(LABELS),
      [metrics.accuracy],
      LABELS,
      **more,
    )  # fmt: skip

  return data_set


def _anli(number: int) -> Callable[[str], DataSet]:
  files = {'train': 'train', 'validation': 'dev', 'test': 'test'}
  return _set(
    'anli', f'anli/r{number}:0.1.0', 'context', folders=('anli',),
    files={split: f'{stem}_r{number}' for split, stem in files.items()},
  )  # fmt: skip


DATA_SETS = {
  'snli': _set('snli', 'snli:1.1.0'),
  'anli_r1': _anli(1),
  'anli_r2': _anli(2),
  'anli_r3': _anli(3),
}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers the sets in both forms, and the mixture `anli` of all rounds."""
  names = sources.register(DATA_SETS, vocabulary)
  for form in ('', sources.TASKLESS):
    rounds = [f'{form}anli_r{i}' for i in (1, 2, 3)]
    names.append(sources.add_mixture(f'{form}anli', rounds))
  return names
