"""The gin files, as a package: `prompt_jax.gin_configs`. No code in here."""
