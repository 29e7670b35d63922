"""Texts, labels and metrics of the sets beside GLUE and SuperGLUE."""

import json

from prompt_jax.tasks import classification
from prompt_jax.tasks import generation
from prompt_jax.tasks import nli
from prompt_jax.tasks import question_answering
from prompt_jax.tasks import sources
import pytest
import seqio
import tensorflow_datasets as tfds

from prompt_jax import tasks
from prompt_jax import user_data
from prompt_jax import vocabularies

VOCABULARY = vocabularies.bytes_vocabulary()
LENGTHS = {'inputs': 64, 'targets': 64}
TABLES = {
  **classification.DATA_SETS,
  **nli.DATA_SETS,
  **question_answering.DATA_SETS,
  **generation.DATA_SETS,
}
IN_TFDS = [name for name, made in TABLES.items() if made(name).tfds]


@pytest.fixture(scope='module', autouse=True)
def names():
  return tasks.register(VOCABULARY)


def through(name, source, split='train'):
  """What the preprocessors of a task make of a source, before tokenizing."""
  ds = source.get_dataset(split, shuffle=False)
  for function in sources.data_set(name).texts:
    ds = function(ds)
  return list(ds.as_numpy_iterator())


def examples(name, rows, split='train'):
  return through(name, user_data.RowsDataSource({split: rows}), split)


def texts(name, *rows):
  found = examples(name, rows)
  return [(one['inputs'].decode(), one['targets'].decode()) for one in found]


@pytest.mark.parametrize(
  ('name', 'row', 'inputs', 'target'),
  [
    ('ag_news', {'title': 'T', 'description': 'D.', 'label': 3},
     'ag_news title: T description: D.', 'Sci/Tech'),
    ('dbpedia', {'title': 'T', 'content': 'C.', 'label': 5},
     'dbpedia title: T content: C.', 'Mean of Transportation'),
    ('trec', {'text': 'Who ?', 'label-coarse': 3}, 'trec text: Who ?', 'human'),
    ('trec_fine', {'text': 'How far ?', 'label-fine': 40},
     'trec_fine text: How far ?', 'distance'),
    ('imdb', {'text': 'Bad.', 'label': 0}, 'imdb text: Bad.', 'negative'),
    ('sst5', {'text': 'a', 'label': 4}, 'sst5 text: a', 'very positive'),
    ('subj', {'text': 'a', 'label': 1}, 'subj text: a', 'objective'),
    ('mr', {'text': 'a', 'label': 1}, 'mr text: a', 'positive'),
    ('cr', {'text': 'a', 'label': 0}, 'cr text: a', 'negative'),
    ('mpqa', {'text': 'a', 'label': 0}, 'mpqa text: a', 'negative'),
    ('snli', {'premise': 'P', 'hypothesis': 'H', 'label': 2},
     'snli hypothesis: H premise: P', 'contradiction'),
    ('anli_r2', {'context': 'P', 'hypothesis': 'H', 'label': 1},
     'anli hypothesis: H premise: P', 'neutral'),
    ('xsum', {'document': 'Long.', 'summary': 'S'}, 'summarize: Long.', 'S'),
    ('cnn_dailymail', {'article': 'Long.', 'highlights': 'S'},
     'summarize: Long.', 'S'),
    ('e2e_nlg', {'meaning_representation': 'name[A], food[B]', 'target': 'T',
                 'references': ['T']},
     'e2e_nlg meaning_representation: name[A], food[B]', 'T'),
    ('web_nlg', {'input': ['A | b | C', 'C | d | E'], 'target': 'T',
                 'references': ['T']},
     'web_nlg input: A | b | C && C | d | E', 'T'),
    ('dart', {'tripleset': ['A b C'], 'target': 'T', 'references': ['T']},
     'dart tripleset: A b C', 'T'),
  ],
)  # fmt: skip
def test_texts_with_and_without_the_name(name, row, inputs, target):
  assert texts(name, row) == [(inputs, target)]
  without = inputs.split(' ', 1)[1]
  assert texts(f'taskless_{name}', row) == [(without, target)]


