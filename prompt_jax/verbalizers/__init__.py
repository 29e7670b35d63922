"""Verbalizers: from what the model says at a blank to labels.

| kind | where |
|---|---|
| a word or several a label | `words.py` |
| KPT | `kpt.py` |
| contextual calibration | `calibration.py` |
| soft (WARP) | `prompt_jax/methods/soft_verbalizer.py` |
| prototypical (ProtoVerb) | `prototypical.py` |
| logits and hidden states at the blank | `states.py` |
| whole answers | `prompt_jax/evaluation.py`, rank classification |
"""

from prompt_jax.verbalizers.calibration import calibrate
from prompt_jax.verbalizers.calibration import content_free_prior
from prompt_jax.verbalizers.words import LabelWords
from prompt_jax.verbalizers.words import label_scores
from prompt_jax.verbalizers.words import label_words
from prompt_jax.verbalizers.words import word_log_probs
from prompt_jax.verbalizers.words import word_logits

__all__ = [
  'LabelWords',
  'calibrate',
  'content_free_prior',
  'label_scores',
  'label_words',
  'word_log_probs',
  'word_logits',
]
