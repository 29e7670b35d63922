"""What a frozen base is known by: a checksum of each of its arrays.

A run's checkpoint holds kilobytes and no base; it holds the base's fingerprint
instead, so that resuming or evaluating on another base is refused by name.
"""

from collections.abc import Mapping
import hashlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp

Fingerprint = dict[str, str]  # 'encoder/layers_0/mlp/wo/kernel' -> checksum


class BaseMismatch(ValueError):
  """A checkpoint was made on another frozen base than the one that is here."""


@jax.jit
def _checksum(x: Any) -> Any:
  """Two uint32 sums over the float32 bits; exact in any order or sharding."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis, length in enumerate(bits.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = place * jnp.uint32(length % 2**32) + index
  weighted = bits * (2 * place + 1)
  return jnp.stack(
    [
      jnp.sum(bits, dtype=jnp.uint32),
      jnp.sum(weighted, dtype=jnp.uint32),
    ]
  )


_checksums = jax.jit(jax.vmap(_checksum))


def fingerprint(flat: Mapping[str, Any]) -> Fingerprint:
  """Checksums by T5X's minimal names, the same scanned or not.

  Args:
    flat: the network's parameters by path, before any cast.
  """
  out = {}
  for path, x in flat.items():
    if '/layers/' not in path:
      out[path] = _text(x.shape, _checksum(x))
      continue
    for i, sums in enumerate(jax.device_get(_checksums(x))):
      name = path.replace('/layers/', f'/layers_{i}/')
      out[name] = _text(x.shape[1:], sums)
  return dict(sorted(out.items()))


def _text(shape: Any, sums: Any) -> str:
  a, b = (int(s) for s in jax.device_get(sums))
  return f'{"x".join(map(str, shape))}:{a:08x}{b:08x}'


def digest(found: Fingerprint) -> str:
  """One short name of the whole base."""
  text = json.dumps(found, sort_keys=True).encode()
  return hashlib.sha256(text).hexdigest()[:16]


ADVICE = (
  'Give the INITIAL_CHECKPOINT_PATH and the model file of that run, or start a '
  'new MODEL_DIR.'
)


def check(
  saved: Fingerprint, here: Fingerprint, where: str, advice: str = ADVICE
) -> None:
  """Refuses a base that differs, naming what does.

  Args:
    saved: of the checkpoint.
    here: of the base that has been loaded.
    where: the checkpoint, for the message.
    advice: what to do, its end.

  Raises:
    BaseMismatch: a parameter is missing, new, of another shape, or another
      number.
  """
  if saved == here:
    return
  shapes = [
    n
    for n in saved.keys() & here.keys()
    if saved[n].split(':')[0] != here[n].split(':')[0]
  ]
  values = [n for n in saved.keys() & here.keys() if saved[n] != here[n]]
  values = sorted(set(values) - set(shapes))
  lines = [
    f'{where} was made on another frozen base (fingerprint '
    f'{digest(saved)}; the base loaded here is {digest(here)}).'
  ]
  for what, names in (
    ('only in its base', sorted(saved.keys() - here.keys())),
    ('only here', sorted(here.keys() - saved.keys())),
    ('of another shape', sorted(shapes)),
    ('with other numbers', values),
  ):
    if names:
      some = ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
      lines.append(f'  {len(names)} parameters {what}: {some}')
  lines.append(advice)
  raise BaseMismatch('\n'.join(lines))


def total_parameters(found: Fingerprint) -> int:
  """Numbers in the base, from the shapes in its fingerprint."""
  total = 0
  for text in found.values():
    count = 1
    for n in re.findall(r'\d+', text.split(':')[0]):
      count *= int(n)
    total += count
  return total
