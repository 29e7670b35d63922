"""Chain of thought as a task: texts by hand, metric, decodes and their vote."""

import json

import commands
import pytest

from prompt_jax import chain_of_thought
from prompt_jax import reasoning
from prompt_jax import vocabularies
from prompt_jax.chain_of_thought import ChainOfThought
from prompt_jax.row_files import UserDataError

BYTES = vocabularies.bytes_vocabulary()
TRAIN = [
  {'question': 'How many are 2 and 3?', 'rationale': '2 and 3 are 5',
   'answer': '5'},
]  # fmt: skip
DEV = [{'question': ' How many are 4 and 3?', 'answer': '7'}]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rows')
  for name, rows in (('train', TRAIN), ('dev', DEV)):
    text = '\n'.join(map(json.dumps, rows))
    (folder / f'{name}.jsonl').write_text(text)
  return {
    'train_data': str(folder / 'train.jsonl'),
    'eval_data': str(folder / 'dev.jsonl'),
  }


def only(task):
  lengths = {'inputs': 300, 'targets': 64}
  ds = task.get_dataset(lengths, 'validation', shuffle=False)
  [row] = ds.as_numpy_iterator()
  keys = ('inputs_pretokenized', 'targets_pretokenized')
  return tuple(row[key].decode() for key in keys)


def test_texts_by_hand(files):
  task = ChainOfThought(**files, k=1).register('thought', BYTES)
  assert only(task) == (
    'Q: How many are 2 and 3?\nA: 2 and 3 are 5. The answer is 5.\n\n'
    'Q: How many are 4 and 3?\nA:',
    'The answer is 7.',
  )
  task = ChainOfThought(eval_data=files['eval_data'], cue=True)
  got, _ = only(task.register('thought', BYTES))
  assert got == "Q: How many are 4 and 3?\nA: Let's think step by step."


def test_metric_by_hand():
  got = chain_of_thought.answer_accuracy(
    ['5', '7', None, 'no'], ['5', None, None, 'yes']
  )
  assert got == {'answer_accuracy': 25.0, 'no_answer': 50.0}


def test_refuses(files, tmp_path):
  with pytest.raises(UserDataError, match='2 demonstrations need --train_data'):
    ChainOfThought(k=2)
  with pytest.raises(UserDataError, match='Give --eval_data'):
    ChainOfThought().register('thought', BYTES)
  with pytest.raises(UserDataError, match="line 1: no 'rationale'"):
    ChainOfThought(train_data=files['eval_data']).register('thought', BYTES)
  with pytest.raises(ValueError, match='k must be from 0 to 1'):
    ChainOfThought(**files, k=2).register('thought', BYTES)
  path = tmp_path / 'a.jsonl'
  path.write_text('{"questoin": "a", "answer": "b"}')
  with pytest.raises(UserDataError, match="no 'question'.*Did you mean"):
    ChainOfThought(eval_data=str(path)).register('thought', BYTES)


@pytest.mark.slow
def test_samples_and_votes(files, tmp_path):
  args = commands.train(
    tmp_path, inputs=None, targets=None, labels=None, K=1, **files,
    output=tmp_path / 'out.jsonl', NUM_DECODES=3,
    DECODE_FN='@decoding.temperature_sample',
    TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 24},
  )  # fmt: skip
  args = commands.without_training(args, 'chain_of_thought')
  assert commands.here('infer', *args[1:]) == 0
  [row] = map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines())
  assert len(row['predictions']) == 3 and len(row['scores']) == 3
  scores, [vote] = reasoning.vote_file(tmp_path / 'out.jsonl')
  assert vote.total == 3 and set(scores) == {
    'vote_accuracy', 'first_accuracy', 'no_answer',
  }  # fmt: skip
