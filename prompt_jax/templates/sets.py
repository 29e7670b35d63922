"""Ten templates for each of a few kinds of task, in our own words.

    sets.get('sentiment', labels=('negative', 'positive'))

Of each set up to three are inverted: they ask for the text, given the label.

Source: Wei et al. 2021, arXiv 2109.01652, section 2.1, for the idea.
"""

from collections.abc import Mapping, Sequence

from prompt_jax import deltas
from prompt_jax.templates.files import PromptSet
from prompt_jax.templates.files import parse_line

# LABEL stands for `{label: a | b}`, LIST for 'a or b'.
SENTIMENT = """
plain: Review: {text|cut} Is the review LIST? ||| LABEL
opinion: {text|cut} What does the writer think of it, LIST? ||| LABEL
was: {text|cut} All in all, the sentiment is ||| LABEL
tone: Read this: "{text|cut}" Is its tone LIST? ||| LABEL
classify: Classify the text as LIST. Text: {text|cut} ||| LABEL
friend: A friend writes: {text|cut} Does that sound LIST? ||| LABEL
options: {text|cut} Which of LIST describes it best? ||| LABEL
write: Write a LABEL review. ||| {text}
example: Give an example of a text that is LABEL. ||| {text}
say: How might somebody say something LABEL? ||| {text}
"""
NLI = """
follows: {premise|cut} Does it follow that "{hypothesis}"? LIST ||| LABEL
given: Given: {premise|cut} Claim: {hypothesis} The claim is (LIST): ||| LABEL
true: If "{premise|cut}" is true, is "{hypothesis}" true? LIST ||| LABEL
read: Read: {premise|cut} Can one conclude: {hypothesis}? Answer LIST. ||| LABEL
relation: Premise: {premise|cut} Hypothesis: {hypothesis} Is it LIST? ||| LABEL
support: Claim: {hypothesis} Is it supported by: {premise|cut} LIST ||| LABEL
judge: {premise|cut} Judge the sentence "{hypothesis}" by LIST. ||| LABEL
question: {premise|cut} Question: {hypothesis} LIST? ||| LABEL
write: {premise|cut} Write a sentence that is judged LABEL. ||| {hypothesis}
continue: Text: {premise|cut} A claim that is judged LABEL: ||| {hypothesis}
"""
PARAPHRASE = """
same: {sentence1} {sentence2} Do the two mean the same? Answer LIST. ||| LABEL
say: "{sentence1}" and "{sentence2}" say the same thing: LIST? ||| LABEL
rewrite: Is "{sentence2}" another way to say "{sentence1}"? LIST ||| LABEL
compare: Compare. First: {sentence1} Second: {sentence2} Say LIST. ||| LABEL
first: First: {sentence1} Second: {sentence2} Equal in meaning (LIST)? ||| LABEL
duplicate: Is one a duplicate? {sentence1} {sentence2} LIST ||| LABEL
replace: Could "{sentence1}" be replaced by "{sentence2}"? LIST ||| LABEL
judge: Judge by LIST whether these agree: {sentence1} / {sentence2} ||| LABEL
write: {sentence1} Write one; do they mean the same? LABEL ||| {sentence2}
pair: A partner of "{sentence1}" that is judged LABEL: ||| {sentence2}
"""
SETS: Mapping[str, str] = {
  'sentiment': SENTIMENT,
  'nli': NLI,
  'paraphrase': PARAPHRASE,
}


def get(
  name: str,
  labels: Sequence[str],
  columns: Mapping[str, str] | None = None,
) -> PromptSet:
  """One of the sets for your own labels and columns.

  Args:
    name: 'sentiment', 'nli' or 'paraphrase'.
    labels: the words of the labels, two or more, in their order.
    columns: a set's column -> your data's, where the names differ, such as
      {'text': 'sentence'}.

  Raises:
    ValueError: no such set or column, or fewer than two labels.
  """
  if name not in SETS:
    raise ValueError(
      f'There is no set {name!r}.{deltas.near_misses(name, SETS)} There are '
      f'{", ".join(SETS)}.'
    )
  if len(labels) < 2:
    raise ValueError(f'A set needs two labels or more, got {list(labels)}.')
  words = [str(label) for label in labels]
  listed = f'{", ".join(words[:-1])} or {words[-1]}'
  text = SETS[name]
  for own, new in (columns or {}).items():
    if own != 'label' and f'{{{own}' not in text:
      raise ValueError(f'The set {name!r} has no column {own!r}.')
    for end in '}|:':
      text = text.replace(f'{{{own}{end}', f'{{{new}{end}')
  label = (columns or {}).get('label', 'label')
  choice = f'{{{label}: {" | ".join(words)}}}'
  text = text.replace('LABEL', choice).replace('LIST', listed)
  prompts = tuple(parse_line(line) for line in text.strip().splitlines())
  return PromptSet(name, prompts)
