"""Reference numbers and the models that they belong to, for all tests."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import models
from prompt_jax import train_state
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network.layers import T5Config

TINY = T5Config(
  vocab_size=32128,
  emb_dim=4,
  num_heads=2,
  head_dim=2,
  mlp_dim=8,
  num_encoder_layers=2,
  num_decoder_layers=2,
  relpos_num_buckets=4,
  relpos_max_distance=8,
)
MINI = T5Config(
  vocab_size=256,
  emb_dim=128,
  num_heads=4,
  head_dim=32,
  mlp_dim=256,
  num_encoder_layers=2,
  num_decoder_layers=2,
)
CONFIGS = {'tiny': TINY, 'mini': MINI}

# For tests of behaviour, where no reference numbers are needed: the smallest
# network with head_dim != emb_dim / num_heads and unequal stacks, its layers
# scanned, which compiles sooner.
SMALL = T5Config(
  vocab_size=64,
  emb_dim=16,
  num_heads=4,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
  relpos_num_buckets=8,
  relpos_max_distance=16,
  scan_unroll=1,
)


def stack_layers(flat: dict[str, Any]) -> dict[str, Any]:
  """Parameters by T5X's minimal names as those of scanned layers."""
  out: dict[str, Any] = {}
  layers: dict[str, dict[int, Any]] = {}
  for path, x in flat.items():
    parts = path.split('/')
    if len(parts) > 1 and parts[1].startswith('layers_'):
      name = '/'.join([parts[0], 'layers', *parts[2:]])
      layers.setdefault(name, {})[int(parts[1][7:])] = x
    else:
      out[path] = x
  for name, found in layers.items():
    out[name] = np.stack([found[i] for i in sorted(found)])
  return out


def unstack_layers(flat: dict[str, Any]) -> dict[str, Any]:
  """The inverse: `layers/X` [L, ...] as `layers_0/X`, `layers_1/X`, ..."""
  out: dict[str, Any] = {}
  for path, x in flat.items():
    if '/layers/' not in path:
      out[path] = x
      continue
    for i in range(len(x)):
      out[path.replace('/layers/', f'/layers_{i}/')] = x[i]
  return out


@functools.cache
def golden(shared: pathlib.Path, name: str) -> dict[str, np.ndarray]:
  """All arrays of a file of reference numbers."""
  with np.load(shared / 'goldens' / f'{name}.npz') as f:
    return {k: f[k] for k in f.files}


def below(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
  """The arrays whose names start with `prefix`, without it."""
  return {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }


@functools.cache
def golden_params(shared: pathlib.Path, name: str, scan: bool = True) -> Any:
  """The parameters of the model `tiny` or `mini`."""
  if name == 'mini':
    flat = golden(shared, 'mini_params')
  else:
    flat = below(golden(shared, 't5x_tiny_checkpoint_contents'), 'target/')
  flat = stack_layers(flat) if scan else flat
  return jax.tree.map(np.asarray, train_state.unflatten(flat))


def model(name: str, prompt_length: int = 0, **fields: Any):
  """The model `tiny` or `mini`, with a soft prompt of that length."""
  method = SoftPrompt(prompt_length) if prompt_length else None
  return models.EncoderDecoderModel(CONFIGS[name], method=method, **fields)


def with_prompt(batch: dict[str, Any], model: Any) -> dict[str, Any]:
  """The batch with the model's soft tokens in front of the encoder's input."""
  tokens = batch['encoder_input_tokens']
  soft = np.repeat(model.soft_ids, len(tokens), axis=0)
  return {
    **batch,
    'encoder_input_tokens': np.concatenate([soft, tokens], axis=1),
  }


def prompted(prompt: Any) -> dict[str, Any]:
  """Trainable parameters that are one prompt."""
  return {'method': {'prompt': np.asarray(prompt)}, 'network': {}}


def as_jax(tree: Any) -> Any:
  """Arrays as a jitted function sees them; the tests check their types."""
  return jax.tree.map(jnp.asarray, tree)


NOTHING: dict[str, Any] = {'method': {}, 'network': {}}


def random_batch(
  config: T5Config,
  rows: int = 4,
  inputs: int = 10,
  targets: int = 6,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Text-like rows: unequal lengths, EOS, padding."""
  rng = np.random.default_rng(seed)

  def tokens(length: int) -> np.ndarray:
    out = rng.integers(2, config.vocab_size, (rows, length)).astype(np.int32)
    for i, n in enumerate(rng.integers(length // 2, length + 1, rows)):
      out[i, n - 1] = 1
      out[i, n:] = 0
    return out

  encoder, target = tokens(inputs), tokens(targets)
  return {
    'encoder_input_tokens': encoder,
    'decoder_target_tokens': target,
    'decoder_input_tokens': np.pad(target, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': (target > 0).astype(np.int32),
  }
