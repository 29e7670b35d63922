"""AutoPrompt's search for trigger tokens, by first-order candidates.

A template has P slots, each a token of the vocabulary. In a step, with e_w the
input embedding of token w and g = dL/de_p the gradient of the loss at the
embedding of a random slot p, on some batches, the candidates are

    top-k over w of  - e_w . g

the tokens that lower the loss most to first order. Each is tried in slot p on
other batches; the best takes the slot if the loss falls there. The loss is the
mean of -log sum_w p(w) over the words w of the label, at the blank.

Source: Shin et al. 2020, arXiv 2010.15980, section 2.2, after Wallace et al.
2019, arXiv 1908.07125; checked against ucinlp/autoprompt
`autoprompt/create_trigger.py`. It differs: triggers and candidates are
compared by the loss, where the reference takes the accuracy; and a slot holds
whole words only, so that the template reads the same when it is written out.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from prompt_jax.search import examples as examples_lib
from prompt_jax.search.examples import Examples
from prompt_jax.verbalizers.words import LabelWords


def first_order_scores(
  embedding: Float[Array, 'V D'], gradient: Float[Array, ' D']
) -> Float[Array, ' V']:
  """How much each token would lower the loss, to first order: -e_w . g."""
  return -(jnp.asarray(embedding, jnp.float32) @ gradient)


def top_candidates(
  scores: np.ndarray, allowed: Bool[np.ndarray, ' V'], number: int
) -> np.ndarray:
  """The allowed tokens of the highest scores, the highest first.

  Of equal ones the lower id comes first.
  """
  scores = np.where(allowed, np.asarray(scores)[: len(allowed)], -np.inf)
  order = np.argsort(-scores, kind='stable')
  return order[: min(number, int(allowed.sum()))]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of a trigger, and its gradient at the slots' embeddings.

  Attributes:
    model: with a `SoftPrompt` of P rows as its method.
    frozen: its parameters, none of them trained.
    words: of the labels.
  """

  model: Any
  frozen: Any
  words: LabelWords

  @functools.cached_property
  def embedding(self) -> Any:
    """The input embedding [V, D]."""
    return self.model.embedding(self.frozen)

  def trainable(self, trigger: Any) -> Any:
    """The trigger, ids [P], as the model's trainable parameters."""
    rows = jnp.take(self.embedding, jnp.asarray(trigger), axis=0)
    return self._rows(rows.astype(jnp.float32))

  def _rows(self, rows: Any) -> Any:
    return {'method': {'prompt': rows}, 'network': {}}

  def _loss(self, frozen: Any, rows: Any, batch: Any) -> Any:
    logits = examples_lib.blank_logits(
      self.model, frozen, self._rows(rows), batch
    )
    log_probs = examples_lib.label_log_probs(logits, self.words)
    return -jnp.mean(examples_lib.own(log_probs, batch['labels']))

  @functools.cached_property
  def _gradient(self) -> Any:
    return jax.jit(jax.grad(self._loss, argnums=1))

  @functools.cached_property
  def _losses(self) -> Any:
    def losses(frozen: Any, triggers: Any, batch: Any) -> Any:
      table = self.model.embedding(frozen)

      def one(trigger: Any) -> Any:
        rows = jnp.take(table, trigger, axis=0).astype(jnp.float32)
        return self._loss(frozen, rows, batch)

      return jax.lax.map(one, triggers)

    return jax.jit(losses)

  def gradient(self, trigger: Any, batches: Sequence[Any]) -> np.ndarray:
    """dL/de at each slot, [P, D], the mean over the batches."""
    rows = self.trainable(trigger)['method']['prompt']
    found = [self._gradient(self.frozen, rows, batch) for batch in batches]
    return np.mean([np.asarray(g) for g in found], axis=0)

  def losses(self, triggers: Any, batches: Sequence[Any]) -> np.ndarray:
    """The loss of K triggers, ids [K, P], the mean over the batches, [K]."""
    triggers = jnp.asarray(triggers, jnp.int32)
    found = [self._losses(self.frozen, triggers, batch) for batch in batches]
    return np.mean([np.asarray(x, np.float64) for x in found], axis=0)


