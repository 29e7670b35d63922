"""PPT's formats: the order of pieces, what is cut, who is drawn, and files."""

import collections
import json
import pathlib

import numpy as np
from prompt_jax.tasks import prompt_formats
from prompt_jax.tasks import prompt_pretraining
from prompt_jax.tasks.prompt_formats import Pieces
import pytest
import seqio

from prompt_jax import checkpoints
from prompt_jax import datasets
from prompt_jax import gin_utils
from prompt_jax import vocabularies
from prompt_jax.methods import initializers
from prompt_jax.row_files import UserDataError

WORDS = [
  *'? . cue no maybe yes terrible bad good great'.split(),
  *'ABCDEFGHIJKLMNOPQ',
  *(f'w{i}' for i in range(400)),
]
VOCABULARY = vocabularies.SoftTokenVocabulary(
  vocabularies.WordVocabulary(WORDS, extra_ids=3)
)
X, Y = VOCABULARY.vocab_size - 1, VOCABULARY.vocab_size - 2
MARKS = ('?', '.', 'cue')
LETTERS = tuple('ABCDEFGHIJKLMNOP')


def pieces(format='next_sentence', vocabulary=VOCABULARY, **options):
  data = prompt_pretraining.PretrainingText(
    format=format, marks=MARKS, **options
  )
  return prompt_pretraining._pieces(data, vocabulary)


def sentence(d, i, length=6):
  """Ids that tell document and sentence: of the words w{10 d + i}."""
  return VOCABULARY.encode(' '.join([f'w{10 * d + i}'] * length))


DOCUMENTS = [[sentence(d, i) for i in range(8)] for d in range(9)]


def origin(ids):
  """(document, sentence) of the ids of one."""
  number = ids[0] - VOCABULARY.encode('w0')[0]
  return divmod(number, 10)


def text(ids):
  return VOCABULARY.decode(ids)


# ---- formats -----------------------------------------------------------------


def test_a_pair_has_the_sentinel_between():
  one, two = sentence(0, 1, 2), sentence(0, 2, 3)
  got = prompt_formats.pair(pieces(), one, two, 20)
  assert got == [*one, X, *two]
  assert text(got) == 'w1 w1 <extra_id_0> w2 w2 w2'
  assert pieces().targets(2) == [X, *VOCABULARY.encode('yes'), Y]


@pytest.mark.parametrize('room', [3, 4, 7, 11, 30, 40])
def test_a_long_pair_is_cut_in_proportion(room):
  one, two = sentence(0, 1, 30), sentence(0, 2, 10)
  got = prompt_formats.pair(pieces(), one, two, room)
  assert len(got) == min(room, 41)
  kept = got.index(X), len(got) - got.index(X) - 1
  assert min(kept) >= 1
  assert abs(kept[0] - 0.75 * sum(kept)) <= 1


def test_a_choice_is_query_options_and_cue():
  p = pieces('next_sentence_selection')
  options = [sentence(0, i, 1) for i in range(6)]
  got = prompt_formats.choice(p, sentence(1, 0, 2), options, 60, 389, 86)
  assert text(got) == (
    'w10 w10 ? A . w0 . B . w1 . C . w2 . D . w3 . E . w4 . F . w5 . '
    '? cue <extra_id_0>'
  )


def test_limits_of_query_and_options_then_proportion():
  p = pieces('next_sentence_selection')
  options = [sentence(0, i, 40) for i in range(6)]
  query = sentence(1, 0, 100)
  got = prompt_formats.choice(p, query, options, 500, 50, 20)
  counts = collections.Counter(got)
  assert counts[query[0]] == 50
  assert {counts[o[0]] for o in options} == {20}
  # 50 and 6 x 20 pieces, 22 between them: room for half of the texts.
  got = prompt_formats.choice(p, query, options, 22 + 85, 50, 20)
  counts = collections.Counter(got)
  assert len(got) <= 107 and got[-1] == X
  assert 22 <= counts[query[0]] <= 26
  assert {counts[o[0]] for o in options} <= {9, 10}
  least = prompt_formats.choice(p, query, options, 22 + 7, 50, 20)
  assert collections.Counter(least)[query[0]] == 1
  with pytest.raises(ValueError, match='28 pieces of inputs are too few for 6'):
    prompt_formats.choice(p, query, options, 28, 50, 20)
  with pytest.raises(ValueError, match='7 options, but 6 letters'):
    prompt_formats.choice(p, query, [*options, query], 500, 50, 20)


