"""Published results that a study of real T5 sizes may be laid over.

Source: Lester, Al-Rfou and Constant 2021, "The Power of Scale for
Parameter-Efficient Prompt Tuning" (EMNLP, arXiv:2104.08691). Its Figure 1, the
curve over sizes, has no table: only numbers that the text or a table states are
here, none that were read off the picture.
"""

from typing import Any

# Table 4: the total at a prompt length of 50 (with its misprint mended by
# arithmetic: 11,135,537,152) less the prompt's 50 x 4096.
T5_XXL_PARAMETERS = 11_135_332_352

# Table 3: SuperGLUE development set, T5 1.1 XXL after 100K steps of LM
# adaptation, prompt length 100, class-label initialisation, five prompts.
LESTER_2021: list[dict[str, Any]] = [
  {
    'label': 'Lester et al. 2021, mean of 5 prompts',
    'source': 'arXiv:2104.08691, Table 3',
    'points': [[T5_XXL_PARAMETERS, 90.5]],
  },
  {
    'label': 'Lester et al. 2021, ensemble of 5 prompts',
    'source': 'arXiv:2104.08691, Table 3',
    'points': [[T5_XXL_PARAMETERS, 91.3]],
  },
]

CURVES = {'lester_2021': LESTER_2021}
