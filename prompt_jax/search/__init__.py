"""Searches for templates and label words, with the model frozen.

`prompt-jax autoprompt`, in `autoprompt.py`:

| SEARCH | finds | where |
|---|---|---|
| trigger | tokens of a template, by gradients | `triggers.py` |
| words | label words, by a probe | `probes.py` |

`prompt-jax lmbff`, in `lmbff.py`:

| SEARCH | finds | where |
|---|---|---|
| templates | what T5 puts into blanks, by a beam | `beams.py` |
| words | label words, by their likelihood | `label_words.py` |
| demonstrations | examples beside an input | `demonstrations.py` |

What they find is written as a file of templates, for `--inputs=@file:name`.
"""
