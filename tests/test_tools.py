"""`prompt-jax spot`, `recycle` and `recover`, as a user meets them."""

import dataclasses
import json
import re

import commands
import helpers
import jax
import numpy as np
import pytest
import runs

from prompt_jax import checkpoints
from prompt_jax import cli
from prompt_jax import fingerprints
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import tools

PNG = b'\x89PNG'


@pytest.fixture
def here(monkeypatch, capsys):
  """Runs a command in this process: (status, standard output, error)."""
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)

  def call(*args):
    capsys.readouterr()
    status = commands.here(*map(str, args))
    return status, *capsys.readouterr()

  return call


def refused(here, *args):
  """The message of a command that ends with status 1 and no more."""
  status, _, err = here(*args)
  assert status == 1
  assert err.startswith(f'prompt-jax {args[0]}: ') and 'Traceback' not in err
  return err


def save(path, prompt, **header):
  path.parent.mkdir(parents=True, exist_ok=True)
  prompt = np.asarray(prompt, np.float32)
  checkpoints.save_trainable(path, helpers.prompted(prompt), header)
  return path


@pytest.mark.parametrize('name', tools.TOOLS)
def test_help_and_what_is_required(here, name, capsys):
  with pytest.raises(SystemExit) as left:
    here(name, '--help')
  assert left.value.code == 0
  said = capsys.readouterr().out
  flags = tools.TOOLS[name][2]
  assert all(f'--{flag.name}' in said for flag in flags)
  message = refused(here, name)
  assert f'--gin.{flags[0].name.upper()}=...  (required by runs/' in message


# ---- spot --------------------------------------------------------------------

BASE = {'base_digest': 'aaaa', 'vocabulary': 'v'}
BANK = {
  'same': [[2, 0], [2, 0]],
  'fork': [[1, 1], [1, -1]],
  'left': [[-1, 0], [0, 1]],
}


@pytest.fixture
def bank(tmp_path):
  """Runs, of which one keeps its best prompt too, and the target's."""
  for name, prompt in BANK.items():
    save(tmp_path / 'bank' / name / 'trainable.safetensors', prompt, **BASE)
  save(tmp_path / 'bank' / 'left' / 'best.safetensors', BANK['same'], **BASE)
  target = save(tmp_path / 'run' / 'trainable.safetensors',
                [[1, 0], [1, 0]], **BASE)  # fmt: skip
  return tmp_path / 'bank', target.parent


def test_spot_ranks_and_draws(here, bank, tmp_path):
  folder, target = bank
  args = ['spot', f'--target_prompt={target}', f'--bank={folder}']
  picture = tmp_path / 'out' / 'near.png'
  status, said, _ = here(*args, f'--output={picture}')
  assert status == 0 and picture.read_bytes()[:4] == PNG
  rows = [x.split('\t') for x in
          picture.with_suffix('.tsv').read_text().splitlines()]  # fmt: skip
  assert rows[0] == ['rank', 'average tokens', 'per token average', 'prompt']
  # By hand: cosines of (1, 0) with the means, and means of the cosines.
  root = f'{0.5**0.5:.4f}'
  paths = {name: f'{folder}/{name}/trainable.safetensors' for name in BANK}
  assert rows[3] == ['3', f'-{root}', '-0.5000', paths['left']]
  assert sorted(row[1:] for row in rows[1:3]) == sorted([
    ['1.0000', '1.0000', paths['same']], ['1.0000', root, paths['fork']]
  ])  # fmt: skip
  assert len(rows) == 4 and f'-{root}' in said
  lines = picture.with_suffix('.md').read_text().splitlines()
  assert lines[0].startswith('|') and len(lines) == 5
  # By the other similarity the fork is second for sure.
  status, said, _ = here(*args, '--gin.SIMILARITY=per_token_average')
  order = re.findall(r'bank/(\w+)/', said)
  assert status == 0 and order == ['same', 'fork', 'left']


