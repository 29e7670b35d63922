"""Data to text, and summaries: `e2e_nlg`, `web_nlg`, `dart`, `xsum`, ...

    e2e_nlg meaning_representation: name[Blue Spice], ...   -> Blue Spice is ...
    web_nlg input: Aarhus | leaderName | Jacob_Bundsgaard   -> The leader of ...
    dart tripleset: Mars Hill College JOINED 1973 && ...    -> A school from ...
    summarize: In a series of ...                           -> The police ...

Summaries have T5's form, which tells the task and not the set. Data-to-text
rows are GEM's: E2E is the cleaned set, WebNLG that of 2020 (release 3), and a
row of training has one text; local rows may be the original sets, a row all
texts of its data (`refs`). Triples are joined by ' && '. Metrics: BLEU, chrF++,
TER and ROUGE over all references of the same data; ROUGE of summaries. A new
set is an entry.

Source: E2E, Novikova et al. 2017, arXiv 1706.09254; WebNLG, Gardent et al.
2017, aclanthology P17-1017; DART, Nan et al. 2021, arXiv 2007.02871; GEM,
Gehrmann et al. 2021, arXiv 2102.01672; XSum, Narayan et al. 2018, arXiv
1808.08745; CNN/Daily Mail, Hermann et al. 2015, arXiv 1506.03340.
"""

from collections.abc import Callable, Iterable
from typing import Any

import seqio

from prompt_jax import metrics
from prompt_jax import text_metrics

from . import postprocessors
from . import preprocessors
from . import sources
from .sources import DataSet

_DATA_METRICS = [
  text_metrics.over_groups(fn)
  for fn in (
    metrics.bleu, text_metrics.chrf, text_metrics.ter, text_metrics.rouge
  )
]  # fmt: skip


def _data_to_text(
  tfds: str, field: str, kind: Any, local: Callable[[Any], Any], **more: Any
) -> Callable[[str], DataSet]:
  """An entry; `local` makes the field of a grouped row, one with `refs`."""

  def expand(row: sources.Row, split: str) -> Iterable[sources.Row]:
    if 'refs' not in row:
      # A list of references for training, as in GEM, may be empty.
      yield {**row, 'references': row.get('references') or [row['target']]}
      return
    # In training each text is an example; elsewhere the data is one.
    texts = row['refs'] if split == 'train' else row['refs'][:1]
    for text in texts:
      yield {field: local(row), 'target': text, 'references': row['refs']}

  def data_set(name: str) -> DataSet:
    return DataSet(
      tfds,
      {field: kind, 'target': str, 'references': [str]},
      [sources.mapped(preprocessors.data_to_text, name=name, field=field)],
      postprocessors.references,
      _DATA_METRICS,
      expand=expand,
      **more,
    )

  return data_set


def _summary(
  tfds: str, document: str, summary: str, **more: Any
) -> Callable[[str], DataSet]:
  """An entry, by the columns of the document and of its summary."""

  def data_set(name: str) -> DataSet:
    text = sources.mapped(
      preprocessors.summarization,
      name=name and 'summarize', document=document, summary=summary,
    )  # fmt: skip
    return DataSet(
      tfds,
      {document: str, summary: str},
      [text],
      metric_fns=[metrics.rouge],
      **more,
    )

  return data_set


DATA_SETS = {
  'e2e_nlg': _data_to_text(
    'gem/e2e_nlg:1.1.0', 'meaning_representation', str, lambda row: row['mr']
  ),
  'web_nlg': _data_to_text(
    'gem/web_nlg_en:1.1.0', 'input', [str],
    lambda row: [' | '.join(triple) for triple in row['triples']],
    folders=('web_nlg', 'webnlg'),
  ),
  'dart': _data_to_text(
    'gem/dart:1.1.0', 'tripleset', [str],
    lambda row: [' '.join(triple) for triple in row['tripleset']],
  ),
  'xsum': _summary(
    'xsum:1.1.0', 'document', 'summary', folders=('xsum', 'xsum_sample')
  ),
  'cnn_dailymail': _summary('cnn_dailymail:3.4.0', 'article', 'highlights'),
}  # fmt: skip


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers the sets in both forms; gives the tasks' names."""
  return sources.register(DATA_SETS, vocabulary)
