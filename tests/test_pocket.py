"""The pocket language, its vocabulary and its tasks."""

import copy
import hashlib
import pickle

import numpy as np
from prompt_jax.tasks import pocket
from prompt_jax.tasks import pocket_language
from prompt_jax.tasks.pocket_language import ATTRIBUTES
from prompt_jax.tasks.pocket_language import FORMS
import pytest
import seqio
import tensorflow as tf

from prompt_jax import datasets
from prompt_jax import feature_converters
from prompt_jax import gin_utils
from prompt_jax import tasks
from prompt_jax import vocabularies

VOCABULARY = pocket.vocabulary()
LENGTHS = {'inputs': 19, 'targets': 5}
VALUES = {v: a for a, values in ATTRIBUTES.items() for v in values}


@pytest.fixture(scope='module')
def registered():
  yield pocket.register(VOCABULARY)
  # Other tests see the tasks that they register themselves.
  pocket.register(vocabularies.bytes_vocabulary())


@pytest.fixture(scope='module')
def drawn():
  """Words and attributes of 4000 sentences of language 1."""
  language = pocket_language.Language(1)
  sentences, values = language.sentences(pocket_language.generator(1, 99), 4000)
  return language, sentences, [text(row).split() for row in sentences], values


def text(row):
  return VOCABULARY.decode([i for i in row.tolist() if i])


def rows(name, split='validation'):
  """(inputs, targets) of all examples of a split, as text."""
  ds = datasets.find_task(name).get_dataset(
    LENGTHS, split, shuffle=False, try_in_mem_cache=False
  )
  return [
    (text(x['inputs']), text(x['targets'])) for x in ds.as_numpy_iterator()
  ]


# ---- the language -----------------------------------------------------------


def test_every_word_is_one():
  assert len(set(pocket_language.WORDS)) == len(pocket_language.WORDS) == 469
  assert VOCABULARY.vocab_size == pocket_language.SIZE == 480
  assert all(w.isalpha() or w in ':.' for w in pocket_language.WORDS)


def test_sentences_are_of_the_length_announced(drawn):
  _, sentences, words, _ = drawn
  lengths = {len(sentence) for sentence in words}
  assert lengths == set(range(9, pocket_language.SENTENCE_LENGTH + 1))
  assert sentences.shape[1] == pocket_language.SENTENCE_LENGTH
  assert all(s.count('.') == 1 and s[-1] == '.' for s in words)


def read(words):
  """What a sentence says, from its words alone; all but the topic."""

  def number(lists):
    [found] = [i for i, x in enumerate(lists) if set(x.split()) & set(words)]
    return found

  lists = pocket_language
  passive = 'by' in words
  [adverb] = [
    i for i, w in enumerate(words) if w in ' '.join(lists._ADVERBS).split()
  ]
  doer = words[words.index('by') + 1 if passive else adverb - 1]
  [agent] = [i for i, x in enumerate(lists._NOUNS) if doer in x.split()]
  return {
    'mood': number(lists._ADJECTIVES) ^ ('hardly' in words),
    'tense': number(lists._TIMES),
    'agent': agent,
    'place': number(lists._PLACES),
    'speed': number(lists._ADVERBS),
  }


def test_attributes_are_what_the_words_say(drawn):
  _, _, words, values = drawn
  names = list(ATTRIBUTES)
  for sentence, row in zip(words, values.tolist(), strict=True):
    said = read(sentence)
    assert said == {a: row[names.index(a)] for a in said}, sentence


