"""Local rows: one flag for all tasks, and what is wrong with files."""

import json

from prompt_jax.tasks import sources
import pytest
import seqio

from prompt_jax import tasks
from prompt_jax import user_data
from prompt_jax import vocabularies

VOCABULARY = vocabularies.bytes_vocabulary()
LENGTHS = {'inputs': 64, 'targets': 16}
Error = user_data.UserDataError


@pytest.fixture(autouse=True)
def registered():
  tasks.register(VOCABULARY)


def write(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(json.dumps(row) for row in rows))


def read(name, split='train'):
  ds = seqio.TaskRegistry.get(name).source.get_dataset(split, shuffle=False)
  for function in sources.data_set(name).texts:
    ds = function(ds)
  return [
    (row['inputs'].decode(), row['targets'].decode())
    for row in ds.as_numpy_iterator()
  ]


def test_both_forms_read_one_folder(tmp_path):
  write(tmp_path / 'glue_sst2/train.jsonl', {'sentence': 'a', 'label': 1})
  tasks.use_rows_dir('glue_sst2', tmp_path)
  tasks.use_rows_dir('taskless_glue_sst2', tmp_path)
  assert read('glue_sst2') == [('sst2 sentence: a', 'positive')]
  assert read('taskless_glue_sst2') == [('sentence: a', 'positive')]
  assert list(seqio.TaskRegistry.get('glue_sst2').splits) == ['train']
  tasks.register(VOCABULARY)  # TFDS's again
  source = seqio.TaskRegistry.get('glue_sst2').source
  assert isinstance(source, seqio.TfdsDataSource)


def test_a_mixture_reads_the_rows_of_its_tasks(tmp_path):
  pair = {'question1': 'a', 'question2': 'b', 'label': 'duplicate'}
  write(tmp_path / 'glue_qqp/train.jsonl', pair)
  write(tmp_path / 'glue_qqp/validation.jsonl', pair)
  pair = {'sentence1': 'c', 'sentence2': 'd', 'label': 'equivalent'}
  write(tmp_path / 'glue_mrpc/train.jsonl', {'sentence1': 'not read'})
  write(tmp_path / 'glue_mrpc/validation.jsonl', pair)
  tasks.use_rows_dir('glue_qqp_to_mrpc', tmp_path)
  mixture = seqio.MixtureRegistry.get('glue_qqp_to_mrpc')
  splits = {t.name: list(t.splits) for t in mixture.tasks}
  assert splits == {
    'glue_qqp': ['train', 'validation'],
    'glue_mrpc_from_qqp': ['validation'],
  }
  ds = mixture.get_dataset(LENGTHS, split='train', shuffle=False)
  row = next(ds.as_numpy_iterator())
  said = VOCABULARY.decode(row['inputs'].tolist())
  assert said == 'qqp question1: a question2: b'
  assert read('glue_mrpc_from_qqp', 'validation') == [
    ('mrpc sentence1: c sentence2: d', 'duplicate')
  ]
  task = seqio.TaskRegistry.get('glue_mrpc_from_qqp')
  said = [task.postprocess_fn(t) for t in ('duplicate', 'equivalent')]
  assert said == [1, -1]
  assert tasks.LABELS['glue_mrpc_from_qqp'] == ('not_duplicate', 'duplicate')
  assert tasks.LABELS['taskless_glue_qqp_from_mrpc'][1] == 'equivalent'


def test_both_ends_of_mnli_are_in_its_folder(tmp_path):
  pair = {'premise': 'p', 'hypothesis': 'h', 'label': 0}
  for name in ('train', 'validation_matched', 'validation_mismatched'):
    write(tmp_path / f'glue_mnli/{name}.jsonl', {**pair, 'premise': name})
  tasks.use_rows_dir('glue_mnli_and_dev', tmp_path)
  mixture = seqio.MixtureRegistry.get('glue_mnli_and_dev')
  assert {t.name: list(t.splits) for t in mixture.tasks} == {
    'glue_mnli': ['train', 'validation_matched', 'validation_mismatched'],
    'glue_mnli_matched': ['validation'],
    'glue_mnli_mismatched': ['validation'],
  }
  [(text, _)] = read('glue_mnli_mismatched', 'validation')
  assert text == 'mnli hypothesis: h premise: validation_mismatched'
  # A folder of their own goes first.
  write(tmp_path / 'glue_mnli_matched/validation.jsonl', pair)
  tasks.use_rows_dir('taskless_glue_mnli_matched', tmp_path)


def test_csv_and_other_folders(tmp_path):
  folder = tmp_path / 'superglue_copa'
  folder.mkdir()
  text = 'choice1,choice2,premise,question,label\nA,B,P,effect,1\n'
  (folder / 'validation.csv').write_text(text)
  tasks.use_rows_dir('super_glue_copa', tmp_path)
  assert read('super_glue_copa', 'validation') == [
    ('copa choice1: A choice2: B premise: P question: effect', 'choice2')
  ]


def test_test_rows_need_no_label(tmp_path):
  row = {'sentence1': 'a', 'sentence2': 'b'}
  write(tmp_path / 'glue_stsb/test.jsonl', row)
  write(tmp_path / 'glue_rte/test.jsonl', row)
  for name in ('glue_stsb', 'glue_rte'):
    tasks.use_rows_dir(name, tmp_path)
    assert read(name, 'test')[0][1] == '<unk>'


