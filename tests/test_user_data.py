import json
import logging

import pytest
import seqio

from prompt_jax import datasets
from prompt_jax import feature_converters as fc
from prompt_jax import user_data
from prompt_jax import vocabularies
from prompt_jax.user_data import UserDataError

VOCABULARY = vocabularies.bytes_vocabulary(0)
LENGTHS = {'inputs': 32, 'targets': 12}
LABELS = ('negative', 'positive')
GOOD = '{"text": "good", "label": 1}\n'


@pytest.fixture(autouse=True)
def clean_registry():
  yield
  seqio.TaskRegistry.remove('ud')
  user_data._registered.discard('ud')  # other tests have their own


def register(tmp_path, train=GOOD, suffix='.jsonl', evaluation=None, **kwargs):
  path = tmp_path / f'train{suffix}'
  path.write_bytes(train if isinstance(train, bytes) else train.encode())
  return user_data.register(
    'ud',
    **{
      'train_data': path,
      'eval_data': evaluation,
      'inputs': 'review: {text}',
      'targets': '{label}',
      'labels': LABELS,
      'vocabulary': VOCABULARY,
      **kwargs,
    },
  )


def texts(split='train', key='pretokenized', shuffle=False, **kwargs):
  task = seqio.TaskRegistry.get('ud')
  ds = task.get_dataset(LENGTHS, split=split, shuffle=shuffle, **kwargs)
  return [
    (row[f'inputs_{key}'].decode(), row[f'targets_{key}'].decode())
    for row in ds.as_numpy_iterator()
  ]


def message(tmp_path, *args, **kwargs):
  with pytest.raises(UserDataError) as caught:
    register(tmp_path, *args, **kwargs)
  return str(caught.value)


def test_jsonl_with_labels_by_number_and_by_text(tmp_path):
  rows = [
    {'text': 'good\u2028film', 'label': 1},
    {'text': 'bad', 'label': 'negative'},
    {'text': 7, 'label': '1'},
    {'text': 'no', 'label': False},
  ]
  train = '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
  made = register(tmp_path, '\ufeff' + train)
  assert texts() == [
    ('review: good\u2028film', 'positive'), ('review: bad', 'negative'),
    ('review: 7', 'positive'), ('review: no', 'negative'),
  ]  # fmt: skip
  assert made.num_rows == {'train': 4} and made.num_skipped == {'train': 0}
  assert made.label_texts == LABELS
  task = seqio.TaskRegistry.get('ud')
  [row] = task.get_dataset(LENGTHS, shuffle=False).take(1).as_numpy_iterator()
  assert row['targets'].tolist() == [*VOCABULARY.encode('positive'), 1]


def test_csv_and_tsv(tmp_path):
  dev = tmp_path / 'dev.tsv'
  dev.write_text('label\ttext\n0\tsay "no, \r\n')
  train = 'text,label\r\n"a ""b"",\nc",1\r\nd,negative\r\n'
  register(tmp_path, train, '.csv', evaluation=dev)
  assert texts() == [
    ('review: a "b",\nc', 'positive'), ('review: d', 'negative')
  ]  # fmt: skip
  assert texts('validation') == [('review: say "no, ', 'negative')]


def test_templates(tmp_path):
  made = register(
    tmp_path,
    '{"the text": "a {b}", "label": 1}',
    inputs='<soft:0> {the text} {{x}} {the text}',
    targets='It was {label}.',
  )
  assert texts() == [('<soft:0> a {b} {x} a {b}', 'It was positive.')]
  assert made.label_texts == ('It was negative.', 'It was positive.')


def test_free_text_targets(tmp_path):
  register(tmp_path, '{"text": "a", "label": 2.5}', labels=None)
  assert texts() == [('review: a', '2.5')]
  [metric] = seqio.TaskRegistry.get('ud').metric_fns
  assert metric(['a', 'b'], ['a', 'c']) == {'exact_match': 50.0}


def test_metric_and_postprocessor(tmp_path):
  register(tmp_path)
  task = seqio.TaskRegistry.get('ud')
  [metric] = task.metric_fns
  said = task.postprocess_fn(' positive ', example={}, is_target=False)
  assert metric(['positive', 'negative'], [said, 'x']) == {'accuracy': 50.0}


def test_each_epoch_is_a_permutation(tmp_path):
  rows = ''.join(json.dumps({'text': i, 'label': 0}) + '\n' for i in range(30))
  register(tmp_path, rows)
  passes = {'num_epochs': 2, 'seed': 5, 'try_in_mem_cache': False}
  order = [text for text, _ in texts(shuffle=True, **passes)]
  assert sorted(order[:30]) == sorted(order[30:]) == sorted(set(order))
  assert order[:30] != order[30:]
  assert order == [text for text, _ in texts(shuffle=True, **passes)]
  assert order != [
    text for text, _ in texts(shuffle=True, **passes | {'seed': 6})
  ]


