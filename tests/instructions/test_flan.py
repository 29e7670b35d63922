"""FLAN: texts by hand, options, exemplars, rates, what is held out."""

import json

import commands
import pytest
import seqio

from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.instructions import flan
from prompt_jax.row_files import UserDataError
from prompt_jax.templates import files

BYTES = vocabularies.bytes_vocabulary()
PROMPT = files.parse_line('p: {text|cut} Good? ||| {label: no | yes}')
ROW = {'text': 'a gem', 'label': 1}
DULL = {'text': 'so dull', 'label': 0}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rows')
  tasks.register(BYTES)
  pair = {'premise': 'p {}', 'hypothesis': 'h {}'}
  for name, columns in (
    ('mr', {'text': 'mr {}'}), ('cr', {'text': 'cr {}'}),
    ('snli', pair), ('super_glue_cb', pair),
  ):  # fmt: skip
    (folder / name).mkdir()
    for split, count in (('train', 20), ('validation', 4)):
      lines = [
        {**{k: v.format(i) for k, v in columns.items()}, 'label': i % 2}
        for i in range(count)
      ]
      text = '\n'.join(map(json.dumps, lines))
      (folder / name / f'{split}.jsonl').write_text(text)
  return folder


def test_text_with_options_by_hand():
  fit = flan._Fit(BYTES, None)
  assert flan.assemble(PROMPT, ROW, [], (), fit) == 'a gem Good?'
  assert flan.assemble(PROMPT, ROW, [], ('no', 'yes'), fit) == (
    'a gem Good?\nOPTIONS:\n- no\n- yes'
  )


def test_exemplars_stand_in_front_and_give_way_whole():
  both = 'x Good?\nno\n\nso dull Good?\nno\n\na gem Good?'
  shown = [{'text': 'x', 'label': 0}, DULL]
  assert flan.assemble(PROMPT, ROW, shown, (), flan._Fit(BYTES, None)) == both
  size = len(both)
  one = both.removeprefix('x Good?\nno\n\n')
  for room, want in ((size, both), (size - 1, one), (len(one) - 1, one[-11:])):
    assert flan.assemble(PROMPT, ROW, shown, (), flan._Fit(BYTES, room)) == want


def test_text_that_may_be_cut_is_cut_and_the_question_stays():
  long = {'text': 'abcdefghij', 'label': 0}
  got = flan.assemble(PROMPT, long, [DULL], (), flan._Fit(BYTES, 10))
  assert got == 'abcd Good?'
  got = flan.assemble(PROMPT, long, [], (), flan._Fit(BYTES, 3))
  assert got == ' Good?'  # what is never cut is as long as it is


def config(rows, **fields):
  return flan.Flan(
    **{
      'data_sets': ('mr', 'cr', 'snli', 'super_glue_cb'),
      'holdout': ('super_glue_cb',),
      'rows_dir': str(rows),
      **fields,
    }
  )


def test_a_held_out_cluster_leaves_no_sibling_in_training(rows):
  made = config(rows, cap=7, max_rows=15).register('flan', BYTES)
  splits = {t.name: tuple(t.splits) for t in made.tasks}
  trained = {name for name, s in splits.items() if s == ('train',)}
  assert trained == {'flan_mr', 'flan_cr'}
  # CB's direct templates: eight of ten.
  held_out = set(splits) - trained
  assert len(held_out) == 8
  assert all(n.startswith('flan_held_out_super_glue_cb_') for n in held_out)
  assert {made.get_rate(t) for t in made.tasks if t.name in trained} == {7.0}
  task = seqio.TaskRegistry.get('flan_mr')
  assert task.num_input_examples('train') == 15


