"""Reads Hugging Face T5 directories: `config.json` and safetensors files.

Names and orientation are mapped lazily to T5X's: matrices are transposed, norms
and the token embedding are not. No PyTorch is needed, so `pytorch_model.bin`
is not read.

Not for adapters (PEFT), and not for writing.

Source: huggingface/transformers `models/t5/modeling_t5.py` and
`configuration_t5.py`.
"""

from collections.abc import Mapping
import json
import os
import re
from typing import Any

import numpy as np
import safetensors

from prompt_jax.convert import base

_CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
# T5 by another name, with the same parameters.
_MODEL_TYPES = ('t5', 'mt5')
_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}

_BLOCK = re.compile(
  r'(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.([\w.]+)\.weight'
)
# (stack, sublayer): module, norm before it.
_SUBLAYERS = {
  ('encoder', '0'): ('attention', 'pre_attention_layer_norm'),
  ('encoder', '1'): ('mlp', 'pre_mlp_layer_norm'),
  ('decoder', '0'): ('self_attention', 'pre_self_attention_layer_norm'),
  ('decoder', '1'): (
    'encoder_decoder_attention',
    'pre_cross_attention_layer_norm',
  ),
  ('decoder', '2'): ('mlp', 'pre_mlp_layer_norm'),
}
_PROJECTIONS = {
  'SelfAttention.q': 'query',
  'SelfAttention.k': 'key',
  'SelfAttention.v': 'value',
  'SelfAttention.o': 'out',
  'EncDecAttention.q': 'query',
  'EncDecAttention.k': 'key',
  'EncDecAttention.v': 'value',
  'EncDecAttention.o': 'out',
  'DenseReluDense.wi': 'wi',
  'DenseReluDense.wi_0': 'wi_0',
  'DenseReluDense.wi_1': 'wi_1',
  'DenseReluDense.wo': 'wo',
}
_EMBEDDING = 'token_embedder/embedding'
_LOGITS = 'decoder/logits_dense/kernel'
# Copies of the token embedding, in files of older versions.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_TOP = {
  'shared.weight': _EMBEDDING,
  'encoder.final_layer_norm.weight': 'encoder/encoder_norm/scale',
  'decoder.final_layer_norm.weight': 'decoder/decoder_norm/scale',
  'lm_head.weight': _LOGITS,
}


def is_huggingface(path: str) -> bool:
  """Whether `path` is a local directory with a `config.json`."""
  return os.path.isfile(os.path.join(path, _CONFIG))


def open_huggingface(path: str) -> base.BaseCheckpoint:
  """Opens a directory; see `prompt_jax.convert.open_checkpoint`."""
  config = config_from_huggingface(path)  # Refuses what is no T5.
  tensors = {}
  for file in _files(path):
    tensors.update(_open_file(os.path.join(path, file)))
  leaves = {}
  for name, leaf in _without_copies(
    tensors, config['logits_via_embedding'], path
  ).items():
    renamed = _rename(name)
    # Norms have one axis; the token embedding is a table of rows in both.
    if len(leaf.shape) == 2 and renamed not in (name, _EMBEDDING):
      leaf = base.transpose(leaf)
    leaves[renamed] = leaf
  return base.BaseCheckpoint(path, 'huggingface', None, leaves)


def config_from_huggingface(path: str) -> dict[str, Any]:
  """Values of `T5Config` fields that `config.json` stands for.

  Fields that a run chooses (dropout, dtype, scanning) are left out.

  Raises:
    CheckpointError: there is no configuration, or it is not one of a T5 that
      `prompt_jax.network` can build.
  """
  config = _read_json(path, _CONFIG)
  kind = config.get('model_type')
  if kind not in _MODEL_TYPES:
    raise base.CheckpointError(
      f'{path}/{_CONFIG} is of model_type {kind!r}; expected one of '
      f'{_MODEL_TYPES}.'
    )
  epsilon = config.get('layer_norm_epsilon', 1e-6)
  if epsilon != 1e-6:
    raise base.CheckpointError(
      f'{path}/{_CONFIG} has layer_norm_epsilon {epsilon}; T5 has 1e-6.'
    )
  layers = config.get('num_layers', 6)
  decoder_layers = config.get('num_decoder_layers')
  return {
    # Absent keys have the defaults of transformers' T5Config.
    'vocab_size': config.get('vocab_size', 32128),
    'emb_dim': config.get('d_model', 512),
    'num_heads': config.get('num_heads', 8),
    'head_dim': config.get('d_kv', 64),
    'mlp_dim': config.get('d_ff', 2048),
    'num_encoder_layers': layers,
    'num_decoder_layers': layers if decoder_layers is None else decoder_layers,
    'mlp_activations': _activations(config, path),
    'logits_via_embedding': _logits_via_embedding(config),
    'relpos_num_buckets': config.get('relative_attention_num_buckets', 32),
    'relpos_max_distance': config.get('relative_attention_max_distance', 128),
  }


def check_config(path: str, config: Any) -> None:
  """Compares a model's configuration with a directory's, field by field.

  Shapes do not show all of it: not the distances of the position buckets.

  Args:
    path: the Hugging Face directory.
    config: a `T5Config`.

  Raises:
    CheckpointMismatch: fields differ; all are listed.
  """
  found = config_from_huggingface(path)
  lines = [
    f'  {name}: {value!r} in the directory, {getattr(config, name)!r} here'
    for name, value in found.items()
    if value != getattr(config, name)
  ]
  if lines:
    raise base.CheckpointMismatch(
      f'{path}/{_CONFIG} is not the configuration of the model file:\n'
      + '\n'.join(lines)
      + '\nGive the models/*.gin file of this checkpoint.'
    )


