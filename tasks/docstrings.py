"""Tasks about docstrings of installed libraries (`docstring_corpus.py`).

    is class : base class for all estimators in scikit learn

Real English with natural labels, in the recipe of the pocket language:

    docstrings_pretrain    256,000 examples of span corruption and queries
    docstrings_queries     summaries that nothing was trained on, queries in the
                           forms that pretraining asks; its `token_accuracy` is
                           how well pretraining was learned, and its validation
                           split is that of `pretrain`, too
    docstrings_class       is it of a class? yes, no
    docstrings_arguments   does it take arguments? without, with
    docstrings_library     of python, scipy or matplotlib? first, second, third
    docstrings_numeric     is it of a library for numbers? yes, no
    docstrings_class_design_0    and so on: 'is class :' and the summary

Pretraining asks for attributes of the code below a docstring; it never asks
whether it 'is class' or 'is none', never for one 'or' another library, and
never answers 'with' or 'first'. Every value of an attribute is asked for as
often as every other. Of the texts themselves it reads what they say: 'with' is
a word like others.

A summary belongs to one split in all tasks, by a hash of its words, so that it
is the same with all versions of the libraries. Downstream training reads
summaries that pretraining has read; validation and test are new to both. The
classes are balanced; a split has fewer rows where there are too few of a class.

The vocabulary has the words of the questions and the most frequent ones of the
training split. Not for another vocabulary.
"""

import dataclasses
import functools

import numpy as np
import seqio

from prompt_jax import metrics
from prompt_jax import vocabularies

from . import arrays
from . import docstring_corpus
from . import docstring_queries
from . import postprocessors
from .docstring_corpus import ATTRIBUTES
from .docstring_queries import SPLITS
from .pocket_language import EOS
from .pocket_language import generator


@dataclasses.dataclass(frozen=True)
class Spec:
  """A classification.

  Attributes:
    attribute: that it is about.
    labels: the answers.
    classes: value of the attribute -> index of its label; others are left out.
    designs: hand-written prompts, put in front of the summary.
  """

  attribute: str
  labels: tuple[str, ...]
  classes: dict[str, int]
  designs: tuple[str, ...]


SPECS = {
  'class': Spec(
    'kind', ('no', 'yes'),
    {'function': 0, 'method': 0, 'property': 0, 'class': 1},
    ('is class :', 'kind :', 'class or function :', 'class or method :',
     'is kind class :', ''),
  ),
  'arguments': Spec(
    'arguments', ('without', 'with'), {'none': 0, 'one': 1, 'several': 1},
    ('arguments :', 'is none :', 'none or one :', 'none or several :',
     'without or with :', ''),
  ),
  'library': Spec(
    'library', ('first', 'second', 'third'),
    {'python': 0, 'scipy': 1, 'matplotlib': 2},
    ('library :', 'python or scipy :', 'scipy or matplotlib :', 'is python :',
     'first or second :', ''),
  ),
  'numeric': Spec(
    'library', ('no', 'yes'),
    {'python': 0, 'matplotlib': 0, 'nltk': 0, 'numpy': 1, 'scipy': 1,
     'sklearn': 1, 'jax': 1, 'tensorflow': 1},
    ('library :', 'is numpy :', 'is jax :', 'is tensorflow :', 'is python :',
     'numpy or python :'),
  ),
}  # fmt: skip

# Of every classification: the texts of its labels.
LABELS = {
  f'docstrings_{name}{end}': spec.labels
  for name, spec in SPECS.items()
  for end in ('', *(f'_design_{i}' for i in range(len(spec.designs))))
}

_SIZES = {'train': 4096, 'validation': 1024, 'test': 1024}
_PRETRAIN_SIZES = {'train': 256_000, 'validation': 2048}
_QUERIES_SIZES = {'validation': 2048, 'test': 2048}
_SPAN_SHARE = 0.4


def vocabulary() -> vocabularies.SoftTokenVocabulary:
  """The vocabulary of this machine's docstrings: 2040 ids and 8 sentinels."""
  return vocabularies.SoftTokenVocabulary(
    vocabularies.WordVocabulary(
      docstring_queries.corpus().words, extra_ids=docstring_queries.SENTINELS
    )
  )


def task_files() -> list[str]:
  """What decides the data, for `plan.Study.task_files`: code and contents."""
  names = (
    'arrays',
    'docstrings',
    'docstring_queries',
    'docstring_corpus',
    'pocket_language',
  )
  return [*(f'{name}.py' for name in names), str(docstring_corpus.path())]


