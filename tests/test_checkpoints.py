"""Saving and restoring: what is kept, what is refused, what may go wrong."""

import contextlib
import json
import os
import pathlib
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import fingerprints
from prompt_jax import optimizers
from prompt_jax import partitioning
from prompt_jax.train_state import TrainState

BASE = {'token_embedder/embedding': '8x4:00'}
OTHER = {'token_embedder/embedding': '8x4:01'}
ADAFACTOR = optimizers.adafactor(multiply_by_parameter_scale=False)


def state(step, shape=(4, 16), optimizer=ADAFACTOR, name='prompt'):
  key = jax.random.PRNGKey(step)
  trainable = {
    'method': {name: jax.random.normal(key, shape)},
    'network': {},
  }
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    trainable=trainable,
    opt_state=optimizer.init(trainable),
    rng=key,
  )


def abstract(found, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), found
  )


def opened(folder, *args, **kwargs):
  return checkpoints.Checkpointer(str(folder), *args, **kwargs)


def saved(folder, steps=(3,), keep=3, base=BASE, **kwargs):
  """Saves states at some steps; returns the last."""
  with opened(folder, keep, base=base) as checkpointer:
    for step in steps:
      checkpointer.save(state(step, **kwargs), {'data_position': step})
  return state(steps[-1], **kwargs)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype


@pytest.mark.parametrize(
  'optimizer', [ADAFACTOR, optimizers.adamw()], ids=['adafactor', 'adamw']
)
def test_state_comes_back_bit_for_bit(tmp_path, optimizer):
  want = saved(tmp_path, optimizer=optimizer)
  with opened(tmp_path, base=BASE) as checkpointer:
    got, host = checkpointer.restore(abstract(want))
  assert_same(got, want)
  assert host['data_position'] == 3


def test_newest_stay(tmp_path):
  saved(tmp_path, steps=(1, 2, 3, 4), keep=2)
  folder = tmp_path / 'checkpoints'
  assert sorted(p.name for p in folder.iterdir()) == ['3', '4']
  with opened(tmp_path, 2, base=BASE) as checkpointer:
    got, _ = checkpointer.restore(abstract(state(3)), 3)
    assert int(got.step) == 3
    with pytest.raises(checkpoints.CheckpointError, match=r'step 1 .*\[3, 4\]'):
      checkpointer.restore(abstract(state(3)), 1)


def test_all_stay_if_asked(tmp_path):
  saved(tmp_path, steps=(1, 2, 3, 4, 5), keep=None)
  assert len(list((tmp_path / 'checkpoints').iterdir())) == 5


def test_prompt_checkpoint_is_small(tmp_path):
  """100 soft tokens of T5 1.1 small, with Adafactor's moments."""
  saved(tmp_path, shape=(100, 512))
  files = [p for p in tmp_path.rglob('*') if p.is_file()]
  total = sum(p.stat().st_size for p in files)
  assert 100_000 < total < 1_000_000  # arrays are compressed


def test_restores_onto_another_mesh(tmp_path):
  want = saved(tmp_path, shape=(8, 16))
  mesh = partitioning.Partitioner(2, 4).mesh
  spec = jax.sharding.PartitionSpec
  wanted = abstract(want, jax.NamedSharding(mesh, spec()))
  cut = jax.NamedSharding(mesh, spec('data', 'model'))
  wanted = wanted.replace(
    trainable=abstract(want.trainable, cut),
  )
  with opened(tmp_path, base=BASE) as checkpointer:
    got, _ = checkpointer.restore(wanted)
  assert got.trainable['method']['prompt'].sharding == cut
  assert_same(got, want)
  # And back: the eight parts of another save on one device.
  again = tmp_path / 'again'
  with opened(again, base=BASE) as checkpointer:
    checkpointer.save(got, {})
  with opened(again, base=BASE) as checkpointer:
    assert_same(checkpointer.restore(abstract(want))[0], want)


def test_trainable_alone(tmp_path):
  """Whatever the optimizer was, and while the run may be going on."""
  want = saved(tmp_path, steps=(3, 4))
  folder = tmp_path / 'checkpoints'
  unfinished = folder / '5.orbax-checkpoint-tmp-1'
  unfinished.mkdir()
  with opened(tmp_path, base=BASE, read_only=True) as checkpointer:
    wanted = abstract(want.trainable)
    assert_same(checkpointer.restore_trainable(wanted), want.trainable)
    got = checkpointer.restore_trainable(wanted, 3)
    assert_same(got, state(3).trainable)
  assert unfinished.exists()


def test_half_written_checkpoints_are_left_out_and_removed(tmp_path):
  want = saved(tmp_path, steps=(3,))
  folder = tmp_path / 'checkpoints'
  unfinished = folder / '5.orbax-checkpoint-tmp-1'
  unfinished.mkdir()
  (unfinished / 'state').mkdir()
  with opened(tmp_path, base=BASE) as checkpointer:
    assert checkpointer.latest_step() == 3
    assert_same(checkpointer.restore(abstract(want))[0], want)
  assert not unfinished.exists()


def test_reading_makes_no_folder(tmp_path):
  with opened(tmp_path, read_only=True) as checkpointer:
    with pytest.raises(checkpoints.CheckpointError, match='there are none'):
      checkpointer.restore_trainable(abstract(state(1).trainable), 1)
  assert not list(tmp_path.iterdir())


# ---- what is refused -------------------------------------------------------


def test_another_base_is_refused_by_name(tmp_path):
  want = saved(tmp_path)
  with opened(tmp_path, base=OTHER) as checkpointer:
    for restore, tree in (
      (checkpointer.restore, want),
      (checkpointer.restore_trainable, want.trainable),
    ):
      with pytest.raises(fingerprints.BaseMismatch) as error:
        restore(abstract(tree))
      assert 'token_embedder/embedding' in str(error.value)
      assert str(tmp_path / 'checkpoints' / '3') in str(error.value)