def test_the_seed_decides_style_weather_and_topic(drawn):
  language, sentences, _, values = drawn
  of = dict(zip(ATTRIBUTES, values.T, strict=True))

  def holding(ids):  # [n, words] -> [n]
    return np.isin(sentences, ids).any(1)

  for style in range(2):
    expected = of['style'] == style
    assert (holding(language._adverbs[:, style]) == expected).all()
    same = holding(language._verbs[:, style])[expected].mean()
    assert 0.75 < same < 0.85  # the verb is of the other style in 20 %
  for weather in range(3):
    expected = of['weather'] == weather
    assert (holding(language._places[:, weather]) == expected).all()
  votes = np.stack([
    sum(np.isin(sentences, table[topic]).sum(1)
        for table in (language._nouns, language._verbs, language._objects))
    for topic in range(8)
  ])  # fmt: skip
  right = (votes.argmax(0) == of['topic']).mean()
  assert 0.6 < right < 0.95  # to be learned, but not all of it
  other = pocket_language.Language(2)
  for name in ('_nouns', '_verbs', '_objects', '_adverbs', '_places'):
    table, others = getattr(language, name), getattr(other, name)
    assert (table != others).any()
    assert sorted(table.ravel()) == sorted(others.ravel())


def test_shares(drawn):
  _, _, words, values = drawn
  n = len(words)
  for word, share in (('hardly', 0.3), ('by', 0.3), ('and', 0.3)):
    found = sum(word in sentence for sentence in words) / n
    assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5
  for column, known in zip(values.T, ATTRIBUTES.values(), strict=True):
    counts = np.bincount(column, minlength=len(known))
    assert len(counts) == len(known)
    assert abs(counts / n - 1 / len(known)).max() < 0.03


def test_queries_are_answered_and_the_held_out_are_never_asked():
  rng = pocket_language.generator(5)
  language = pocket_language.Language(1)
  sentences, values = language.sentences(rng, 4000)
  inputs, answers, asked = pocket_language.queries(rng, sentences, values)
  seen = set()
  said = []
  for i, row in enumerate(inputs):
    prompt, _, sentence = text(row).partition(' : ')
    assert sentence == text(sentences[i])
    words = prompt.split()
    form = {1: 'attr', 2: 'is', 3: 'or'}[len(words)]
    attribute = {'attr': words[0]}.get(form) or VALUES[words[-1]]
    seen.add((form, attribute))
    assert FORMS.index(form) == asked[i][0]
    value = ATTRIBUTES[attribute][values[i][list(ATTRIBUTES).index(attribute)]]
    if form == 'is':
      said.append(value == words[1])
      value = 'yes' if value == words[1] else 'no'
    elif form == 'or':
      assert {words[0], words[2]} <= set(ATTRIBUTES[attribute])
      assert words[0] != words[2]
      assert value in words
    assert text(answers[i : i + 1]) == value
  everything = {(form, a) for form in FORMS for a in ATTRIBUTES}
  assert seen == everything - set(pocket_language.NEVER_ASKED)
  assert 0.45 < np.mean(said) < 0.55


def test_spans_can_be_put_back():
  rng = pocket_language.generator(5)
  sentences, _ = pocket_language.Language(1).sentences(rng, 500)
  inputs, targets = pocket_language.corrupted(rng, sentences)
  for row, target, sentence in zip(inputs, targets, sentences, strict=True):
    first, one, second, two = text(target).split()
    assert (first, second) == ('<extra_id_0>', '<extra_id_1>')
    assert target[-1] == VOCABULARY.eos_id
    whole = text(row).replace(first, one).replace(second, two)
    assert whole == text(sentence)


def test_numbers_are_the_same_everywhere():
  """A change here changes what every study reads: say so in the changelog."""
  digest = hashlib.sha256()
  for name in ('pretrain', 'mood', 'agent', 'group', 'place'):
    if name == 'pretrain':
      rng = pocket_language.generator(1, 1)
      arrays = pocket_language.Language(1).examples(rng, 1000)
    else:
      arrays = pocket._classification(1, name, '', 'test').values()
    for array in arrays:
      assert array.dtype == np.int32
      digest.update(np.ascontiguousarray(array, '<i4').tobytes())
  assert digest.hexdigest()[:16] == '7f0dd6ae4fba3fd0'