def test_questions_have_t5s_form_and_spaces():
  row = {'question': "Who's it?", 'context': 'It is (now) Ann.',
         'answers': {'text': ['Ann.', 'A-n']}}  # fmt: skip
  # Appendix D of the paper, and the spaces of T5's code.
  expected = (
    "question: Who ' s it ? context: It is ( now ) Ann . ", 'Ann . '
  )  # fmt: skip
  assert texts('squad', row) == texts('taskless_squad', row) == [expected]
  row['answers'] = ['Ann.', 'A-n']
  assert texts('mrqa_race', row) == [expected]


def test_pairs_without_a_label_are_left_out():
  row = {'premise': 'P', 'hypothesis': 'H', 'label': -1}
  assert len(texts('snli', row, {**row, 'label': 0}, row)) == 1


@pytest.mark.parametrize('name', IN_TFDS)
def test_every_task_reads_tfds(name):
  # Ragged and nested columns, too: what TFDS's own definition says.
  with tfds.testing.mock_data(num_examples=2):
    task = seqio.TaskRegistry.get(f'taskless_{name}')
    found = through(name, task.source, task.splits[0])
  assert len(found) == 2 and all(one['inputs'] for one in found)
  labels = sources.data_set(name).labels
  assert not labels or found[0]['targets'].decode() in labels


@pytest.mark.parametrize('name', ['trec', 'anli_r1', 'squad', 'dart', 'xsum'])
def test_tokens_of_tfds(name):
  with tfds.testing.mock_data(num_examples=1):
    task = seqio.TaskRegistry.get(name)
    ds = task.get_dataset(LENGTHS, shuffle=False, try_in_mem_cache=False)
    [row] = ds.as_numpy_iterator()
  for feature in LENGTHS:
    text = row[f'{feature}_pretokenized'].decode()
    ids = [*VOCABULARY.encode(text)[:63], 1]
    assert row[feature].tolist() == ids


def test_labels_are_those_of_tfds():
  def names(builder, column='label'):
    return (
      tfds.builder(builder, data_dir='/nowhere').info.features[column].names
    )

  assert names('ag_news_subset') == list(tasks.LABELS['ag_news'])
  assert names('snli') == list(nli.LABELS)
  # Spelt out: by their first letters.
  assert [t[0] for t in nli.LABELS] == names('anli/r1')
  assert [t[:3] for t in tasks.LABELS['imdb']] == names('imdb_reviews')
  assert names('trec', 'label-coarse') == list(classification._TREC_COARSE)
  assert names('trec', 'label-fine') == list(classification._TREC_FINE)
  assert len(set(tasks.LABELS['trec_fine'])) == 47


def test_splits_are_those_of_tfds():
  for name in IN_TFDS:
    data = sources.data_set(name)
    cls = tfds.builder_cls(data.tfds.split(':')[0].split('/')[0])
    version = data.tfds.split(':')[1]
    config = (data.tfds.split(':')[0].split('/') + [''])[1]
    builder = tfds.builder(data.tfds.split(':')[0], data_dir='/nowhere')
    assert str(builder.version) == version and isinstance(builder, cls)
    urls = getattr(builder.builder_config, 'data_urls', {})
    if data.tfds.startswith('mrqa'):
      assert set(urls) == set(data.splits), config


def test_mixtures(names):
  def parts(name):
    return {t.name for t in seqio.MixtureRegistry.get(name).tasks}

  assert parts('anli') == {'anli_r1', 'anli_r2', 'anli_r3'}
  assert parts('squad_to_drop') == {'squad', 'mrqa_drop'}
  assert parts('taskless_squad_to_mrqa') >= {
    'taskless_squad', 'taskless_mrqa_bio_asq'
  }  # fmt: skip
  assert len(parts('mrqa_in_domain')) == len(parts('mrqa_out_of_domain')) == 6
  assert len(names) == len(set(names))


