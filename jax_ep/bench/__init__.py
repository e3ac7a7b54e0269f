"""`python -m jax_ep.bench`: what the ops cost on this machine, beside what they cannot go below."""
