"""Base checkpoints in: T5X's, Hugging Face's and our own, leaf by leaf."""

from prompt_jax.convert.base import BaseCheckpoint
from prompt_jax.convert.base import CheckpointError
from prompt_jax.convert.base import CheckpointMismatch
from prompt_jax.convert.base import Leaf
from prompt_jax.convert.base import fit
from prompt_jax.convert.base import report
from prompt_jax.convert.huggingface import check_config
from prompt_jax.convert.huggingface import config_from_huggingface
from prompt_jax.convert.opening import open_checkpoint
from prompt_jax.convert.t5x import read_t5x_state

__all__ = [
  'BaseCheckpoint',
  'CheckpointError',
  'CheckpointMismatch',
  'Leaf',
  'check_config',
  'config_from_huggingface',
  'fit',
  'open_checkpoint',
  'read_t5x_state',
  'report',
]