def test_rows_go_through_the_templates_in_turn(rows):
  examples = config(rows)._examples('mr', flan._Fit(BYTES, None))
  prompts = flan.SETS['mr'].prompts
  assert len(prompts.prompts) == 10 and len(prompts.inverted) >= 1
  inverted = {p.name for p in prompts.inverted}
  for i, (example, prompt) in enumerate(
    zip(examples, 2 * prompts.prompts, strict=True)
  ):
    asked = f'mr {i}'
    assert ('OPTIONS' in example['inputs']) == (prompt.name not in inverted)
    where = 'targets' if prompt.name in inverted else 'inputs'
    assert asked in example[where]
  direct = config(rows, inverted=False)._examples('mr', flan._Fit(BYTES, None))
  assert {e['targets'] for e in direct} == {'negative', 'positive'}


def test_exemplars_are_other_rows_of_the_training_split(rows):
  made = config(rows, exemplars=2, exemplar_share=1.0, options_share=0.0)
  for i, example in enumerate(made._examples('mr', flan._Fit(BYTES, None))):
    parts = example['inputs'].split('\n\n')
    assert len(parts) == 3
    whole = f'{example["inputs"]} {example["targets"]}'.replace('\n', ' ')
    own = [w for w in whole.replace('"', ' ').split('mr ')[1:]]
    numbers = [int(''.join(c for c in x.split()[0] if c.isdigit()))
               for x in own]  # fmt: skip
    assert numbers[-1] == i and i not in numbers[:-1]


def test_held_out_choices_are_the_labels_words(rows):
  config(rows).register('flan', BYTES)
  name = 'flan_held_out_super_glue_cb_follows'
  ds = seqio.TaskRegistry.get(name).get_dataset(
    {'inputs': 200, 'targets': 8}, 'validation', shuffle=False
  )
  got = [
    (x['targets_pretokenized'].decode(), int(x['right']))
    for x in ds.as_numpy_iterator()
  ]
  # CB's labels: entailment, contradiction, neutral.
  assert got[:3] == [('yes', 1), ('no', 0), ('maybe', 0)]
  assert got[3:6] == [('yes', 0), ('no', 1), ('maybe', 0)]


@pytest.mark.parametrize('name', flan.SETS)
def test_every_entry_fits_its_task(rows, name):
  entry = flan.SETS[name]
  data = tasks.sources.data_set(name)
  assert len(entry.labels) == len(tasks.LABELS[name])
  for prompt in entry.prompts.prompts:
    for template in (prompt.inputs, prompt.targets):
      assert set(template.fields) <= set(data.columns)


def test_words_go_with_the_tasks_labels(rows):
  words = {'entailment': 'yes', 'neutral': 'maybe', 'contradiction': 'no',
           'not_entailment': 'no'}  # fmt: skip
  for name, entry in flan.SETS.items():
    if entry.templates == 'nli':
      assert entry.labels == tuple(words[x] for x in tasks.LABELS[name])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'data_sets': ('mrr',)}, "no FLAN templates of 'mrr'.*Did you mean"),
    ({'holdout': ('nlli',)}, "'nlli' is to be held out"),
    ({'holdout': ()}, 'nothing is held out'),
    ({'options_share': 2.0}, 'options_share must be from 0 to 1'),
    ({'exemplars': -1}, 'exemplars must be 0 or more'),
    ({'cap': 0}, 'cap must be 1 or more'),
  ],
)
def test_refuses(rows, fields, message):
  with pytest.raises(UserDataError, match=message):
    config(rows, **fields).register('flan', BYTES)


@pytest.mark.slow
def test_from_gin_to_the_table(rows, tmp_path):
  args = commands.train(
    rows, train_data=None, eval_data=None, inputs=None, targets=None,
    labels=None, rows_dir=rows, model_dir=tmp_path, TRAIN_STEPS=1,
    DATA_SETS=('mr', 'super_glue_cb'), HOLDOUT=('nli',), EXEMPLARS=1,
    EVAL_ROWS=2, EVALUATE_UNTRAINED=False,
    TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 16},
  )  # fmt: skip
  args = [a.replace('runs/train', 'runs/flan') for a in args[1:]]
  assert commands.here('instruct', *args) == 0
  lines = (tmp_path / 'prompts.tsv').read_text().splitlines()
  assert len(lines) == 9
