"""`prompt-jax prune`, as a user of ladder side tuning meets it."""

import dataclasses

import commands
import jax
import numpy as np
import pytest
import runs

from prompt_jax import cli
from prompt_jax import datasets
from prompt_jax.methods import pruning

R = 4


@pytest.fixture
def here(monkeypatch, capsys):
  """Runs a command in this process: (status, standard output, error)."""
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)
  return lambda *args: (commands.here(*args), *capsys.readouterr())


def lst(data, command, **changes):
  """The arguments of a command on methods/lst.gin."""
  args = commands.train(
    data, **{'REDUCTION_FACTOR': R, 'PROMPT_LENGTH': None, **changes}
  )
  args = [a.replace('soft_prompt', 'lst') for a in args]
  if command == 'train':
    return args
  args = commands.without_training(args, command)
  return [a for a in args if 'EVAL_BATCH' not in a]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  runs.write_data(folder, train=12, dev=4)
  return folder


@pytest.mark.slow
def test_prune_writes_what_lst_starts_at(here, data, tmp_path):
  output = tmp_path / 'new' / 'units.safetensors'
  args = lst(data, 'prune', PRUNE_EXAMPLES=1000)
  status, said, err = here(*args, f'--output={output}')
  assert status == 0, err
  assert (
    f'Wrote {output}: 1/4 ' in said and 'on 12 examples of user_data' in said
  )
  assert 'START=@pruning.FromFile()' in said
  # By squared gradients of the same base on the same examples.
  of = dataclasses.replace(runs.CONFIG, num_heads=2)
  made = {'method': None, 'trainable_patterns': ('.*',)}
  run = runs.make(data, config=dataclasses.asdict(of), **made)
  run.register_tasks()
  read = run.dataset_config(
    split='train', batch_size=12, shuffle=False, num_epochs=1
  )
  params = run.load().network
  batches = datasets.TrainIterator(read, run.converter())
  want = pruning.measure(run.model, params, batches, str(tmp_path / 'u'), R)
  got = pruning.FromFile(str(output))({}, run.model.config, R)
  assert got.keys() == want.keys()
  for path, axes in want.items():
    jax.tree.map(np.testing.assert_array_equal, got[path], axes)
  plain = pruning.Magnitude()(pruning.by_layer(params), run.model.config, R)
  assert any(
    (a != np.asarray(b)).any()
    for path in want
    for a, b in zip(got[path], plain[path], strict=True)
  )
  # `train` takes it, of the same factor.
  start = ['--gin.START=@pruning.FromFile()', f'--gin.UNITS_PATH={output}']
  train = lst(data, 'train', model_dir=tmp_path / 'run')
  status, said, err = here(*train, *start, '--dry_run')
  assert status == 0, err
  train = lst(data, 'train', model_dir=tmp_path / 'run', REDUCTION_FACTOR=2)
  status, _, err = here(*train, *start, '--dry_run')
  assert status == 1 and 'holds units for' in err


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'output': None}, 'Give --output=FILE'),
    ({'REDUCTION_FACTOR': 3}, 'must divide T5Config.emb_dim, which is 16'),
    ({'PRUNE_EXAMPLES': 0}, 'examples must be a whole number of at least 1'),
    ({'PRUNE_SPLIT': 'trian'}, "no split 'trian'. Did you mean 'train'"),
    ({'PRUNE_EXAMPLE': 3}, 'Did you mean PRUNE_EXAMPLES'),
    ({'INITIAL_CHECKPOINT_PATH': 'nowhere'}, 'No checkpoint in nowhere'),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_prune_refuses(here, data, tmp_path, changes, message):
  flags = {'output': tmp_path / 'units', **changes}
  status, _, err = here(*lst(data, 'prune', **flags))
  assert status == 1 and 'Traceback' not in err
  assert err.startswith('prompt-jax prune: ') and message in err
