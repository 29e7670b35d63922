"""Docstrings: the corpus, its vocabulary and its tasks.

No docstring of an installed library is read, but those of files made here.
"""

import dataclasses
import json
import textwrap

import numpy as np
from prompt_jax.tasks import docstring_corpus
from prompt_jax.tasks import docstring_queries
from prompt_jax.tasks import docstrings
from prompt_jax.tasks.docstring_corpus import ATTRIBUTES
import pytest
import seqio

from prompt_jax import datasets
from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.study import plan

VALUES = {v: a for a, values in ATTRIBUTES.items() for v in values}
# Of one library: every value of the other attributes.
SOURCE = '''
class {0}Thing:
  """Thing that holds the {1} of {0}."""

  def __init__(self, {1}):
    self.{1} = {1}

  @property
  def {1}(self):
    """The {1} in a thing of {0}."""
    return self._{1}

  def set(self, {1}, {0}):
    """Sets {1} within some {0}.

    More about it.
    """
    self.{1} = {1}
    {lines}

  def _hide(self):
    """Hides {1} away from {0}."""


def make_{1}():
  """Makes a new {1} without {0}. It is new."""
  def inner(thing):
    return thing
  {lines}
  yield inner
'''


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Files of every library; each says the same of its own words."""
  root = tmp_path_factory.mktemp('libraries')
  for library in ATTRIBUTES['library']:
    folder = root / library
    folder.mkdir()
    for i in range(40):
      word = f'{library}{"abcdefgh"[i % 8]}{"ijklm"[i // 8]}'
      lines = f'x = [{chr(10) * (i % 3) * 12}]'
      source = SOURCE.format(word, f'part{word}', lines=lines)
      (folder / f'{word}.py').write_text(source)
  return {name: [root / name] for name in ATTRIBUTES['library']}


@pytest.fixture(scope='module')
def records(folders):
  return docstring_corpus.extract(folders)


def forget():
  for function in (
    docstring_queries.corpus,
    docstrings._chosen,
    docstrings._pretrain,
  ):
    function.cache_clear()


@pytest.fixture(scope='module')
def vocabulary(records):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(docstring_corpus, 'records', lambda: records)
    patch.setattr(docstrings, '_PRETRAIN_SIZES', {'train': 3000})
    forget()
    yield docstrings.vocabulary()
    # Other tests see the tasks that they register themselves.
    docstrings.register(vocabularies.bytes_vocabulary())
  forget()


@pytest.fixture(scope='module')
def registered(vocabulary):
  return docstrings.register(vocabulary)


def text(vocabulary, row):
  return vocabulary.decode([i for i in row.tolist() if i])


# ---- the corpus -------------------------------------------------------------


def write(folder, source):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'a.py').write_text(textwrap.dedent(source))
  return [folder]


def test_attributes_are_those_of_the_code(tmp_path):
  found = docstring_corpus.extract(
    {
      'numpy': write(
        tmp_path / 'numpy',
        '''
        class Tree:
          """A tree of words; it grows."""

          def __init__(self, a, *, b=1):
            pass

          @property
          def leaves(self):
            """All leaves (or none)."""
            return []

          @staticmethod
          def _plant(seed):
            """Plants a seed, e.g. an acorn.

            More of it.
            """
            def inner():
              return 1

        async def cut(*trees, **kind):
          """Cuts some trees."""
          yield trees

        def short():
          """Too short."""
        ''',
      )
    }
  )
  said = [tuple(r[a] for a in ('words', *ATTRIBUTES)) for r in found]
  assert sorted(said) == [
    ('a tree of words', 'numpy', 'class', 'several', 'nothing', 'public',
     'brief', 'medium'),
    ('all leaves or none', 'numpy', 'property', 'none', 'value', 'public',
     'brief', 'small'),
    ('cuts some trees', 'numpy', 'function', 'several', 'value', 'public',
     'brief', 'small'),
    ('plants a seed e g an acorn', 'numpy', 'method', 'one', 'nothing',
     'private', 'detailed', 'small'),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('docstring', 'words'),
  [
    ('Add `x` to y. Then stop.', 'add x to y'),
    ('Add x\n  to y\n  \nMore', 'add x to y'),
    ('Returns i.e. gives x', 'returns i e gives x'),
    ('Of numpy.array in v2.', 'of numpy array in v'),
    ('a ' * 30, ' '.join('a' * 24)),
    ('', ''),
  ],
)
def test_summary(docstring, words):
  assert docstring_corpus.summary(docstring) == words


def test_summaries_are_there_once_and_of_one_library(tmp_path):
  source = 'def {}():\n  """{}"""\n'
  folders = {
    'python': write(tmp_path / 'p', source.format('f', 'Adds one number')),
    'jax': write(
      tmp_path / 'j',
      source.format('f', 'Adds one number.')
      + source.format('g', 'Adds two numbers.')
      + source.format('h', 'Adds two numbers!'),
    ),
  }
  write(tmp_path / 'j' / 'tests', source.format('t', 'Tests two numbers'))
  (tmp_path / 'j' / 'wrong.py').write_text('def f(:')
  found = docstring_corpus.extract(folders)
  assert [r['words'] for r in found] == ['adds two numbers']


def test_extracting_again_gives_the_same(folders, records):
  assert docstring_corpus.extract(folders) == records
  for attribute, values in ATTRIBUTES.items():
    assert {record[attribute] for record in records} == set(values)


def test_the_file_is_made_once(tmp_path, folders, records, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(docstring_corpus, '_folders', lambda: folders)
  path = docstring_corpus.path()
  assert docstring_corpus.records() == records
  assert [*path.parent.iterdir()] == [path]
  path.write_text(json.dumps(records[0]) + '\n')
  assert docstring_corpus.records() == records[:1]
  monkeypatch.setattr(docstring_corpus, 'versions', lambda: {'python': '9'})
  assert docstring_corpus.path() != path
  names = docstrings.task_files()
  assert str(docstring_corpus.path()) in names
  assert len(plan._data_fingerprint(tuple(names))) == 16


def test_an_empty_split_is_named(vocabulary, monkeypatch):
  corpus = docstring_queries.corpus()
  some = corpus.values[:, 0] != 3
  few = dataclasses.replace(
    corpus,
    texts=corpus.texts[some],
    values=corpus.values[some],
    splits=corpus.splits[some],
  )
  monkeypatch.setattr(docstring_queries, 'corpus', lambda: few)
  with pytest.raises(docstring_corpus.CorpusError, match='library sklearn'):
    docstring_queries.queries(np.random.default_rng(0), 'test', 100)


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(docstring_corpus._PACKAGES, 'x', {'no-such-one': 'x'})
  with pytest.raises(docstring_corpus.CorpusError, match='no-such-one'):
    docstring_corpus.versions()


# ---- the vocabulary ---------------------------------------------------------


def test_text_goes_round(vocabulary):
  line = 'is numpy : makes a new <extra_id_0> without <unk>'
  ids = vocabulary.encode(line)
  assert vocabulary.decode(ids) == line
  assert ids[6] == docstring_queries.corpus().size - 1
  assert vocabulary.vocab_size == docstring_queries.corpus().size
  assert vocabulary.vocab_size <= docstring_queries.SIZE
  assert docstring_queries.ids('is numpy :').tolist() == ids[:3]
  assert docstrings.vocabulary() == vocabulary


# ---- the tasks --------------------------------------------------------------


def test_only_the_own_vocabulary_has_the_tasks(registered, vocabulary):
  assert set(docstrings.LABELS) < set(registered)
  assert set(registered) <= set(seqio.TaskRegistry.names())
  assert docstrings.register(vocabularies.bytes_vocabulary()) == []
  assert not set(registered) & set(seqio.TaskRegistry.names())
  assert docstrings.register(vocabulary) == registered
  assert tasks.LABELS['docstrings_arguments_design_5'] == ('without', 'with')


def test_splits_share_no_summary(vocabulary):
  corpus = docstring_queries.corpus()
  assert len(np.unique(corpus.texts, axis=0)) == len(corpus.texts) > 1000
  share = np.bincount(corpus.splits) / len(corpus.splits)
  assert np.allclose(share, (0.7, 0.15, 0.15), atol=0.05)
  seen = {}
  for task in docstrings.SPECS:
    for split in docstring_queries.SPLITS:
      for row in docstrings._classification(task, '', split)['inputs']:
        assert seen.setdefault(text(vocabulary, row), split) == split
  pretraining = {
    text(vocabulary, row).split(' : ')[-1]
    for row in docstrings._pretrain('train')['inputs']
  }
  assert {seen.get(summary, 'train') for summary in pretraining} == {'train'}
  assert len(pretraining & set(seen)) > 100


@pytest.mark.parametrize('task', docstrings.SPECS)
def test_classes_are_balanced_and_right(task, vocabulary, records):
  spec = docstrings.SPECS[task]
  of = {r['words']: r[spec.attribute] for r in records}
  # A word that the vocabulary lacks hides what a summary is of.
  for split in docstring_queries.SPLITS:
    found = docstrings._classification(task, '', split)
    chosen, labels = docstrings._chosen(task, split)
    counts = np.bincount(labels, minlength=len(spec.labels))
    assert len(chosen) == len(np.unique(chosen)) > 30
    assert max(counts) - min(counts) <= 1
    for row, target in zip(found['inputs'], found['targets'], strict=True):
      summary = text(vocabulary, row)
      label = text(vocabulary, target)
      if '<unk>' not in summary:
        assert spec.labels[spec.classes[of[summary]]] == label


def test_designs_stand_before_the_same_summaries(vocabulary, registered):
  for task, spec in docstrings.SPECS.items():
    plain = docstrings._classification(task, '', 'test')
    for i, prompt in enumerate(spec.designs):
      name = f'docstrings_{task}_design_{i}'
      ds = datasets.find_task(name).get_dataset(
        {'inputs': 29, 'targets': 2}, 'test', shuffle=False,
        try_in_mem_cache=False,
      )  # fmt: skip
      rows = list(ds.as_numpy_iterator())
      assert len(rows) == len(plain['inputs'])
      for row, before in zip(rows, plain['inputs'], strict=True):
        expected = f'{prompt} {text(vocabulary, before)}'.strip()
        assert text(vocabulary, row['inputs']) == expected


def test_queries_are_answered_and_the_held_out_are_never_asked(vocabulary):
  corpus = docstring_queries.corpus()
  values = {
    text(vocabulary, row): dict(zip(ATTRIBUTES, v, strict=True))
    for row, v in zip(corpus.texts, corpus.values.tolist(), strict=True)
  }
  rng = np.random.default_rng(5)
  inputs, answers, asked = docstring_queries.queries(rng, 'train', 3000)
  seen = set()
  said = []
  for row, answer, (form_id, _) in zip(inputs, answers, asked, strict=True):
    prompt, _, summary = text(vocabulary, row).partition(' : ')
    words = prompt.split()
    form = {1: 'attr', 2: 'is', 3: 'or'}[len(words)]
    attribute = {'attr': words[0]}.get(form) or VALUES[words[-1]]
    seen.add((form, attribute))
    assert docstring_queries.FORMS.index(form) == form_id
    expected = ATTRIBUTES[attribute][values[summary][attribute]]
    if form == 'is':
      said.append(expected == words[1])
      expected = 'yes' if expected == words[1] else 'no'
    elif form == 'or':
      assert expected in words and VALUES[words[0]] == attribute
      assert words[0] != words[2]
    assert vocabulary.decode([int(answer)]) == expected
  everything = {(f, a) for f in docstring_queries.FORMS for a in ATTRIBUTES}
  assert seen == everything - set(docstring_queries.NEVER_ASKED)
  assert 0.4 < np.mean(said) < 0.6


def test_spans_can_be_put_back(vocabulary):
  texts = docstring_queries.corpus().texts[:300]
  rng = np.random.default_rng(5)
  inputs, targets = docstring_queries.corrupted(rng, texts)
  for row, target, before in zip(inputs, targets, texts, strict=True):
    first, one, second, two = text(vocabulary, target).split()
    assert (first, second) == ('<extra_id_0>', '<extra_id_1>')
    whole = text(vocabulary, row).replace(first, one).replace(second, two)
    assert whole == text(vocabulary, before)


def test_the_same_rows_again(vocabulary):
  before = [
    docstrings._pretrain('train'),
    docstrings._queries('test'),
    docstrings._classification('class', '', 'train'),
  ]
  forget()
  assert docstrings.vocabulary() == vocabulary
  after = [
    docstrings._pretrain('train'),
    docstrings._queries('test'),
    docstrings._classification('class', '', 'train'),
  ]
  for a, b in zip(before, after, strict=True):
    for name in a:
      assert a[name].dtype == np.int32
      assert (a[name] == b[name]).all()
