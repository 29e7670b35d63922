"""Which reader a base checkpoint needs."""

import os

from prompt_jax.convert import base
from prompt_jax.convert import huggingface
from prompt_jax.convert import own
from prompt_jax.convert import t5x


def open_checkpoint(path: str | os.PathLike[str]) -> base.BaseCheckpoint:
  """Opens a base checkpoint; its arrays are read later.

  Args:
    path: a T5X checkpoint (`.../checkpoint_1000000`, of the legacy or the Orbax
      form; local or `gs://`), a local Hugging Face directory, the directory or
      `trainable.safetensors` of a run that trained a whole network, or a
      directory with T5X checkpoints, of which the newest is taken.

  Raises:
    CheckpointError: nothing to read is there, or what is there is damaged.
  """
  path = os.path.expanduser(path)
  if own.is_own(path):
    return own.open_own(path)
  if huggingface.is_huggingface(path):
    return huggingface.open_huggingface(path)
  return t5x.open_t5x(path)
