import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_jax import feature_converters as fc
from prompt_jax import vocabularies
from prompt_jax.vocabularies import SOFT_BASE

V = 300
IDS = np.array([[300, 301, 302], [303, 304, 305]], np.int32)
LENGTHS = {'inputs': 5, 'targets': 4}


def soft(k):
  return SOFT_BASE + k


def dataset(*examples):
  """Examples of (inputs, targets) or (inputs, targets, task)."""
  keys = ('inputs', 'targets', 'task_ids')[: len(examples[0])]
  spec = {
    key: tf.TensorSpec([] if key == 'task_ids' else [None], tf.int32)
    for key in keys
  }
  rows = [dict(zip(keys, example, strict=True)) for example in examples]
  return tf.data.Dataset.from_generator(lambda: rows, output_signature=spec)


def convert(converter, *examples, lengths=LENGTHS):
  ds = converter(dataset(*examples), lengths)
  return [
    {k: v.tolist() for k, v in row.items()} for row in ds.as_numpy_iterator()
  ]


def test_prompt_goes_in_front():
  [row] = convert(fc.EncDecFeatureConverter(IDS[:1], V), ([7, 8, 1], [3, 1]))
  assert row == {
    'encoder_input_tokens': [300, 301, 302, 7, 8, 1, 0, 0],
    'decoder_input_tokens': [0, 3, 1, 0],
    'decoder_target_tokens': [3, 1, 0, 0],
    'decoder_loss_weights': [1, 1, 0, 0],
  }


def test_without_soft_tokens_it_is_seqio():
  examples = ([7, 8, 1], [3, 1]), ([9, 1], [4, 5, 1])
  for pack in (False, True):
    ours = convert(fc.EncDecFeatureConverter(pack=pack), *examples)
    theirs = convert(seqio.EncDecFeatureConverter(pack=pack), *examples)
    assert ours == theirs
    ours = convert(fc.DecoderOnlyFeatureConverter(pack=pack), *examples)
    theirs = convert(seqio.PrefixLMFeatureConverter(pack=pack), *examples)
    assert ours == theirs


def test_a_template_places_them_in_inputs_and_targets():
  converter = fc.EncDecFeatureConverter(IDS[:1], V)
  [row] = convert(converter, ([7, soft(2), 1], [soft(0), 3, soft(2), 1]))
  assert row['encoder_input_tokens'] == [7, 302, 1, 0, 0, 0, 0, 0]
  assert row['decoder_input_tokens'] == [0, 300, 3, 302]
  assert row['decoder_target_tokens'] == [0, 3, 0, 1]
  assert row['decoder_loss_weights'] == [0, 1, 0, 1]
  # In the targets alone: none are put in front of the inputs.
  [row] = convert(converter, ([7, 1], [soft(1), 1]))
  assert row['encoder_input_tokens'] == [7, 1, 0, 0, 0, 0, 0, 0]


def test_task_ids_choose_the_row_and_pass_through():
  converter = fc.EncDecFeatureConverter(IDS, V)
  rows = convert(converter, ([7, 1], [3, 1], 1), ([soft(1), 1], [3, 1], 1))
  assert [row['task_ids'] for row in rows] == [1, 1]
  assert rows[0]['encoder_input_tokens'][:5] == [303, 304, 305, 7, 1]
  assert rows[1]['encoder_input_tokens'][:3] == [304, 1, 0]
  # One shared prompt: the number of the task does not matter.
  [row] = convert(fc.EncDecFeatureConverter(IDS[:1], V), ([7, 1], [1], 5))
  assert row['encoder_input_tokens'][:4] == [300, 301, 302, 7]
  assert row['task_ids'] == 5
  # The converter is as before afterwards. Of several prompts none is chosen
  # for examples that do not say whose they are.
  with pytest.raises(ValueError, match='keeps 2 tasks apart.*NUMBER_TASKS'):
    convert(converter, ([7, 1], [3, 1]))
  [row] = convert(fc.EncDecFeatureConverter(IDS[:1], V), ([7, 1], [3, 1]))
  assert row['encoder_input_tokens'][:3] == [300, 301, 302]
  assert 'task_ids' not in row


def test_packed_examples_carry_their_own_prompts():
  converter = fc.EncDecFeatureConverter(IDS, V, pack=True)
  lengths = {'inputs': 10, 'targets': 6}
  [row] = convert(
    converter,
    ([7, 8, 1], [3, 1], 1), ([9, soft(0), 1], [4, 5, 1], 0),
    lengths=lengths,
  )  # fmt: skip
  assert row == {
    'encoder_input_tokens': [303, 304, 305, 7, 8, 1, 9, 300, 1, 0, 0, 0, 0],
    'encoder_segment_ids': [1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0],
    'encoder_positions': [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0, 0],
    'decoder_target_tokens': [3, 1, 4, 5, 1, 0],
    'decoder_input_tokens': [0, 3, 0, 4, 5, 0],
    'decoder_loss_weights': [1, 1, 1, 1, 1, 0],
    'decoder_segment_ids': [1, 1, 2, 2, 2, 0],
    'decoder_positions': [0, 1, 0, 1, 2, 0],
  }


