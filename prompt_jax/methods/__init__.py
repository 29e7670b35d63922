"""Tuning methods: one module each, from what is learned to deltas."""
