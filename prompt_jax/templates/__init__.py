"""Templates: from the columns of a row to texts (see `language.py`)."""

from prompt_jax.templates.composition import Rules
from prompt_jax.templates.composition import StructuralPrompt
from prompt_jax.templates.composition import SubPrompt
from prompt_jax.templates.ensembles import accuracy_weights
from prompt_jax.templates.ensembles import ensemble
from prompt_jax.templates.files import Prompt
from prompt_jax.templates.files import PromptSet
from prompt_jax.templates.files import read
from prompt_jax.templates.language import Template
from prompt_jax.templates.language import TemplateError
from prompt_jax.templates.rendering import Rendering

__all__ = [
  'Prompt',
  'PromptSet',
  'Rendering',
  'Rules',
  'StructuralPrompt',
  'SubPrompt',
  'Template',
  'TemplateError',
  'accuracy_weights',
  'ensemble',
  'read',
]