def test_a_single_sentence_ends_with_the_sentinel():
  p = pieces('single_sentence')
  assert prompt_formats.single(p, sentence(0, 0, 3), 9)[-1] == X
  assert len(prompt_formats.single(p, sentence(0, 0, 30), 9)) == 9
  assert text(p.targets(0)) == '<extra_id_0> terrible <extra_id_1>'


# ---- who is drawn ------------------------------------------------------------


def drawn(format, passes=40, documents=DOCUMENTS, room=412):
  made = prompt_formats.examples(
    documents, format, pieces(format), room, passes
  )
  return made


def test_labels_of_a_pair_are_what_the_sentences_are():
  counts = collections.Counter()
  neighbours = collections.Counter()
  for inputs, label in drawn('next_sentence'):
    middle = inputs.index(X)
    (d, i), (e, j) = origin(inputs), origin(inputs[middle + 1 :])
    expected = 0 if d != e else 2 if abs(i - j) == 1 else 1
    assert label == expected and (d, i) != (e, j)
    counts[label] += 1
    if label == 2 and 0 < i < 7:
      neighbours[j - i] += 1
  n = sum(counts.values())
  assert n == 40 * 72
  for label in range(3):  # thirds, within three standard deviations
    assert abs(counts[label] / n - 1 / 3) < 3 * (2 / 9 / n) ** 0.5
  share = neighbours[1] / sum(neighbours.values())
  assert abs(share - 0.5) < 0.06


def test_unlike_lengths_are_left_out():
  long = [[sentence(0, i, 601 if i % 2 else 6) for i in range(8)],
          [sentence(1, i, 6) for i in range(8)]]  # fmt: skip
  for inputs, _ in drawn('next_sentence', 5, long, room=5000):
    one = inputs.index(X)
    assert 0.01 <= one / (len(inputs) - one - 1) <= 100


def parts(inputs, p):
  """Query and options of a choice."""
  assert inputs[-1] == X and inputs[-2:-1] == p.cue
  assert inputs[-3] == p.question
  query, rest = inputs[: inputs.index(p.question)], inputs[:-3]
  rest = rest[len(query) + 1 :]
  options = []
  for letter in p.letters:
    if not rest:
      break
    assert rest[:2] == [letter, p.stop]
    end = rest.index(p.stop, 2)
    options.append(rest[2:end])
    rest = rest[end + 1 :]
  assert not rest
  return query, options


def test_six_options_are_one_beside_one_near_and_four_elsewhere():
  p = pieces('next_sentence_selection')
  answers = collections.Counter()
  for inputs, label in drawn('next_sentence_selection', 10):
    query, options = parts(inputs, p)
    d, i = origin(query)
    found = [origin(option) for option in options]
    assert len(found) == 6 and len(set(found)) == 6
    assert found[label] in ((d, i - 1), (d, i + 1))
    own = [o for o in found if o[0] == d]
    assert len(own) == 2
    [near] = [o for o in own if o != found[label]]
    assert abs(near[1] - i) > 1
    assert len({o[0] for o in found}) == 5  # four other documents
    answers[label] += 1
  n = sum(answers.values())
  assert n == 720 and len(answers) == 6
  assert max(answers.values()) / n < 0.25


def test_unified_has_2_to_16_options_evenly():
  p = pieces('unified')
  counts = collections.Counter()
  for inputs, label in drawn('unified', 20):
    query, options = parts(inputs, p)
    d, i = origin(query)
    count = len(options)
    *_, same = prompt_formats.LIMITS[count]
    found = [origin(option) for option in options]
    assert found[label] in ((d, i - 1), (d, i + 1))
    assert sum(o[0] == d for o in found) == 1 + min(same, count - 1)
    counts[count] += 1
  assert set(counts) == set(range(2, 17))
  n = sum(counts.values())
  for share in counts.values():
    assert abs(share / n - 1 / 15) < 4 * (1 / 15 / n) ** 0.5


def test_draws_are_of_the_seed():
  one, again, other = (
    prompt_formats.examples(DOCUMENTS, 'unified', pieces('unified'), 412, 1, s)
    for s in (0, 0, 1)
  )
  assert one == again != other


