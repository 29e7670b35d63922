import json

from prompt_jax.tasks import glue
from prompt_jax.tasks import postprocessors
from prompt_jax.tasks import preprocessors
from prompt_jax.tasks import super_glue
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_jax import datasets
from prompt_jax import tasks
from prompt_jax import vocabularies

VOCABULARY = vocabularies.bytes_vocabulary(0)
LENGTHS = {'inputs': 64, 'targets': 16}


@pytest.fixture(scope='module', autouse=True)
def names():
  return super_glue.register(VOCABULARY)


def text(name, row):
  """inputs and targets of the registered preprocessors, for one row."""
  spec = super_glue.SPECS[name]
  ds = tf.data.Dataset.from_tensors({'idx': 0, **row})
  for function in super_glue._texts(name, spec, spec.prefix):
    ds = function(ds)
  return [
    (e['inputs'].decode(), e['targets'].decode())
    for e in ds.as_numpy_iterator()
  ]


# Inputs and targets of the paper's appendix D where it has them, long ones cut;
# else of T5's code, whose COPA has `choice2` where the appendix has `True`, and
# whose WiC has no part of speech.
APPENDIX = [
  ('boolq', {'question': 'is it', 'passage': 'P.', 'label': 1},
   'boolq passage: P. question: is it', 'True'),
  ('cb', {'premise': 'Valence the void-brain, Valence the virtuous valet.',
          'hypothesis': 'Valence was helping', 'label': 1},
   'cb hypothesis: Valence was helping premise: Valence the void-brain, '
   'Valence the virtuous valet.', 'contradiction'),
  ('copa', {'premise': 'Political violence broke out in the nation.',
            'choice1': 'Many citizens relocated to the capitol.',
            'choice2': 'Many citizens took refuge in other territories.',
            'question': 'effect', 'label': 1},
   'copa choice1: Many citizens relocated to the capitol. choice2: Many '
   'citizens took refuge in other territories. premise: Political violence '
   'broke out in the nation. question: effect', 'choice2'),
  ('multirc', {'question': 'Why was Joey surprised?', 'label': 1,
               'answer': 'There was only pie to eat', 'idx': {
                 'paragraph': 5, 'question': 1, 'answer': 3},
               'paragraph': '<b>Sent 1: </b>Once upon a time, there was a '
                            'squirrel named Joey.<br>'},
   'multirc question: Why was Joey surprised? answer: There was only pie to '
   'eat paragraph: Sent 1: Once upon a time, there was a squirrel named '
   'Joey. ', 'True'),
  ('record', {'query': 'Mr @placeholder won.', 'entities': ['Ann', 'Bob'],
              'passage': 'P.', 'answers': ['Ann'],
              'idx': {'passage': 1, 'query': 2}},
   'record query: Mr @placeholder won. entities: Ann, Bob passage: P.', 'Ann'),
  ('rte', {'premise': 'P', 'hypothesis': 'H', 'label': 0},
   'rte hypothesis: H premise: P', 'entailment'),
  ('wic', {'sentence1': 'It was the deliberation of his act that was '
                        'insulting .',
           'sentence2': 'The deliberations of the jury .',
           'word': 'deliberation', 'label': 0, 'start1': 1},
   'wic sentence1: It was the deliberation of his act that was insulting . '
   'sentence2: The deliberations of the jury . word: deliberation', 'False'),
  ('axb', {'sentence1': 'P', 'sentence2': 'H', 'label': -1},
   'rte hypothesis: H premise: P', '<unk>'),
  ('axg', {'premise': 'P', 'hypothesis': 'H', 'label': -1},
   'rte hypothesis: H premise: P', '<unk>'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'row', 'inputs', 'target'), APPENDIX)
def test_texts_are_those_of_t5(name, row, inputs, target):
  assert text(name, row) == [(inputs, target)]


def test_every_set_has_its_text_here():
  assert {name for name, *_ in APPENDIX} == set(super_glue.SPECS)


STABLE = {
  'text': 'The stable was very roomy, with four good stalls; a large swinging '
  'window opened into the yard , which made it pleasant and airy.',
  'span1_text': 'stable', 'span1_index': 1,
  'span2_text': 'it', 'span2_index': 20,
  'label': 1, 'idx': 0,
}  # fmt: skip