# ---- the vocabulary ---------------------------------------------------------


def test_text_goes_round():
  line = 'soon farmers quickly packed <extra_id_0> roses at <soft:2> .'
  ids = VOCABULARY.encode(line)
  assert VOCABULARY.decode([*ids, 1, 0, 5]) == line
  assert VOCABULARY.encode_tf(tf.constant(line)).numpy().tolist() == ids
  assert ids[4] == VOCABULARY.vocab_size - 1
  assert VOCABULARY.encode('  soon\tzebras  ') == VOCABULARY.encode(
    'soon zebras'
  )
  texts = ['', 'soon xylophones', line]
  ragged = VOCABULARY.encode_tf(tf.constant(texts))
  assert ragged.to_list() == [VOCABULARY.encode(t) for t in texts]
  assert VOCABULARY.decode(VOCABULARY.encode('soon xylo')) == 'soon <unk>'
  inner = VOCABULARY.inner
  ids = inner.encode('yes or no')
  assert inner.decode_tf(tf.constant([[*ids, 1, 4]])).numpy() == [b'yes or no']


def test_equality_copies_and_fingerprint():
  for twin in (
    pocket.vocabulary(),
    copy.deepcopy(VOCABULARY),
    pickle.loads(pickle.dumps(VOCABULARY)),
  ):
    assert twin == VOCABULARY and hash(twin) == hash(VOCABULARY)
  words = pocket_language.WORDS
  prints = {
    vocabularies.fingerprint(vocabularies.WordVocabulary(some, extra))
    for some, extra in ((words, 8), (words[::-1], 8), (words, 7))
  }
  assert len(prints) == 3
  assert vocabularies.fingerprint(VOCABULARY) in prints


@pytest.mark.parametrize('words', [['a', 'a'], ['a b'], [''], ['</s>']])
def test_wrong_words(words):
  with pytest.raises(ValueError, match='different and without spaces'):
    vocabularies.WordVocabulary(words)


def test_gin_builds_it_from_a_model_file():
  gin_utils.parse(['models/pocket_8.gin'], ['METHOD=None', 'DTYPE="float32"',
                  'DROPOUT_RATE=0.0', 'TRAINABLE_PATTERNS=()'])  # fmt: skip
  made = gin_utils.build('%MODEL')
  gin_utils.clear()
  assert made.vocabulary == VOCABULARY
  vocabularies.check_fits(VOCABULARY, made.config.vocab_size)


# ---- the tasks --------------------------------------------------------------


def test_only_the_own_vocabulary_has_the_tasks(registered):
  assert set(pocket.LABELS) < set(registered) <= set(seqio.TaskRegistry.names())
  assert pocket.register(vocabularies.bytes_vocabulary()) == []
  assert not set(registered) & set(seqio.TaskRegistry.names())
  assert pocket.register(VOCABULARY) == registered
  assert tasks.LABELS['pocket3_place_design_5'] == ('left', 'right')


@pytest.mark.parametrize('seed', pocket.LANGUAGES)
@pytest.mark.parametrize('name', pocket.SPECS)
def test_sentences_are_different_and_classes_balanced(seed, name):
  sentences, _ = pocket._sentences(seed, name)
  assert len(np.unique(sentences, axis=0)) == len(sentences) == 4096 + 2 * 1024
  spec = pocket.SPECS[name]
  for split, size in pocket._SIZES.items():
    found = pocket._classification(seed, name, '', split)
    assert len(found['inputs']) == size
    counts = [
      (found['targets'][:, 0] == VOCABULARY.encode(label)).sum()
      for label in spec.labels
    ]
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1


