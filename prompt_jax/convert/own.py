"""Networks that a run of this package has trained, as a base to tune.

Such a run has `trainable_patterns = ['.*']`: pretraining, or fine-tuning before
a prompt is laid on its result. Its `trainable.safetensors` is the base. Not for
going on with a run (`prompt_jax.checkpoints`).
"""

import os
import re

from prompt_jax import checkpoints
from prompt_jax.convert import base

_FILE = 'trainable.safetensors'
_NETWORK = 'network/'


def is_own(path: str) -> bool:
  """Whether this is such a file, or the directory of a run that has one."""
  return path.endswith('.safetensors') or os.path.isfile(
    os.path.join(path, _FILE)
  )


def open_own(path: str) -> base.BaseCheckpoint:
  """Opens a whole network.

  Args:
    path: a `trainable.safetensors`, or the directory of a finished run.

  Raises:
    CheckpointError: the file is not there or not whole, or holds something
      else than parameters of a network.
  """
  file = os.path.join(path, _FILE) if os.path.isdir(path) else path
  try:
    arrays, header = checkpoints.load_trainable(file)
  except checkpoints.CheckpointError as e:
    raise base.CheckpointError(str(e)) from e
  other = [name for name in arrays if not name.startswith(_NETWORK)]
  if other or not arrays:
    what = f'holds {other[0]}' if other else 'is empty'
    raise base.CheckpointError(
      f'{file} {what}: a base is a whole network, from a run with '
      "TRAINABLE_PATTERNS = ('.*',) and no method."
    )
  leaves: dict[str, base.Leaf] = {}
  for name, array in arrays.items():
    leaf, name = base.from_array(array), name.removeprefix(_NETWORK)
    if re.search(r'/layers/', name) is None:
      leaves[name] = leaf
      continue
    for i in range(leaf.shape[0]):  # scanned: the layers lie on axis 0
      one = name.replace('/layers/', f'/layers_{i}/')
      leaves[one] = base.layer(leaf, i, 0)
  step = int(header['step']) if 'step' in header else None
  return base.BaseCheckpoint(path, 'prompt_jax', step, leaves)