def test_wsc_is_that_of_t5():
  row = {key: tf.constant(value) for key, value in STABLE.items()}
  example = preprocessors.wsc(row, name='wsc')
  assert example['inputs'].numpy().decode() == (
    'wsc: The stable was very roomy, with four good stalls; a large swinging '
    'window opened into the yard , which made *it* pleasant and airy.'
  )
  assert example['targets'].numpy() == b'stable'


@pytest.mark.parametrize(
  ('changes', 'expected', 'target'),
  [
    ({}, 'The * stable * was very roomy, with four good stalls; a large '
     'swinging window opened into the yard , which made # it # pleasant and '
     'airy.', 'True'),
    # T5's own example, the pronoun first.
    ({'text': 'This is a test sentence .', 'span1_text': 'test',
      'span1_index': 3, 'span2_text': 'This', 'span2_index': 0, 'label': 0},
     '# This # is a * test * sentence .', 'False'),
    # Several words; punctuation sticks to the span; capitals do not matter.
    ({'text': 'I told the tall man, his dog bit.', 'span1_index': 2,
      'span1_text': 'The tall man', 'span2_text': 'his', 'span2_index': 5},
     'I told * the tall man *, # his # dog bit.', 'True'),
    # An index that is one too small, and a candidate that is not there.
    ({'text': 'Ann saw him', 'span1_text': 'Bob', 'span1_index': 0,
      'span2_text': 'him', 'span2_index': 1, 'label': -1},
     'Ann saw # him #', '<unk>'),
  ],
)  # fmt: skip
def test_wsc_as_true_or_false(changes, expected, target):
  row = {k: tf.constant(v) for k, v in {**STABLE, **changes}.items()}
  example = preprocessors.wsc_true_false(row, name='wsc')
  assert example['inputs'].numpy().decode() == f'wsc text: {expected}'
  assert example['targets'].numpy().decode() == target
  taskless = preprocessors.wsc_true_false(row, name='')
  assert taskless['inputs'].numpy().decode() == f'text: {expected}'


def test_multirc_loses_its_markup():
  row = {
    'paragraph': '<b>Sent 1: </b>Once.<br><b>Sent 2: </b>Twice.',
    'question': 'Why?',
    'answer': 'Pie',
    'label': 1,
    'idx': {'paragraph': 5, 'question': 1, 'answer': 3},
  }
  assert text('multirc', row) == [
    ('multirc question: Why? answer: Pie paragraph: Sent 1: Once. '
     'Sent 2: Twice.', 'True')
  ]  # fmt: skip


def test_record_has_an_example_per_answer():
  row = {
    'query': 'It was @placeholder.',
    'entities': ['A', 'B', 'C'],
    'passage': 'The passage\n@highlight\nAnother.\n@highlight\nThird.',
    'answers': ['A', 'C'],
    'idx': {'passage': 1, 'query': 2},
  }
  inputs = (
    'record query: It was @placeholder. entities: A, B, C passage: '
    'The passage. Another. Third.'
  )
  assert text('record', row) == [(inputs, 'A'), (inputs, 'C')]
  row['answers'] = tf.constant([], tf.string)
  assert text('record', row) == [(inputs, '<unk>')]


@pytest.mark.parametrize(
  ('words', 'index', 'pronoun', 'expected'),
  [
    ('Mitchell asked Tom if he could lend some.', 4, 'he',
     'Mitchell asked Tom if *he* could lend some.'),
    # T5's two special rows, and what T5 could not do: the last word.
    ('"Good for him," he said.', 2, 'him', '"Good for *him* ," he said.'),
    ('they might want to use it , but', 4, 'it',
     'they might want to use *it* , but'),
    ('Tom saw her', 2, 'her', 'Tom saw *her*'),
  ],
)  # fmt: skip
def test_wsc_marks_the_pronoun(words, index, pronoun, expected):
  row = {'text': words, 'span1_text': 'Tom', 'span2_text': pronoun,
         'span2_index': index, 'label': 1, 'idx': 0}  # fmt: skip
  row = {key: tf.constant(value) for key, value in row.items()}
  example = preprocessors.wsc(row, name='wsc')
  assert example['inputs'].numpy().decode() == f'wsc: {expected}'
  assert example['targets'].numpy() == b'Tom'
  taskless = preprocessors.wsc(row, name='')
  assert taskless['inputs'].numpy().decode() == expected
  row['span2_text'] = tf.constant('nobody')
  with pytest.raises(
    tf.errors.InvalidArgumentError, match='not at span2_index'
  ):
    preprocessors.wsc(row, name='wsc')


