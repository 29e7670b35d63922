"""The frozen networks: T5 (1.0 and 1.1) and a decoder-only language model."""
