"""Classification of single texts, in T5's form: `imdb`, `taskless_imdb`, ...

    imdb text: It finally hit me ...                    -> negative

A new set is an entry of `DATA_SETS`. AG News, IMDB and TREC are TFDS's; the
others are read from local rows (`sources.py`). Labels are the sets' own, spelt
out where TFDS abbreviates. Metric: accuracy.

Source: SST-5, Socher et al. 2013; SUBJ, Pang and Lee 2004; MR, Pang and Lee
2005; CR, Hu and Liu 2004; MPQA, Wiebe et al. 2005; TREC, Li and Roth 2002; AG
News and DBpedia, Zhang et al. 2015, arXiv 1509.01626; IMDB, Maas et al. 2011.
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

_POLARITY = ('negative', 'positive')
_DBPEDIA = (
  'Company', 'Educational Institution', 'Artist', 'Athlete', 'Office Holder',
  'Mean of Transportation', 'Building', 'Natural Place', 'Village', 'Animal',
  'Plant', 'Album', 'Film', 'Written Work',
)  # fmt: skip
_TREC_COARSE = {
  'DESC': 'description', 'ENTY': 'entity', 'ABBR': 'abbreviation',
  'HUM': 'human', 'NUM': 'number', 'LOC': 'location',
}  # fmt: skip
# TFDS leaves out the coarse class, so that `other` of three of them are one.
_TREC_FINE = {
  'manner': 'manner', 'cremat': 'creative work', 'animal': 'animal',
  'exp': 'expansion', 'ind': 'individual', 'gr': 'group', 'title': 'title',
  'def': 'definition', 'date': 'date', 'reason': 'reason', 'event': 'event',
  'state': 'state', 'desc': 'description', 'count': 'count', 'other': 'other',
  'letter': 'letter', 'religion': 'religion', 'food': 'food',
  'country': 'country', 'color': 'color', 'termeq': 'equivalent term',
  'city': 'city', 'body': 'body', 'dismed': 'disease or medicine',
  'mount': 'mountain', 'money': 'money', 'product': 'product',
  'period': 'period', 'substance': 'substance', 'sport': 'sport',
  'plant': 'plant', 'techmeth': 'technique', 'volsize': 'size',
  'instru': 'instrument', 'abb': 'abbreviation', 'speed': 'speed',
  'word': 'word', 'lang': 'language', 'perc': 'percent', 'code': 'code',
  'dist': 'distance', 'temp': 'temperature', 'symbol': 'symbol',
  'ord': 'order', 'veh': 'vehicle', 'weight': 'weight', 'currency': 'currency',
}  # fmt: skip


def _set(
  tfds: str | None,
  labels: tuple[str, ...],
  fields: tuple[str, ...] = ('text',),
  label: str = LABEL,
  **more: Any,
) -> Callable[[str], DataSet]:
  """An entry: `name` of the set, or '', to its DataSet."""

  def data_set(name: str) -> DataSet:
    text = sources.mapped(
      preprocessors.classification, name=name, fields=fields, labels=labels
    )
    rename = sources.mapped(preprocessors.renamed, names={label: LABEL})
    return DataSet(
      tfds,
      {**dict.fromkeys(fields, str), label: labels},
      [text] if label == LABEL else [rename, text],
      postprocessors.LabelId(labels),
      [metrics.accuracy],
      labels,
      **more,
    )

  return data_set


def _trec(row: sources.Row, split: str) -> list[sources.Row]:
  """TFDS's labels, also from the class as the set writes it, NUM:dist."""
  del split
  if 'fine_class' not in row:
    return [row]
  coarse, fine = row['fine_class'].split(':')
  labels = {
    'label-coarse': _TREC_COARSE[coarse],
    'label-fine': _TREC_FINE[fine],
  }
  return [{**row, **labels}]


_TREC = {
  'splits': ('train', 'test'),
  'folders': ('trec',),
  'expand': _trec,
}
DATA_SETS = {
  'ag_news': _set(
    'ag_news_subset:1.0.0', ('World', 'Sports', 'Business', 'Sci/Tech'),
    ('title', 'description'), splits=('train', 'test'),
  ),
  'dbpedia': _set(
    None, _DBPEDIA, ('title', 'content'), splits=('train', 'test'),
    folders=('dbpedia', 'dbpedia_14'),
  ),
  'trec': _set(
    'trec:1.0.0', tuple(_TREC_COARSE.values()), label='label-coarse', **_TREC
  ),
  'trec_fine': _set(
    'trec:1.0.0', tuple(_TREC_FINE.values()), label='label-fine', **_TREC
  ),
  'imdb': _set(
    'imdb_reviews/plain_text:1.0.0', _POLARITY, splits=('train', 'test')
  ),
  'sst5': _set(
    None,
    ('very negative', 'negative', 'neutral', 'positive', 'very positive'),
  ),
  'subj': _set(None, ('subjective', 'objective')),
  'mr': _set(None, _POLARITY),
  'cr': _set(None, _POLARITY),
  'mpqa': _set(None, _POLARITY),
}  # fmt: skip


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers the sets in both forms; gives the tasks' names."""
  return sources.register(DATA_SETS, vocabulary)