@pytest.mark.parametrize(
  ('said', 'candidate', 'expected'),
  [
    ('the fuzzy Bunny', 'bunny', 1),
    ('bunny', 'his fuzzy bunny', 1),
    ('Bob', "Bob's hat", 0),
    ('Ann', 'Bob', 0),
    ('', 'Bob', -1),
    ('the', 'Bob', -1),
  ],
)
def test_wsc_is_right_when_the_candidate_is_named(said, candidate, expected):
  example = {'targets_pretokenized': candidate.encode(), 'label': 1}
  assert postprocessors.wsc(said, example, is_target=False) == expected
  assert postprocessors.wsc(candidate, example, is_target=True) == 1


def test_specs_are_those_of_tfds():
  for config in tfds.builder_cls('super_glue').builder_configs.values():
    if config.name.startswith('wsc') or config.name == 'record':
      continue
    spec = super_glue.SPECS[config.name]
    assert list(spec.labels) == list(config.label_classes)
    columns = {c for c in config.features if not c.startswith(('start', 'end'))}
    if config.name == 'axb':  # renamed before
      columns = {'premise', 'hypothesis'}
    assert set(spec.fields) == columns


def test_names_and_labels(names):
  assert {
    'super_glue_boolq',
    'taskless_super_glue_cb',
    'super_glue_wsc',
  } <= set(names)
  assert tasks.LABELS['taskless_super_glue_cb'][1] == 'contradiction'
  assert not any('record' in name for name in tasks.LABELS)
  wsc = {name for name in tasks.LABELS if 'wsc' in name}
  assert wsc == {
    'super_glue_wsc_true_false',
    'taskless_super_glue_wsc_true_false',
  }


@pytest.mark.parametrize('name', list(super_glue.SPECS))
def test_every_task_reads_tfds(name):
  with tfds.testing.mock_data(num_examples=1):
    task = seqio.TaskRegistry.get(f'super_glue_{name}')
    ds = task.get_dataset(
      LENGTHS, split=task.splits[0], shuffle=False, try_in_mem_cache=False
    )
    row = next(ds.as_numpy_iterator())
  spec = super_glue.SPECS[name]
  start = f'{spec.prefix} {spec.fields[0]}: '
  assert row['inputs_pretokenized'].decode().startswith(start)
  target = row['targets_pretokenized'].decode()
  made = task.postprocess_fn(target, example=row, is_target=True)
  said = task.postprocess_fn(target, example=row, is_target=False)
  scores = {}
  for metric in task.metric_fns:
    scores |= metric([made], [said])
  # The target itself scores full marks; F1 depends on which label it is.
  exact = {'accuracy', 'exact_match', 'em'} & set(scores)
  assert {scores[key] for key in exact} == ({100.0} if scores else set())


def test_multirc_and_record_metrics():
  multirc = seqio.TaskRegistry.get('super_glue_multirc')

  def pair(target, said, question):
    example = {'idx/paragraph': 0, 'idx/question': question}
    return (
      multirc.postprocess_fn(target, example=example, is_target=True),
      multirc.postprocess_fn(said, example=example, is_target=False),
    )

  targets, said = zip(
    pair('True', 'True', 0), pair('False', 'False', 0),
    pair('True', 'Maybe', 1),
    strict=True,
  )  # fmt: skip
  scores = {}
  for metric in multirc.metric_fns:
    scores |= metric(targets, said)
  assert scores['exact_match'] == 50.0
  assert scores['f1'] == pytest.approx(100 * 2 / 3)

  record = seqio.TaskRegistry.get('super_glue_record')
  example = {'idx/passage': 0, 'idx/query': 0, 'answers': [b'A B', b'C']}
  target = record.postprocess_fn('A B', example=example, is_target=True)
  wrong = {'group': (0, 1), 'value': ['D']}
  said = [{'value': 'c'}, {'value': 'c'}, {'value': 'E'}]
  [metric] = record.metric_fns
  # Two rows of one query count once.
  assert metric([target, target, wrong], said) == {'em': 50.0, 'f1': 50.0}


