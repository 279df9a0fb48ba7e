"""One file per source of images; `swat_jax.data.load` chooses."""
