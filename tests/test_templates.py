"""The template language: what is rendered, and what is said of mistakes."""

import textwrap

import pytest
import seqio

from prompt_jax import user_data
from prompt_jax import vocabularies
from prompt_jax.row_files import UserDataError
from prompt_jax.templates import masks
from prompt_jax.templates.language import CUT
from prompt_jax.templates.language import FIXED
from prompt_jax.templates.language import PLAIN
from prompt_jax.templates.language import Template


def message(function, *args, **kwargs):
  with pytest.raises(UserDataError) as caught:
    function(*args, **kwargs)
  return str(caught.value)


@pytest.mark.parametrize(
  ('template', 'row', 'expected'),
  [
    ('a {b} {c}', {'b': 'x', 'c': 2.5}, 'a x 2.5'),
    ('{{{b}}}', {'b': True}, '{True}'),
    ('{the text|cut}', {'the text': '{b} <mask>'}, '{b} <mask>'),
    ('{b|keep}{b | cut }', {'b': 'x'}, 'xx'),
    ('{l: no | yes}', {'l': 1}, 'yes'),
    ('{l: no | yes}', {'l': 'no'}, 'no'),
    ('{l: no | yes}', {'l': False}, 'no'),
    ('{l:no|no|yes}', {'l': '1'}, 'no'),
    ('<soft:0>{b}<soft:12>', {'b': 'x'}, '<soft:0>x<soft:12>'),
    ('<mask> {b} <mask>', {'b': 'x'}, '<extra_id_0> x <extra_id_1>'),
    ('a{if b} {b}{end}.', {'b': 'x'}, 'a x.'),
    ('a{if b} {b}{end}.', {'b': ' '}, 'a.'),
    ('a{if b} {b}{end}.', {'b': None}, 'a.'),
    ('a{if b} b{else} c{end}.', {'b': False}, 'a c.'),
    ('a{if b} {b}{end}.', {'b': 0}, 'a 0.'),
    ('{if b}{if c}1{else}2{end}{else}3{end}', {'b': 'x', 'c': ''}, '2'),
    ('{if b}<mask> 1{else}2 <mask>{end} <mask>', {'b': ''},
     '2 <extra_id_0> <extra_id_1>'),
    # Words of the language are columns where no condition is open.
    ('{end} {else}', {'end': 'x', 'else': 'y'}, 'x y'),
  ],
)  # fmt: skip
def test_rendering(template, row, expected):
  assert Template(template).render(row) == expected


def test_what_a_template_says_of_itself():
  made = Template('{b} {if c}{d|cut}{end}<soft:3><soft:0> is <mask> {b}')
  assert made.fields == ('b', 'c', 'd')
  assert made.num_masks == 1 and made.soft_tokens == (0, 3)
  assert made.kind == 'mixed' and made.needs_fitting
  assert Template('<soft:0> {b} <soft:1>').kind == 'soft'
  assert Template('{b} is').kind == 'hard'
  assert not Template('{b} is {l: a | b}').needs_fitting
  assert [c.choices for c in Template('{l: a | b}').choices] == [('a', 'b')]


def test_parts_and_their_rules():
  made = Template('<soft:0> {a|cut}, {b} {c|keep} <mask>{l: x | y}')
  row = {'a': 'A', 'b': 'B', 'c': 'C', 'l': 1}
  assert made.parts(row, ['M']) == [
    ('<soft:0> ', FIXED), ('A', CUT), (', ', FIXED), ('B', PLAIN),
    (' ', FIXED), ('C', FIXED), (' ', FIXED), ('M', FIXED), ('y', FIXED),
  ]  # fmt: skip


# ---- mistakes --------------------------------------------------------------


@pytest.mark.parametrize(
  ('template', 'place', 'expected'),
  [
    ('a {b', 2, 'the brace is not closed'),
    ('a b} c', 3, 'the brace is not opened'),
    ('a {b{c}', 2, 'the brace is not closed'),
    ('a {}', 2, 'only plain columns such as {text}'),
    ('a {b.c}', 2, 'only plain columns such as {text}'),
    ('a {b|ct} {c}', 2, "cut or keep, not 'ct'. Did you mean 'cut'?"),
    ('a {b: x}', 2, 'choices such as {label: bad | good}, not {b: x}'),
    ('a {b: x | }', 2, 'one of the choices is empty'),
    ('ab <soft:x>', 3, 'a soft token is <soft:k>'),
    ('ab <soft:1234567>', 3, 'a soft token is <soft:k>'),
    ('a {if b}c', 2, '{if ...} has no {end}'),
    ('{if b}{if c}{end}', 0, '{if ...} has no {end}'),
    ('{if b}1{else}2{else}3{end}', 14, 'a second {else}'),
    ('a {if b}<mask>{end}', 2, 'both parts of a condition must hold as many'),
  ],
)  # fmt: skip
def test_mistakes_have_a_caret_under_them(template, place, expected):
  said = message(Template, template)
  assert said.startswith(f'Template {template!r}: ') and expected in said
  assert said.endswith(f'\n  {template}\n  {" " * place}^')


def test_a_caret_in_the_second_line():
  assert message(Template, 'a {b}\nc {d').endswith('\n  c {d\n    ^')


