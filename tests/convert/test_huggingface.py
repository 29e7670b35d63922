import dataclasses
import json
import pathlib
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from prompt_jax import convert
from prompt_jax.network import t5

CONFIG = {
  'model_type': 't5',
  'vocab_size': 11,
  'd_model': 4,
  'd_kv': 5,
  'd_ff': 9,
  'num_heads': 2,
  'num_layers': 2,
  'num_decoder_layers': 3,
  'relative_attention_num_buckets': 6,
  'relative_attention_max_distance': 20,
}
V11 = {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
V10 = {'feed_forward_proj': 'relu'}


def random_tensors(gated: bool) -> dict[str, np.ndarray]:
  """What transformers saves for CONFIG, the output projection included."""
  rng = np.random.default_rng(0)
  shapes: dict[str, tuple[int, ...]] = {
    'shared.weight': (11, 4),
    'lm_head.weight': (11, 4),
  }
  for stack, length, attentions in (
    ('encoder', 2, ['SelfAttention']),
    ('decoder', 3, ['SelfAttention', 'EncDecAttention']),
  ):
    shapes[f'{stack}.final_layer_norm.weight'] = (4,)
    first = f'{stack}.block.0.layer.0.SelfAttention'
    shapes[f'{first}.relative_attention_bias.weight'] = (6, 2)
    for i in range(length):
      for j, attention in enumerate(attentions):
        layer = f'{stack}.block.{i}.layer.{j}'
        shapes[f'{layer}.layer_norm.weight'] = (4,)
        for part in 'qkv':
          shapes[f'{layer}.{attention}.{part}.weight'] = (10, 4)
        shapes[f'{layer}.{attention}.o.weight'] = (4, 10)
      layer = f'{stack}.block.{i}.layer.{len(attentions)}'
      shapes[f'{layer}.layer_norm.weight'] = (4,)
      for part in ('wi_0', 'wi_1') if gated else ('wi',):
        shapes[f'{layer}.DenseReluDense.{part}.weight'] = (9, 4)
      shapes[f'{layer}.DenseReluDense.wo.weight'] = (4, 9)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(
  path: pathlib.Path,
  tensors: dict[str, np.ndarray],
  shards: int = 1,
  **config: Any,
) -> str:
  (path / 'config.json').write_text(json.dumps(CONFIG | config))
  if shards == 1:
    safetensors.save_file(tensors, path / 'model.safetensors')
    return str(path)
  weight_map = {}
  names = sorted(tensors)
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    part = {name: tensors[name] for name in names[i::shards]}
    safetensors.save_file(part, path / file)
    weight_map |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (path / 'model.safetensors.index.json').write_text(json.dumps(index))
  return str(path)


def expected(path: str, **fields: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Flat parameters of our network for the directory's configuration."""
  config = t5.T5Config(**convert.config_from_huggingface(path) | fields)
  tokens = np.ones((1, 2), np.int32)
  model = t5.T5(config)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  return traverse_util.flatten_dict(nn.unbox(tree)['params'], sep='/')


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('version', [V10, V11])
def test_fits_our_network(tmp_path, version, shards, scan):
  tensors = random_tensors(gated=version is V11)
  path = write(tmp_path, tensors, shards, **version)
  checkpoint = convert.open_checkpoint(path)
  assert (checkpoint.kind, checkpoint.step) == ('huggingface', None)
  fitted = convert.fit(checkpoint, expected(path, scan_layers=scan))
  # Each number is used once, except the ignored output projection of 1.0.
  ignored = tensors['lm_head.weight'].size if version is V10 else 0
  size = sum(int(np.prod(leaf.shape)) for leaf in fitted.values())
  assert size == sum(tensor.size for tensor in tensors.values()) - ignored
  for leaf in fitted.values():
    assert leaf.array().shape == leaf.shape


def test_names_and_orientation(tmp_path):
  tensors = random_tensors(gated=True)
  leaves = convert.open_checkpoint(write(tmp_path, tensors, **V11)).leaves
  assert len(leaves) == len(tensors)
  for ours, theirs, transposed in (
    ('token_embedder/embedding', 'shared', False),
    ('decoder/logits_dense/kernel', 'lm_head', True),
    ('encoder/encoder_norm/scale', 'encoder.final_layer_norm', False),
    ('decoder/decoder_norm/scale', 'decoder.final_layer_norm', False),
    (
      'encoder/layers_1/pre_attention_layer_norm/scale',
      'encoder.block.1.layer.0.layer_norm',
      False,
    ),
    (
      'encoder/layers_1/pre_mlp_layer_norm/scale',
      'encoder.block.1.layer.1.layer_norm',
      False,
    ),
    (
      'encoder/layers_0/attention/key/kernel',
      'encoder.block.0.layer.0.SelfAttention.k',
      True,
    ),
    (
      'encoder/layers_1/mlp/wi_1/kernel',
      'encoder.block.1.layer.1.DenseReluDense.wi_1',
      True,
    ),
    (
      'decoder/layers_2/self_attention/out/kernel',
      'decoder.block.2.layer.0.SelfAttention.o',
      True,
    ),
    (
      'decoder/layers_2/encoder_decoder_attention/query/kernel',
      'decoder.block.2.layer.1.EncDecAttention.q',
      True,
    ),
    (
      'decoder/layers_2/pre_cross_attention_layer_norm/scale',
      'decoder.block.2.layer.1.layer_norm',
      False,
    ),
    (
      'decoder/layers_0/mlp/wo/kernel',
      'decoder.block.0.layer.2.DenseReluDense.wo',
      True,
    ),
    (
      'decoder/relpos_bias/rel_embedding',
      'decoder.block.0.layer.0.SelfAttention.relative_attention_bias',
      True,
    ),
  ):
    tensor = tensors[f'{theirs}.weight']
    tensor = tensor.T if transposed else tensor
    np.testing.assert_array_equal(leaves[ours].array(), tensor, err_msg=ours)
    index = (slice(1, 2),) * tensor.ndim
    np.testing.assert_array_equal(leaves[ours].read(index), tensor[index])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision(tmp_path, dtype):
  tensors = {
    name: tensor.astype(np.dtype(dtype))
    for name, tensor in random_tensors(gated=True).items()
  }
  path = write(tmp_path, tensors, **V11)
  leaves = convert.open_checkpoint(path).leaves
  leaf = leaves['decoder/logits_dense/kernel']
  assert leaf.dtype == leaf.array().dtype == np.dtype(dtype)
  np.testing.assert_array_equal(leaf.array(), tensors['lm_head.weight'].T)


class TestEmbeddings:
  """Who holds the token embedding, and whether there is a projection."""

  def leaves(self, path):
    return convert.open_checkpoint(path).leaves

  def test_copies(self, tmp_path):
    tensors = random_tensors(gated=True)
    shared = tensors['shared.weight']
    copies = {
      f'{s}.embed_tokens.weight': shared for s in ('encoder', 'decoder')
    }
    both = self.leaves(write(tmp_path, tensors | copies, **V11))
    assert len(both) == len(tensors)
    del tensors['shared.weight']
    one = self.leaves(write(tmp_path, tensors | copies, **V11))
    assert one.keys() == both.keys()
    embedding = one['token_embedder/embedding'].array()
    np.testing.assert_array_equal(embedding, shared)

  def test_copy_of_another_shape(self, tmp_path):
    tensors = random_tensors(gated=True)
    tensors['encoder.embed_tokens.weight'] = np.zeros((12, 4), np.float32)
    with pytest.raises(convert.CheckpointError, match=r'\[12, 4\] should be a'):
      self.leaves(write(tmp_path, tensors, **V11))

  def test_unused_cross_attention_table(self, tmp_path):
    tensors = random_tensors(gated=False)
    name = 'decoder.block.0.layer.1.EncDecAttention'
    unused = {f'{name}.relative_attention_bias.weight': np.zeros((6, 2))}
    unused = {n: t.astype(np.float32) for n, t in unused.items()}
    path = write(tmp_path, tensors | unused, **V10)
    convert.fit(convert.open_checkpoint(path), expected(path))

  @pytest.mark.parametrize(
    'config, has_projection',
    [
      ({}, False),
      ({'tie_word_embeddings': True}, False),
      ({'tie_word_embeddings': False}, True),
      # As transformers 5 writes T5 1.0 and 1.1.
      ({'tie_word_embeddings': True, 'scale_decoder_outputs': True}, False),
      ({'tie_word_embeddings': True, 'scale_decoder_outputs': False}, True),
    ],
  )
  def test_projection(self, tmp_path, config, has_projection):
    tensors = random_tensors(gated=False)
    path = write(tmp_path, tensors, **config)
    fields = convert.config_from_huggingface(path)
    assert fields['logits_via_embedding'] is not has_projection
    leaves = self.leaves(path)
    assert ('decoder/logits_dense/kernel' in leaves) == has_projection
    if has_projection:
      found = leaves['decoder/logits_dense/kernel'].array()
      np.testing.assert_array_equal(found, tensors['lm_head.weight'].T)

  def test_tied_but_not_rescaled(self, tmp_path):
    tensors = random_tensors(gated=True)
    del tensors['lm_head.weight']
    config = {'tie_word_embeddings': True, 'scale_decoder_outputs': False}
    path = write(tmp_path, tensors, feed_forward_proj='gated-gelu', **config)
    found = self.leaves(path)['decoder/logits_dense/kernel'].array()
    np.testing.assert_array_equal(found, tensors['shared.weight'].T)

  def test_untied_projection_is_missing(self, tmp_path):
    tensors = random_tensors(gated=True)
    del tensors['lm_head.weight']
    path = write(tmp_path, tensors, **V11)
    with pytest.raises(convert.CheckpointMismatch, match='logits_dense'):
      convert.fit(convert.open_checkpoint(path), expected(path))


class TestConfig:
  def test_fields(self, tmp_path):
    assert convert.config_from_huggingface(
      write(tmp_path, random_tensors(gated=True), **V11)
    ) == {
      'vocab_size': 11,
      'emb_dim': 4,
      'num_heads': 2,
      'head_dim': 5,
      'mlp_dim': 9,
      'num_encoder_layers': 2,
      'num_decoder_layers': 3,
      'mlp_activations': ('gelu', 'linear'),
      'logits_via_embedding': False,
      'relpos_num_buckets': 6,
      'relpos_max_distance': 20,
    }

  def test_defaults_are_those_of_transformers(self, tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'config.json').write_text('{"model_type": "t5"}')
    bare = convert.config_from_huggingface(str(tmp_path))
    transformers.T5Config().save_pretrained(tmp_path)
    assert bare == convert.config_from_huggingface(str(tmp_path))

  @pytest.mark.parametrize(
    'config, message',
    [
      ({'model_type': 'bert'}, "model_type 'bert'"),
      ({'model_type': None}, 'model_type None'),
      ({'feed_forward_proj': 'gelu'}, "feed_forward_proj 'gelu'"),
      ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon 1e-05'),
    ],
  )
  def test_not_our_t5(self, tmp_path, config, message):
    path = write(tmp_path, {}, **config)
    with pytest.raises(convert.CheckpointError, match=message):
      convert.open_checkpoint(path)

  def test_damaged(self, tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type"')
    with pytest.raises(convert.CheckpointError, match=r'config\.json'):
      convert.open_checkpoint(str(tmp_path))


class TestFiles:
  def test_only_torch(self, tmp_path):
    write(tmp_path, {}, **V11)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')
    with pytest.raises(
      convert.CheckpointError, match=r'pytorch_model\.bin\. Convert it to safet'
    ):
      convert.open_checkpoint(str(tmp_path))

  def test_nothing(self, tmp_path):
    write(tmp_path, {}, **V11)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(convert.CheckpointError, match=r'index\.json\.$'):
      convert.open_checkpoint(str(tmp_path))

  def test_shard_is_gone(self, tmp_path):
    path = write(tmp_path, random_tensors(gated=True), 3, **V11)
    (tmp_path / 'model-00002-of-00003.safetensors').unlink()
    with pytest.raises(convert.CheckpointError, match=r'missing: .*00002-of'):
      convert.open_checkpoint(path)

  @pytest.mark.parametrize('length', [0, 4, 100, -1])
  def test_cut_off(self, tmp_path, length):
    path = write(tmp_path, random_tensors(gated=True), **V11)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(convert.CheckpointError, match=r'model\.safetensors is'):
      convert.open_checkpoint(path)

  def test_quantized(self, tmp_path):
    tensors = random_tensors(gated=True)
    tensors['lm_head.weight'] = np.zeros((11, 4), np.int8)
    path = write(tmp_path, tensors, **V11)
    with pytest.raises(convert.CheckpointError, match=r'lm_head.* type I8'):
      convert.open_checkpoint(path)


def test_mismatch_names_the_leaves(tmp_path):
  tensors = random_tensors(gated=False)
  # A table in each layer, as in UMT5.
  name = 'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight'
  tensors[name] = np.zeros((6, 2), np.float32)
  path = write(tmp_path, tensors, **V10)
  wanted = expected(path, vocab_size=12, mlp_activations=('gelu', 'linear'))
  with pytest.raises(convert.CheckpointMismatch) as error:
    convert.fit(convert.open_checkpoint(path), wanted)
  text = ' '.join(str(error.value).split())
  assert f'{name} [6, 2] - float32 extra' in text
  assert 'token_embedder/embedding [11, 4] [12, 4] float32 misshapen' in text
  assert 'decoder/layers_{0..2}/mlp/wi_1/kernel - [4, 9] - missing' in text


def test_another_configuration_is_refused_field_by_field(tmp_path):
  path = write(tmp_path, random_tensors(gated=True), **V11)
  fields = convert.config_from_huggingface(path)
  same = t5.T5Config(**fields)
  convert.check_config(path, same)
  other = dataclasses.replace(same, relpos_max_distance=7, num_heads=1)
  with pytest.raises(convert.CheckpointMismatch) as error:
    convert.check_config(path, other)
  text = str(error.value)
  assert 'relpos_max_distance: ' in text and ', 7 here' in text
  assert 'num_heads: ' in text and 'emb_dim' not in text