def note() -> str:
  """What a study is to say of the data."""
  versions = docstring_corpus.versions()
  listed = ', '.join(f'{name} {v}' for name, v in versions.items())
  return (
    f'Docstrings of {listed}; models pretrained on queries about them. '
    'Other versions have other docstrings.'
  )


def register(given: seqio.Vocabulary) -> list[str]:
  """Registers the tasks; with another vocabulary, takes them away.

  Returns:
    Their names.
  """
  names = ['docstrings_pretrain', 'docstrings_queries', *LABELS]
  if not _is_own(given):
    for name in names:
      seqio.TaskRegistry.remove(name)
    return []
  pretrain, ask, *classify = names
  arrays.add(pretrain, given, _pretrain, _PRETRAIN_SIZES)
  arrays.add(
    ask, given, _queries, _QUERIES_SIZES, metric_fn=metrics.exact_match
  )
  for name in classify:
    _, task, *design = name.split('_')
    spec = SPECS[task]
    arrays.add(
      name,
      given,
      functools.partial(
        _classification, task, spec.designs[int(design[1])] if design else ''
      ),
      {split: len(_chosen(task, split)[0]) for split in SPLITS},
      postprocessors.LabelId(spec.labels),
      metrics.accuracy,
    )
  return names


def _is_own(given: seqio.Vocabulary) -> bool:
  """Whether it is `vocabulary()`; no docstring is read for others."""
  words = getattr(getattr(given, 'inner', None), 'words', ())
  start = words[: len(docstring_queries.QUESTION_WORDS)]
  return start == docstring_queries.QUESTION_WORDS and given == vocabulary()


@functools.lru_cache(maxsize=2)
def _pretrain(split: str) -> arrays.Rows:
  if split == 'validation':  # as of `queries`: what pretraining is judged by
    return _queries(split)
  rng, n = generator(0, 0), _PRETRAIN_SIZES[split]
  here = np.flatnonzero(
    docstring_queries.corpus().splits == SPLITS.index(split)
  )
  texts = docstring_queries.corpus().texts[
    here[rng.integers(len(here), size=n)]
  ]
  spans = docstring_queries.corrupted(rng, texts)
  inputs, answers, _ = docstring_queries.queries(rng, split, n)
  targets = np.zeros((n, docstring_queries.TARGETS_LENGTH), np.int32)
  targets[:, 0], targets[:, 1] = answers, EOS
  is_span = rng.random((n, 1)) < _SPAN_SHARE
  return {
    'inputs': np.where(is_span, spans[0], inputs),
    'targets': np.where(is_span, spans[1], targets),
  }


def _queries(split: str) -> arrays.Rows:
  rng = generator(0, 1, SPLITS.index(split))
  inputs, answers, _ = docstring_queries.queries(
    rng, split, _QUERIES_SIZES[split]
  )
  # Without EOS: token accuracy is then that of the answers.
  return {'inputs': inputs, 'targets': answers[:, None]}


def _classification(task: str, design: str, split: str) -> arrays.Rows:
  chosen, labels = _chosen(task, split)
  answers = docstring_queries.ids(' '.join(SPECS[task].labels))[labels]
  return {
    'inputs': docstring_queries.with_prompt(
      docstring_queries.corpus().texts[chosen], docstring_queries.ids(design)
    ),
    'targets': docstring_queries.columns(answers, EOS),
  }


@functools.lru_cache(maxsize=len(SPECS) * len(SPLITS))
def _chosen(task: str, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Summaries of a split with balanced classes, and the classes.

  The classes take turns, so that the first so many rows are balanced too.
  """
  spec, found = SPECS[task], docstring_queries.corpus()
  rng = generator(0, 2, list(SPECS).index(task), SPLITS.index(split))
  classes = np.array(
    [spec.classes.get(v, -1) for v in ATTRIBUTES[spec.attribute]]
  )
  label = classes[found.values[:, list(ATTRIBUTES).index(spec.attribute)]]
  label[found.splits != SPLITS.index(split)] = -1
  order = np.argsort(rng.random(len(label)))
  of = [order[label[order] == i] for i in range(len(spec.labels))]
  size = min(_SIZES[split], len(of) * min(map(len, of)))
  labels = np.arange(size) % len(of)
  return np.array([of[k][i // len(of)] for i, k in enumerate(labels)]), labels
