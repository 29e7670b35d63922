"""Reading comprehension in T5's form: SQuAD, and the sets of MRQA 2019.

    question: Who ... ? context: The Panthers defense ...    -> Kawann Short

T5 puts no name in front, so `taskless_squad` is the same text. Six sets of MRQA
have splits train and validation, six others, out of their domain, only test.
`squad_to_mrqa` trains on SQuAD and has the six others to test on, each by
itself in `squad_to_<name>`; `mrqa_in_domain` and `mrqa_out_of_domain` are
mixtures of their six. A new set is an entry of `DATA_SETS`. Metrics: exact
match and F1.

Source: Rajpurkar et al. 2016, arXiv 1606.05250; Fisch et al. 2019, arXiv
1910.09753; the transfer of Lester et al. 2021, arXiv 2104.08691, section 4.
"""

from collections.abc import Callable, Iterable
from typing import Any

import seqio

from prompt_jax import metrics

from . import postprocessors
from . import preprocessors
from . import sources
from .sources import DataSet

IN_DOMAIN = (
  'squad', 'news_qa', 'trivia_qa', 'search_qa', 'hotpot_qa',
  'natural_questions',
)  # fmt: skip
OUT_OF_DOMAIN = (
  'bio_asq', 'drop', 'duo_rc', 'race', 'relation_extraction', 'textbook_qa',
)  # fmt: skip


def _set(
  tfds: str | None,
  columns: dict[str, Any],
  answers: Callable[[Any], Any],
  splits: tuple[str, ...] = ('train', 'validation'),
  **more: Any,
) -> Callable[[str], DataSet]:
  """An entry; `answers` takes them from a row."""
  text = sources.mapped(preprocessors.question_answering, answers=answers)
  data = DataSet(
    tfds,
    {'question': str, 'context': str, **columns},
    [text],
    postprocessors.question_answering,
    [metrics.squad],
    splits=splits,
    **more,
  )
  return lambda name: data


def _mrqa(name: str, *splits: str) -> Callable[[str], DataSet]:
  return _set(
    f'mrqa/{name}:1.0.0',
    {'answers': [str]},
    lambda row: row['answers'],
    splits,
  )


def _questions(row: sources.Row, split: str) -> Iterable[sources.Row]:
  """One row a question of a context's `qas`; whole rows as they are."""
  del split
  for one in row.get('qas', [row]):
    answers = one.get('answers') or [one['answer']]
    yield {**row, 'question': one['question'], 'answers': answers}


DATA_SETS = {
  'squad': _set(
    'squad/v1.1:3.0.0',
    {'answers': {'text': [str]}},
    lambda row: row['answers']['text'],
  ),
  **{f'mrqa_{n}': _mrqa(n, 'train', 'validation') for n in IN_DOMAIN},
  **{f'mrqa_{n}': _mrqa(n, 'test') for n in OUT_OF_DOMAIN},
  # Other sets out of SQuAD's domain, where MRQA's cannot be had.
  'qa_out_of_domain': _set(
    None, {'answers': [str]}, lambda row: row['answers'], ('test',),
    expand=_questions,
  ),
}  # fmt: skip


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers the sets in both forms, and the mixtures."""
  names = sources.register(DATA_SETS, vocabulary)
  for form in ('', sources.TASKLESS):
    squad = f'{form}squad'
    others = [f'{form}mrqa_{name}' for name in OUT_OF_DOMAIN]
    mixtures = {
      'mrqa_in_domain': [f'{form}mrqa_{name}' for name in IN_DOMAIN],
      'mrqa_out_of_domain': others,
      'squad_to_mrqa': [squad, *others],
      **{
        f'squad_to_{name}': [squad, other]
        for name, other in zip(OUT_OF_DOMAIN, others, strict=True)
      },
    }
    names += [
      sources.add_mixture(f'{form}{name}', parts)
      for name, parts in mixtures.items()
    ]
  return names