def test_question_answering_is_scored_against_all_answers():
  row = {'question': 'Q', 'context': 'C', 'answers': ['the Cat', 'A dog!']}
  [example] = examples('mrqa_drop', [row], 'test')
  task = seqio.TaskRegistry.get('mrqa_drop')
  target = task.postprocess_fn('the Cat', example=example, is_target=True)
  assert target == ['the Cat', 'A dog ! ']
  said = task.postprocess_fn('dog', example=example, is_target=False)
  [metric] = task.metric_fns
  assert metric([target, target], [said, 'cat nap']) == {
    'em': 50.0,
    'f1': pytest.approx((100 + 100 * 2 / 3) / 2),
  }


def test_data_to_text_counts_each_data_once_with_all_its_texts():
  one = {'input': ['A | b | C'], 'target': 'x y z w', 'references': ['x y z w']}
  two = {**one, 'target': 'p q r s', 'references': ['p q r s']}
  rows = examples('web_nlg', [one, two], 'test')
  task = seqio.TaskRegistry.get('web_nlg')
  targets = [
    task.postprocess_fn('', example=row, is_target=True) for row in rows
  ]
  assert targets[0] == {'group': 'A | b | C', 'value': ['x y z w'] * 2}
  scores = {}
  for metric in task.metric_fns:
    scores |= metric(targets, ['p q r s', 'never looked at'])
  assert scores == pytest.approx(
    {'bleu': 100, 'chrf': 100, 'ter': 0, 'rouge1': 100, 'rouge2': 100,
     'rougeLsum': 100}
  )  # fmt: skip


def test_a_set_that_tfds_lacks_says_what_it_needs():
  task = seqio.TaskRegistry.get('sst5')
  with pytest.raises(
    user_data.UserDataError,
    match=r"'sst5' is not in TFDS: give --rows_dir=DIR with "
    r'DIR/sst5/train.jsonl .*label: 0 = very negative, 1',
  ):
    task.get_dataset(LENGTHS, split='train', shuffle=False)


@pytest.mark.parametrize(
  ('name', 'split', 'count'),
  [
    ('ag_news', 'test', 7600), ('dbpedia', 'test', 1600), ('trec', 'test', 500),
    ('trec_fine', 'train', 5452), ('imdb', 'validation', 1000),
    ('sst5', 'validation', 1101), ('subj', 'test', 2000), ('mr', 'test', 2000),
    ('cr', 'test', 1000), ('mpqa', 'test', 2000), ('snli', 'validation', 1000),
    ('anli_r3', 'validation', 1198), ('squad', 'validation', 1190),
    ('qa_out_of_domain', 'test', 1381), ('e2e_nlg', 'train', 23737),
    ('web_nlg', 'test', 1862), ('dart', 'validation', 2768),
    ('xsum', 'test', 600),
  ],
)  # fmt: skip
def test_real_rows(shared, name, split, count):
  path = sources.local_files(f'taskless_{name}', shared / 'data')[split]
  rows = sources.read_rows(name, {split: path})
  assert len(rows[split]) == count
  found = examples(name, rows[split][:20], split)
  assert len(found) == 20
  labels = sources.data_set(name).labels
  if labels:
    made = [row['targets'].decode() for row in found]
    originals = [json.loads(line) for line in path.open()][:20]
    if name == 'trec':
      expected = [labels[row['label_coarse_tfds']] for row in originals]
    elif name == 'trec_fine':
      codes = list(classification._TREC_FINE)
      fine = [row['fine_class'].split(':')[1] for row in originals]
      expected = [labels[codes.index(code)] for code in fine]
    else:
      expected = [labels[row['label']] for row in originals]
    assert made == expected
