"""`python -m jax_ep.doctor`: what this machine has, whether jax_ep works on it, and what to do where it does not."""
