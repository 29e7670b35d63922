"""The mesh, where parameters lie on it, and several processes."""

from flax import linen as nn
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import runs

from prompt_jax import partitioning

PARTITIONER = partitioning.Partitioner(2, 4)


def boxed(shape, *names):
  return nn.Partitioned(jax.ShapeDtypeStruct(shape, np.float32), names)


def test_mesh_has_all_devices():
  assert dict(partitioning.make_mesh().shape) == {'data': 8, 'model': 1}
  mesh = partitioning.make_mesh(model=4)
  assert dict(mesh.shape) == {'data': 2, 'model': 4}
  assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize('shape', [(3, 2), (2, 2), (-1, 3), (0, 1), (8, 0)])
def test_mesh_that_does_not_fit(shape):
  with pytest.raises(ValueError, match=r'mesh of shape \(.*\)'):
    partitioning.make_mesh(*shape)


def test_rules_place_parameters():
  found = PARTITIONER.shardings(
    {
      'kernel': boxed((6, 8), 'embed', 'joined_kv'),
      'uneven': boxed((6, 6), 'embed', 'joined_kv'),
      'prompt': boxed((4, 8), 'prompt', 'prompt_embed'),
      'plain': jax.ShapeDtypeStruct((8, 8), np.float32),
    }
  )
  assert found['kernel'].spec == P(None, 'model')
  # 6 columns do not divide over 4 devices: whole on each, not an error.
  assert found['uneven'].spec == P(None, None)
  assert found['prompt'].spec == P(None, None)
  assert found['plain'].spec == P()


def test_axis_without_a_rule_is_named():
  with pytest.raises(ValueError, match=r"'k'.*no rule.*'depth'"):
    PARTITIONER.shardings({'k': boxed((2,), 'depth')})


def test_moments_lie_as_their_parameters():
  sharded = PARTITIONER.shardings({'a': {'w': boxed((6, 8), 'embed', 'mlp')}})
  moments = {
    'count': np.zeros(()),
    'v': {'a': {'w': np.zeros((6, 8))}},
    'row': {'a': {'w': np.zeros(6)}},
    'other': {'a': {'w': np.zeros((6, 9))}},
  }
  found = PARTITIONER.like(sharded, moments)
  assert found['v']['a']['w'].spec == P(None, 'model')
  assert found['count'].spec == P()
  assert found['row']['a']['w'].spec == P()
  assert found['other']['a']['w'].spec == P()  # 9 columns do not divide


def test_batch_is_cut_over_the_data_axis():
  batch = {'x': np.arange(12).reshape(4, 3)}
  placed = PARTITIONER.put_batch(batch)['x']
  assert placed.sharding.spec == P('data')
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(PARTITIONER.gather(placed), batch['x'])
  with pytest.raises(ValueError, match=r'batch of 5 rows.*2 devices'):
    PARTITIONER.put_batch({'x': np.zeros((5, 3))})


def test_every_process_reads_only_its_own_part():
  asked = []
  whole = np.arange(16.0).reshape(2, 8)
  sharding = jax.NamedSharding(PARTITIONER.mesh, P(None, 'model'))

  def read(index):
    asked.append(whole[index].shape)
    return whole[index]

  placed = PARTITIONER.put(whole.shape, sharding, read)
  assert set(asked) == {(2, 2)}
  np.testing.assert_array_equal(placed, whole)


def test_one_process_needs_no_coordinator(monkeypatch):
  called = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *a: called.append(a)
  )
  for name in ('JAX_COORDINATOR_ADDRESS', 'PROMPT_JAX_DISTRIBUTED'):
    monkeypatch.delenv(name, raising=False)
  partitioning.initialize_distributed()
  assert called == []
  with pytest.raises(ValueError, match='JAX_NUM_PROCESSES'):
    partitioning.initialize_distributed('here:1')
  partitioning.initialize_distributed('here:1', 2, 0)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'there:2')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '3')
  monkeypatch.setenv('JAX_PROCESS_ID', '1')
  partitioning.initialize_distributed()
  assert called == [('here:1', 2, 0), ('there:2', 3, 1)]


def test_frozen_parameters_are_sharded_on_the_mesh(tmp_path):
  """The base's matrices are cut, not copied to every device."""
  run = runs.make(tmp_path, mesh=(2, 4), data={'train_data': None})
  with run.partitioner.activate():
    frozen = run.load().frozen
  kernel = frozen['encoder']['layers']['mlp']['wi_0']['kernel']
  assert kernel.sharding.spec == P(None, None, 'model')
  shapes = {s.data.shape for s in kernel.addressable_shards}
  assert shapes == {(1, 16, 8)}