def _activations(config: Mapping[str, Any], path: str) -> tuple[str, ...]:
  name = config.get('feed_forward_proj', 'relu')
  known = {
    'relu': ('relu',),
    # transformers' `gelu_new`: the tanh approximation, as in T5X.
    'gated-gelu': ('gelu', 'linear'),
    'gated-silu': ('silu', 'linear'),
    'gated-relu': ('relu', 'linear'),
  }
  if name not in known:
    raise base.CheckpointError(
      f'{path}/{_CONFIG} has feed_forward_proj {name!r}; expected one of '
      f'{sorted(known)}.'
    )
  return known[name]


def _logits_via_embedding(config: Mapping[str, Any]) -> bool:
  """Whether logits come from the rescaled embedding (T5 1.0).

  transformers 5 writes `tie_word_embeddings: true` for T5 1.1, too, and keeps
  what used to be meant by it in `scale_decoder_outputs`.
  """
  scale = config.get('scale_decoder_outputs')
  if scale is not None:
    return scale
  return config.get('tie_word_embeddings') is not False


def _without_copies(
  tensors: Mapping[str, base.Leaf], via_embedding: bool, path: str
) -> dict[str, base.Leaf]:
  """One token embedding, and an output projection only where T5 has one."""
  tensors = {
    name: leaf
    for name, leaf in tensors.items()
    # Left in the files of T5 1.0, whose code never uses it.
    if not name.endswith('EncDecAttention.relative_attention_bias.weight')
  }
  copies = {name: tensors.pop(name) for name in _COPIES if name in tensors}
  for name, leaf in copies.items():
    kept = tensors.setdefault('shared.weight', leaf)
    if kept.shape != leaf.shape:
      raise base.CheckpointError(
        f'{path}: {name} {list(leaf.shape)} should be a copy of shared.weight '
        f'{list(kept.shape)}.'
      )
  if via_embedding:
    tensors.pop('lm_head.weight', None)
  elif (
    _read_json(path, _CONFIG).get('tie_word_embeddings')
    and 'shared.weight' in tensors
  ):
    # Tied without the rescaling of T5 1.0: the projection is a copy, too.
    tensors.setdefault('lm_head.weight', tensors['shared.weight'])
  return tensors


def _rename(name: str) -> str:
  """T5X's name; a name that T5 does not have is kept, for `fit` to refuse."""
  if name in _TOP:
    return _TOP[name]
  block = _BLOCK.fullmatch(name)
  if block is None or (block[1], block[3]) not in _SUBLAYERS:
    return name
  stack, i, sublayer, part = block.groups()
  module, norm = _SUBLAYERS[stack, sublayer]
  if part == 'layer_norm':
    return f'{stack}/layers_{i}/{norm}/scale'
  if part == 'SelfAttention.relative_attention_bias' and i == '0':
    return f'{stack}/relpos_bias/rel_embedding'
  if part not in _PROJECTIONS:
    return name
  return f'{stack}/layers_{i}/{module}/{_PROJECTIONS[part]}/kernel'


# Files.


def _read_json(path: str, name: str) -> dict[str, Any]:
  file = os.path.join(path, name)
  try:
    with open(file, encoding='utf-8') as stream:
      return json.load(stream)
  except (OSError, ValueError) as error:
    raise base.CheckpointError(f'Cannot read {file}: {error}') from error


def _files(path: str) -> list[str]:
  """Names of the safetensors files, all of them present."""
  present = set(os.listdir(path))
  if _WEIGHTS in present:
    return [_WEIGHTS]
  if _INDEX in present:
    index = _read_json(path, _INDEX)
    files = sorted(set(index.get('weight_map', {}).values()))
    missing = sorted(set(files) - present)
    if missing or not files:
      raise base.CheckpointError(
        f'{path}/{_INDEX} names {len(files)} files; missing: {missing}.'
      )
    return files
  other = sorted(
    name for name in present if name.endswith(('.bin', '.h5', '.msgpack'))
  )
  raise base.CheckpointError(
    f'{path} has neither {_WEIGHTS} nor {_INDEX}'
    + (
      f', but {", ".join(other)}. Convert it to safetensors: load it with '
      'transformers (AutoModelForSeq2SeqLM.from_pretrained) and write it with '
      'save_pretrained.'
      if other
      else '.'
    )
  )


def _open_file(file: str) -> dict[str, base.Leaf]:
  try:
    stored = safetensors.safe_open(file, framework='numpy')
    return {
      name: _from_slice(stored.get_slice(name), f'{name} in {file}')
      for name in stored.keys()
    }
  except (OSError, safetensors.SafetensorError) as error:
    raise base.CheckpointError(
      f'{file} is damaged or cut off: {error}'
    ) from error


def _from_slice(stored: Any, where: str) -> base.Leaf:
  """A leaf of a tensor; the file is mapped into memory, not read."""
  dtype = stored.get_dtype()
  if dtype not in _DTYPES:
    raise base.CheckpointError(
      f'{where} has type {dtype}; expected one of {sorted(_DTYPES)}.'
    )
  return base.Leaf(
    tuple(stored.get_shape()),
    np.dtype(_DTYPES[dtype]),
    lambda index: stored[index],
  )