def test_spot_takes_runs_and_files(here, bank):
  folder, target = bank
  paths = folder / 'left', folder / 'fork' / 'trainable.safetensors'
  _, said, _ = here('spot', f'--target_prompt={target}',
                    *(f'--bank={path}' for path in paths))  # fmt: skip
  assert re.findall(r'bank/(\w+)/', said) == ['fork', 'left']


def test_spot_refuses(here, bank, tmp_path):
  folder, target = bank

  def said(*args, target=target, bank=folder):
    return refused(
      here, 'spot', f'--target_prompt={target}', f'--bank={bank}', *args
    )

  assert "Did you mean 'run'" in said(target=tmp_path / 'runn')
  assert "Did you mean 'bank'" in said(bank=tmp_path / 'bnak')
  assert "Did you mean 'average_tokens'" in said(
    '--gin.SIMILARITY=averagetoken'
  )
  assert '.png or .svg, got' in said('--output=near.pdf')
  assert 'Did you mean BANK' in said('--gin.BANKS=x')
  other = save(folder / 'other.safetensors', [[1, 2]], base_digest='bbbb')
  assert 'trained with another base (bbbb)' in said()
  save(other, [[1, 2, 3]])
  assert 'width 3, but the target' in said()


# ---- recycle -----------------------------------------------------------------

NARROW, WIDE, P = 8, 16, 4


def config(width):
  """What `commands.train` makes of models/mini_bytes.gin, of that width."""
  return dataclasses.replace(runs.CONFIG, emb_dim=width, num_heads=2)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """A narrow and a wide base, whose embedding is the narrow one's times M."""
  folder = tmp_path_factory.mktemp('bases')
  runs.write_data(folder)
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  matrix = draw((NARROW, WIDE))
  table = draw((384, NARROW))
  for width, embedding in ((NARROW, table), (WIDE, table @ matrix)):
    shapes = models.EncoderDecoderModel(config(width)).abstract_network
    params = jax.tree.map(
      lambda x: 0.1 * draw(x.shape), partitioning.unbox(shapes)
    )
    params['token_embedder']['embedding'] = embedding
    path = folder / str(width) / 'trainable.safetensors'
    path.parent.mkdir()
    own = {'method': {}, 'network': params}
    checkpoints.save_trainable(path, own, {})
  trained_on = fingerprints.fingerprint({'token_embedder/embedding': table})
  prompts = {name: draw((P, NARROW)) for name in ('mood', 'place')}
  for name, prompt in prompts.items():
    save(folder / name / 'trainable.safetensors', prompt, base=trained_on)
  return folder, prompts, matrix


def recycle(folder, output, *args, prompts=('mood',)):
  return [
    'recycle',
    *(f'--prompt={folder / name}' for name in prompts),
    f'--source_base={folder / str(NARROW)}',
    f'--target_base={folder / str(WIDE)}',
    f'--output={output}',
    *args,
  ]


