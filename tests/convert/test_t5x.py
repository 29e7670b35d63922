"""T5X checkpoints, real and made here in every layout that T5X writes.

Over 400 lines, since all cases share the builders at the top.
"""

import json
import logging
import pathlib
import re
import shutil
from typing import Any

from flax import serialization
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from prompt_jax import convert
from prompt_jax.convert import t5x

BFLOAT16 = np.dtype('bfloat16')


@pytest.fixture(scope='module')
def tiny(shared) -> pathlib.Path:
  return shared / 'goldens' / 't5x_tiny_checkpoint' / 'checkpoint_3'


@pytest.fixture(scope='module')
def golden(shared) -> dict[str, np.ndarray]:
  """Flat arrays as T5X reads them from `tiny`."""
  with np.load(shared / 'goldens' / 't5x_tiny_checkpoint_contents.npz') as file:
    return dict(file)


@pytest.fixture(scope='module')
def target(golden) -> dict[str, np.ndarray]:
  return {
    name.removeprefix('target/'): array
    for name, array in golden.items()
    if name.startswith('target/')
  }


@pytest.fixture
def copy(tiny, tmp_path) -> pathlib.Path:
  """A checkpoint that a test may damage."""
  path = tmp_path / 'checkpoint_3'
  shutil.copytree(tiny, path)
  for file in [path, *path.rglob('*')]:
    file.chmod(0o755)
  return path


