import json

from prompt_jax.tasks import glue
from prompt_jax.tasks import postprocessors
from prompt_jax.tasks import preprocessors
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_jax import tasks
from prompt_jax import user_data
from prompt_jax import vocabularies

VOCABULARY = vocabularies.bytes_vocabulary(0)
LENGTHS = {'inputs': 64, 'targets': 16}


@pytest.fixture(scope='module', autouse=True)
def names():
  return tasks.register(VOCABULARY)


def text(function, row, **kwargs):
  """inputs and targets that a preprocessor makes of one row."""
  example = function({k: tf.constant(v) for k, v in row.items()}, **kwargs)
  return example['inputs'].numpy().decode(), example['targets'].numpy().decode()


def classify(name, **row):
  spec = glue.SPECS[name]
  return text(
    preprocessors.classification, {'idx': 0, **row},
    name=spec.prefix, fields=spec.fields, labels=spec.labels,
  )  # fmt: skip


# Inputs and targets of the paper's appendix D, long ones cut; fields are in the
# order of T5's code.
APPENDIX = [
  ('cola', {'sentence': 'John made Bill master of himself.', 'label': 1},
   'cola sentence: John made Bill master of himself.', 'acceptable'),
  ('rte', {'sentence1': "A smaller proportion of Yugoslavia's Italians were "
                        'settled in Slovenia.',
           'sentence2': 'Slovenia has 3,000 inhabitants.', 'label': 1},
   "rte sentence1: A smaller proportion of Yugoslavia's Italians were settled "
   'in Slovenia. sentence2: Slovenia has 3,000 inhabitants.',
   'not_entailment'),
  ('mnli', {'premise': 'yeah well losing is i mean',
            'hypothesis': 'The St. Louis Cardinals have always won.',
            'label': 2},
   'mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah '
   'well losing is i mean', 'contradiction'),
  ('mrpc', {'sentence1': 'We acted .', 'sentence2': 'Rather , the US acted .',
            'label': 1},
   'mrpc sentence1: We acted . sentence2: Rather , the US acted .',
   'equivalent'),
  ('qnli', {'question': 'Where did Jebe die?',
            'sentence': 'Jebe died on the road back to Samarkand.',
            'label': 0},
   'qnli question: Where did Jebe die? sentence: Jebe died on the road back '
   'to Samarkand.', 'entailment'),
  ('qqp', {'question1': 'What attributes would have made you highly desirable '
                        'in ancient Rome?',
           'question2': 'How I GET OPPERTINUTY TO JOIN IT COMPANY AS A '
                        'FRESHER?', 'label': 0},
   'qqp question1: What attributes would have made you highly desirable in '
   'ancient Rome? question2: How I GET OPPERTINUTY TO JOIN IT COMPANY AS A '
   'FRESHER?', 'not_duplicate'),
  ('sst2', {'sentence': "it confirms fincher 's status as a film maker",
            'label': 1},
   "sst2 sentence: it confirms fincher 's status as a film maker",
   'positive'),
  ('wnli', {'sentence1': 'A', 'sentence2': 'B', 'label': 1},
   'wnli sentence1: A sentence2: B', 'entailment'),
  ('mnli_matched', {'premise': 'P', 'hypothesis': 'H', 'label': 0},
   'mnli hypothesis: H premise: P', 'entailment'),
  ('mnli_mismatched', {'premise': 'P', 'hypothesis': 'H', 'label': 1},
   'mnli hypothesis: H premise: P', 'neutral'),
  ('ax', {'premise': 'P', 'hypothesis': 'H', 'label': -1},
   'mnli hypothesis: H premise: P', '<unk>'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'row', 'inputs', 'target'), APPENDIX)
def test_texts_are_those_of_t5(name, row, inputs, target):
  assert classify(name, **row) == (inputs, target)


def test_every_set_has_its_text_here():
  assert {name for name, *_ in APPENDIX} == set(glue.SPECS) - {'stsb'}


