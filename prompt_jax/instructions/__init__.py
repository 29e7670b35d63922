"""Instruction tuning: T0, FLAN and Super-NaturalInstructions as seqio tasks.

    rows.py      rows of the benchmark sets with promptsource's columns
    prompted.py  tasks of rendered rows, and of ranked choices
    t0.py        every prompt a task of its own, T0's rates
    flan.py      clusters held out, options, exemplars, inverted templates
    natural.py   definition and examples as the input
    table.py     scores of held-out tasks over their prompts
    tuning.py    `prompt-jax instruct`: train, evaluate, write the table

A class of `t0`, `flan` or `natural` stands where a run has `user_data.UserData`
and registers one mixture: tasks to train on, which have a split `train` alone,
and held-out ones, which have `validation` alone.
"""