# ---- words and vocabularies --------------------------------------------------


def test_the_papers_words_are_single_pieces_of_t5(shared):
  path = str(shared / 'goldens' / 'vocab' / 't5_vocab')
  t5 = vocabularies.sentencepiece(path)
  for format in prompt_formats.FORMATS:
    data = prompt_pretraining.PretrainingText(format=format)
    p = prompt_pretraining._pieces(data, t5)
    assert p.sentinels == (32099, 32098)
    assert (p.question, p.stop) == (58, 5)  # '?' and '.', as the released code
    want = {'next_sentence': [150, 2087, 4273],
            'single_sentence': [9412, 1282, 2087, 207, 248]}  # fmt: skip
    assert p.words == want.get(format, p.words)
    words = prompt_formats.WORDS[format]
    said = prompt_pretraining._Word(words)
    for label in range(len(words)):
      assert said(t5.decode(p.targets(label))) == label
  pair = prompt_formats.pair(p, p.encode('Is it?'), p.encode('It is.'), 99)
  assert pair.index(32099) == len(p.encode('Is it?'))
  # Another vocabulary has other pieces.
  with pytest.raises(ValueError, match="'maybe' is 5 pieces"):
    pieces(
      vocabulary=vocabularies.bytes_vocabulary(), words=('n', 'maybe', 'y')
    )


def test_words_that_will_not_do():
  with pytest.raises(ValueError, match="'perhaps' is 1 pieces .* or unknown"):
    pieces(words=('no', 'perhaps', 'yes'))
  with pytest.raises(ValueError, match='are the same piece'):
    pieces(words=('no', 'no', 'yes'))
  with pytest.raises(ValueError, match='has 3 labels, got the words'):
    pieces(words=('no', 'yes'))
  few = vocabularies.WordVocabulary(WORDS, extra_ids=1)
  with pytest.raises(ValueError, match='1 sentinels; .* need two'):
    Pieces(few, ('no', 'yes'))
  with pytest.raises(
    ValueError, match="got 'next_sentense'. Did you mean 'next_sentence'"
  ):
    prompt_pretraining.PretrainingText(format='next_sentense')
  for field in ('max_inputs', 'passes', 'min_tokens', 'min_sentences'):
    with pytest.raises(ValueError, match=f'{field} must be .* got 0'):
      prompt_pretraining.PretrainingText(**{field: 0})


# ---- files and tasks ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  lines = [[text(s) for s in document] for document in DOCUMENTS]
  (tmp_path / 'lines.txt').write_text('\n\n'.join(map('\n'.join, lines)))
  prose = [[f'{text(s)} .'.replace('w', 'W', 1) for s in d] for d in DOCUMENTS]
  (tmp_path / 'prose.txt').write_text('\n'.join(map(' '.join, prose)))
  rows = [json.dumps({'text': '\n'.join(d)}) for d in lines]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(rows))
  yield tmp_path
  seqio.TaskRegistry.remove('ppt_test')


def rows(data, split='train', inputs=412):
  data.register('ppt_test', VOCABULARY)
  ds = datasets.find_task('ppt_test').get_dataset(
    {'inputs': inputs, 'targets': 3}, split, shuffle=False,
    try_in_mem_cache=False,
  )  # fmt: skip
  return [
    (text([i for i in x['inputs'].tolist() if i]), text(x['targets'].tolist()))
    for x in ds.as_numpy_iterator()
  ]


@pytest.mark.parametrize('name', ['lines.txt', 'rows.jsonl'])
def test_a_file_becomes_a_task(folder, name):
  data = prompt_pretraining.PretrainingText(
    str(folder / name), str(folder / 'lines.txt'), marks=MARKS,
    sentence_per_line=True, passes=2,
  )  # fmt: skip
  found = rows(data)
  assert len(found) == 2 * 72
  for inputs, targets in found:
    one, two = inputs.split(' <extra_id_0> ')
    assert len(set(one.split())) == len(set(two.split())) == 1
    x, word, y = targets.split()
    assert (x, y) == ('<extra_id_0>', '<extra_id_1>')
    assert word in ('no', 'maybe', 'yes')
  assert [x for x, _ in rows(data, 'validation')] != [x for x, _ in found]
  task = datasets.find_task('ppt_test')
  assert task.postprocess_fn('<extra_id_0> maybe <extra_id_1>') == 1
  assert task.postprocess_fn('<extra_id_0> cue') == -1
  with pytest.raises(ValueError, match='room for 5: its texts'):
    rows(data, inputs=5)


