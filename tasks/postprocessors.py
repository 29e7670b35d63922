"""What a model says, and the targets, to what the metrics compare.

Signature and meaning are seqio's: `fn(text, example=row, is_target=bool)`. Text
that is no label is -1, which equals no target.

Source: google-research/text-to-text-transfer-transformer
`t5/data/postprocessors.py`.
"""

from collections.abc import Sequence
from typing import Any

# Left out when two referents are compared: "the boy" and "his boy" are one.
_DETERMINERS = frozenset(
  'a an few her his each every many much my our some that the their these '
  'this those which whose your'.split()
)


class LabelId:
  """Number of a label, -1 for other text."""

  def __init__(self, labels: Sequence[str]):
    self.labels = tuple(labels)

  def __call__(self, text: str, **unused: Any) -> Any:
    """The label's number."""
    return self.labels.index(text) if text in self.labels else -1


def number(text: str, **unused: Any) -> float:
  """The text as a number, -1 for other text."""
  try:
    return float(text)
  except ValueError:
    return -1.0


class MultiRCAnswer(LabelId):
  """{'value': label's number}, and for a target the 'group': its question."""

  def __call__(
    self, text: str, example: Any = None, is_target: bool = False, **unused: Any
  ) -> Any:
    """The label's number in a dict."""
    answer = {'value': super().__call__(text)}
    if is_target:
      keys = ('idx/paragraph', 'idx/question')
      answer['group'] = tuple(int(example[key]) for key in keys)
    return answer


def record(
  text: str, example: Any = None, is_target: bool = False, **unused: Any
) -> dict[str, Any]:
  """{'value': answer}; for a target all answers, and its query as 'group'."""
  if not is_target:
    return {'value': text}
  keys = ('idx/passage', 'idx/query')
  return {
    'value': [answer.decode() for answer in example['answers']],
    'group': tuple(int(example[key]) for key in keys),
  }


def question_answering(
  text: str, example: Any = None, is_target: bool = False, **unused: Any
) -> Any:
  """The text; for a target all accepted answers."""
  if not is_target:
    return text
  answers = [answer.decode() for answer in example['answers']]
  return answers or [text]


def references(
  text: str, example: Any = None, is_target: bool = False, **unused: Any
) -> Any:
  """The text; for a target its data as 'group', and its texts."""
  if not is_target:
    return text
  texts = [reference.decode() for reference in example['references']]
  return {'group': example['group'].decode(), 'value': texts}


def wsc(
  text: str, example: Any = None, is_target: bool = False, **unused: Any
) -> int:
  """1 if the model named the candidate, 0 if another, -1 if nobody.

  A target is the row's label: whether the candidate is right. Naming it means
  that one has all words of the other, capitals and determiners aside; "Bob" and
  "Bob's hat" are two.
  """
  if is_target:
    return int(example['label'])
  candidate = example['targets_pretokenized']
  if isinstance(candidate, bytes):
    candidate = candidate.decode()
  said, named = _words(text), _words(candidate)
  if not said:
    return -1
  if any("'" in word for word in said) != any("'" in word for word in named):
    return 0
  return int(said <= named or named <= said)


def _words(text: str) -> set[str]:
  return set(text.lower().split()) - _DETERMINERS
