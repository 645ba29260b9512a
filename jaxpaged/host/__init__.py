"""The host side: requests, pages and the scheduler. Pure Python, imports neither jax nor numpy."""
