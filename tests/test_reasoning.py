"""Answers of reasoning, and votes over them."""

import itertools
import json

import pytest

from prompt_jax import reasoning
from prompt_jax.row_files import UserDataError


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('2 and 3 are 5. The answer is 5.', '5'),
    ('The answer is 4. No: the answer is: 1,250.00 dollars', '1250'),
    ('so The answer is (B).', 'b'),
    ('The answer is $3.50\nQ: next? The', '3.5'),
    ('The answer is -7', '-7'),
    ('The answer is no', 'no'),
    ('It is 5.', None),
    ('The answer is', None),
    ('The answer is ...', None),
  ],
)
def test_answer(text, want):
  assert reasoning.answer(text) == want


@pytest.mark.parametrize(
  ('one', 'other'),
  [
    ('1/2', '1/3'),
    ('10:30', '10:45'),
    ('2024-05-01', '2024-06-01'),
    ('1.2.3', '1.2.4'),
    ('2 1/2', '2 1/3'),
    ('3 / 4', '3 / 5'),
    ('3-4', '3-5'),
    ('5 am', '5 p.m.'),
    ('2^5', '2^6'),
  ],
)
def test_what_begins_with_a_number_and_is_another_is_wrong(one, other):
  right, wrong = (reasoning.answer(t) for t in says(one, other))
  assert None not in (right, wrong) and right != wrong


@pytest.mark.parametrize(
  'text', ['5', '5.', '5.0', '5 apples', '5kg', '5%', '5-year', '$5', '+5!']
)
def test_a_number_stands_for_itself_with_its_unit(text):
  assert reasoning.normal(text) == '5'


def test_texts_of_both_calls_and_of_demonstrations():
  assert reasoning.worked(' 2 and 3 are 5 ', '5.') == (
    '2 and 3 are 5. The answer is 5.'
  )
  assert reasoning.answer(reasoning.worked('why', 'yes')) == 'yes'
  assert reasoning.extraction('How many? ', ' 2 plus 3. ') == (
    "How many?\nLet's think step by step. 2 plus 3.\nTherefore, the answer is"
  )


def says(*answers):
  return [f'I think. The answer is {a}.' if a else 'I think.' for a in answers]


def test_majority_of_those_that_answer():
  found = reasoning.vote(says('5', None, '4', '5', None, '5.0'))
  assert found == reasoning.Vote('5', 0.75, 4, 6)


def test_one_greedy_decode_is_plain_chain_of_thought():
  for text in says('5', None):
    assert reasoning.vote([text]).answer == reasoning.answer(text)


def test_ties_go_to_the_likelier_then_to_the_first():
  texts = says('5', '4', '4', '5')
  assert reasoning.vote(texts, [-3.0, -1.0, -2.0, -5.0]).answer == '4'
  assert reasoning.vote(texts, [-1.0, -1.0, -1.0, -1.0]).answer == '5'
  assert reasoning.vote(texts).answer == '5'


def test_probabilities_as_weights():
  # 0.5 against 0.2 + 0.1.
  import math

  logs = [math.log(p) for p in (0.5, 0.2, 0.1)]
  texts = says('4', '5', '5')
  found = reasoning.vote(texts, logs, 'probability')
  assert found.answer == '4' and found.share == pytest.approx(0.5 / 0.8)
  assert reasoning.vote(texts, logs).answer == '5'


@pytest.mark.parametrize('weights', reasoning.WEIGHTS)
def test_no_order_matters(weights):
  texts, logs = says('4', '5', '6', '5', '4'), [-0.1, -0.7, -0.2, -0.3, -0.8]
  want = reasoning.vote(texts, logs, weights)
  for order in itertools.permutations(range(5)):
    got = reasoning.vote(
      [texts[i] for i in order], [logs[i] for i in order], weights
    )
    assert got == want


def test_nobody_answers():
  assert reasoning.vote(says(None, None)) == reasoning.Vote(None, 0.0, 0, 2)


def test_vote_refuses():
  with pytest.raises(ValueError, match='as many log_probs; got 2 and 1'):
    reasoning.vote(says('4', '5'), [-1.0])
  with pytest.raises(ValueError, match='the latter with log_probs'):
    reasoning.vote(says('4'), weights='probability')


def test_file_of_decodes(tmp_path):
  path = tmp_path / 'infer.jsonl'
  rows = [
    {'targets': 'Two. The answer is 5.', 'predictions': says('4', '5', '5'),
     'scores': [-1.0, -2.0, -3.0]},
    {'targets': 'yes', 'predictions': says('yes', None), 'scores': [-1, -2]},
    {'targets': 'no', 'predictions': says(None, None), 'scores': [-1, -2]},
  ]  # fmt: skip
  path.write_text('\n'.join(map(json.dumps, rows)))
  scores, votes = reasoning.vote_file(path)
  assert scores == {
    'vote_accuracy': pytest.approx(200 / 3),
    'first_accuracy': pytest.approx(100 / 3),
    'no_answer': pytest.approx(100 / 3),
  }
  assert [v.answer for v in votes] == ['5', 'yes', None]
  path.write_text('{"targets": "a"}')
  with pytest.raises(UserDataError, match="line 1: no 'predictions'"):
    reasoning.vote_file(path)


def test_real_rationales_give_their_answers(shared):
  path = shared / 'data' / 'flan_cot' / 'train.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows:
    text = reasoning.worked(row['rationale'], row['answer'])
    assert reasoning.answer(text) == (reasoning.normal(row['answer']) or None)
