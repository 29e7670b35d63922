"""Templates on tensors: the same texts as in Python, and what gives way."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_jax import feature_converters
from prompt_jax import vocabularies
from prompt_jax.templates import fitting
from prompt_jax.templates.language import CUT
from prompt_jax.templates.language import FIXED
from prompt_jax.templates.language import PLAIN
from prompt_jax.templates.language import Template
from prompt_jax.templates.language import TemplateError
from prompt_jax.templates.rendering import Rendering

BYTES = vocabularies.bytes_vocabulary(0)  # a token a byte
WORDS = vocabularies.SoftTokenVocabulary(
  vocabularies.WordVocabulary('a b c d e was no yes .'.split(), extra_ids=2)
)


def texts(columns, inputs, targets='x', vocabulary=WORDS, lengths=None):
  ds = tf.data.Dataset.from_tensor_slices(columns)
  features = feature_converters.output_features(vocabulary)
  ds = Rendering(inputs, targets)(ds, features, lengths)
  return [
    (row['inputs'].decode(), row['targets'].decode())
    for row in ds.as_numpy_iterator()
  ]


COLUMNS = {
  'text': ['a b', '', 'c {d}'],
  'number': [3, -4, 0],
  'half': np.array([0.5, 2.0, -1.25]),
  'flag': [True, False, False],
  'label': [1, 0, 1],
  'said': ['yes', '0', 'no'],
}


@pytest.mark.parametrize(
  'template',
  [
    '{text} {number} {half} {flag}',
    '<soft:0>{text|cut}{{}}<soft:1> {number|keep} <mask>',
    '{label: no | yes} {said: no | yes} {flag: no | yes}',
    '{if text}<{text}>{else}nothing{end} {if number}n{end}{if flag}f{end}',
    '{if flag}{if text}1{else}2{end}<mask>{else}<mask>{text}{end}<mask>',
  ],
)
def test_as_in_python(template):
  rows = [
    {key: np.asarray(x)[i].item() for key, x in COLUMNS.items()}
    for i in range(3)
  ]
  masks = [' <extra_id_0> ', ' <extra_id_1> ']
  want = [Template(template).render(row, masks) for row in rows]
  assert [x for x, _ in texts(COLUMNS, template)] == want
  assert [y for _, y in texts(COLUMNS, 'x', template)] == want


def test_rows_keep_their_columns_and_rows_without_a_label():
  ds = tf.data.Dataset.from_tensor_slices({'label': [-1], 'idx': [7]})
  features = feature_converters.output_features(WORDS)
  [row] = Rendering('a', '{label: no | yes}')(ds, features).as_numpy_iterator()
  assert row['targets'] == b'<unk>' and row['idx'] == 7


def test_a_label_without_a_word():
  with pytest.raises(
    tf.errors.InvalidArgumentError,
    match='column label holds 2, but the choices are: 0 = no, 1 = yes',
  ):
    texts({'label': [2]}, 'a', '{label: no | yes}')
  with pytest.raises(tf.errors.InvalidArgumentError, match='holds maybe'):
    texts({'label': ['maybe']}, 'a', '{label: no | yes}')


def test_columns_are_checked_before_any_row():
  with pytest.raises(TemplateError, match='Did you mean {text}'):
    texts({'text': ['a']}, '{txt}')
  with pytest.raises(TemplateError, match='one text or number a row'):
    texts({'text': [['a', 'b']]}, '{text}')
  with pytest.raises(TemplateError, match="no column 'b'"):
    texts({'text': ['a']}, '{if b}{text}{end}')


def test_in_a_task():
  rows = {'text': ['a b', 'c'], 'label': [0, 1]}
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
      rows
    ),
    splits=['train'],
  )
  seqio.TaskRegistry.add(
    'templates_in_a_task',
    source=source,
    preprocessors=[
      Rendering('<soft:1> {text|cut} was <mask>', '{label: no | yes}'),
      seqio.preprocessors.tokenize,
      feature_converters.trim_and_append_eos,
    ],
    output_features=feature_converters.output_features(WORDS),
  )
  try:
    task = seqio.TaskRegistry.get('templates_in_a_task')
    lengths = {'inputs': 5, 'targets': 2}
    ds = task.get_dataset(lengths, shuffle=False)
    got = [
      (r['inputs'].tolist(), r['targets'].tolist())
      for r in ds.as_numpy_iterator()
    ]
  finally:
    seqio.TaskRegistry.remove('templates_in_a_task')
  # a, b, c, d, e are 3 to 7, was 8, no 9, yes 10, the sentinels 13 and 12.
  soft = vocabularies.SOFT_BASE + 1
  assert got == [([soft, 3, 8, 13, 1], [9, 1]), ([soft, 5, 8, 13, 1], [10, 1])]


# ---- what gives way --------------------------------------------------------


def fitted(parts, length, vocabulary=BYTES):
  feature = seqio.Feature(vocabulary, add_eos=True)
  text, rules = zip(*parts, strict=True)

  @tf.function
  def fit(text):
    return fitting.fitted(text, list(rules), feature, length, 'T')

  return fit(tf.constant(text)).numpy().decode()


def parts_of(text):
  """'cut:abc' and the like."""
  rules = {'fixed': FIXED, 'plain': PLAIN, 'cut': CUT}
  pairs = (part.split(':') for part in text.split())
  return [(x, rules[rule]) for rule, x in pairs]


@pytest.mark.parametrize(
  ('parts', 'room', 'expected'),
  [
    ('cut:abcdef fixed:XY', 8, 'abcdefXY'),
    ('cut:abcdef fixed:XY', 7, 'abcdeXY'),
    ('cut:abcdef fixed:XY', 3, 'aXY'),
    ('cut:abcdef fixed:XY', 2, 'XY'),
    # What may be cut gives way before what may also be.
    ('plain:abc fixed:X cut:def', 5, 'abcXd'),
    ('plain:abc fixed:X cut:def', 4, 'abcX'),
    ('plain:abc fixed:X cut:def', 2, 'aX'),
    ('plain:abc fixed:X', 2, 'aX'),
    # The longest gives way, down to the others' length, then all.
    ('cut:abcdef cut:gh fixed:X', 6, 'abcghX'),
    ('cut:abcdef cut:gh fixed:X', 5, 'abghX'),
    ('cut:abcdef cut:gh fixed:X', 4, 'agX'),
  ],
)
def test_what_gives_way(parts, room, expected):
  assert fitted(parts_of(parts), room + 1) == expected  # EOS takes one


def test_characters_are_not_broken():
  # Two bytes each: of five bytes that are free, two characters fit.
  assert fitted([('äöüß', CUT), ('!', FIXED)], 7) == 'äö!'


def test_words_of_the_template_that_are_too_long():
  with pytest.raises(
    tf.errors.InvalidArgumentError,
    match='the columns that it keeps take 3 tokens, but there is room for 2 '
    '.*The template: T The text begins: XYZ',
  ):
    fitted(parts_of('cut:abc fixed:XYZ'), 3)


def test_soft_tokens_and_blanks_are_one_token_each():
  columns = {'text': ['a b c d']}
  template = '<soft:0> {text} <soft:1> was <mask> .'
  for room, kept in ((9, 'a b c d'), (8, 'a b c'), (6, 'a'), (5, '')):
    [(got, _)] = texts(columns, template, lengths={'inputs': room + 1})
    assert len(WORDS.encode(got)) == room
    assert got.startswith('<soft:0> ' + kept) and got.endswith(' .')
    assert ' <soft:1> was  <extra_id_0> ' in got
  with pytest.raises(tf.errors.InvalidArgumentError, match='keeps take 5 '):
    texts(columns, template, lengths={'inputs': 5})


@pytest.mark.slow
def test_pieces_of_a_sentencepiece_model(shared):
  path = shared / 'data' / 't5_vocab' / 'spiece.model'
  vocabulary = vocabularies.sentencepiece(str(path))
  text = 'An unforgettable performance by everyone involved in the film. ' * 3
  end = ' It was <extra_id_0>.'
  columns = {'text': [text]}
  whole = len(vocabulary.encode(text + end))
  for room in (whole, whole - 1, 20, 12, 6):
    [(got, _)] = texts(
      columns, '{text|cut} It was <mask>.', vocabulary=vocabulary,
      lengths={'inputs': room + 1},
    )  # fmt: skip
    kept = got.removesuffix(' It was  <extra_id_0>.')
    assert kept != got and text.startswith(kept)
    size = len(vocabulary.encode(got))
    assert size <= room and size >= room - 2
    ids = vocabulary.encode(got)
    assert ids[-4:] == vocabulary.encode(end)