def test_batches_with_a_task_id(tmp_path):
  register(tmp_path, task_id=3)
  config = datasets.DatasetConfig('ud', LENGTHS, batch_size=2)
  batch = next(datasets.TrainIterator(config, fc.EncDecFeatureConverter()))
  assert batch['task_ids'].tolist() == [3, 3]


def test_registering_again_replaces_only_ones_own(tmp_path):
  register(tmp_path)
  register(tmp_path, inputs='{text}')
  assert texts() == [('good', 'positive')]
  user_data._registered.discard('ud')
  assert 'is the name of a task that exists' in message(tmp_path)


@pytest.mark.parametrize(
  ('train', 'expected'),
  [
    (GOOD + '{"text": "a", "label": 1', 'line 2: not JSON: Expecting'),
    (GOOD + '\n[1, 2]\n', 'line 3: expected an object such as'),
    ('{"txt": "a", "label": 1}', "line 1: no column 'text', which template "
     "'review: {text}' needs. Did you mean {txt}? The columns: txt, label"),
    ('{"text": null, "label": 1}', "column 'text' holds null"),
    ('{"text": ["a"], "label": 1}', 'column \'text\' holds ["a"]'),
    ('{"text": "a", "label": "positiv"}', "holds 'positiv', which is no label. "
     "Did you mean 'positive'? The labels: 0 = 'negative', 1 = 'positive'"),
    ('{"text": "a", "label": 2}', 'label number 2, but they are: 0 = '),
    ('{"text": "a", "label": "-1"}', 'label number -1'),
    ('{"text": "a", "label": 0.5}', "holds '0.5', which is no label"),
    ('', 'the file is empty'),
    (b'{"text": "a", "label": 1}\n{"text": "\xe9"}', 'line 2: not UTF-8 (byte '
     '0xe9)'),
  ],
)  # fmt: skip
def test_bad_json_rows(tmp_path, train, expected):
  said = message(tmp_path, train)
  assert expected in said and 'train.jsonl' in said


@pytest.mark.parametrize(
  ('train', 'expected'),
  [
    ('text,label\n"a\nb",1\nc,d,1\n', 'line 4: 3 columns, but the header has '
     '2: text, label. Text with a comma needs "quotes".'),
    ('text,label,text\n', "line 1: the header has 'text' twice"),
    ('text,,label\n', 'line 1: the header has a column without a name'),
    ('text,label\na,1\n"b,1\nc,1\n', 'line 3: unexpected end of data'),
    ('text,label\n', 'train.csv: no rows.'),
    ('text,label\na,3\n', 'line 2: column \'label\' holds label number 3'),
  ],
)  # fmt: skip
def test_bad_csv_rows(tmp_path, train, expected):
  said = message(tmp_path, train, '.csv')
  assert expected in said and 'train.csv' in said


def test_bad_files(tmp_path):
  assert "'.txt'; use one of .jsonl, .csv" in message(tmp_path, suffix='.txt')
  said = message(tmp_path, evaluation=tmp_path / 'trian.jsonl')
  assert 'no such file. Did you mean train.jsonl?' in said


@pytest.mark.parametrize(
  'template',
  ['{text', 'text}', '{}', '{text!r}', '{text:>9}', '{a.b}', '{a[0]}'],
)
def test_bad_templates(tmp_path, template):
  said = message(tmp_path, inputs=template)
  assert f'Template {template!r}' in said


def test_bad_labels(tmp_path):
  assert 'the one column that' in message(tmp_path, targets='{label} {text}')
  assert 'two or more' in message(tmp_path, labels=('a', 'a'))


def test_bad_rows_can_be_skipped(tmp_path, caplog):
  train = 'nonsense\n' + GOOD + '{"text": "a", "label": 9}\n'
  with caplog.at_level(logging.WARNING, logger='absl'):
    made = register(tmp_path, train, skip_bad_rows=True)
  assert made.num_skipped == {'train': 2} and made.num_rows == {'train': 1}
  assert texts() == [('review: good', 'positive')]
  assert 'skipped 2 bad rows of 3' in caplog.text
  said = message(tmp_path, 'nonsense\n', skip_bad_rows=True)
  assert 'no rows. The first of 1 bad rows' in said and 'line 1' in said


def test_labels_are_ranked_as_the_targets_say_them():
  data = user_data.UserData(
    train_data='x.jsonl', inputs='{text}', targets='It was {label}.',
    labels=('bad', 'good'),
  )  # fmt: skip
  assert data.label_texts == ('It was bad.', 'It was good.')
  words = user_data.UserData(
    train_data='x.jsonl', inputs='{text}', targets='{label: bad | good}'
  )
  assert words.label_texts == words.labels == ('bad', 'good')
