"""Benchmark tasks in the words of a template."""

import json

import commands
import pytest
import seqio
import tensorflow_datasets as tfds

from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.row_files import UserDataError
from prompt_jax.user_data import UserData

VOCABULARY = vocabularies.bytes_vocabulary()
LENGTHS = {'inputs': 64, 'targets': 32}
PAIR = {'sentence1': 'a', 'sentence2': 'b'}


@pytest.fixture(autouse=True)
def registered(tmp_path):
  tasks.register(VOCABULARY)
  for split, numbers in {
    'train': (0, 1, -1), 'validation': (1, 0), 'test': (-1, -1)
  }.items():  # fmt: skip
    path = tmp_path / 'glue_mrpc' / f'{split}.jsonl'
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({**PAIR, 'label': n}) for n in numbers]
    path.write_text('\n'.join(lines))
  tasks.use_rows_dir('glue_mrpc', tmp_path)


def texts(name, split='train'):
  ds = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, split, shuffle=False)
  return [
    (x['inputs_pretokenized'].decode(), x['targets_pretokenized'].decode())
    for x in ds.as_numpy_iterator()
  ]


def test_rows_of_the_task_in_other_words():
  data = UserData(
    inputs='{sentence1|cut} Same? {sentence2}',
    targets='Oh {label: nope | yes}',
  )
  assert data.given
  made = data.register('glue_mrpc', VOCABULARY)
  # Rows without a label cannot say it.
  assert made.num_rows == {'train': 2, 'validation': 2}
  assert made.num_skipped == {'train': 1, 'validation': 0}
  assert texts('glue_mrpc') == [
    ('a Same? b', 'Oh nope'),
    ('a Same? b', 'Oh yes'),
  ]
  assert data.label_texts == ('Oh nope', 'Oh yes')
  # The task's own metrics, of the labels' numbers.
  task = seqio.TaskRegistry.get('glue_mrpc')
  said = [task.postprocess_fn(t) for t in ('Oh nope', '<soft:0> Oh yes', 'yes')]
  assert said == [0, 1, -1]
  scores = {}
  for metric in task.metric_fns:
    scores |= metric([1, 0, 1], [1, 1, 1])
  assert scores == {
    'f1': pytest.approx(80.0), 'accuracy': pytest.approx(200 / 3)
  }  # fmt: skip
  tasks.register(VOCABULARY)  # its own words again
  assert seqio.TaskRegistry.get('glue_mrpc') is not task


def test_labels_are_the_tasks_own_or_given_ones():
  data = UserData(inputs='{sentence1}', targets='It is {label}.')
  data.register('glue_mrpc', VOCABULARY)
  assert [y for _, y in texts('glue_mrpc', 'validation')] == [
    'It is equivalent.', 'It is not_equivalent.'
  ]  # fmt: skip
  assert data.label_texts == ('It is not_equivalent.', 'It is equivalent.')
  tasks.register(VOCABULARY)


def test_given_labels_stand_for_the_tasks(tmp_path):
  data = UserData(
    inputs='{sentence1}', targets='{label}', labels=('no', 'yes'), task_id=3
  )
  data.register('glue_mrpc', VOCABULARY)
  assert [y for _, y in texts('glue_mrpc')] == ['no', 'yes']
  ds = seqio.TaskRegistry.get('glue_mrpc').get_dataset(LENGTHS, 'train')
  assert {int(x['task_ids'].item()) for x in ds.as_numpy_iterator()} == {3}


def test_free_targets_are_compared_as_they_are():
  UserData(inputs='{sentence1}', targets='{sentence2}').register(
    'glue_mrpc', VOCABULARY
  )
  [metric] = seqio.TaskRegistry.get('glue_mrpc').metric_fns
  assert metric.__name__ == 'exact_match'


def test_rows_of_tfds():
  with tfds.testing.mock_data(num_examples=3):
    UserData(inputs='{text}', targets='{label-coarse}').register(
      'trec', VOCABULARY
    )
  found = texts('trec', 'test')
  assert len(found) == 3
  assert {y for _, y in found} <= set(tasks.LABELS['trec'])


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    ('glue_mrcp', {}, "'glue_mrcp' is none. Did you mean 'glue_mrpc'"),
    ('glue_qqp_to_mrpc', {}, 'benchmark task, and .* is none'),
    ('text_lm', {}, "'text_lm' is none"),
    ('glue_mrpc', {'inputs': '{sentense1}'},
     r"glue_mrpc \(train\), row 0: .*'sentense1'.*Did you mean {sentence1}"),
    ('glue_mrpc', {'targets': None}, "need --inputs='...' and --targets"),
    ('glue_mrpc', {'inputs': None}, "need --inputs='...' and --targets"),
  ],
)  # fmt: skip
def test_refuses(name, fields, message):
  data = {'inputs': '{sentence1}', 'targets': '{label}', **fields}
  with pytest.raises(UserDataError, match=message):
    UserData(**data).register(name, VOCABULARY)


@pytest.mark.slow
def test_trains_and_ranks_in_other_words(tmp_path):
  args = commands.train(
    tmp_path, train_data=None, eval_data=None, labels=None,
    inputs='{sentence1} {sentence2}?', targets='{label: no | yes}',
    MIXTURE_OR_TASK_NAME='glue_mrpc', TRAIN_STEPS=1, rows_dir=tmp_path,
    EVAL_PERIOD=1, CHECKPOINT_PERIOD=1, model_dir=tmp_path / 'run',
  )  # fmt: skip
  assert commands.here(*args) == 0
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  found = [json.loads(line) for line in text.splitlines()]
  [scores] = [x for x in found if 'rank_accuracy' in x]
  assert scores['task'] == 'glue_mrpc' and 'f1' in scores
