"""Rows of benchmark sets to T5's texts.

Each function takes a row and gives `inputs` and `targets`, and what the metrics
need besides. `name` stands first, as in "sst2 sentence: ..."; '' leaves it out
(the taskless tasks). A test row without a label has target "<unk>". A set that
T5 knows nothing of has T5's form: its name, then each column with its name.

Not for tokenizing.

Source: Raffel et al. 2020, arXiv 1910.10683, appendix D, and
google-research/text-to-text-transfer-transformer `t5/data/preprocessors.py`,
whose order of the fields these texts have where the two differ.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

Row = dict[str, Any]
NO_LABEL = '<unk>'


def classification(
  row: Row, *, name: str, fields: Sequence[str], labels: Sequence[str]
) -> Row:
  """'name field: text field: text ...' to the name of the label."""
  example = {
    'inputs': _fields_text(row, name, fields),
    'targets': _label_text(row['label'], labels),
  }
  return example | {key: row[key] for key in ('idx',) if key in row}


def stsb(row: Row, *, name: str) -> Row:
  """Similarity 0 to 5 as text, rounded to the nearest multiple of 0.2."""
  rounded = tf.round(row['label'] * 5) / 5
  return {
    'inputs': _fields_text(row, name, ('sentence1', 'sentence2')),
    # A test row has similarity -1.
    'targets': tf.where(
      row['label'] < 0, NO_LABEL, tf.strings.as_string(rounded, precision=1)
    ),
    'idx': row['idx'],
  }


def renamed(row: Row, *, names: Mapping[str, str]) -> Row:
  """The row with other names of some columns, {old: new}."""
  return {names.get(key, key): value for key, value in row.items()}


def has_label(row: Row) -> tf.Tensor:
  """Whether the annotators agreed on a label."""
  return row['label'] >= 0


def multirc(row: Row, *, name: str, labels: Sequence[str]) -> Row:
  """One candidate answer; HTML in the paragraph goes."""
  text = _fields_text(row, name, ('question', 'answer', 'paragraph'))
  text = tf.strings.regex_replace(text, '<br>', ' ')
  return {
    'inputs': tf.strings.regex_replace(text, '</?b>', ''),
    'targets': _label_text(row['label'], labels),
    'idx/paragraph': row['idx']['paragraph'],
    'idx/question': row['idx']['question'],
    'idx/answer': row['idx']['answer'],
  }


def wsc(row: Row, *, name: str) -> Row:
  """'wsc: text with *pronoun* marked' to the candidate referent.

  The target is the candidate whether it is right or not, so that training uses
  only rows where it is; see `is_right_referent`. Punctuation that sticks to the
  pronoun is set off. One row of the set counts a word too few: there the next
  word is the pronoun.
  """
  words = tf.strings.split(row['text'], ' ')
  pronoun = row['span2_text']
  index = row['span2_index']
  after = tf.minimum(index + 1, tf.size(words) - 1)
  holds = _starts_with(words[index], pronoun)
  index = tf.where(holds, index, after)
  word = words[index]
  tf.debugging.Assert(
    _starts_with(word, pronoun),
    ['WSC: the pronoun is not at span2_index of the text: ', row['text']],
  )
  rest = tf.strings.substr(word, tf.strings.length(pronoun), -1)
  rest = tf.where(tf.strings.length(rest) > 0, ' ' + rest, '')
  marked = tf.strings.join(['*', pronoun, '*', rest])
  words = tf.concat([words[:index], marked[None], words[index + 1 :]], axis=0)
  text = tf.strings.reduce_join(words, separator=' ')
  return {
    'inputs': tf.strings.join([f'{name}: ', text]) if name else text,
    'targets': row['span1_text'],
    'label': row['label'],
    'idx': row['idx'],
  }


def wsc_true_false(row: Row, *, name: str) -> Row:
  """'wsc text: # the pronoun # and * the candidate * marked' to True or False.

  A span is marked where the text has it from word `span_index` on, or from the
  next one (a row counts a word too few). Capitals do not matter: T5 leaves a
  span unmarked where the row writes "The table" for "the table", a seventh of
  the rows. What the text has nowhere near stays unmarked, as in T5.
  """
  text = row['text']
  spans = (('span1', '*'), ('span2', '#'))
  # The later one first: marks in front of a word would move it.
  first_is_later = row['span1_index'] > row['span2_index']
  forth = _marked(_marked(text, row, *spans[0]), row, *spans[1])
  back = _marked(_marked(text, row, *spans[1]), row, *spans[0])
  text = tf.where(first_is_later, forth, back)
  return {
    'inputs': _fields_text({'text': text}, name, ('text',)),
    'targets': _label_text(row['label'], ('False', 'True')),
    'idx': row['idx'],
  }


def is_right_referent(row: Row) -> tf.Tensor:
  """Whether WSC's candidate is what the pronoun means."""
  return tf.equal(row['label'], 1)


