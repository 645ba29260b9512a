"""What runs inside another engine's own interpreter: `child.py` with one of the `side_*.py`, and the writer of GGUF files.

These files know their engine, the standard library and what that engine brings. They refuse to know jaxpaged and jax, which
such an interpreter need not have: nothing here imports anything of jaxpaged.
"""