def test_stsb_is_that_of_t5():
  row = {
    'sentence1': 'Representatives for Puretunes could not immediately be '
    'reached for comment Wednesday.',
    'sentence2': 'Puretunes representatives could not be located Thursday to '
    'comment on the suit.',
    'label': 3.25,
    'idx': 0,
  }
  assert text(preprocessors.stsb, row, name='stsb') == (
    f'stsb sentence1: {row["sentence1"]} sentence2: {row["sentence2"]}', '3.2'
  )  # fmt: skip


def test_transfer_in_the_words_of_the_source():
  tried = seqio.TaskRegistry.get('glue_qqp_from_mrpc')
  assert list(tried.splits) == ['validation']
  with tfds.testing.mock_data(num_examples=4):
    ds = tried.get_dataset(
      LENGTHS, split='validation', shuffle=False, try_in_mem_cache=False
    )
    rows = list(ds.as_numpy_iterator())
  targets = {row['targets_pretokenized'].decode() for row in rows}
  assert targets <= {'not_equivalent', 'equivalent'}
  mixture = seqio.MixtureRegistry.get('glue_mrpc_to_qqp')
  assert {t.name for t in mixture.tasks} == {'glue_mrpc', 'glue_qqp_from_mrpc'}
  targets = [tried.postprocess_fn(t) for t in ('equivalent', 'not_equivalent')]
  said = [tried.postprocess_fn(t) for t in ('equivalent', 'duplicate')]
  scores = {}
  for metric in tried.metric_fns:
    scores |= metric(targets, said)
  # A word of QQP is none of the model's: it counts as the other label.
  assert scores == {'f1': pytest.approx(100 * 2 / 3), 'accuracy': 50.0}


@pytest.mark.parametrize(
  ('score', 'expected'),
  [(3.25, '3.2'), (2.8, '2.8'), (1.66, '1.6'), (5.0, '5.0'), (0.0, '0.0'),
   (-1.0, '<unk>')],
)  # fmt: skip
def test_stsb_rounds_to_fifths(score, expected):
  row = {'sentence1': 'A', 'sentence2': 'B', 'label': score, 'idx': 0}
  assert text(preprocessors.stsb, row, name='stsb') == (
    'stsb sentence1: A sentence2: B', expected
  )  # fmt: skip


def test_without_the_name_of_the_task():
  assert text(
    preprocessors.classification, {'sentence': 'a', 'label': 0, 'idx': 0},
    name='', fields=('sentence',), labels=('negative', 'positive'),
  ) == ('sentence: a', 'negative')  # fmt: skip


def test_names_and_labels(names):
  assert {'glue_sst2', 'taskless_glue_rte', 'glue_mnli_and_dev'} <= set(names)
  assert tasks.LABELS['glue_rte'] == ('entailment', 'not_entailment')
  assert 'glue_stsb' not in tasks.LABELS
  assert {name for name in tasks.LABELS if 'glue_' in name} <= set(names)


def test_specs_are_those_of_tfds():
  # Labels, columns: what TFDS's own definitions say.
  for config in tfds.builder_cls('glue').builder_configs.values():
    spec = glue.SPECS[config.name]
    assert list(spec.labels) == list(config.label_classes or [])
    assert set(spec.fields) == set(config.text_features)


def test_registering_again_changes_the_vocabulary():
  other = vocabularies.bytes_vocabulary(9)
  tasks.register(other)
  feature = seqio.TaskRegistry.get('glue_sst2').output_features['inputs']
  assert feature.vocabulary == other
  tasks.register(VOCABULARY)
  mixture = seqio.MixtureRegistry.get('glue_mnli_and_dev')
  assert mixture.output_features['inputs'].vocabulary == VOCABULARY