def test_recycle_maps_words_to_words(here, bases, tmp_path):
  folder, prompts, matrix = bases
  output = tmp_path / 'new' / 'prompt.npy'
  status, said, _ = here(*recycle(folder, output))
  assert status == 0 and f'Wrote {output}: v2v-lin of ' in said
  want = prompts['mood'] @ matrix
  np.testing.assert_allclose(np.load(output), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_other_model_starts_at_it(here, bases, tmp_path):
  """Evaluated as it is, it is what is trained to the same numbers."""
  folder, *_ = bases
  output = tmp_path / 'prompt.npy'
  assert here(*recycle(folder, output))[0] == 0
  trained = save(tmp_path / 'trained.safetensors', np.load(output))
  args = commands.train(
    folder, INITIAL_CHECKPOINT_PATH=folder / str(WIDE), PROMPT_LENGTH=P
  )
  args = commands.without_training(args, 'eval')
  found = []
  for own in (
    ['--gin.PROMPT_INIT=@initializers.FromFile()',
     f'--gin.initializers.FromFile.path={output}'],
    [f'--trainable={trained}'],
    [],
  ):  # fmt: skip
    file = tmp_path / 'eval.json'
    status, _, err = here(*args, *own, f'--output={file}')
    assert status == 0, err
    found.append(json.loads(file.read_text())['user_data']['loss_per_token'])
  assert found[0] == found[1] != found[2]


def test_several_prompts_go_to_a_folder(here, bases, tmp_path):
  folder, prompts, matrix = bases
  args = recycle(folder, tmp_path / 'out', prompts=('mood', 'place'))
  status, _, _ = here(*args)
  assert status == 0
  for name, prompt in prompts.items():
    got = np.load(tmp_path / 'out' / f'{name}.npy')
    np.testing.assert_allclose(got, prompt @ matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ({'prompt': 'moood'}, "No file .*Did you mean 'mood'"),
    ({'source_base': '9'}, "No base checkpoint '.*9'"),
    ({'source_base': str(WIDE)}, 'width 8, but .* in 16 dimensions'),
    ({'source_base': 'other'}, 'trained on another base than .*384x8:'),
    ({'target_base': '16x'}, "Did you mean '16'"),
    ({'output': 'prompt.txt'}, r'written as \.npy'),
    ({'gin.RECYCLING_METHOD': 'v2v_lin'}, "Did you mean 'v2v-lin'"),
    ({'gin.WORDS': '[1, 400]'}, 'ids from 1 to 400, but .* 384 rows'),
    ({'gin.recycle.recycle.epochs': 3}, r"v2v-lin has no options, got \['epo"),
    (
      {'gin.RECYCLING_METHOD': 'v2v-nn', 'gin.recycle.recycle.epoch': 3},
      "no option 'epoch'.*Did you mean 'epochs'",
    ),
    ({'gin.WORDS': 'w.json', 'gin.VOCABULARY_PATH': 'v'}, 'not both'),
  ],
  ids=str,
)  # fmt: skip
def test_recycle_refuses(here, bases, tmp_path, args, message):
  folder, _, _ = bases
  other = folder / 'other' / 'trainable.safetensors'
  if not other.exists():
    other.parent.mkdir()
    table = np.ones((384, NARROW), np.float32)
    network = {'token_embedder': {'embedding': table}}
    checkpoints.save_trainable(other, {'method': {}, 'network': network}, {})
  flags = {
    'prompt': 'mood', 'source_base': NARROW, 'target_base': WIDE,
    'output': tmp_path / 'p.npy', **args,
  }  # fmt: skip
  paths = ('prompt', 'source_base', 'target_base')
  flags |= {name: folder / str(flags[name]) for name in paths}
  said = refused(here, 'recycle', *(f'--{k}={v}' for k, v in flags.items()))
  assert re.search(message, said), said


def test_prompts_of_one_name_are_refused(here, bases, tmp_path):
  folder, *_ = bases
  args = recycle(
    folder, tmp_path, prompts=('mood', 'mood/trainable.safetensors')
  )
  assert 'Several prompts are called mood' in refused(here, *args)
  args = recycle(folder, tmp_path / 'x.npy', prompts=('mood', 'place'))
  assert 'are written to a folder' in refused(here, *args)


# ---- recover -----------------------------------------------------------------


@pytest.fixture
def scores(tmp_path, monkeypatch):
  """Directories of runs with what `prompt-jax eval` writes."""
  for name, values in {
    'tuned': {'mood': 80.0, 'place': 90.0},
    'q5': {'mood': 40.0, 'place': 90.0},
    'q50': {'mood': 80.0, 'place': 45.0},
  }.items():
    path = tmp_path / name / 'eval_validation.json'
    path.parent.mkdir()
    found = {task: {'rank_accuracy': x} for task, x in values.items()}
    path.write_text(json.dumps(found))
  monkeypatch.chdir(tmp_path)


RECOVER = ('recover', '--reference=tuned', '--result=50=q50', '--result=5=q5')


