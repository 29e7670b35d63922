"""Few-shot splits: the same rows everywhere, and published ones."""

import json

import commands
import pytest

from prompt_jax import datasets
from prompt_jax import few_shot
from prompt_jax import tasks
from prompt_jax import vocabularies
from prompt_jax.row_files import UserDataError

ROWS = [{'text': f'text {i}', 'label': i % 3, 'idx': i} for i in range(30)]
LENGTHS = {'inputs': 512, 'targets': 32}


@pytest.fixture(scope='module')
def registered():
  tasks.register(vocabularies.bytes_vocabulary())


def test_canonical_row_and_checksum_are_stated():
  row = {'text': 'é "x"', 'label': 1, 'idx': 7}
  assert few_shot.canonical(row) == '{"label":1,"text":"é \\"x\\""}'
  # printf '{"a":1}\n' | sha256sum
  assert few_shot.checksum([{'a': 1}]) == (
    'e346432021b04179518d9614f3560ccd71354a4ee101ddcb893d6959a9d6301c'
  )


def test_the_same_rows_for_the_same_seed_everywhere():
  # Written down: another machine, Python or numpy must choose these.
  train, dev = few_shot.choose(ROWS, 2, seed=13)
  assert few_shot.checksum([*train, *dev]) == (
    '16e820ebba4984969571920ac86130dc5be34ebf482fabc5ea8121e78dbca0ab'
  )
  numbers = [int(r['text'].removeprefix('text ')) for r in train]
  assert numbers == [25, 2, 26, 16, 12, 27]


def test_neither_the_order_of_rows_nor_idx_matters():
  turned = [{**row, 'idx': -row['idx']} for row in reversed(ROWS)]
  want = [few_shot.checksum(p) for p in few_shot.choose(ROWS, 3, 21)]
  got = [few_shot.checksum(p) for p in few_shot.choose(turned, 3, 21)]
  assert got == want


def test_classes_are_even_and_parts_apart():
  found = few_shot.choose(ROWS, 4, 42)
  for part in found:
    labels = [row['label'] for row in part]
    assert [labels.count(c) for c in range(3)] == [4, 4, 4]
  texts = [row['text'] for part in found for row in part]
  assert len(set(texts)) == 24
  sums = {few_shot.checksum(few_shot.choose(ROWS, 4, s)[0]) for s in range(5)}
  assert len(sums) == 5


def test_rows_that_are_there_twice_count_once():
  with pytest.raises(UserDataError, match='has 10 different rows'):
    few_shot.choose(ROWS * 3, 6, 13)


@pytest.mark.parametrize(
  ('rows', 'k', 'label', 'message'),
  [
    (ROWS, 6, 'label', r'Class 0 has 10 different rows, fewer than 12: K = 6 '
     r'for each of 2 splits. The largest K is 5'),
    ([], 6, 'label', 'the split is empty'),
    (ROWS, 0, 'label', 'K must be 1 or more'),
    (ROWS, 1, 'lable', "no column 'lable'.*Did you mean"),
    ([{'text': 'a', 'label': -1}], 1, 'label', 'No row has a label'),
  ],
)  # fmt: skip
def test_choosing_refuses(rows, k, label, message):
  with pytest.raises(UserDataError, match=message):
    few_shot.choose(rows, k, 13, label)


def write(folder, name, rows):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')


def test_task_has_the_splits_and_checks_its_sum(registered, tmp_path):
  rows = [{'text': f't {i}', 'label': i % 2} for i in range(20)]
  write(tmp_path, 'mr/train.jsonl', rows)
  write(tmp_path, 'mr/validation.jsonl', rows[:5])
  one = few_shot.FewShot('mr', k=3, seed=13, rows_dir=str(tmp_path))
  task = one.register('mr_few')
  sizes = {s: task.num_input_examples(s) for s in task.splits}
  assert sizes == {'train': 6, 'dev': 6, 'validation': 5}
  assert one.labels == ('negative', 'positive')
  assert datasets.find_task('mr') is not task
  sum_ = few_shot.checksum([r for s in one.splits().values() for r in s])
  again = few_shot.FewShot('mr', 3, 13, str(tmp_path), checksum=sum_)
  again.register('mr_few')
  other = few_shot.FewShot('mr', 3, 21, str(tmp_path), checksum=sum_)
  with pytest.raises(UserDataError, match='they are other rows'):
    other.register('mr_few')
  with pytest.raises(UserDataError, match='another MIXTURE_OR_TASK_NAME'):
    one.register('mr')
  with pytest.raises(ValueError, match='Did you mean'):
    few_shot.FewShot('mrr', rows_dir=str(tmp_path)).register('mr_few')