def test_all_wrong_shapes_are_listed(tmp_path):
  want = saved(tmp_path)
  longer = state(3, shape=(5, 16))
  other = state(3, name='lora')
  with opened(tmp_path, base=BASE) as checkpointer:
    with pytest.raises(
      checkpoints.CheckpointError,
      match=r'method/prompt: shape \(4, 16\), expected \(5, 16\)',
    ):
      checkpointer.restore(abstract(longer))
    with pytest.raises(checkpoints.CheckpointError) as error:
      checkpointer.restore_trainable(abstract(other.trainable))
    assert 'method/lora: missing' in str(error.value)
    assert 'method/prompt: extra' in str(error.value)
    assert_same(checkpointer.restore(abstract(want))[0], want)


def test_another_vocabulary_is_refused(tmp_path):
  with opened(tmp_path, vocabulary='aaaa') as checkpointer:
    checkpointer.save(state(3), {})
  with opened(tmp_path, vocabulary='bbbb') as checkpointer:
    with pytest.raises(
      checkpoints.CheckpointError, match=r'/3 was .*vocabulary .*aaaa.*bbbb'
    ):
      checkpointer.restore(abstract(state(3)))
  for known in ('aaaa', None):
    with opened(tmp_path, vocabulary=known) as checkpointer:
      checkpointer.restore(abstract(state(3)))


# ---- places that take no files -----------------------------------------------


@contextlib.contextmanager
def largest_file(size):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Orbax's threads speak of the failure too.
@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_failed_save_leaves_the_last_checkpoint(tmp_path):
  shape = (512, 512)
  want = saved(tmp_path, shape=shape)
  with largest_file(100_000):
    with pytest.raises(checkpoints.CheckpointError) as error:
      with opened(tmp_path, base=BASE) as checkpointer:
        checkpointer.save(state(4, shape), {})
  assert 'step 3) is untouched' in str(error.value)
  with opened(tmp_path, base=BASE) as checkpointer:
    assert checkpointer.latest_step() == 3
    assert_same(checkpointer.restore(abstract(want))[0], want)
    checkpointer.save(state(4, shape), {})
  with opened(tmp_path, base=BASE) as checkpointer:
    assert checkpointer.latest_step() == 4


@pytest.fixture
def full_disk(tmp_path):
  """A file system with no room, where one may be mounted."""
  folder = tmp_path / 'full'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True, timeout=10)
  except (OSError, subprocess.SubprocessError):
    pytest.skip('a small tmpfs cannot be mounted here')
  (folder / 'ballast').write_bytes(b'0' * 65536)
  yield folder
  subprocess.run(['umount', str(folder)], check=True, timeout=10)


def test_full_disk_is_found_before_any_work(full_disk):
  with pytest.raises(checkpoints.CheckpointError, match='No space left'):
    checkpoints.check_writable(str(full_disk))


def test_directory_that_cannot_be_made(tmp_path):
  file = tmp_path / 'file'
  file.write_text('here')
  for path in (file, file / 'below'):
    with pytest.raises(checkpoints.CheckpointError, match='cannot be written'):
      checkpoints.check_writable(str(path))
  assert file.read_text() == 'here'
  checkpoints.check_writable(str(tmp_path / 'a' / 'b'))
  assert list((tmp_path / 'a' / 'b').iterdir()) == []


# ---- the trained part alone ------------------------------------------------


def test_trainable_file(tmp_path):
  trainable = state(3).trainable
  header = {'step': 3, 'method': 'SoftPrompt', 'metrics': {'a': {'b': 0.1}}}
  path = tmp_path / 'x.safetensors'
  checkpoints.save_trainable(path, trainable, header)
  arrays, found = checkpoints.load_trainable(str(path))
  assert list(arrays) == ['method/prompt']
  np.testing.assert_array_equal(
    arrays['method/prompt'], trainable['method']['prompt']
  )
  assert found['method'] == 'SoftPrompt'
  assert json.loads(found['metrics']) == {'a': {'b': 0.1}}
  # The arrays are aligned, as readers that map the file want it.
  assert int.from_bytes(path.read_bytes()[:8], 'little') % 8 == 0


def test_trainable_file_has_the_same_bytes_every_time(tmp_path):
  trainable = state(3).trainable
  header = {f'key_{i}': i for i in range(20)}
  files = [tmp_path / str(i) for i in range(5)]
  for file in files:
    checkpoints.save_trainable(file, trainable, header)
  assert len({file.read_bytes() for file in files}) == 1


def test_damaged_trainable_file(tmp_path):
  path = tmp_path / 'x.safetensors'
  with pytest.raises(checkpoints.CheckpointError, match='No file'):
    checkpoints.load_trainable(str(path))
  checkpoints.save_trainable(path, state(3).trainable, {'step': 3})
  whole = path.read_bytes()
  for content in (whole[:-10], whole[:20], b'', b'not safetensors at all'):
    path.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match='not a whole'):
      checkpoints.load_trainable(str(path))


def test_files_are_replaced_as_a_whole(tmp_path):
  path = tmp_path / 'x'
  checkpoints.write_atomically(path, b'before')
  with largest_file(1000):
    with pytest.raises(checkpoints.CheckpointError, match='could not be'):
      checkpoints.write_atomically(path, b'0' * 100_000)
  assert path.read_bytes() == b'before'
  assert os.listdir(tmp_path) == ['x']
  with pytest.raises(checkpoints.CheckpointError, match='could not be'):
    checkpoints.write_atomically(pathlib.Path(tmp_path / 'no' / 'x'), b'')
