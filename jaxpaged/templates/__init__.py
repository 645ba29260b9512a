"""Chat templates: programs that come with a checkpoint, run in a process of their own that can be killed.

`process` is our side of it, `child` the other, `sandbox` what a template can reach there, `messages` what is handed to it.
"""