def local(shared, tmp_path_factory, name, folder, rows=None):
  path = shared / 'data' / folder / 'train.jsonl'
  if rows is not None:
    path = tmp_path_factory / 'rows.jsonl'
    path.write_text('\n'.join(json.dumps(row) for row in rows))
  return tasks.with_local_source(name, {'train': path}, new_name='local_sg')


@pytest.fixture
def local_task(shared, tmp_path):
  yield lambda *args, **kwargs: local(shared, tmp_path, *args, **kwargs)
  seqio.TaskRegistry.remove('local_sg')


def test_all_real_wsc_rows(shared, local_task):
  task = local_task('super_glue_wsc_train', 'superglue_wsc')
  path = shared / 'data' / 'superglue_wsc' / 'train.jsonl'
  originals = [json.loads(line) for line in path.open()]
  right = [row for row in originals if row['label'] == 1]
  rows = list(task.get_dataset(None, shuffle=False).as_numpy_iterator())
  assert len(rows) == len(right) > 200
  for row, original in zip(rows, right, strict=True):
    inputs = row['inputs_pretokenized'].decode()
    assert f' *{original["span2_text"]}*' in inputs
    assert inputs.startswith('wsc: ')
    plain = inputs.removeprefix('wsc: ').replace('*', '').replace(' ', '')
    assert plain == original['text'].replace('*', '').replace(' ', '')
    assert row['targets_pretokenized'].decode() == original['span1_text']


def test_all_real_wsc_rows_as_true_or_false(shared, local_task):
  task = local_task('super_glue_wsc_true_false', 'superglue_wsc')
  path = shared / 'data' / 'superglue_wsc' / 'train.jsonl'
  originals = [json.loads(line) for line in path.open()]
  ds = task.get_dataset(None, shuffle=False, try_in_mem_cache=False)
  for row, original in zip(ds.as_numpy_iterator(), originals, strict=True):
    inputs = row['inputs_pretokenized'].decode().removeprefix('wsc text: ')
    assert f'# {original["span2_text"]} #' in inputs
    marked = f'* {original["span1_text"]} *'.replace('\n', ' ').lower()
    assert marked in inputs.lower()
    assert row['targets_pretokenized'] == [b'False', b'True'][original['label']]


def test_real_multirc_rows(shared, local_task):
  path = shared / 'data' / 'superglue_multirc' / 'train.jsonl'
  group = json.loads(path.open().readline())
  rows = [
    {
      'paragraph': group['paragraph'],
      **{key: c[key] for key in ('question', 'answer', 'label')},
      'idx': {
        'paragraph': group['paragraph_idx'],
        'question': c['question_idx'],
        'answer': c['answer_idx'],
      },
    }
    for c in group['candidates']
  ]
  task = local_task('super_glue_multirc', 'superglue_multirc', rows)
  ds = task.get_dataset(None, shuffle=False)
  targets = [
    task.postprocess_fn(
      row['targets_pretokenized'].decode(), example=row, is_target=True
    )
    for row in ds.as_numpy_iterator()
  ]
  assert [target['value'] for target in targets] == [r['label'] for r in rows]
  assert len({target['group'] for target in targets}) == len(
    {c['question_idx'] for c in group['candidates']}
  )


def test_few_shot_rows_with_labels_as_text(shared):
  vocabulary = vocabularies.sentencepiece(
    shared / 'data' / 't5_vocab' / 'spiece.model'
  )
  super_glue.register(vocabulary)
  folder = shared / 'data' / 'fewglue_32dev' / 'CB'
  tasks.with_local_source(
    'super_glue_cb',
    {'train': folder / 'train.jsonl', 'validation': folder / 'dev32.jsonl'},
    new_name='few_cb',
  )
  report = datasets.length_report(
    'few_cb', 'train', {'inputs': 64, 'targets': 4}
  )
  task = seqio.TaskRegistry.get('few_cb')
  rows = list(task.get_dataset(None, shuffle=False).as_numpy_iterator())
  seqio.TaskRegistry.remove('few_cb')
  super_glue.register(VOCABULARY)
  originals = [json.loads(line) for line in (folder / 'train.jsonl').open()]
  assert report.features['inputs'].n == len(originals) == 32
  assert [row['targets_pretokenized'].decode() for row in rows] == [
    row['label'] for row in originals
  ]


def test_super_glue_and_glue_do_not_share_names(names):
  glue_names = {f'glue_{name}' for name in glue.SPECS}
  assert not glue_names & set(names)
