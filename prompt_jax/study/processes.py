"""Several processes that run one program (`jax.distributed`), in step.

The first one decides which job is next and writes the ledger; the others
follow. Where there is one process, all this is nothing. Not for workers, which
are independent of each other (`workers.py`).
"""

import jax
import numpy as np


def is_first() -> bool:
  """Whether this one decides and writes."""
  return jax.process_index() == 0


def agree(value: int) -> int:
  """The first one's value, on all of them."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name: str) -> None:
  """Waits for all: what the first one has written can then be read."""
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  multihost_utils.sync_global_devices(name)