@pytest.mark.parametrize('name', list(glue.SPECS))
def test_every_task_reads_tfds(name):
  with tfds.testing.mock_data(num_examples=1):
    task = seqio.TaskRegistry.get(f'taskless_glue_{name}')
    split = task.splits[0]
    ds = task.get_dataset(
      LENGTHS, split=split, shuffle=False, try_in_mem_cache=False
    )
    [row] = ds.as_numpy_iterator()
  spec = glue.SPECS[name]
  assert row['inputs_pretokenized'].decode().startswith(f'{spec.fields[0]}: ')
  assert row['inputs'][-1] == 1 and len(row['inputs']) <= 64
  target = row['targets_pretokenized'].decode()
  if spec.labels:
    assert target in spec.labels
    assert task.postprocess_fn(target, example=row, is_target=True) == (
      spec.labels.index(target)
    )
  else:
    value = task.postprocess_fn(target, example=row, is_target=True)
    assert value == -1 or f'{value:.1f}' == target


def test_metrics_score_texts():
  task = seqio.TaskRegistry.get('glue_mrpc')

  def post(text):
    return task.postprocess_fn(text, example={}, is_target=False)

  targets = [post(t) for t in ('equivalent', 'not_equivalent', 'equivalent')]
  said = [post(t) for t in ('equivalent', 'nonsense', 'not_equivalent')]
  assert targets == [1, 0, 1] and said == [1, -1, 0]
  scores = {
    k: v for fn in task.metric_fns for k, v in fn(targets, said).items()
  }
  assert set(scores) == {'f1', 'accuracy'}
  assert scores['accuracy'] == pytest.approx(100 / 3)
  assert postprocessors.number('3.4') == 3.4
  assert postprocessors.number('many') == -1.0


def test_a_local_source(tmp_path):
  with pytest.raises(ValueError, match=r'its tasks.*glue_mnli_matched'):
    tasks.with_local_source('glue_mnli_and_dev', {})
  path = tmp_path / 'dev.csv'
  path.write_text('idx,sentence,label\n0,good,positive\n1,bad,0\n')
  made = tasks.with_local_source(
    'glue_sst2', {'validation': path}, new_name='local_sst2'
  )
  rows = list(
    made.get_dataset(LENGTHS, split='validation', shuffle=False)
    .as_numpy_iterator()
  )  # fmt: skip
  seqio.TaskRegistry.remove('local_sst2')
  assert [row['targets_pretokenized'] for row in rows] == [
    b'positive', b'negative'
  ]  # fmt: skip
  assert rows[0]['inputs_pretokenized'] == b'sst2 sentence: good'
  for label in ('2', 'maybe'):
    path.write_text(f'idx,sentence,label\n0,good,{label}\n')
    with pytest.raises(
      user_data.UserDataError, match=r'line 2: label.*negative'
    ):
      tasks.with_local_source('glue_sst2', {'validation': path})


@pytest.mark.parametrize('name', ['sst2', 'mnli', 'stsb', 'qqp'])
def test_real_rows_with_the_real_vocabulary(shared, name):
  vocabulary = vocabularies.sentencepiece(
    shared / 'data' / 't5_vocab' / 'spiece.model'
  )
  glue.register(vocabulary)
  path = shared / 'data' / f'glue_{name}' / 'validation.jsonl'
  task = tasks.with_local_source(
    f'glue_{name}', {'validation': path}, new_name='local_glue'
  )
  ds = task.get_dataset(
    {'inputs': 128, 'targets': 8}, split='validation', shuffle=False
  )
  rows = list(ds.take(50).as_numpy_iterator())
  seqio.TaskRegistry.remove('local_glue')
  glue.register(VOCABULARY)
  assert len(rows) == 50
  originals = [json.loads(line) for line in path.read_text().split('\n')[:50]]
  for row, original in zip(rows, originals, strict=True):
    target = row['targets_pretokenized'].decode()
    if name == 'stsb':
      assert float(target) == pytest.approx(original['label'], abs=0.101)
    else:
      assert target == tasks.LABELS[f'glue_{name}'][original['label']]
    assert vocabulary.decode(row['targets'].tolist()) == target
    assert 2 not in row['targets']
