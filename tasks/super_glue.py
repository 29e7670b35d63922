"""SuperGLUE as text to text: `super_glue_boolq`, `taskless_super_glue_boolq`.

`register(vocabulary)` makes the tasks in both forms. WSC is T5's: the model
names what the marked pronoun means, which can only be trained on rows whose
candidate is right. So `super_glue_wsc` is a mixture of `super_glue_wsc_train`
and `super_glue_wsc_eval`. `super_glue_wsc_true_false` asks instead whether the
marked candidate is what it means, and trains on all rows.

Source: Wang et al. 2019, arXiv 1905.00537; formats as in `preprocessors.py`.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import seqio

from prompt_jax import metrics

from . import glue
from . import postprocessors
from . import preprocessors
from . import sources
from .glue import Spec
from .sources import LABEL
from .sources import DataSet

_BOOLEAN = ('False', 'True')
_ENTAILMENT = ('entailment', 'not_entailment')
_NLI_FIELDS = ('hypothesis', 'premise')
_ACCURACY = (metrics.accuracy,)
# Columns of the broad diagnostic set -> RTE's.
_AXB = {'sentence1': 'premise', 'sentence2': 'hypothesis'}


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


def multirc_exact_match(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
  """Percentage of questions with all their answers judged right."""
  by_question = metrics.mean_group_metric(metrics.all_match)
  return by_question(targets, predictions)


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
     multirc_exact_match],
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
  f'{form}super_glue_{name}': texts
  for form in ('', sources.TASKLESS)
  for name, texts in (
    *((name, spec.labels) for name, spec in SPECS.items()),
    ('wsc_true_false', _BOOLEAN),
  )
  if texts
}
_WSC = {
  'text': str, 'span1_text': str, 'span1_index': int, 'span2_text': str,
  'span2_index': int, LABEL: _BOOLEAN, 'idx': int,
}  # fmt: skip
_IDX = {
  'multirc': dict.fromkeys(('paragraph', 'question', 'answer'), int),
  'record': dict.fromkeys(('passage', 'query'), int),
}


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers SuperGLUE with a vocabulary, in place of what was there.

  Returns:
    The names of the tasks and mixtures.
  """
  names = []
  for form in ('', sources.TASKLESS):
    for name, spec in SPECS.items():
      data = DataSet(
        f'super_glue/{name}:1.0.2',
        _columns(name, spec),
        _texts(name, spec, '' if form else spec.prefix),
        _postprocessor(name, spec),
        spec.metric_fns,
        spec.labels,
        spec.splits,
        folders=_folders(name),
        expand={'multirc': _candidates, 'record': _queries}.get(name),
      )
      names.append(sources.add(f'{form}super_glue_{name}', data, vocabulary))
    names += _register_wsc(form, vocabulary)
  return names


def _register_wsc(form: str, vocabulary: seqio.Vocabulary) -> list[str]:
  name = '' if form else 'wsc'
  text = sources.mapped(preprocessors.wsc, name=name)
  named = DataSet(
    'super_glue/wsc.fixed:1.0.2', _WSC, [text], postprocessors.wsc,
    folders=_folders('wsc'), expand=_spans,
  )  # fmt: skip
  train = dataclasses.replace(
    named, texts=[_right_referents, text], splits=('train',),
    files={'train': 'train'},
  )  # fmt: skip
  splits = ('validation', 'test')
  tried = dataclasses.replace(
    named, metric_fns=_ACCURACY, splits=splits,
    files=dict(zip(splits, splits, strict=True)),
  )  # fmt: skip
  judged = dataclasses.replace(
    named,
    texts=[sources.mapped(preprocessors.wsc_true_false, name=name)],
    postprocess_fn=postprocessors.LabelId(_BOOLEAN), metric_fns=_ACCURACY,
    labels=_BOOLEAN,
  )  # fmt: skip
  wsc = f'{form}super_glue_wsc'
  parts = [
    sources.add(f'{wsc}_train', train, vocabulary),
    sources.add(f'{wsc}_eval', tried, vocabulary),
  ]
  return [
    *parts,
    sources.add_mixture(wsc, parts),
    sources.add(f'{wsc}_true_false', judged, vocabulary),
  ]


def _right_referents(dataset: Any) -> Any:
  return dataset.filter(preprocessors.is_right_referent)


def _folders(name: str) -> tuple[str, ...]:
  return (f'super_glue_{name}', f'superglue_{name}')


def _columns(name: str, spec: Spec) -> dict[str, Any]:
  if name == 'record':
    lists = {'entities': [str], 'answers': [str]}
    return {'query': str, 'passage': str, **lists, 'idx': _IDX[name]}
  columns = {**glue.columns(spec), 'idx': _IDX.get(name, int)}
  if name != 'axb':
    return columns
  old = {new: old for old, new in _AXB.items()}
  return {old.get(key, key): kind for key, kind in columns.items()}


def _candidates(row: sources.Row, split: str) -> Iterable[sources.Row]:
  """A row a candidate, where a file has a row a paragraph.

  Its candidates are in one list, or, as in SuperGLUE's own form, by question.
  """
  del split
  if 'questions' in row.get('passage', ()):
    for question in row['passage']['questions']:
      for answer in question['answers']:
        yield {
          'paragraph': row['passage']['text'],
          'question': question['question'],
          'answer': answer['text'],
          LABEL: answer['label'],
          'idx': {
            'paragraph': row['idx'],
            'question': question['idx'],
            'answer': answer['idx'],
          },
        }
    return
  if 'candidates' not in row:
    yield row
    return
  for one in row['candidates']:
    numbers = {k: one[f'{k}_idx'] for k in ('question', 'answer')}
    idx = {'paragraph': row['paragraph_idx'], **numbers}
    yield {**one, 'paragraph': row['paragraph'], 'idx': idx}


def _spans(row: sources.Row, split: str) -> Iterable[sources.Row]:
  """The row with what SuperGLUE's own form of WSC has in `target`."""
  del split
  yield {**row, **row.get('target', {})}


def _queries(row: sources.Row, split: str) -> Iterable[sources.Row]:
  """A row a query, where a file has SuperGLUE's own form: a row a passage."""
  del split
  if 'qas' not in row:
    yield row
    return
  text = row['passage']['text']
  spans = row['passage']['entities']
  # The ends of SuperGLUE's spans are their last characters.
  entities = sorted({text[span['start'] : span['end'] + 1] for span in spans})
  for query in row['qas']:
    answers = [answer['text'] for answer in query.get('answers', ())]
    yield {
      'passage': text,
      'entities': entities,
      'query': query['query'],
      'answers': sorted(set(answers)),
      'idx': {'passage': row['idx'], 'query': query['idx']},
    }


def _texts(name: str, spec: Spec, prefix: str) -> list[Callable[..., Any]]:
  if name == 'record':
    return [functools.partial(preprocessors.record, name=prefix)]
  if name == 'multirc':
    return [
      sources.mapped(preprocessors.multirc, name=prefix, labels=spec.labels)
    ]
  text = sources.mapped(
    preprocessors.classification,
    name=prefix, fields=spec.fields, labels=spec.labels,
  )  # fmt: skip
  if name == 'axb':
    return [sources.mapped(preprocessors.renamed, names=_AXB), text]
  return [text]


def _postprocessor(name: str, spec: Spec) -> Callable[..., Any]:
  if name == 'record':
    return postprocessors.record
  if name == 'multirc':
    return postprocessors.MultiRCAnswer(spec.labels)
  return postprocessors.LabelId(spec.labels)