@pytest.mark.parametrize('task', few_shot.FEWGLUE)
def test_fewglue_has_32_and_32(registered, shared, task):
  folder = shared / 'data' / 'fewglue_32dev'
  one = few_shot.FewShot(task, source=str(folder))
  made = one.register('few')
  sizes = {s: made.num_input_examples(s) for s in made.splits}
  assert sizes == {'train': 32, 'dev': 32}
  ds = made.get_dataset(LENGTHS, 'train', shuffle=False)
  rows = ds.as_numpy_iterator()
  targets = {x['targets_pretokenized'].decode() for x in rows}
  # WSC's training rows are those whose candidate is right.
  labels = ['True'] if 'wsc' in task else tasks.LABELS[task]
  assert targets == set(labels)


@pytest.mark.parametrize('task', few_shot.LM_BFF)
def test_lm_bff_has_16_a_class_for_five_seeds(registered, shared, task):
  folder = str(shared / 'data' / 'lmbff_kshot')
  sums = set()
  for seed in few_shot.SEEDS:
    found = few_shot.lm_bff(task, folder, seed)
    for rows in found.values():
      label = 'label-coarse' if task == 'trec' else 'label'
      labels = [row[label] for row in rows]
      if task == 'snli':  # two of its classes are not quite even
        assert len(labels) == 48 and labels.count(2) == 16
      elif task != 'glue_stsb':
        classes = range(len(tasks.LABELS[task]))
        assert [labels.count(c) for c in classes] == [16] * len(classes)
    sums.add(few_shot.checksum(found['train']))
  assert len(sums) == 5
  with pytest.raises(UserDataError, match='no split of seed 14; its seeds are'):
    few_shot.lm_bff(task, folder, 14)


@pytest.mark.parametrize('task', ['trec', 'subj', 'mr', 'cr', 'sst5'])
def test_lm_bffs_labels_are_those_of_the_sets(registered, shared, task):
  # Texts that both have, compared without spaces.
  folder = str(shared / 'data')
  files = tasks.sources.local_files(task, folder)
  label = 'label-coarse' if task == 'trec' else 'label'
  known = {}
  for rows in tasks.sources.read_rows(task, files).values():
    known |= {''.join(r['text'].lower().split()): r[label] for r in rows}
  same = []
  for seed in few_shot.SEEDS:
    found = few_shot.lm_bff(task, f'{folder}/lmbff_kshot', seed)
    for row in [*found['train'], *found['dev']]:
      text = ''.join(row['text'].lower().split())
      if text in known:
        same.append(known[text] == row[label])
  assert len(same) > 100 and sum(same) / len(same) > 0.98


def test_published_splits_refuse(registered, tmp_path):
  with pytest.raises(UserDataError, match="FewGLUE has no 'glue_rte'"):
    few_shot.fewglue('glue_rte', str(tmp_path))
  with pytest.raises(UserDataError, match='there is no such file'):
    few_shot.lm_bff('mr', str(tmp_path), 13)


@pytest.mark.slow
def test_trains_from_gin_and_chooses_by_dev(tmp_path):
  rows = [{'text': f't {i}', 'label': i % 2} for i in range(20)]
  write(tmp_path, 'mr/train.jsonl', rows)
  write(tmp_path, 'mr/validation.jsonl', rows[:5])
  args = commands.train(
    tmp_path, train_data=None, eval_data=None, inputs=None, targets=None,
    labels=None, rows_dir=tmp_path, model_dir=tmp_path / 'run', TRAIN_STEPS=2,
    EVAL_PERIOD=2, TASK='mr', K=4, BEST_METRIC='rank_accuracy',
    TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16},
  )  # fmt: skip
  args = [a.replace('runs/train', 'runs/few_shot') for a in args]
  assert commands.here(*args) == 0
  assert (tmp_path / 'run' / 'best.safetensors').exists()
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert any(x['split'] == 'dev' and 'rank_accuracy' in x for x in lines)
