"""What a frozen base is known by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import fingerprints
from prompt_jax import partitioning

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((2, 4, 8)).astype(np.float32)
TABLE = RNG.standard_normal((6, 4)).astype(np.float32)
FLAT = {'token_embedder/embedding': TABLE, 'encoder/layers/mlp/kernel': KERNEL}


def test_same_for_scanned_layers_and_a_loop():
  scanned = fingerprints.fingerprint(FLAT)
  loop = fingerprints.fingerprint(
    {
      'token_embedder/embedding': TABLE,
      'encoder/layers_0/mlp/kernel': KERNEL[0],
      'encoder/layers_1/mlp/kernel': KERNEL[1],
    }
  )
  assert scanned == loop
  assert len(set(loop.values())) == 3
  assert fingerprints.digest(scanned) == fingerprints.digest(loop)


def test_same_on_every_mesh():
  want = fingerprints.fingerprint({'a': TABLE, 'encoder/layers/b': KERNEL})
  for shape in ((8, 1), (2, 4), (1, 8)):
    partitioner = partitioning.Partitioner(*shape)
    sharding = jax.NamedSharding(
      partitioner.mesh, jax.sharding.PartitionSpec(None, None, 'model')
    )
    got = fingerprints.fingerprint(
      {'a': TABLE, 'encoder/layers/b': jax.device_put(KERNEL, sharding)}
    )
    assert got == want


@pytest.mark.parametrize(
  'change',
  [
    lambda x: x.at[0, 0, 0].set(jnp.nextafter(x[0, 0, 0], 9.0)),
    lambda x: x.at[0, 0, 0].multiply(-1),
    lambda x: x[:, ::-1],
    lambda x: x[::-1],
    lambda x: x.at[1, 0, 0].set(x[1, 0, 1]).at[1, 0, 1].set(x[1, 0, 0]),
    lambda x: x.at[0, 0, 0].set(jnp.nan),
    lambda x: jnp.moveaxis(x, 1, 2).reshape(x.shape),
  ],
  ids=['ulp', 'sign', 'rows', 'layers', 'swap', 'nan', 'transposed'],
)
def test_any_change_shows(change):
  changed = {**FLAT, 'encoder/layers/mlp/kernel': change(jnp.asarray(KERNEL))}
  assert fingerprints.fingerprint(changed) != fingerprints.fingerprint(FLAT)


def test_differences_are_named():
  saved = fingerprints.fingerprint(
    {'a': TABLE, 'b': TABLE, 'gone': TABLE, 'c': TABLE}
  )
  here = fingerprints.fingerprint(
    {'a': TABLE, 'b': TABLE + 1, 'new': TABLE, 'c': TABLE[:3]}
  )
  fingerprints.check(saved, dict(saved), 'x')
  with pytest.raises(fingerprints.BaseMismatch) as error:
    fingerprints.check(saved, here, 'The checkpoint /tmp/x')
  text = str(error.value)
  assert text.startswith('The checkpoint /tmp/x was made on another frozen')
  for line in (
    '1 parameters only in its base: gone',
    '1 parameters only here: new',
    '1 parameters of another shape: c',
    '1 parameters with other numbers: b',
    'INITIAL_CHECKPOINT_PATH',
  ):
    assert line in text, line
  assert fingerprints.digest(saved) in text
  assert fingerprints.digest(here) in text


def test_long_lists_are_cut():
  saved = {f'layer_{i}': '1:0' for i in range(9)}
  with pytest.raises(fingerprints.BaseMismatch, match=r'9 .*layer_3, \.\.\.'):
    fingerprints.check(saved, dict.fromkeys(saved, '1:1'), 'x')


def test_numbers_are_counted():
  found = fingerprints.fingerprint({**FLAT, 'scale': np.ones(5)})
  assert fingerprints.total_parameters(found) == 2 * 32 + 24 + 5