def test_prose_is_cut_into_sentences(folder):
  texts = prompt_formats.read_documents(str(folder / 'prose.txt'))
  assert len(texts) == 9
  assert [len(prompt_formats.sentences(t)) for t in texts] == [8] * 9
  said = 'He said: "Stop!" They stopped. It was 5.30 then (or so). 7 left?'
  assert prompt_formats.sentences(said) == [
    'He said: "Stop!"', 'They stopped.', 'It was 5.30 then (or so).', '7 left?'
  ]  # fmt: skip


def test_short_sentences_and_documents_are_left_out(folder):
  path = folder / 'short.txt'
  one = ['w1 w1 w1', *['w2 w2 w2 w2 w2'] * 6]
  two = ['w3 w3 w3 w3 w3'] * 5
  path.write_text('\n'.join(one) + '\n\n' + '\n'.join(two))
  data = prompt_pretraining.PretrainingText(
    str(path), marks=MARKS, sentence_per_line=True
  )
  with pytest.raises(
    UserDataError, match='1 documents of at least 6 sentences'
  ):
    rows(data)
  path.write_text('\n'.join(one) + '\n\n' + '\n'.join([*two, two[0]]))
  assert all('w1' not in x for x, _ in rows(data))


def test_single_sentences_have_a_classifiers_labels(folder):
  path = folder / 'rated.jsonl'
  scores = [
    dict(zip('12345', x, strict=True))
    for x in ((0.0, -9.0, -9.0, -9.0, -9.0), (-9.0, -9.0, -9.0, -1.0, -1.1))
  ]
  found = [{'text': 'w1 w2', 'label': 4}, {'text': 'w3', 'label': 'bad'},
           *({'text': f'w{i}', 'label_scores': s}
             for i, s in enumerate(scores, 4))]  # fmt: skip
  path.write_text('\n'.join(map(json.dumps, found)))
  data = prompt_pretraining.PretrainingText(
    str(path), format='single_sentence', marks=MARKS
  )
  made = [(x, y.split()[1]) for x, y in rows(data)]
  assert made == [('w1 w2 <extra_id_0>', 'great'), ('w3 <extra_id_0>', 'bad'),
                  ('w4 <extra_id_0>', 'terrible'),
                  ('w5 <extra_id_0>', 'good')]  # fmt: skip
  sure = prompt_pretraining.PretrainingText(
    str(path), format='single_sentence', marks=MARKS, confidence=0.9
  )
  assert len(rows(sure)) == 3
  path.write_text(json.dumps({'text': 'w1', 'label': 5}))
  for row, message in (
    ({'text': 'w1', 'label': 5}, 'line 1: label 5, expected one of terrible'),
    ({'label': 5}, 'line 1: no column `text`'),
    ({'text': 'w', 'label_scores': {'a': 1}}, 'of 1 labels, expected 5'),
  ):
    other = folder / f'{len(message)}.jsonl'
    other.write_text(json.dumps(row))
    data = prompt_pretraining.PretrainingText(
      str(other), format='single_sentence', marks=MARKS
    )
    with pytest.raises(UserDataError, match=message):
      rows(data)