def test_a_column_that_is_missing():
  row = {'premise': 'x', 'label': 0}
  said = message(Template('{label} {premisse}').render, row)
  assert said == (
    "no column 'premisse', which template '{label} {premisse}' needs. Did you "
    'mean {premise}? The columns: premise, label.\n'
    '  {label} {premisse}\n          ^'
  )
  assert "no column 'b'" in message(Template('{if b}a{end}').render, row)


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (2, 'holds label number 2, but they are: 0 = \'bad\', 1 = \'good\''),
    (-1, 'holds label number -1'),
    ('god', "holds 'god', which is no label. Did you mean 'good'"),
    (0.5, "holds '0.5', which is no label"),
  ],
)  # fmt: skip
def test_a_choice_that_is_none(value, expected):
  assert expected in message(Template('{l: bad | good}').render, {'l': value})


def test_what_cannot_be_shown():
  assert 'holds ["x"], expected text or a number' in message(
    Template('{b}').render, {'b': ['x']}
  )


# ---- blanks ----------------------------------------------------------------


def test_blanks_of_a_sentencepiece_model(shared):
  path = shared / 'data' / 't5_vocab' / 'spiece.model'
  vocabulary = vocabularies.sentencepiece(str(path))
  made = Template('It was<mask>, "<mask>".')
  found = masks.texts(vocabulary, made.num_masks)
  ids = vocabulary.encode(made.render({}, found))
  assert [i for i in ids if i > 32000] == [32099, 32098]
  assert ids == vocabulary.encode('It was <extra_id_0>, " <extra_id_1>".')


def test_blanks_of_words_and_of_bytes():
  vocabulary = vocabularies.WordVocabulary(['a', 'is', '.'], extra_ids=2)
  made = Template('a is<mask><mask>.')
  text = made.render({}, masks.texts(vocabulary, 2))
  assert vocabulary.encode(text) == [3, 4, 7, 6, 5]
  with pytest.raises(ValueError, match='it has 2 sentinels'):
    masks.texts(vocabulary, 3)
  with pytest.raises(ValueError, match='bytes are never read as one'):
    masks.texts(vocabularies.bytes_vocabulary(), 1)
  assert masks.texts(vocabularies.bytes_vocabulary(), 0) == []


# ---- one's own rows --------------------------------------------------------

WORDS = vocabularies.SoftTokenVocabulary(
  vocabularies.WordVocabulary('a b c d was bad good x'.split(), extra_ids=2)
)
FILE = textwrap.dedent("""\
  # How a film was.
  was: {text|cut} was <mask> ||| <mask> {label: bad | good}

  write: {label: bad | good} x ||| {text}
  """)


@pytest.fixture
def files(tmp_path):
  yield tmp_path
  seqio.TaskRegistry.remove('own')
  user_data._registered.discard('own')  # other tests have their own


def register(folder, rows='{"text": "a b c", "label": 1}', **kwargs):
  (folder / 'train.jsonl').write_text(rows)
  (folder / 'films.txt').write_text(FILE)
  data = user_data.UserData(str(folder / 'train.jsonl'), **kwargs)
  data.register('own', WORDS)
  return data


def rows_of(inputs=8, targets=8):
  task = seqio.TaskRegistry.get('own')
  lengths = {'inputs': inputs, 'targets': targets}
  ds = task.get_dataset(lengths, split='train', shuffle=False)
  return [
    tuple(WORDS.decode(row[k]) for k in lengths)
    for row in ds.as_numpy_iterator()
  ]


def test_a_file_of_templates_and_labels_of_their_own(files):
  data = register(files, inputs=f'@{files}/films.txt:was')
  assert data.labels == ('<extra_id_0> bad', '<extra_id_0> good')
  assert rows_of() == [('a b c was <extra_id_0>', '<extra_id_0> good')]
  # Five tokens with EOS: the text gives way, not the blank behind it.
  assert rows_of(inputs=5) == [('a b was <extra_id_0>', '<extra_id_0> good')]
  task = seqio.TaskRegistry.get('own')
  [metric] = task.metric_fns
  said = task.postprocess_fn('<extra_id_0> good', example={}, is_target=False)
  assert said == 'good' and metric(['good'], [said]) == {'accuracy': 100.0}
  data = register(files, inputs=f'@{files}/films.txt:write')
  assert data.labels is None and rows_of() == [('good x', 'a b c')]


def test_templates_beside_a_file(files):
  at = f'@{files}/films.txt'
  data = register(files, inputs='x {text}', targets=f'{at}:was')
  assert data.labels == ('<extra_id_0> bad', '<extra_id_0> good')
  assert rows_of() == [('x a b c', '<extra_id_0> good')]
  said = message(register, files, inputs=at)
  assert f'has 2 templates, so say which, as in {at}:was' in said
  said = message(register, files, inputs=f'{at}:waz')
  assert "films.txt: 'films' has no template 'waz'. Did you mean 'was'?" in said
  said = message(register, files, inputs=f'@{files}/film.txt:was')
  assert 'there is no such file. Did you mean films.txt?' in said
  said = message(
    register, files, inputs=f'{at}:was', labels=('positive', 'negative')
  )
  assert 'say what the labels are: give no labels beside it' in said


def test_rows_of_unequal_columns(files):
  rows = '{"text": "a b", "more": null}\n{"text": "c", "more": "d d"}'
  register(
    files, rows, inputs='{text|keep}{if more} x {more}{end} was', targets='a'
  )
  assert [x for x, _ in rows_of()] == ['a b was', 'c x d d was']
  assert [x for x, _ in rows_of(inputs=5)] == ['a b was', 'c x d was']
