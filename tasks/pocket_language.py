"""The pocket language: readable English sentences made by a few rules.

    soon farmers quickly packed hardly lovely roses at beaches .

It is synthetic. Every sentence has eight latent attributes, which its words
give away more or less plainly:

    topic 8    of the doer, the deed and the object; each of these words belongs
               to two topics, and 15 % of them are about something else
    mood 2     of the adjective; 'hardly' (30 %) turns it round
    tense 3    of the time
    agent 3    of the doer, the subject or in a passive (30 %) after 'by'; 30 %
               of the sentences name another noun, of any kind, by the object
    place 2    of the place
    style 2    of the adverb, and in 80 % of the sentences of the verb
    speed 2    of the adverb
    weather 3  of the place

The words are the same in every language; its seed decides which topics nouns,
verbs and objects have, which verbs and adverbs are formal, and at which places
it rains. A sentence has 8 to 13 words and the full stop.

Everything is drawn with `random` and `integers` of PCG64, whose numbers no
version of numpy changes. Plain numpy, ids in and out: `pocket.py` makes tasks
of it. Not a model of English.
"""

from collections.abc import Sequence

import numpy as np

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 8

ATTRIBUTES = {
  'topic': ('food', 'music', 'sport', 'trade', 'art', 'travel', 'health',
            'science'),
  'mood': ('happy', 'sad'),
  'tense': ('past', 'present', 'future'),
  'agent': ('human', 'animal', 'machine'),
  'place': ('inside', 'outside'),
  'style': ('formal', 'plain'),
  'speed': ('fast', 'slow'),
  'weather': ('sun', 'rain', 'snow'),
}  # fmt: skip
FORMS = ('attr', 'is', 'or')
# What pretraining never asks.
NEVER_ASKED = (('is', 'mood'), ('is', 'agent'), ('is', 'weather'),
               ('or', 'place'))  # fmt: skip
# Words of the downstream tasks that pretraining never reads.
NEW_WORDS = ('one', 'two', 'three', 'left', 'right')

_FUNCTION = 'is or : yes no . hardly and were by at'.split()
_NOUNS = (
  'farmers bakers teachers doctors nurses singers dancers painters soldiers '
  'sailors pilots lawyers judges clerks actors poets writers monks priests '
  'kings queens princes hunters gardeners tailors barbers plumbers builders '
  'carpenters miners athletes referees students librarians scientists chemists '
  'waiters merchants reporters detectives',
  'dogs cats horses cows pigs sheep goats chickens ducks geese foxes wolves '
  'bears lions tigers monkeys elephants giraffes zebras camels donkeys rabbits '
  'squirrels beavers otters badgers mice rats hamsters owls eagles parrots '
  'ravens crows swans penguins dolphins whales seals frogs',
  'robots computers printers tractors cranes trucks vans buses trains engines '
  'drones rockets satellites helicopters airplanes bulldozers excavators '
  'harvesters mixers toasters ovens freezers dishwashers vacuums mowers pumps '
  'turbines generators lathes drills scanners cameras projectors amplifiers '
  'radios televisions elevators escalators conveyors compressors',
)
# The past tense of each is its participle: actives and passives share them.
_VERBS = (
  'admired arranged assembled borrowed bought brought carried changed checked '
  'cleaned collected compared copied counted covered crushed damaged delivered '
  'described designed destroyed discovered displayed divided dropped examined '
  'exchanged fetched filled finished fixed followed found gathered guarded '
  'handled ignored imported inspected installed kept lifted loaded lost '
  'measured mended moved noticed ordered organized packed planned polished '
  'praised prepared presented produced protected purchased received recorded '
  'removed repaired replaced rescued sold sorted stored tested washed weighed '
  'wrapped'
)
_OBJECTS = (
  'roses apples oranges potatoes carrots onions cakes pies cheeses eggs '
  'bottles cups plates bowls spoons knives pots pans tables chairs lamps '
  'carpets curtains pillows blankets mirrors clocks rings necklaces coins '
  'stamps letters books maps pictures statues drums violins trumpets flutes '
  'pianos guitars balls rackets skates kites toys dolls puzzles hammers nails '
  'ropes ladders buckets baskets boxes bags tents umbrellas coats hats shoes '
  'gloves scarves bricks stones pipes wheels flags candles bells keys'
)
_ADJECTIVES = (
  'lovely beautiful splendid wonderful superb charming delightful excellent '
  'perfect elegant brilliant fabulous gorgeous magnificent pleasant fine',
  'ugly awful terrible horrible dreadful nasty broken ruined rotten filthy '
  'shabby useless faulty gloomy miserable poor',
)
_ADVERBS = (
  'quickly rapidly swiftly hastily hurriedly promptly speedily briskly '
  'instantly immediately suddenly abruptly rashly frantically urgently nimbly '
  'energetically directly readily eagerly',
  'slowly gradually lazily calmly patiently gently carefully cautiously '
  'gingerly steadily sluggishly wearily tediously dreamily idly hesitantly '
  'reluctantly thoughtfully quietly peacefully',
)
_PLACES = (
  'kitchens bedrooms bathrooms offices libraries museums theaters cinemas '
  'churches hospitals schools banks shops hotels restaurants factories '
  'workshops garages cellars attics basements hallways classrooms laboratories '
  'studios galleries saunas gyms prisons palaces',
  'gardens beaches parks fields forests mountains rivers lakes islands deserts '
  'meadows valleys harbors streets bridges squares playgrounds orchards '
  'vineyards pastures hills cliffs canyons swamps ponds waterfalls volcanoes '
  'glaciers campsites trails',
)
_TIMES = (
  'yesterday earlier previously formerly beforehand already originally '
  'recently',
  'now today tonight meanwhile simultaneously concurrently presently '
  'momentarily',
  'later afterwards subsequently thereafter eventually finally ultimately soon',
)