def test_recover_prints_and_draws(here, scores, tmp_path):
  status, said, _ = here(*RECOVER, '--unseen=place', '--output=out/e.png')
  assert status == 0 and 'E_rel unseen' in said
  assert (tmp_path / 'out' / 'e.png').read_bytes()[:4] == PNG
  lines = (tmp_path / 'out' / 'e.tsv').read_text().splitlines()
  found = {tuple(x.split('\t')[:2]): x.split('\t')[-1] for x in lines}
  want = {'E_rel': '0.750', 'E_rel seen': '0.500', 'E_rel unseen': '1.000'}
  assert {k: found['5', k] for k in want} == want
  want = {'E_rel': '0.750', 'E_rel seen': '1.000', 'E_rel unseen': '0.500'}
  assert {k: found['50', k] for k in want} == want
  assert '| dimension' in (tmp_path / 'out' / 'e.md').read_text()


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--result=7=q7', "No file 'q7'.*Did you mean 'q5'"),
    ('--reference=tunned', "Did you mean 'tuned'"),
    ('--unseen=plaice', "Did you mean 'place'"),
    ('--gin.RECOVERED_METRIC=rank_acuracy', "Did you mean 'rank_accuracy'"),
    ('--result=q5', 'give it as DIMENSION=PATH'),
    ('--gin.EVAL_SPLIT=test', r"No file '.*eval_test.json'.*eval_validation"),
  ],
)
def test_recover_refuses(here, scores, flag, message):
  said = refused(here, *RECOVER, flag, '--output=e.png')
  assert re.search(message, said), said


# ---- compare_seeds, vote -----------------------------------------------------


def evaluated(folder, name, **tasks):
  path = folder / f'{name}.json'
  found = {task: {'rank_accuracy': x, 'em': 1.0} for task, x in tasks.items()}
  path.write_text(json.dumps(found))
  return path


def test_compare_seeds(here, tmp_path):
  args = []
  for seed, a, b in ((13, 71, 66), (21, 69, 68), (42, 70, 66)):
    for flag, x in (('result', a), ('reference', b)):
      path = evaluated(tmp_path, f'{flag}{seed}', rte=x, cb=50)
      args.append(f'--{flag}={seed}={path}')
  status, out, _ = here('compare_seeds', *args)
  assert status == 0
  # The differences 5, 1 and 4: of 2^3 signs two are as far from 0.
  assert out.splitlines() == [
    'rte, rank_accuracy: A 70.00 +- 1.00 (n = 3), B 66.67 +- 1.15 (n = 3): '
    'A - B = +3.33, p = 0.25 (permutation, paired, two-sided; it cannot be '
    'below 0.25)',
    'cb, rank_accuracy: A 50.00 +- 0.00 (n = 3), B 50.00 +- 0.00 (n = 3): '
    'A - B = +0.00, p = 1 (permutation, paired, two-sided; it cannot be '
    'below 0.25)',
  ]
  status, out, _ = here('compare_seeds', *args, '--gin.COMPARED_METRIC=em')
  assert status == 0 and 'rte, em: A 1.00' in out
  assert 'the same seeds' in refused(here, 'compare_seeds', *args[:-1])
  assert 'twice' in refused(here, 'compare_seeds', *args, args[0])
  odd = args[1].replace('=13=', '=')
  assert 'Expected SEED=PATH' in refused(here, 'compare_seeds', args[0], odd)
  other = f'--reference=13={evaluated(tmp_path, "other", boolq=1)}'
  message = refused(here, 'compare_seeds', args[0], other)
  assert "the references ['boolq']" in message


def test_vote(here, tmp_path):
  path = tmp_path / 'decodes.jsonl'
  texts = [f'So. The answer is {x}.' for x in (4, 5, 5)]
  row = {'targets': '5', 'predictions': texts, 'scores': [-1, -3, -3]}
  path.write_text(json.dumps(row))
  status, out, _ = here('vote', f'--decodes={path}')
  assert status == 0
  assert out.split() == [
    'vote_accuracy', '100.00', 'first_accuracy', '0.00', 'no_answer', '0.00',
    'inputs', '1',
  ]  # fmt: skip
  weighted = '--gin.VOTE_WEIGHTS=probability'
  assert (
    'vote_accuracy   0.00' in here('vote', f'--decodes={path}', weighted)[1]
  )
  path.write_text('{}')
  assert "no 'predictions'" in refused(here, 'vote', f'--decodes={path}')
