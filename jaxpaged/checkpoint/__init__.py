"""Bytes on disk <-> weights: find a checkpoint, read its configuration, load its parameters one at a time.

Knows two layouts, Hugging Face safetensors and the orbax directory that `convert` writes, and trusts neither. Refuses to know
engines and requests, and never executes code that a checkpoint names.

`find` -> `configuration` -> `loading`; `hf` and `orbax` are the two layouts, `safetensors` and `manifest` their formats, and
`files` is what all of them read with.
"""

from jaxpaged.checkpoint.configuration import Checkpoint, open_checkpoint, read_config
from jaxpaged.checkpoint.files import CheckpointError
from jaxpaged.checkpoint.find import resolve
from jaxpaged.checkpoint.loading import check_values, load, open_tensors

__all__ = ["Checkpoint", "CheckpointError", "check_values", "load", "open_checkpoint", "open_tensors", "read_config", "resolve"]