def random_target(layers: int = 3) -> dict[str, np.ndarray]:
  """Parameters of a minimal T5 with 2 heads of size 5 on a width of 4."""
  rng = np.random.default_rng(0)
  shapes: dict[str, tuple[int, ...]] = {'token_embedder/embedding': (7, 4)}
  for stack, attentions in (
    ('encoder', ['attention']),
    ('decoder', ['self_attention', 'encoder_decoder_attention']),
  ):
    shapes[f'{stack}/{stack}_norm/scale'] = (4,)
    shapes[f'{stack}/relpos_bias/rel_embedding'] = (2, 6)
    for i in range(layers):
      layer = f'{stack}/layers_{i}'
      shapes[f'{layer}/pre_mlp_layer_norm/scale'] = (4,)
      shapes[f'{layer}/mlp/wi/kernel'] = (4, 9)
      shapes[f'{layer}/mlp/wo/kernel'] = (9, 4)
      for name in attentions:
        for part in ('query', 'key', 'value'):
          shapes[f'{layer}/{name}/{part}/kernel'] = (4, 10)
        shapes[f'{layer}/{name}/out/kernel'] = (10, 4)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def scanned(target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same parameters as this package's scanned network names them."""
  layers: dict[str, dict[int, np.ndarray]] = {}
  result = {}
  for name, array in target.items():
    if match := re.search(r'layers_(\d+)', name):
      name = name.replace(match[0], 'layers')
      layers.setdefault(name, {})[int(match[1])] = array
    else:
      result[name] = array
  for name, of in layers.items():
    result[name] = np.stack([of[i] for i in range(len(of))])
  return result


def scalable(target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same parameters as T5X's scalable network stores them."""
  result = {}
  for name, array in scanned(target).items():
    stack = name.split('/')[0]
    if name.endswith('rel_embedding'):
      array = np.stack([array] * 3)
      name = f'{stack}/{name}'
    elif '/layers/' not in name:
      result[name] = array
      continue
    if 'attention' in name:
      heads = (2, 5, 4) if '/out/' in name else (4, 2, 5)
      array = array.reshape(3, *heads)
    name = name.replace(f'{stack}/layers/', f'{stack}/{stack}/')
    result[name] = np.moveaxis(array, 0, 1)
  return result


def structs(target: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct(array.shape, np.float32)
    for name, array in target.items()
  }


def write(path: pathlib.Path, target: dict[str, Any], version: int = 3):
  """A legacy checkpoint with everything inline."""
  path.mkdir(parents=True, exist_ok=True)
  optimizer = {
    'target': traverse_util.unflatten_dict(target, sep='/'),
    'state': {'step': np.int32(11), 'param_states': {'a': None}},
  }
  tree = {'version': version, 'optimizer': optimizer}
  (path / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  return path


def write_orbax(parent: pathlib.Path, target: dict[str, Any], **handler):
  """As T5X's OrbaxCheckpointManagerInterface sets Orbax up and saves."""
  tree = {
    'target': traverse_util.unflatten_dict(target, sep='/'),
    'state': {
      'step': np.int32(11),
      'param_states': {'a': {'v': np.arange(3.0, dtype=np.float32), 'm': None}},
    },
    'flax_mutables': {},
  }
  with ocp.CheckpointManager(
    parent,
    options=ocp.CheckpointManagerOptions(step_prefix='checkpoint'),
    item_handlers={'state': ocp.PyTreeCheckpointHandler(**handler)},
  ) as manager:
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
    manager.save(11, args=args)
  return parent / 'checkpoint_11'


def assert_equal(leaves, arrays):
  assert leaves.keys() == arrays.keys()
  for name, array in arrays.items():
    leaf = leaves[name]
    found = leaf.array()
    assert leaf.shape == found.shape == array.shape, name
    assert leaf.dtype == found.dtype == array.dtype, name
    np.testing.assert_array_equal(found, array, err_msg=name)


class TestLegacy:
  def test_contents(self, tiny, target):
    checkpoint = convert.open_checkpoint(str(tiny))
    assert (checkpoint.kind, checkpoint.step) == ('t5x', 3)
    assert len(checkpoint.leaves) == 52
    assert_equal(checkpoint.leaves, target)

  def test_all_105_arrays(self, tiny, golden):
    state = convert.read_t5x_state(str(tiny))
    assert len(golden) == 105
    for name, array in golden.items():
      assert state[name].dtype == array.dtype
      np.testing.assert_array_equal(state.pop(name), array, err_msg=name)
    # What is left are the accumulators that were not in use.
    assert len(state) == 3 * 52
    for name, array in state.items():
      assert name.endswith(('/m', '/v_row', '/v_col'))
      np.testing.assert_array_equal(array, [0.0])

  def test_reads_slices(self, tiny, target):
    leaves = convert.open_checkpoint(str(tiny)).leaves
    for name, index in {
      'token_embedder/embedding': np.s_[4090:4100, 1:3],
      'decoder/logits_dense/kernel': np.s_[0:4, 32000:32128],
      'encoder/encoder_norm/scale': np.s_[1:2],
    }.items():
      found = leaves[name].read(index if isinstance(index, tuple) else (index,))
      np.testing.assert_array_equal(found, target[name][index])

  def test_path_of_the_file(self, tiny):
    assert convert.open_checkpoint(str(tiny / 'checkpoint')).path == str(tiny)

  def test_sharded_array(self, tiny, target):
    name = 'token_embedder/embedding'
    leaf = convert.open_checkpoint(str(tiny)).leaves[name]
    mesh = jax.make_mesh((2, 4), ('a', 'b'))
    sharding = jax.NamedSharding(mesh, jax.P('a', 'b'))
    array = jax.make_array_from_callback(leaf.shape, sharding, leaf.read)
    np.testing.assert_array_equal(array, target[name])

  def test_fits_scanned_and_unrolled(self, tiny, target):
    checkpoint = convert.open_checkpoint(str(tiny))
    for expected in (target, scanned(target)):
      assert_equal(convert.fit(checkpoint, structs(expected)), expected)

  def test_report(self, tiny, target):
    checkpoint = convert.open_checkpoint(str(tiny))
    report = convert.report(checkpoint, structs(scanned(target)))
    head, *lines = report.splitlines()
    assert head == f'{tiny} (t5x, step 3): fits'
    rows = [line.split() for line in lines]
    row = 'encoder/layers_{0..1}/mlp/wo/kernel [8, 4] [8, 4] float32 ok'
    assert row.split() in rows

  def test_bfloat16_of_version_2(self, tmp_path):
    values = np.arange(6.0).reshape(2, 3).astype(BFLOAT16)
    path = write(tmp_path / 'checkpoint_1', {'b/y': values}, version=2)
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{path}/target.a.x'},
      'metadata': {'shape': [2, 3], 'chunks': [2, 3], 'dtype': '<u2'},
    }
    ts.open(spec, create=True).result().write(values.view(np.uint16)).result()
    spec['kvstore']['path'] = 'target.a.x'
    write(path, {'a/x': spec, 'b/y': values}, version=2)
    leaves = convert.open_checkpoint(str(path)).leaves
    assert_equal(leaves, {'a/x': values, 'b/y': values})

  @pytest.mark.parametrize('driver', ['gfile', 'file', 'gcs'])
  @pytest.mark.parametrize('outside', [False, True])
  def test_placeholders(self, tmp_path, driver, outside):
    path = write(tmp_path / 'checkpoint_1', {})
    values = np.arange(6.0, dtype=np.float32)
    metadata = {'shape': [6], 'chunks': [4], 'dtype': '<f4'}
    kvstore = {'driver': 'file', 'path': f'{path}/target.a'}
    spec = {'driver': 'zarr', 'kvstore': kvstore, 'metadata': metadata}
    ts.open(spec, create=True).result().write(values).result()
    spec['kvstore'] = {'driver': driver}
    (spec if outside else spec['kvstore'])['path'] = 'target.a'
    if driver == 'gcs':
      spec['kvstore']['bucket'] = 't5x-dummy-bucket'
    write(path, {'a': spec})
    leaves = convert.open_checkpoint(str(path)).leaves
    assert_equal(leaves, {'a': values})

  def test_bucket(self, tiny):
    data = (tiny / 'checkpoint').read_bytes()
    kind, entries = t5x._msgpack_entries('gs://bucket/some/checkpoint_3', data)
    assert kind == 't5x'
    spec = ts.Spec(entries['target/token_embedder/embedding']).to_json()
    assert spec['driver'] == 'zarr'
    assert spec['kvstore'] == {
      'driver': 'gcs',
      'bucket': 'bucket',
      'path': 'some/checkpoint_3/target.token_embedder.embedding/',
    }

  def test_bucket_folders(self):
    root = {'driver': 'gcs', 'bucket': 'b', 'path': ''}
    assert t5x.kvstore_spec('gs://b') == t5x.kvstore_spec('gs://b/') == root
    assert t5x.kvstore_spec('gs://b/c/d/')['path'] == 'c/d/'
    assert t5x.kvstore_spec('/c/d') == {'driver': 'file', 'path': '/c/d/'}


class TestOrbax:
  @pytest.mark.parametrize(
    'handler',
    [
      {'use_ocdbt': True},  # T5X's choice.
      {'use_ocdbt': False},
      {'use_ocdbt': True, 'use_zarr3': True},
    ],
  )
  def test_contents(self, tmp_path, handler):
    written = random_target()
    name = 'encoder/layers_0/mlp/wi/kernel'
    written[name] = written[name].astype(BFLOAT16)
    arrays = {n: jax.numpy.asarray(a) for n, a in written.items()}
    path = write_orbax(tmp_path, arrays, **handler)
    for given in (path, tmp_path, path / 'state'):
      checkpoint = convert.open_checkpoint(str(given))
      assert (checkpoint.kind, checkpoint.step) == ('t5x-orbax', 11)
      assert_equal(checkpoint.leaves, written)
    state = convert.read_t5x_state(str(path))
    assert state['state/step'] == 11
    np.testing.assert_array_equal(state['state/param_states/a/v'], [0, 1, 2])

  def test_placeholders_of_early_versions(self, tmp_path):
    written = random_target()
    folder = write_orbax(tmp_path, written, use_ocdbt=False) / 'state'
    (folder / '_METADATA').unlink()
    flat = {
      f'target/{name}': f'PLACEHOLDER://target.{name.replace("/", ".")}'
      for name in written
    }
    tree = traverse_util.unflatten_dict(
      flat | {'state/step': np.int32(11), 'flax_mutables': None}, sep='/'
    )
    (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
    checkpoint = convert.open_checkpoint(str(tmp_path))
    assert (checkpoint.kind, checkpoint.step) == ('t5x-orbax', 11)
    assert_equal(checkpoint.leaves, written)

  def test_bucket(self):
    metadata = {
      'tree_metadata': {
        "('target', 'a')": {
          'key_metadata': [{'key': 'target'}, {'key': 'a'}],
          'value_metadata': {'value_type': 'jax.Array'},
        }
      }
    }
    # Whether there is a database cannot be asked without a network.
    kvstore = {
      'driver': 'ocdbt',
      'base': t5x.kvstore_spec('gs://bucket/checkpoint_3/state'),
      'path': '',
    }
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(t5x, '_orbax_kvstore', lambda _: kvstore)
      entries = t5x._orbax_entries('gs://...', json.dumps(metadata).encode())
    spec = ts.Spec(entries['target/a']).to_json()['kvstore']
    assert spec['path'] == 'target.a/'
    assert spec['base'] == {
      'driver': 'gcs',
      'bucket': 'bucket',
      'path': 'checkpoint_3/state/',
    }

  def test_damaged(self, tmp_path):
    path = write_orbax(tmp_path, random_target(), use_ocdbt=True) / 'state'
    data = (path / '_METADATA').read_text()
    (path / '_METADATA').write_text(data[:-10])
    with pytest.raises(convert.CheckpointError, match='state/_METADATA is dam'):
      convert.open_checkpoint(str(tmp_path))
    (path / '_METADATA').write_text(data)
    shutil.rmtree(path / 'd')
    shutil.rmtree(path / 'ocdbt.process_0')
    with pytest.raises(convert.CheckpointError, match='Cannot open'):
      convert.open_checkpoint(str(tmp_path))


class TestScanned:
  def test_equals_minimal(self, tmp_path):
    minimal = random_target()
    write(tmp_path / 'scalable', scalable(minimal))
    checkpoint = convert.open_checkpoint(str(tmp_path / 'scalable'))
    assert checkpoint.leaves.keys() == minimal.keys()
    for expected in (minimal, scanned(minimal)):
      fitted = convert.fit(checkpoint, structs(expected))
      assert_equal(fitted, expected)

  def test_zarr(self, tmp_path):
    minimal = random_target()
    path = write_orbax(tmp_path, scalable(minimal), use_ocdbt=True)
    expected = scanned(minimal)
    fitted = convert.fit(convert.open_checkpoint(str(path)), structs(expected))
    assert_equal(fitted, expected)
    name = 'decoder/layers/self_attention/query/kernel'
    index = np.s_[1:3, 2:4, 3:8]
    np.testing.assert_array_equal(
      fitted[name].read(index), expected[name][index]
    )

  @pytest.mark.parametrize('scan', [True, False])
  def test_position_tables_differ(self, tmp_path, scan):
    minimal = random_target()
    name = 'encoder/relpos_bias/rel_embedding'
    table = minimal[name]
    tables = np.stack([table, table, table + 0.25], 1)
    if scan:
      written = scalable(minimal)
      written[f'encoder/{name}'] = tables
    else:
      del minimal[name]
      written = minimal | {
        name.replace('/', f'/layers_{i}/', 1): tables[:, i] for i in range(3)
      }
    write(tmp_path, written)
    with pytest.raises(
      convert.CheckpointError, match=r'layers 0 and 2 by up to 0\.25'
    ):
      convert.open_checkpoint(str(tmp_path))

  def test_layers_disagree(self, tmp_path):
    written = scalable(random_target())
    name = 'decoder/decoder/mlp/wi/kernel'
    written[name] = written[name][:, :2]
    write(tmp_path, written)
    with pytest.raises(convert.CheckpointError, match='3 layers of the decod'):
      convert.open_checkpoint(str(tmp_path))


class TestFind:
  def test_newest(self, tmp_path, caplog):
    for step in (9, 10, 2):
      write(tmp_path / f'checkpoint_{step}', {'a': np.full(2, step)})
    (tmp_path / 'checkpoint_11.tmp-123').mkdir()
    with caplog.at_level(logging.INFO, logger='absl'):
      checkpoint = convert.open_checkpoint(str(tmp_path))
    assert checkpoint.path == f'{tmp_path}/checkpoint_10'
    assert '[2, 9, 10]' in caplog.text

  @pytest.mark.parametrize('name', ['', 'nothing/here'])
  def test_nothing(self, tmp_path, name):
    (tmp_path / 'a_file').touch()
    with pytest.raises(convert.CheckpointError) as error:
      convert.open_checkpoint(str(tmp_path / name))
    for text in ('checkpoint (T5X)', 'state/_METADATA', 'config.json'):
      assert text in str(error.value)
    assert ('nothing.' if name else 'Found: a_file.') in str(error.value)

  def test_half_written(self, tmp_path):
    (tmp_path / 'checkpoint_5.orbax-checkpoint-tmp').mkdir()
    with pytest.raises(convert.CheckpointError, match='Not written to the end'):
      convert.open_checkpoint(str(tmp_path))

  def test_newest_is_empty(self, tmp_path):
    write(tmp_path / 'checkpoint_1', {})
    (tmp_path / 'checkpoint_2').mkdir()
    with pytest.raises(convert.CheckpointError, match=r'checkpoint_2.*nothing'):
      convert.open_checkpoint(str(tmp_path))


class TestDamaged:
  @pytest.mark.parametrize('length', [0, 10, 1000, 1_000_000])
  def test_cut_off(self, copy, length):
    file = copy / 'checkpoint'
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(
      convert.CheckpointError, match='checkpoint_3/checkpoint'
    ):
      convert.open_checkpoint(str(copy))

  def test_array_is_gone(self, copy):
    shutil.rmtree(copy / 'target.encoder.layers_1.mlp.wo.kernel')
    with pytest.raises(
      convert.CheckpointError, match=r'wo/kernel \(.*/target\.encoder\.layers_1'
    ):
      convert.open_checkpoint(str(copy))

  def test_metadata_is_cut_off(self, copy):
    file = copy / 'target.encoder.layers_1.mlp.wo.kernel' / '.zarray'
    file.write_text(file.read_text()[:20])
    with pytest.raises(convert.CheckpointError, match=r'layers_1\.mlp\.wo'):
      convert.open_checkpoint(str(copy))

  def test_chunk_is_gone(self, copy):
    (copy / 'target.token_embedder.embedding' / '3.0').unlink()
    leaf = convert.open_checkpoint(str(copy)).leaves['token_embedder/embedding']
    leaf.read(np.s_[0:10, 0:4])
    with pytest.raises(
      convert.CheckpointError, match=r'target\.token_embedder'
    ):
      leaf.array()

  def test_chunk_is_cut_off(self, copy):
    file = copy / 'target.token_embedder.embedding' / '3.0'
    file.write_bytes(file.read_bytes()[:100])
    leaf = convert.open_checkpoint(str(copy)).leaves['token_embedder/embedding']
    with pytest.raises(
      convert.CheckpointError, match=r'target\.token_embedder'
    ):
      leaf.array()

  def test_placeholder_of_another_shape(self, copy):
    name = 'target.encoder.layers_0.attention.query.kernel'
    file = copy / name / '.zarray'
    file.write_text(file.read_text().replace('"shape":[4,4]', '"shape":[4,8]'))
    with pytest.raises(
      convert.CheckpointError, match=r'of \[4,4\] .* \[4,8\]$'
    ):
      convert.open_checkpoint(str(copy))

  def test_tensorflow(self, tmp_path):
    (tmp_path / 'checkpoint').write_text(
      'model_checkpoint_path: "model.ckpt-0"'
    )
    with pytest.raises(convert.CheckpointError, match='TensorFlow'):
      convert.open_checkpoint(str(tmp_path))

  def test_old_version(self, tmp_path):
    write(tmp_path, {'a': np.zeros(1)}, version=1)
    with pytest.raises(convert.CheckpointError, match='version 1, not 2 or 3'):
      convert.open_checkpoint(str(tmp_path))

  def test_no_target(self, tmp_path):
    write(tmp_path, {})
    with pytest.raises(convert.CheckpointError, match=r"no `target`.*'state'"):
      convert.open_checkpoint(str(tmp_path))

  def test_unknown_driver(self, tmp_path):
    spec = {'driver': 'n5', 'kvstore': {'driver': 's3'}, 'metadata': {}}
    write(tmp_path, {'a': spec})
    with pytest.raises(convert.CheckpointError, match='target/a in an unknown'):
      convert.open_checkpoint(str(tmp_path))