def test_a_prompt_that_no_longer_fits_opens_a_new_row():
  converter = fc.EncDecFeatureConverter(IDS[:1], V, pack=True)
  rows = convert(converter, ([7, 8, 1], [3, 1]), ([9, 1], [4, 1]))
  assert [row['encoder_input_tokens'] for row in rows] == [
    [300, 301, 302, 7, 8, 1, 0, 0], [300, 301, 302, 9, 1, 0, 0, 0],
  ]  # fmt: skip


def test_decoder_only():
  converter = fc.DecoderOnlyFeatureConverter(IDS, V)
  [row] = convert(converter, ([7, 1], [3, soft(2), 1], 1))
  assert row['decoder_input_tokens'][:6] == [0, 7, 1, 3, 305, 1]
  [row] = convert(converter, ([7, 1], [3, 1], 1))
  assert row == {
    'decoder_input_tokens': [0, 303, 304, 305, 7, 1, 3, 1, 0, 0, 0, 0],
    'decoder_target_tokens': [0, 0, 0, 7, 1, 3, 1, 0, 0, 0, 0, 0],
    'decoder_loss_weights': [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
    'decoder_causal_attention': [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    'task_ids': 1,
  }


def test_decoder_only_packed():
  converter = fc.DecoderOnlyFeatureConverter(IDS[:, :1], V, pack=True)
  [row] = convert(
    converter, ([7, 1], [3, 1], 0), ([8], [4, 1], 1),
    lengths={'inputs': 6, 'targets': 4},
  )  # fmt: skip
  assert row == {
    'decoder_input_tokens': [0, 300, 7, 1, 3, 0, 303, 8, 4, 0, 0],
    'decoder_target_tokens': [0, 7, 1, 3, 1, 0, 8, 4, 1, 0, 0],
    'decoder_loss_weights': [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0],
    'decoder_causal_attention': [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0],
    'decoder_segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    'decoder_positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
  }


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize(
  'kind', [fc.EncDecFeatureConverter, fc.DecoderOnlyFeatureConverter]
)
def test_lengths_are_as_announced(kind, pack):
  converter = kind(IDS[:1], V, pack=pack)
  ds = converter(dataset(([7, 1], [3, 1])), LENGTHS)
  announced = converter.get_model_feature_lengths(LENGTHS)
  assert {k: (v,) for k, v in announced.items()} == {
    k: tuple(spec.shape) for k, spec in ds.element_spec.items()
  }
  long = 'encoder_input_tokens' if 'encoder_input_tokens' in announced else (
    'decoder_input_tokens'
  )  # fmt: skip
  assert announced[long] == (8 if long.startswith('encoder') else 12)


@pytest.mark.parametrize(
  ('example', 'message'),
  [
    (([soft(3), 1], [1], 0), r'3 soft tokens, .* holds <soft:3>'),
    (([7, 1], [soft(9), 1], 0), r'holds <soft:9>'),
    (([7, 1], [1], 2), r'2 tasks .* task_ids 2'),
    (([7, 1], [1], -1), r'task_ids -1'),
    (([V, 1], [1], 0), r'embeds 300 ids, but a text holds id 300'),
  ],
)
def test_what_does_not_exist_is_named(example, message):
  converter = fc.EncDecFeatureConverter(IDS, V)
  with pytest.raises(tf.errors.InvalidArgumentError, match=message):
    convert(converter, example)


def test_a_soft_token_without_a_prompt_is_an_error():
  with pytest.raises(tf.errors.InvalidArgumentError, match='no soft tokens'):
    convert(fc.EncDecFeatureConverter(), ([soft(0), 1], [1]))


def test_wrong_soft_ids():
  with pytest.raises(ValueError, match=r'\[tasks, soft tokens\]'):
    fc.EncDecFeatureConverter(IDS[0], V)
  with pytest.raises(ValueError, match=r'300.*vocab_size 400'):
    fc.EncDecFeatureConverter(IDS, 400)


def test_trimming_keeps_soft_tokens():
  vocabulary = vocabularies.bytes_vocabulary(0)
  features = fc.output_features(vocabulary)
  ds = dataset(([7, 8, soft(0), 9, 10, soft(1)], [3, 4]))
  lengths = {'inputs': 5, 'targets': 2}
  [row] = fc.trim_and_append_eos(ds, features, lengths).as_numpy_iterator()
  assert row['inputs'].tolist() == [7, 8, soft(0), soft(1), 1]
  assert row['targets'].tolist() == [3, 1]
  [row] = fc.trim_and_append_eos(ds, features, None).as_numpy_iterator()
  assert row['inputs'].tolist() == [7, 8, soft(0), 9, 10, soft(1), 1]
  # Without soft tokens it is seqio's.
  ds = dataset(([7, 8, 9, 10, 11], [3]))
  ours, theirs = (
    next(trim(ds, features, lengths).as_numpy_iterator())['inputs'].tolist()
    for trim in (
      fc.trim_and_append_eos, seqio.preprocessors.append_eos_after_trim
    )
  )  # fmt: skip
  assert ours == theirs == [7, 8, 9, 10, 1]


def test_prompts_are_whole_at_any_text_length():
  converter = fc.EncDecFeatureConverter(IDS[:1], V)
  [row] = convert(converter, ([7, 8, 9, 10, 1], [1]))
  assert row['encoder_input_tokens'] == [300, 301, 302, 7, 8, 9, 10, 1]
