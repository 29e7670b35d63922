"""The text of a blank, by the vocabulary that will read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import seqio

# A SentencePiece model has its sentinels with the space before them, and takes
# no other; a vocabulary of words needs one on either side.
_FORMS = (' <extra_id_{}>', ' <extra_id_{}> ')


def texts(vocabulary: seqio.Vocabulary, number: int) -> list[str]:
  """What to write for blanks 0 to `number` - 1.

  Blank i is the id `vocab_size - 1 - i`, as in T5.

  Raises:
    ValueError: the vocabulary has too few sentinels, or reads none in a text.
  """
  for form in _FORMS:
    found = [form.format(i) for i in range(number)]
    wanted = [vocabulary.vocab_size - 1 - i for i in range(number)]
    if all(
      _reads(vocabulary, *pair) for pair in zip(found, wanted, strict=True)
    ):
      return found
  raise ValueError(
    f'A template holds {number} <mask>, but the vocabulary does not read '
    f'<extra_id_{number - 1}> in a text as one token: it has '
    f'{vocabulary.extra_ids} sentinels, and bytes are never read as one. Use a '
    'SentencePiece model with sentinels, or leave <mask> out.'
  )


def _reads(vocabulary: seqio.Vocabulary, text: str, wanted: int) -> bool:
  """Whether the text is one token, by itself and before a full stop."""
  alone, before = vocabulary.encode(text), vocabulary.encode(f'{text}.')
  return list(alone) == [wanted] == list(before)[:1]


def by_feature(
  features: Mapping[str, Any], templates: Mapping[str, Any]
) -> dict[str, Sequence[str]]:
  """`texts` for each template, by the vocabulary of its feature."""
  return {
    key: texts(features[key].vocabulary, template.num_masks)
    for key, template in templates.items()
  }
