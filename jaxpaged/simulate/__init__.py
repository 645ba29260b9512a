"""The engine's own scheduler and page pool on a virtual clock, with a cost model in place of the device.

Knows what a step would take and what users would see of it. Refuses to know jax: nothing here computes a token.

`gpus` and `shapes` -> `cost`; `lengths` -> `arrivals` and `trace`; `random_model` is what beams choose among; `run` is the loop,
`report` its numbers, `memory` and `sharing` are experiments on top of it.
"""