@dataclasses.dataclass(frozen=True)
class Search:
  """What a step depends on, beside the state.

  Attributes:
    objective: the loss.
    train: examples of the steps.
    dev: examples that choose the best trigger.
    allowed: tokens that a slot may hold, [V].
    num_candidates: k.
    batch_size: examples of a batch.
    gradient_batches: batches of a step's gradient.
    evaluation_batches: batches that a step's candidates are tried on; others
      than the gradient's as far as there are examples.
    seed: of the batches and the slots.
  """

  objective: Objective
  train: Examples
  dev: Examples
  allowed: np.ndarray
  num_candidates: int
  batch_size: int
  gradient_batches: int
  evaluation_batches: int
  seed: int

  def begin(self, trigger: Sequence[int]) -> 'State':
    """The state before the first step."""
    loss = self.dev_loss(trigger)
    return State(0, tuple(trigger), tuple(trigger), loss)

  def dev_loss(self, trigger: Sequence[int]) -> float:
    """The loss on the development set."""
    o = self.objective
    trainable = o.trainable(np.asarray(trigger, np.int32))
    return examples_lib.evaluate(
      o.model, o.frozen, trainable, self.dev, o.words, self.batch_size
    )[0]

  def batches(self, step: int) -> tuple[list[Any], list[Any], int]:
    """Of a step: the gradient's batches, the candidates', and a draw."""
    rng = np.random.default_rng([self.seed, step])
    size = min(self.batch_size, len(self.train))
    number = self.gradient_batches + self.evaluation_batches
    rows = np.resize(rng.permutation(len(self.train)), (number, size))
    found = [self.train.take(some) for some in rows]
    draw = int(rng.integers(1 << 30))
    at = self.gradient_batches
    return found[:at], found[at:], draw

  def step(self, state: 'State') -> 'State':
    """The state after one more step; of the same state always the same."""
    gradient_batches, batches, draw = self.batches(state.step)
    slot = draw % len(state.trigger)
    gradient = self.objective.gradient(state.trigger, gradient_batches)[slot]
    scores = first_order_scores(self.objective.embedding, jnp.asarray(gradient))
    allowed = self.allowed.copy()
    allowed[state.trigger[slot]] = False
    tokens = top_candidates(np.asarray(scores), allowed, self.num_candidates)
    triggers = np.tile(np.array(state.trigger), (len(tokens) + 1, 1))
    triggers[1:, slot] = tokens  # the first is the one that there is
    losses = self.objective.losses(triggers, batches)
    best = int(np.argmin(losses))
    new = dataclasses.replace(
      state,
      step=state.step + 1,
      slot=slot,
      before=float(losses[0]),
      after=float(losses[best]),
    )
    if best == 0:
      return new
    trigger = tuple(map(int, triggers[best]))
    dev_loss = self.dev_loss(trigger)
    new = dataclasses.replace(new, trigger=trigger)
    if dev_loss < new.best_loss:
      new = dataclasses.replace(new, best=trigger, best_loss=dev_loss)
    return new

  def steps(self, state: 'State', number: int) -> Iterator['State']:
    """The states after each step, until `number` are done."""
    while state.step < number:
      state = self.step(state)
      yield state


@dataclasses.dataclass(frozen=True)
class State:
  """Where a search stands.

  Attributes:
    step: steps that are done.
    trigger: ids of the slots, [P].
    best: the trigger of the least loss on the development set so far.
    best_loss: that loss.
    slot: of the last step.
    before: loss of the trigger on the last step's batches.
    after: the same of what it took; not above `before`.
  """

  step: int
  trigger: tuple[int, ...]
  best: tuple[int, ...]
  best_loss: float
  slot: int = -1
  before: float = float('nan')
  after: float = float('nan')
