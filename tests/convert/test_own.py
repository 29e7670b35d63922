"""A network that was trained here is a base like any other."""

import numpy as np
import pytest
import runs

from prompt_jax import checkpoints
from prompt_jax import convert
from prompt_jax import optimizers
from prompt_jax import train_state

FIELDS = {'method': None, 'trainable_patterns': ('.*',)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  runs.write_data(folder)
  return folder


@pytest.fixture(
  scope='module',
  params=['scan', pytest.param('loop', marks=pytest.mark.slow)],
)
def trained(request, data, tmp_path_factory):
  """A directory of a run of two steps that trained everything."""
  folder = tmp_path_factory.mktemp(request.param)
  config = {'scan_layers': request.param == 'scan'}
  run = runs.make(data, config=config, **FIELDS)
  runs.go(
    run,
    folder,
    total_steps=2,
    optimizer=optimizers.sgd(),
    learning_rate=1e-3,
  )
  return folder


@pytest.mark.parametrize('scan', [True, False], ids=['as_scan', 'as_loop'])
def test_round_trip(data, trained, scan):
  for path in (trained, trained / 'trainable.safetensors'):
    run = runs.make(
      data, config={'scan_layers': scan}, initial_checkpoint_path=str(path)
    )
    base = run.load()
    assert base.step == 2
    found = train_state.flatten(base.params)
    arrays, _ = checkpoints.load_trainable(
      str(trained / 'trainable.safetensors')
    )
    layers = '/layers/' if scan else '/layers_0/'
    for name, x in arrays.items():
      name = name.removeprefix('network/')
      if '/layers_0/' in name:
        x = x[None] if scan else x
      elif '/layers/' in name and not scan:
        x = x[0]
      name = name.replace('/layers_0/', layers).replace('/layers/', layers)
      np.testing.assert_array_equal(found.pop(name), x)
    assert not found


def test_method_is_no_base(data, tmp_path):
  runs.go(runs.make(data), tmp_path, total_steps=1)
  with pytest.raises(
    convert.CheckpointError, match=r'prompt: a base is a whol'
  ):
    convert.open_checkpoint(tmp_path)


def test_file_that_is_not_there_or_not_whole(tmp_path):
  with pytest.raises(convert.CheckpointError, match='No file'):
    convert.open_checkpoint(tmp_path / 'a.safetensors')
  (tmp_path / 'trainable.safetensors').write_bytes(b'no such thing')
  with pytest.raises(convert.CheckpointError, match='not a whole'):
    convert.open_checkpoint(tmp_path)
