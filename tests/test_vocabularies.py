import copy
import pickle

import pytest
import seqio
import tensorflow as tf

from prompt_jax import vocabularies
from prompt_jax.vocabularies import SOFT_BASE

TEXTS = [
  '',
  'a plain text',
  '<soft:0>',
  '<soft:0><soft:12> review: it was',
  'it was <soft:3> .',
  'sentence: bad film <soft:1> . <soft:0> <extra_id_0> <soft:999999>',
  'naïve café\n<soft:2>\u2028',
]


@pytest.fixture(scope='module')
def spiece(shared):
  return shared / 'data' / 't5_vocab' / 'spiece.model'


@pytest.fixture(scope='module', params=['bytes', 'sentencepiece'])
def vocabulary(request):
  if request.param == 'bytes':
    return vocabularies.bytes_vocabulary()
  return vocabularies.sentencepiece(request.getfixturevalue('spiece'))


def test_soft_tokens_interleave_with_the_inner_ids(vocabulary):
  inner = vocabulary.inner
  expected = [
    *inner.encode('it was '), SOFT_BASE + 3, *inner.encode(' .')
  ]  # fmt: skip
  assert vocabulary.encode('it was <soft:3> .') == expected


def test_without_soft_tokens_it_is_the_inner_vocabulary(vocabulary):
  text = 'a plain <text> with soft:0'
  assert vocabulary.encode(text) == vocabulary.inner.encode(text)
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == vocabulary.inner.decode(ids)
  assert vocabulary.vocab_size == vocabulary.inner.vocab_size
  assert vocabulary.extra_ids == vocabulary.inner.extra_ids
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


@pytest.mark.parametrize('text', TEXTS)
def test_tensorflow_agrees_with_python(vocabulary, text):
  ids = vocabulary.encode_tf(tf.constant(text))
  assert ids.dtype == tf.int32 and ids.shape.rank == 1
  assert ids.numpy().tolist() == vocabulary.encode(text)


def test_tensorflow_encodes_a_batch_as_ragged(vocabulary):
  rows = vocabulary.encode_tf(tf.constant(TEXTS))
  assert rows.to_list() == [vocabulary.encode(text) for text in TEXTS]


def test_encodes_inside_a_dataset(vocabulary):
  ds = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
  assert ds.element_spec.shape.rank == 1
  rows = [row.tolist() for row in ds.as_numpy_iterator()]
  assert rows == [vocabulary.encode(text) for text in TEXTS]


def test_decodes_up_to_eos(vocabulary):
  text = 'it was <soft:3> .'
  ids = [*vocabulary.encode(text), 1, SOFT_BASE, 5]
  assert vocabulary.decode(ids) == text
  assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == text
  batch = vocabulary.decode_tf(tf.constant([ids, ids]))
  assert [row.decode() for row in batch.numpy()] == [text, text]


@pytest.mark.parametrize('text', ['<soft:x>', '<soft:>', '<soft:1234567>'])
def test_a_malformed_soft_token_is_an_error(vocabulary, text):
  with pytest.raises(ValueError, match='malformed soft token'):
    vocabulary.encode(f'it was {text}')
  with pytest.raises(tf.errors.InvalidArgumentError, match='malformed soft'):
    vocabulary.encode_tf(tf.constant(f'it\nwas {text}'))


def test_equality_copies_and_hash(vocabulary):
  for twin in (
    copy.deepcopy(vocabulary),
    pickle.loads(pickle.dumps(vocabulary)),
  ):
    assert twin == vocabulary and hash(twin) == hash(vocabulary)
    assert twin.encode('a <soft:1>') == vocabulary.encode('a <soft:1>')
  assert vocabulary != vocabulary.inner
  assert vocabulary != vocabularies.bytes_vocabulary(extra_ids=7)
  with pytest.raises(ValueError, match='already'):
    vocabularies.SoftTokenVocabulary(vocabulary)


def test_t5_ids(spiece):
  vocabulary = vocabularies.sentencepiece(spiece)
  assert vocabulary.vocab_size == 32100
  assert vocabulary.encode('<extra_id_0> <extra_id_99>') == [32099, 32000]
  vocabularies.check_fits(vocabulary, 32128)
  with pytest.raises(ValueError, match=r'32100 ids.* embeds 256'):
    vocabularies.check_fits(vocabulary, 256)


def test_a_model_with_sentinels_gets_no_more(spiece, tmp_path):
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(spiece.read_bytes())
  for i in reversed(range(100)):
    model.pieces.add(
      piece=f'▁<extra_id_{i}>',
      type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED,
    )
  path = tmp_path / 'sentencepiece.model'
  path.write_bytes(model.SerializeToString())
  vocabulary = vocabularies.sentencepiece(path)
  assert vocabulary.vocab_size == 32100
  assert vocabulary.encode('<extra_id_0>') == [32099]


def test_wrong_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'none\.model'):
    vocabularies.sentencepiece(tmp_path / 'none.model')
  with pytest.raises(ValueError, match='folder'):
    vocabularies.sentencepiece(tmp_path)
  for content in (b'', b'version https://git-lfs.github.com/spec/v1\n'):
    path = tmp_path / 'wrong.model'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'wrong\.model.*not a SentencePiece'):
      vocabularies.sentencepiece(path)


def test_fingerprint(spiece, tmp_path):
  moved = tmp_path / 'moved.model'
  moved.write_bytes(spiece.read_bytes())
  prints = {
    vocabularies.fingerprint(vocabulary)
    for vocabulary in (
      vocabularies.sentencepiece(spiece),
      vocabularies.sentencepiece(spiece, extra_ids=0),
      vocabularies.bytes_vocabulary(),
      vocabularies.bytes_vocabulary(0),
    )
  }
  assert len(prints) == 4 and all(len(p) == 16 for p in prints)
  assert vocabularies.fingerprint(vocabularies.sentencepiece(moved)) in prints
  assert vocabularies.fingerprint(seqio.ByteVocabulary(0)) in prints