def test_missing_folders_and_files(tmp_path):
  with pytest.raises(Error, match='there is no folder .*nowhere'):
    tasks.use_rows_dir('glue_sst2', tmp_path / 'nowhere')
  (tmp_path / 'glue_sst').mkdir()
  with pytest.raises(
    Error,
    match=r"no folder 'glue_sst2' for .* Did you mean 'glue_sst'\? Expected: "
    r'DIR/glue_sst2/train.jsonl, .*label: 0 = negative, 1 = positive',
  ):
    tasks.use_rows_dir('glue_sst2', tmp_path)
  folder = tmp_path / 'glue_sst2'
  folder.mkdir()
  (folder / 'README.md').write_text('')
  with pytest.raises(sources.NoLocalRows, match='no files of .*train.jsonl'):
    tasks.use_rows_dir('glue_sst2', tmp_path)
  write(folder / 'validaton.jsonl', {})
  with pytest.raises(
    Error, match=r"validaton.jsonl is no split .*Did you mean 'validation'"
  ):
    tasks.use_rows_dir('glue_sst2', tmp_path)
  (folder / 'validaton.jsonl').unlink()
  write(folder / 'train.jsonl', {})
  (folder / 'train.csv').write_text('')
  with pytest.raises(Error, match=r'train.csv and .*train.jsonl are the same'):
    tasks.use_rows_dir('glue_sst2', tmp_path)


GOOD = {'sentence': 'a', 'label': 0}


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'sentense': 'a', 'label': 0}, "no column 'sentence'. Did you mean 'sent"),
    ({'sentence': 'a'}, "no column 'label'.* The columns: sentence"),
    ({'sentence': 3, 'label': 0}, "sentence holds '3', expected text"),
    ({'sentence': ['a'], 'label': 0}, 'expected text'),
    ({**GOOD, 'label': 2}, 'label 2, expected 0 to 1 or its text: 0 = neg'),
    ({**GOOD, 'label': 'positiv'}, "Did you mean 'positive'"),
    ({**GOOD, 'label': None}, 'label None, expected'),
    ({**GOOD, 'idx': 'x'}, "idx holds 'x', expected a whole number"),
  ],
)
def test_bad_rows_say_file_and_line(tmp_path, row, message):
  path = tmp_path / 'glue_sst2' / 'train.jsonl'
  write(path, GOOD, row)
  with pytest.raises(Error, match=rf'{path}, line 2.*{message}'):
    tasks.use_rows_dir('glue_sst2', tmp_path)


@pytest.mark.parametrize(
  ('name', 'row', 'message'),
  [
    ('squad', {'question': 'a', 'context': 'b', 'answers': 'c'},
     "answers holds 'c', expected an object"),
    ('squad', {'question': 'a', 'context': 'b', 'answers': {'texts': []}},
     "answers has no 'text'"),
    ('squad', {'question': 'a', 'context': 'b', 'answers': {'text': 'c'}},
     "expected a list"),
    ('web_nlg', {'triplets': [], 'refs': ['a']}, "not a row .*'triples'"),
    ('trec', {'text': 'a', 'fine_class': 'NUM:x'}, "not a row .*'x'"),
    ('glue_stsb', {'sentence1': 'a', 'sentence2': 'b', 'label': 'high'},
     "label holds 'high', expected a number"),
  ],
)  # fmt: skip
def test_bad_rows_of_other_kinds(tmp_path, name, row, message):
  path = tmp_path / name / 'train.jsonl'
  write(path, row)
  with pytest.raises(Error, match=rf'{path}, line 1.*{message}'):
    tasks.use_rows_dir(name, tmp_path)


def test_a_task_without_rows_of_its_own():
  with pytest.raises(ValueError, match="'glue_sst' has no rows.*'glue_sst2'"):
    sources.data_set('glue_sst')


def test_grouped_rows_of_local_files(shared):
  files = sources.local_files('super_glue_multirc', shared / 'data')
  rows = sources.read_rows('super_glue_multirc', files)
  assert [len(rows[s]) for s in ('train', 'validation')] == [2000, 4848]
  few = shared / 'data' / 'fewglue_32dev' / 'ReCoRD' / 'dev32.jsonl'
  rows = sources.read_rows('super_glue_record', {'validation': few})
  first = rows['validation'][0]
  assert first['query'].startswith('They will sew our lips')
  assert first['answers'] == ['Benazir Bhutto', 'Bhutto']
  assert first['entities'] == sorted(set(first['entities']))
  assert 'Islamabad' in first['entities']
  assert first['idx'] == {'passage': 12705, 'query': 19617}


def test_what_tfds_cannot_give_is_told(monkeypatch):
  def fail(*args, **kwargs):
    raise ConnectionError('no such host\n' + 'x' * 300)

  monkeypatch.setattr(seqio.LazyTfdsLoader, 'load', fail)
  monkeypatch.setattr(seqio.LazyTfdsLoader, 'size', fail)
  task = seqio.TaskRegistry.get('glue_sst2')
  match = (
    r'TFDS cannot give glue/sst2:2.0.0: ConnectionError: no such host x{100}.*'
    r'\.\.\. --rows_dir=DIR reads DIR/glue_sst2/train.jsonl, .*in its place'
  )
  with pytest.raises(Error, match=match):
    task.get_dataset(LENGTHS, split='train', shuffle=False)
  with pytest.raises(Error, match=match):
    task.num_input_examples('train')
