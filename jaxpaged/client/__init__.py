"""A client of OpenAI's API: what `jaxpaged chat --url` and `jaxpaged bench serve` talk to a server with.

It knows when bytes came, and does little with them while more come. Imports nothing of the engine.
"""
