"""The specification of SWAT's sparsity in plain jax.numpy: selection, masks, budgets, periods."""
