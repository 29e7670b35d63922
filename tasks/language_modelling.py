"""Plain text as tasks: `c4_span_corruption`, `wikitext_prefix_lm`, `text_lm`.

Each corpus has T5's three objectives (`denoising.py`):

    _span_corruption   T5's pretraining
    _prefix_lm         LM adaptation of an encoder-decoder: continue a text
    _lm                the same of a decoder: all tokens, no inputs

C4 is TFDS's; WikiText, and any text as `text`, are local rows with the column
`text`. `TextFiles` makes a task of text files, by flags (runs/denoise.gin). A
new corpus is an entry of `CORPORA`.

Source: Raffel et al. 2020, arXiv 1910.10683, sections 2.2 and 3; LM adaptation,
Lester et al. 2021, arXiv 2104.08691, section 3.2.
"""

import dataclasses
from typing import Any

import seqio

from prompt_jax import deltas
from prompt_jax import user_data

from . import denoising
from . import prompt_formats
from . import sources
from .sources import DataSet

OBJECTIVES = {
  'span_corruption': denoising.span_corruption,
  'prefix_lm': denoising.prefix_lm,
  'lm': denoising.full_lm,
}
# Name -> what a DataSet says of it.
CORPORA: dict[str, dict[str, Any]] = {
  'c4': {'tfds': 'c4/en:3.1.0', 'splits': ('train', 'validation')},
  'wikitext': {
    'tfds': None,
    'folders': ('wikitext', 'wikitext103', 'wikitext2'),
  },
  'text': {'tfds': None},
}


def _documents(row: Any) -> Any:
  return {'targets': row['text']}


def _data_set(objective: str, **corpus: Any) -> DataSet:
  return DataSet(
    columns={'text': str},
    texts=[sources.mapped(_documents)],
    tokens=[OBJECTIVES[objective]],
    add_eos=objective != 'lm',  # its documents have their own
    **corpus,
  )


def register(vocabulary: seqio.Vocabulary) -> list[str]:
  """Registers all corpora with all objectives; there is no taskless form."""
  names = []
  for corpus, fields in CORPORA.items():
    for objective in OBJECTIVES:
      data = _data_set(objective, **{'folders': (corpus,), **fields})
      names.append(sources.add(f'{corpus}_{objective}', data, vocabulary))
  return names


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Files of text as a task, in place of `user_data.UserData`.

  A text file holds documents, apart by empty lines, or, where it has none, one
  a line; a JSONL file has a document in the column `text` of each row.

  Attributes:
    train_data: file of split `train`, or None.
    eval_data: file of split `validation`, or None.
    objective: one of `OBJECTIVES`.
  """

  train_data: str | None = None
  eval_data: str | None = None
  objective: str = 'span_corruption'
  # Text has no labels to rank.
  labels = None

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(
        f'The objective must be one of {", ".join(OBJECTIVES)}, got '
        f'{self.objective!r}.'
        f'{deltas.near_misses(str(self.objective), OBJECTIVES)}'
      )

  @property
  def given(self) -> bool:
    """Whether there are any files."""
    return bool(self.train_data or self.eval_data)

  def register(
    self, name: str, vocabulary: seqio.Vocabulary
  ) -> user_data.UserTask:
    """Registers the files as the task `name`.

    Raises:
      UserDataError: a file is not there, or a row has no text.
    """
    files = {'train': self.train_data, 'validation': self.eval_data}
    rows = {
      split: [{'text': text} for text in prompt_formats.read_documents(path)]
      for split, path in files.items()
      if path is not None
    }
    data = _data_set(self.objective, tfds=None, splits=tuple(rows))
    sources.add(name, data, vocabulary)
    sources.use_rows(name, rows)
    # As a user's own task: the next one of that name takes its place.
    user_data._registered.add(name)
    sizes = {split: len(some) for split, some in rows.items()}
    return user_data.UserTask(name, sizes, dict.fromkeys(sizes, 0), ())