def test_labels_are_those_of_the_sentences(registered):
  for name, expected in {
    'mood': lambda said: ('yes', 'no')[said['mood']],
    'agent': lambda said: ('one', 'two', 'three')[said['agent']],
    'place': lambda said: ('left', 'right')[said['place']],
  }.items():
    for sentence, label in rows(f'pocket1_{name}'):
      assert label == expected(read(sentence.split()))
  spec = pocket.SPECS['group']
  group = [
    t for t, c in zip(ATTRIBUTES['topic'], spec.classes, strict=True) if c
  ]
  assert group == ['food', 'trade', 'travel', 'health']


@pytest.mark.slow
def test_designs_stand_before_the_same_sentences(registered):
  for name, spec in pocket.SPECS.items():
    plain = rows(f'pocket2_{name}', 'test')
    for i, prompt in enumerate(spec.designs):
      designed = rows(f'pocket2_{name}_design_{i}', 'test')
      assert designed == [(f'{prompt} {x}'.strip(), y) for x, y in plain]


def test_new_words_are_not_in_pretraining(registered):
  language = pocket_language.Language(1)
  inputs, targets = language.examples(pocket._generator(1, 'train'), 2048)
  found = {'inputs': inputs, 'targets': targets}
  new = pocket_language.ids(' '.join(pocket_language.NEW_WORDS))
  assert not np.isin([*found['inputs'].ravel()], new).any()
  share = (found['targets'][:, 0] == VOCABULARY.vocab_size - 1).mean()
  assert 0.36 < share < 0.44
  asked = {x for x, _ in rows('pocket1_queries')}
  trained = {text(x[x != 1]) for x in found['inputs']}
  assert len(asked) == 2048 and not asked & trained


def test_the_pipeline_gives_batches(registered):
  config = datasets.DatasetConfig(
    'pocket1_agent', LENGTHS, 'test', batch_size=256, shuffle=False,
    num_epochs=1,
  )  # fmt: skip
  converter = feature_converters.EncDecFeatureConverter(
    480 + np.arange(3)[None], 480
  )
  batches = list(datasets.get_dataset(config, converter).as_numpy_iterator())
  assert len(batches) == 4
  first = {k: x[0].tolist() for k, x in batches[0].items()}
  sentence, label = rows('pocket1_agent', 'test')[0]
  ids = [480, 481, 482, *VOCABULARY.encode(sentence), 1]
  [answer] = VOCABULARY.encode(label)
  assert first == {
    'encoder_input_tokens': ids + [0] * (22 - len(ids)),
    'decoder_target_tokens': [answer, 1, 0, 0, 0],
    'decoder_input_tokens': [0, answer, 1, 0, 0],
    'decoder_loss_weights': [1, 1, 0, 0, 0],
  }


def test_padding_is_not_packed(registered):
  config = datasets.DatasetConfig(
    'pocket1_agent', {'inputs': 40, 'targets': 8}, 'test', batch_size=1,
    shuffle=False, pack=True, num_epochs=1,
  )  # fmt: skip
  converter = feature_converters.EncDecFeatureConverter(pack=True)
  batch = next(datasets.get_dataset(config, converter).as_numpy_iterator())
  tokens = batch['encoder_input_tokens'][0]
  segments = batch['encoder_segment_ids'][0]
  assert ((tokens != 0) == (segments != 0)).all()
  assert segments.max() >= 2


def test_shuffling_is_a_permutation_by_seed(registered):
  def order(seed):
    ds = datasets.find_task('pocket1_mood').get_dataset(
      LENGTHS, 'validation', shuffle=True, seed=seed, try_in_mem_cache=False
    )
    return [text(x['inputs']) for x in ds.as_numpy_iterator()]

  plain = [x for x, _ in rows('pocket1_mood')]
  assert order(1) == order(1) != order(2)
  assert sorted(order(1)) == sorted(plain) and order(1) != plain


def test_too_little_room_is_an_error(registered):
  with pytest.raises(ValueError, match='up to 15 tokens, .* room for 12'):
    datasets.find_task('pocket1_mood').get_dataset(
      {'inputs': 12, 'targets': 2}, 'train'
    )