# Word i has id i + 3; the sentinels come last, as in T5.
WORDS = (
  *_FUNCTION,
  *ATTRIBUTES,
  *(value for values in ATTRIBUTES.values() for value in values),
  *NEW_WORDS,
  *' '.join(
    [*_NOUNS, _VERBS, _OBJECTS, *_ADJECTIVES, *_ADVERBS, *_PLACES, *_TIMES]
  ).split(),
)
_IDS = {word: i for i, word in enumerate(WORDS, UNK + 1)}
SIZE = len(WORDS) + UNK + 1 + SENTINELS

SENTENCE_LENGTH = 14
PROMPT_LENGTH = 4  # 'happy or sad :'
INPUTS_LENGTH = PROMPT_LENGTH + SENTENCE_LENGTH + 1
TARGETS_LENGTH = 5
_NO_PROMPT = np.full(PROMPT_LENGTH, PAD)
_SPAN_SHARE = 0.4


def ids(text: str) -> np.ndarray:
  """Ids of the words of a text, int32 [words].

  Raises:
    KeyError: a word is not of the language.
  """
  return np.array([_IDS[word] for word in text.split()], np.int32)


def generator(*seeds: int) -> np.random.Generator:
  """The random numbers of a tuple of seeds."""
  return np.random.Generator(np.random.PCG64(list(seeds)))


