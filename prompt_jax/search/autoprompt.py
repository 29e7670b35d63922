"""`prompt-jax autoprompt`: trigger tokens, or label words, by gradients.

Reads rows of the user's own and a template, and writes the template with what
it found, for `--inputs=@file:trigger` or `@file:words`. Nothing is trained.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from absl import logging
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import run as run_lib
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.row_files import UserDataError
from prompt_jax.search import examples as examples_lib
from prompt_jax.search import probes
from prompt_jax.search import triggers
from prompt_jax.search import writing
from prompt_jax.search.examples import Task
from prompt_jax.templates.language import Template
from prompt_jax.verbalizers.words import LabelWords

SEARCHES = ('trigger', 'words')


def autoprompt(
  run: run_lib.Run,
  *,
  output: str | None,
  search: str = 'trigger',
  words_path: str | None = None,
  num_trigger_tokens: int = 3,
  initial_trigger: str | None = None,
  steps: int = 180,
  num_candidates: int = 100,
  batch_size: int = 32,
  gradient_batches: int = 8,
  evaluation_batches: int = 4,
  words_per_label: int = 3,
) -> dict[str, float]:
  """Searches, and writes a file of templates.

  A search for a trigger that was stopped goes on: `<output>.state.json` holds
  where it stood.

  Args:
    run: model and data, with `--train_data` and perhaps `--eval_data`, which
      then chooses. Its method is not looked at; the seed draws batches.
    output: the file of templates.
    search: 'trigger': tokens for the `<soft:k>` of the inputs, or in front of
      inputs without any; 'words': label words.
    words_path: label words, lines `0: word, word`, for the loss of a trigger;
      None: those of the targets.
    num_trigger_tokens: slots, where the inputs have no `<soft:k>`.
    initial_trigger: a text of as many tokens; None: the same for each slot, the
      lowest id that is a word.
    steps: of the search for a trigger.
    num_candidates: k.
    batch_size: examples of a batch.
    gradient_batches: of a step.
    evaluation_batches: of a step, for the candidates.
    words_per_label: that are written.

  Returns:
    `loss` and `accuracy` on the split that chooses, of what was written; for
    words accuracy is by the first of each label.

  Raises:
    ValueError: a number or `search` is wrong, a label's word is not one token
      or another label's too, and what `examples.task` raises.
    UserDataError: a file, template or row is wrong, or a label has no example.
    CheckpointError: a file cannot be read or written.
  """
  writing.one_of('search', search, SEARCHES)
  task = examples_lib.task(
    run, output, num_trigger_tokens=num_trigger_tokens, steps=steps,
    num_candidates=num_candidates, batch_size=batch_size,
    gradient_batches=gradient_batches, evaluation_batches=evaluation_batches,
    words_per_label=words_per_label,
  )  # fmt: skip
  path = pathlib.Path(str(output))
  with run.partitioner.activate():
    if search == 'words':
      return _words(task, path, words_per_label, batch_size)
    template, slots = _slots(task.prompt.inputs, num_trigger_tokens)
    words = task.words
    if words_path is not None:
      words = writing.read_words(words_path, task.names, task.vocabulary)
    texts = writing.texts(task.vocabulary)
    allowed = _allowed(texts, words, slots)
    first = _first(initial_trigger, allowed, slots, task.vocabulary)
    task = task.with_model(method=SoftPrompt(slots))
    train, dev = (
      task.read(split, template) for split in ('train', task.dev_split)
    )
    base = task.run.load()
    found = triggers.Search(
      triggers.Objective(task.run.model, base.frozen, words), train, dev,
      allowed, num_candidates, batch_size, gradient_batches,
      evaluation_batches, run.seed,
    )  # fmt: skip
    origin = {'base': base.fingerprint, 'template': template}
    state = _search(found, first, steps, path, texts, origin)
    return _write(task, found, state, template, texts, path)


def _slots(inputs: Template, number: int) -> tuple[str, int]:
  """The template with its slots written out, and how many there are.

  Raises:
    UserDataError: of the slots from 0 on one is left out.
  """
  slots = inputs.soft_tokens
  if not slots:
    return _front(inputs.text, number), number
  if slots != tuple(range(len(slots))):
    raise UserDataError(
      f'The slots of {inputs.text!r} must be <soft:0>, <soft:1> and so on; got '
      f'{", ".join(f"<soft:{k}>" for k in slots)}.'
    )
  return inputs.text, len(slots)


def _front(text: str, number: int) -> str:
  return ' '.join([*(f'<soft:{k}>' for k in range(number)), text])


def _allowed(texts: list[str], words: LabelWords, slots: int) -> np.ndarray:
  """Tokens that a slot may hold: words without capitals, no label words."""
  taken = set(words.ids[words.ids >= 0].tolist())
  out = np.array(
    [
      bool(text) and not any(c.isupper() for c in text) and i not in taken
      for i, text in enumerate(texts)
    ]
  )
  if not out.any():
    raise ValueError(
      f'The vocabulary has no word for the {slots} slots of a trigger.'
    )
  return out


def _first(
  text: str | None, allowed: np.ndarray, slots: int, vocabulary: Any
) -> list[int]:
  """The trigger at the start.

  Raises:
    ValueError: the text has another number of tokens, or tokens that a trigger
      cannot hold.
  """
  if text is None:
    return [int(np.argmax(allowed))] * slots
  ids = [int(i) for i in vocabulary.encode(text)]
  if len(ids) != slots:
    pieces = ', '.join(repr(vocabulary.decode([i])) for i in ids)
    raise ValueError(
      f'The initial trigger {text!r} must have {slots} tokens, got {len(ids)}: '
      f'{pieces}.'
    )
  for i in ids:
    if i >= len(allowed) or not allowed[i]:
      raise ValueError(
        f'The initial trigger {text!r} holds {vocabulary.decode([i])!r}, which '
        'is no whole word in small letters, or a label word.'
      )
  return ids


def _search(
  search: triggers.Search,
  first: list[int],
  steps: int,
  output: pathlib.Path,
  texts: list[str],
  origin: dict[str, Any],
) -> triggers.State:
  """Goes on where the file beside the output says, or begins."""
  path = output.with_name(f'{output.name}.state.json')
  key = _key(search, first, origin)
  state = _saved(path, key) or search.begin(first)
  if state.step:
    logging.info('Going on from step %d of %s.', state.step, path)
  for new in search.steps(state, steps):
    if new.trigger != state.trigger:
      old, now = (texts[s.trigger[new.slot]] for s in (state, new))
      logging.info(
        'Step %d of %d: slot %d, %r -> %r, loss %.4f -> %.4f; best on dev: '
        '%.4f.', new.step, steps, new.slot, old, now, new.before, new.after,
        new.best_loss,
      )  # fmt: skip
    elif new.step % 10 == 0 or new.step == steps:
      logging.info('Step %d of %d: no change.', new.step, steps)
    state = new
    saved = {'key': key, 'state': dataclasses.asdict(state)}
    checkpoints.write_atomically(path, json.dumps(saved).encode())
  return state


def _key(
  search: triggers.Search, first: list[int], origin: dict[str, Any]
) -> str:
  """Differs where a search would go another way."""
  sums = hashlib.sha256()
  for part in (search.train, search.dev):
    for x in (part.tokens, part.prefix, part.labels):
      sums.update(np.ascontiguousarray(x).tobytes())
  sums.update(search.objective.words.ids.tobytes())
  settings = [
    first, search.num_candidates, search.batch_size, search.gradient_batches,
    search.evaluation_batches, search.seed, origin,
  ]  # fmt: skip
  sums.update(json.dumps(settings, sort_keys=True, default=str).encode())
  return sums.hexdigest()


def _saved(path: pathlib.Path, key: str) -> triggers.State | None:
  """The state in a file, if there is one.

  Raises:
    ValueError: it is of another search.
  """
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text())
    fields = dict(found['state'])
    same = found['key'] == key
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged: remove it.') from error
  if not same:
    raise ValueError(
      f'{path} is of a search with other data, settings or model: remove it, '
      'or give another --output.'
    )
  fields |= {k: tuple(fields[k]) for k in ('trigger', 'best')}
  return triggers.State(**fields)


def _write(
  task: Task,
  search: triggers.Search,
  state: triggers.State,
  template: str,
  texts: list[str],
  path: pathlib.Path,
) -> dict[str, float]:
  """Writes the best trigger; its loss and accuracy as it is written."""
  found = template
  for slot, token in enumerate(state.best):
    found = found.replace(f'<soft:{slot}>', texts[token])
  # As the data will be read, with words in place of soft tokens.
  bare = task.with_model(method=None)
  split = task.dev_split
  o, size = search.objective, search.batch_size
  read = bare.read(split, found)
  loss, accuracy = examples_lib.evaluate(
    bare.run.model, o.frozen, examples_lib.NOTHING, read, o.words, size
  )
  wanted = search.dev.tokens.copy()
  first = o.model.config.vocab_size
  for slot, token in enumerate(state.best):
    wanted[wanted == first + slot] = token
  width = min(wanted.shape[1], read.tokens.shape[1])
  same = (wanted[:, :width] == read.tokens[:, :width]).all(axis=1)
  if not same.all():
    logging.warning(
      '%d of %d texts of %s are read as other tokens when the trigger is '
      'written out: the loss is %.4f there, and was %.4f in the search.',
      int((~same).sum()), len(same), split, loss, state.best_loss,
    )  # fmt: skip
  trigger = ' '.join(texts[token] for token in state.best)
  notes = [f'{trigger}: loss {loss:.4f}, accuracy {accuracy:.1%} on {split}.']
  sides = (found, task.prompt.targets.text)
  writing.write_templates(path, {'trigger': sides}, notes)
  print(
    f'Wrote {path}: the trigger {trigger!r}, loss {loss:.4f}, accuracy '
    f'{accuracy:.1%} on {split}. Train with --inputs=@{path}:trigger'
    f'{_labels_hint(task)}'
  )
  return {'loss': loss, 'accuracy': accuracy}


def _labels_hint(task: Task) -> str:
  if task.prompt.targets.choices:
    return ''
  return f' --labels={",".join(task.names)}'


def _words(
  task: Task, path: pathlib.Path, number: int, batch_size: int
) -> dict[str, float]:
  """Searches label words, and writes them."""
  if task.prompt.inputs.soft_tokens:
    raise UserDataError(
      f'The inputs {task.prompt.inputs.text!r} hold soft tokens: search label '
      'words without them, or with words in their places.'
    )
  for split in dict.fromkeys(('train', task.dev_split)):
    writing.check_numbers(task.path(split), task.field)
  train = task.read('train')
  texts = writing.texts(task.vocabulary)
  allowed = np.array([any(c.isalnum() for c in text) for text in texts])
  model, frozen = task.run.model, task.run.load().frozen
  states = probes.states_at_blank(model, frozen, train, batch_size)
  scores = probes.scores(
    probes.fit(states, train.labels), probes.output_embedding(model, frozen)
  )
  ids = probes.top_words(scores, allowed, number)
  words = [[texts[i] for i in own] for own in ids]
  beside = path.with_name(f'{path.name}.words.txt')
  writing.write_words(beside, words)
  found = dataclasses.replace(task, names=tuple(own[0] for own in words))
  targets = template_with(task, found.choice)
  dev = found.read(task.dev_split, targets=targets)
  loss, accuracy = examples_lib.evaluate(
    model, frozen, examples_lib.NOTHING, dev, found.words, batch_size
  )
  notes = [f'loss {loss:.4f}, accuracy {accuracy:.1%} on {task.dev_split}.']
  sides = (task.prompt.inputs.text, targets)
  writing.write_templates(path, {'words': sides}, notes)
  for i, own in enumerate(words):
    print(f'{i} ({task.names[i]}): {", ".join(own)}')
  print(
    f'Wrote {path} with the first word of each label, accuracy {accuracy:.1%} '
    f'on {task.dev_split}, and all in {beside}. Train with '
    f'--inputs=@{path}:words'
  )
  return {'loss': loss, 'accuracy': accuracy}


def template_with(task: Task, choice: str) -> str:
  """The targets with another choice in place of the label."""
  targets = task.prompt.targets
  [field] = targets.named
  end = targets.text.index('}', field.place) + 1
  return targets.text[: field.place] + choice + targets.text[end:]