def record(dataset: tf.data.Dataset, *, name: str) -> tf.data.Dataset:
  """One example per accepted answer; all of them in `answers`."""

  def texts(row: Row) -> Row:
    passage = row['passage']
    # Highlights are sentences: one that lacks its full stop gets it.
    passage = tf.strings.regex_replace(
      passage, r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(row['entities'], separator=', ')
    cleaned = {'query': row['query'], 'entities': entities, 'passage': passage}
    return {
      'inputs': _fields_text(cleaned, name, ('query', 'entities', 'passage')),
      'answers': row['answers'],
      'idx/passage': row['idx']['passage'],
      'idx/query': row['idx']['query'],
    }

  def one_per_answer(example: Row) -> tf.data.Dataset:
    # Test rows have no answers, but one example as well.
    size = tf.maximum(tf.size(example['answers']), 1)
    targets = tf.concat([example['answers'], [NO_LABEL]], axis=0)[:size]
    return tf.data.Dataset.from_tensor_slices(targets).map(
      lambda answer: {**example, 'targets': answer}
    )

  return dataset.map(texts, tf.data.AUTOTUNE).flat_map(one_per_answer)


def question_answering(row: Row, *, answers: Callable[[Row], tf.Tensor]) -> Row:
  """'question: ... context: ...' to the first answer; all in `answers`.

  Spaces stand around punctuation, as in T5's code, and no two of them together
  in the inputs. T5 has no name here.
  """
  texts = _spaced(answers(row))
  spaced = {key: _spaced(row[key]) for key in ('question', 'context')}
  # A test row may have no answer.
  return {
    'inputs': _one_space(_fields_text(spaced, '', ('question', 'context'))),
    'targets': tf.concat([texts, [NO_LABEL]], axis=0)[0],
    'answers': texts,
  }


def summarization(row: Row, *, name: str, document: str, summary: str) -> Row:
  """'summarize: document' to its summary."""
  text = row[document]
  return {
    'inputs': tf.strings.join([f'{name}: ', text]) if name else text,
    'targets': row[summary],
  }


def data_to_text(row: Row, *, name: str, field: str) -> Row:
  """'name field: data' to one text; a list of triples is joined by ' && '."""
  data = row[field]
  if data.shape.rank:
    data = tf.strings.reduce_join(data, separator=' && ')
  return {
    'inputs': _fields_text({field: data}, name, (field,)),
    'targets': row['target'],
    'references': tf.concat([[row['target']], row['references']], axis=0),
    'group': data,
  }


def _fields_text(row: Row, name: str, fields: Sequence[str]) -> tf.Tensor:
  parts = [name] if name else []
  for field in fields:
    parts += [f'{field}:', row[field]]
  return tf.strings.join(parts, separator=' ')


def _label_text(label: tf.Tensor, labels: Sequence[str]) -> tf.Tensor:
  # Test rows have label -1, which is the last entry.
  index = tf.math.floormod(label, len(labels) + 1)
  return tf.gather(tf.constant([*labels, NO_LABEL]), index)


def _starts_with(text: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
  return tf.strings.substr(text, 0, tf.strings.length(start)) == start


def _spaced(text: tf.Tensor) -> tf.Tensor:
  text = tf.strings.regex_replace(text, r'([[:punct:]])', r' \1 ')
  return _one_space(text)


def _one_space(text: tf.Tensor) -> tf.Tensor:
  return tf.strings.regex_replace(text, r'\s+', ' ')


def _marked(text: tf.Tensor, row: Row, span: str, mark: str) -> tf.Tensor:
  """The text with a mark on either side of a span."""
  words = tf.strings.split(text, ' ')
  named = tf.strings.regex_replace(row[f'{span}_text'], r'\s', ' ')
  named = tf.strings.lower(named)

  def parts(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    index = tf.minimum(index, tf.size(words))
    before = tf.strings.reduce_join(words[:index], separator=' ')
    after = tf.strings.reduce_join(words[index:], separator=' ')
    return before, after, _starts_with(tf.strings.lower(after), named)

  index = row[f'{span}_index']
  index = tf.where(parts(index)[2], index, index + 1)
  before, after, found = parts(index)
  size = tf.strings.length(named)
  marked = [
    before,
    tf.where(index > 0, ' ', ''),
    f'{mark} ',
    tf.strings.substr(after, 0, size),
    f' {mark}',
    tf.strings.substr(after, size, -1),
  ]
  return tf.where(found, tf.strings.join(marked), text)