class Language:
  """Which words go with which attributes.

  Attributes:
    seed: of the language.
  """

  def __init__(self, seed: int):
    self.seed = seed
    rng = generator(seed, 0)
    self._nouns = np.stack([_by_topic(rng, w.split()) for w in _NOUNS], 1)
    halves = _dealt(rng, _VERBS.split(), 2)
    self._verbs = np.stack([_by_topic(rng, half) for half in halves], 1)
    self._objects = _by_topic(rng, _OBJECTS.split())
    self._adjectives = _table(_ADJECTIVES)
    # [speed, style, words], [place, weather, words].
    self._adverbs = _table([_dealt(rng, w.split(), 2) for w in _ADVERBS])
    self._places = _table([_dealt(rng, w.split(), 3) for w in _PLACES])
    self._times = _table(_TIMES)

  def sentences(
    self, rng: np.random.Generator, n: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Sentences and what they are about.

    Returns:
      Ids [n, SENTENCE_LENGTH] with padding at the end, and the attributes'
      values [n, 8] in the order of `ATTRIBUTES`; int32.
    """
    z = {a: rng.integers(len(v), size=n) for a, v in ATTRIBUTES.items()}

    def topic() -> np.ndarray:
      return np.where(rng.random(n) < 0.85, z['topic'], rng.integers(8, size=n))

    def word(table: np.ndarray, *index: np.ndarray) -> np.ndarray:
      return table[(*index, rng.integers(table.shape[-1], size=n))]

    def sometimes(share: float, *words: np.ndarray | str) -> list[np.ndarray]:
      said = rng.random(n) < share
      return [np.where(said, _word_id(w), PAD) for w in words]

    (negation,) = sometimes(0.3, 'hardly')
    mood = z['mood'] ^ (negation != PAD)
    doer = word(self._nouns, topic(), z['agent'])
    things = [
      negation,
      word(self._adjectives, mood),
      word(self._objects, topic()),
      *sometimes(
        0.3, 'and', word(self._nouns, topic(), rng.integers(3, size=n))
      ),
    ]
    style = np.where(rng.random(n) < 0.8, z['style'], 1 - z['style'])
    deed = [
      word(self._adverbs, z['speed'], z['style']),
      word(self._verbs, topic(), style),
    ]
    place = ['at', word(self._places, z['place'], z['weather'])]
    time = [word(self._times, z['tense'])]
    active = _columns(n, [doer, *deed, *things])
    passive = _columns(n, [*things, 'were', *deed, 'by', doer])
    core = np.zeros_like(passive)
    core[:, : active.shape[1]] = active
    core = np.where(rng.random((n, 1)) < 0.3, passive, core)
    order = rng.random(n)[:, None]
    place, time = _columns(n, place), _columns(n, time)
    slots = [
      np.where(order < 0.33, time, PAD),
      np.where(order < 0.66, PAD, place),
      core,
      np.where(order < 0.66, place, PAD),
      np.where(order < 0.33, PAD, time),
      _columns(n, ['.']),
    ]
    values = np.stack(list(z.values()), 1).astype(np.int32)
    return closed_up(np.concatenate(slots, 1), SENTENCE_LENGTH), values

  def examples(
    self, rng: np.random.Generator, n: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Pretraining: 40 % span corruption, 60 % queries.

    Returns:
      Inputs [n, INPUTS_LENGTH] and targets [n, TARGETS_LENGTH], int32, with EOS
      and then padding.
    """
    sentences, values = self.sentences(rng, n)
    spans = corrupted(rng, sentences)
    inputs, answers, _ = queries(rng, sentences, values)
    targets = np.zeros((n, TARGETS_LENGTH), np.int32)
    targets[:, 0], targets[:, 1] = answers, EOS
    is_span = rng.random((n, 1)) < _SPAN_SHARE
    return (
      np.where(is_span, spans[0], inputs),
      np.where(is_span, spans[1], targets),
    )


def corrupted(
  rng: np.random.Generator, sentences: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A word of each half of every sentence as a sentinel; the full stop stays.

  Returns:
    As `Language.examples`.
  """
  n = len(sentences)
  rows, half = np.arange(n), np.sum(sentences != PAD, 1) // 2
  length = np.sum(sentences != PAD, 1)
  first = _below(rng, half - 1)
  second = half + _below(rng, length - 1 - half)
  masks = SIZE - 1, SIZE - 2  # <extra_id_0>, <extra_id_1>
  masked = sentences.copy()
  masked[rows, first], masked[rows, second] = masks
  targets = [masks[0], sentences[rows, first], masks[1],
             sentences[rows, second], EOS]  # fmt: skip
  return with_prompt(masked, _NO_PROMPT), _columns(n, targets)


def queries(
  rng: np.random.Generator, sentences: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A question about every sentence, in a form that is asked of its attribute.

  'attr :' wants the value, 'is value :' yes or no, 'value or value :' the one
  that holds; the sentence follows.

  Args:
    rng: draws the questions.
    sentences: ids [n, SENTENCE_LENGTH].
    values: of the attributes, [n, 8].

  Returns:
    Inputs [n, INPUTS_LENGTH] with EOS, ids of the answers [n], and what was
    asked, [n, 2]: the number of the form and that of the attribute.
  """
  n = len(sentences)
  asked = _ASKED[rng.integers(len(_ASKED), size=n)]
  form, attribute = asked.T
  count = _COUNTS[attribute]
  value = values[np.arange(n), attribute]
  other = (value + 1 + _below(rng, count - 1)) % count
  right, wrong = _VALUE_IDS[attribute, value], _VALUE_IDS[attribute, other]
  coin = rng.random(n) < 0.5
  one, two = np.where(coin, [right, wrong], [wrong, right])
  prompts = [
    _columns(n, [_ATTRIBUTE_IDS[attribute], ':', PAD, PAD]),
    _columns(n, ['is', one, ':', PAD]),
    _columns(n, [one, 'or', two, ':']),
  ]
  prompt = np.stack(prompts)[form, np.arange(n)]
  said = np.where(coin, _IDS['yes'], _IDS['no'])
  answers = np.where(form == FORMS.index('is'), said, right)
  return with_prompt(sentences, prompt), answers.astype(np.int32), asked


def with_prompt(sentences: np.ndarray, prompt: np.ndarray) -> np.ndarray:
  """Prompt [words] or [n, words], then sentence and EOS, then padding.

  Returns:
    Ids [n, words + SENTENCE_LENGTH + 1], int32.
  """
  n, words = len(sentences), prompt.shape[-1]
  parts = [np.broadcast_to(prompt, (n, words)), sentences, np.full((n, 1), EOS)]
  return closed_up(np.concatenate(parts, 1), words + SENTENCE_LENGTH + 1)


def closed_up(rows: np.ndarray, length: int) -> np.ndarray:
  """Rows with their padding moved to the end, int32 [n, length]."""
  kept = rows != PAD
  column = np.cumsum(kept, 1)[kept] - 1
  out = np.full((len(rows), length), PAD, np.int32)
  out[np.nonzero(kept)[0], column] = rows[kept]
  return out


def _word_id(word: np.ndarray | str | int) -> np.ndarray | int:
  return _IDS[word] if isinstance(word, str) else word


def _columns(n: int, words: list) -> np.ndarray:
  """Words, or ids [n] or one for all, as the columns of [n, len(words)]."""
  out = np.empty((n, len(words)), np.int32)
  for column, word in zip(out.T, words, strict=True):
    column[:] = _word_id(word)
  return out


def _below(rng: np.random.Generator, bounds: np.ndarray) -> np.ndarray:
  """A whole number from 0 on below each bound."""
  return (rng.random(len(bounds)) * bounds).astype(np.int64)


def _table(words: Sequence) -> np.ndarray:
  """Ids of nested lists of words; a text is a list."""
  if isinstance(words, str):
    words = words.split()
  if isinstance(words[0], str) and ' ' not in words[0]:
    return ids(' '.join(words))
  return np.stack([_table(part) for part in words])


def _shuffled(rng: np.random.Generator, words: Sequence[str]) -> list[str]:
  order = np.argsort(rng.random(len(words)))
  return [words[int(i)] for i in order]


def _dealt(
  rng: np.random.Generator, words: Sequence[str], hands: int
) -> list[list[str]]:
  deck = _shuffled(rng, words)
  return [deck[i::hands] for i in range(hands)]


def _by_topic(rng: np.random.Generator, words: Sequence[str]) -> np.ndarray:
  """Ids of the words of each topic, [8, words / 4].

  Every word has two topics. They may be the same: then it stands there twice.
  """
  drawn = _shuffled(rng, words) + _shuffled(rng, words)
  number = len(ATTRIBUTES['topic'])
  return _table([drawn[t::number] for t in range(number)])


_COUNTS = np.array([len(values) for values in ATTRIBUTES.values()])
_ATTRIBUTE_IDS = ids(' '.join(ATTRIBUTES))
_VALUE_IDS = np.array(
  [
    np.resize(ids(' '.join(values)), max(_COUNTS))
    for values in ATTRIBUTES.values()
  ]
)
_ASKED = np.array(
  [
    (FORMS.index(form), i)
    for form in FORMS
    for i, attribute in enumerate(ATTRIBUTES)
    if (form, attribute) not in NEVER_ASKED
  ]
)