def test_downstream_rows_are_in_the_same_format(folder):
  path = folder / 'cb.jsonl'
  row = {'premise': 'w1 w2', 'hypothesis': 'w3', 'label': 'entailment'}
  path.write_text(json.dumps(row))
  classes = ('contradiction', 'neutral', 'entailment')
  form = prompt_pretraining.FormattedRows
  common = {'train_data': str(path), 'marks': MARKS, 'classes': classes}
  data = form(inputs='{hypothesis}', second='{premise}', **common)
  target = '<extra_id_0> yes <extra_id_1>'
  assert rows(data) == [('w3 <extra_id_0> w1 w2', target)]
  data = form(
    inputs='{hypothesis} ? {premise} .', options=('no', 'maybe', '{label}'),
    format='unified', **{**common, 'classes': classes},
  )  # fmt: skip
  path.write_text(json.dumps({**row, 'label': 'neutral'}))
  prompt_pretraining._read.cache_clear()
  with pytest.raises(UserDataError, match="column 'lable', .*mean 'label'"):
    rows(form(inputs='{lable}', second='{premise}', **common))
  [(inputs, target)] = rows(data)
  assert inputs.startswith('w3 ? w1 w2 . ? A . no . B . maybe . C . ')
  assert target == '<extra_id_0> B <extra_id_1>'
  single = form(
    inputs='{premise}', format='single_sentence', words=('bad', 'good'),
    **{**common, 'classes': ('neutral', 'entailment')},
  )  # fmt: skip
  assert rows(single) == [
    ('w1 w2 <extra_id_0>', '<extra_id_0> bad <extra_id_1>')
  ]
  with pytest.raises(ValueError, match='next_sentence needs the template `sec'):
    form(inputs='{hypothesis}', **common)
  with pytest.raises(ValueError, match='unified needs the template `options`'):
    form(inputs='{hypothesis}', format='unified', **common)
  with pytest.raises(ValueError, match='3 classes .* but 2 words'):
    form(inputs='{a}', second='{b}', words=('no', 'yes'), **common)


def test_missing_files_are_told():
  data = prompt_pretraining.PretrainingText('nowhere.txt', marks=MARKS)
  with pytest.raises(UserDataError, match=r'nowhere\.txt: there is no such'):
    data.register('ppt_test', VOCABULARY)
  assert not prompt_pretraining.PretrainingText().given


# ---- gin ---------------------------------------------------------------------


def test_the_run_files_make_the_data(folder):
  model = ['models/mini_bytes.gin', 'methods/ppt.gin']
  flags = [f"TRAIN_DATA='{folder}/lines.txt'", 'MIXTURE_OR_TASK_NAME=user_data',
           'TRAIN_STEPS=3', 'FORMAT=unified', 'MAX_INPUTS=99']  # fmt: skip
  gin_utils.parse([*model, 'runs/pretrain_prompt.gin'], flags)
  data = gin_utils.build('@run.Run()').user_data
  assert data == prompt_pretraining.PretrainingText(
    f'{folder}/lines.txt', format='unified', max_inputs=99
  )
  gin_utils.parse(
    [*model, 'runs/formatted_rows.gin'],
    [*flags, "INPUTS='{a}'", "OPTIONS=('{b}', 'w1')", "LABELS=('x', 'y')"],
  )
  data = gin_utils.build('@run.Run()').user_data
  assert data == prompt_pretraining.FormattedRows(
    f'{folder}/lines.txt',
    inputs='{a}',
    options=('{b}', 'w1'),
    format='unified',
    classes=('x', 'y'),
    max_inputs=99,
  )
  assert data.options == ('{b}', 'w1')


def test_the_schedule_is_the_papers():
  gin_utils.parse(
    ['models/mini_bytes.gin', 'methods/ppt.gin', 'runs/train.gin'],
    ['MIXTURE_OR_TASK_NAME=none', 'TRAIN_STEPS=3'],
  )
  rate = gin_utils.build('%LEARNING_RATE_FN')
  steps = np.array([0, 1, 2, 99, 199_999])
  got = [float(rate(step)) for step in steps]
  np.testing.assert_allclose(got, 0.1 / np.sqrt(steps + 1), rtol=1e-6)


def test_a_pretrained_prompt_starts_a_task_bit_for_bit(tmp_path):
  """The file of a run is what `initializers.FromFile` of ppt_tune.gin reads."""
  prompt = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
  path = pathlib.Path(tmp_path) / 'trainable.safetensors'
  own = {'method': {'prompt': prompt}, 'network': {}}
  checkpoints.save_trainable(path, own, {})
  gin_utils.parse(
    ['models/mini_bytes.gin', 'methods/ppt_tune.gin', 'runs/train.gin'],
    ['MIXTURE_OR_TASK_NAME=none', 'TRAIN_STEPS=3',
     'PROMPT_INIT=@initializers.FromFile()',
     f'initializers.FromFile.path={path}'],
  )  # fmt: skip
  init = gin_utils.build('%METHOD').prompt_init
  assert init == initializers.FromFile(str(path))
  np.testing.assert_array_equal(init(None, (3, 16), None), prompt)
