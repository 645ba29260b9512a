"""Parameters from disk to devices, one at a time, and the check that their numbers can be weights.

Knows both layouts by what they have in common: `dtype`, `read`, `source`. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from jaxpaged.checkpoint.configuration import Checkpoint
from jaxpaged.checkpoint.files import CheckpointError
from jaxpaged.checkpoint.hf import HfTensors
from jaxpaged.checkpoint.orbax import DTYPES, OrbaxTensors
from jaxpaged.config import FLOAT_DTYPES, ConfigError
from jaxpaged.model.quantization import QuantizedMatrix, quantized
from jaxpaged.model.weights import Parameter, Weights, build, num_bytes


def open_tensors(checkpoint: Checkpoint, *, verify: bool = True) -> HfTensors | OrbaxTensors:
    """The parameters of a checkpoint, to be read one at a time. Close it."""
    if checkpoint.manifest is not None:
        return OrbaxTensors(checkpoint.directory, checkpoint.config, checkpoint.manifest, verify=verify)
    return HfTensors(checkpoint.directory, checkpoint.config)


def load(
    checkpoint: Checkpoint,
    dtype: str,
    *,
    quantization: str | None = None,
    allow_nonfinite: bool = False,
    verify: bool = True,
    use_tqdm: bool = False,
    place: Callable[[Parameter, np.ndarray], jax.Array] | None = None,
) -> Weights:
    """All parameters at `dtype`, or an error: never a part.

    Parameters are read one after the other; beside the weights themselves, memory holds at most two copies of one parameter.
    Matrices are quantised as they come, from the numbers as they are saved: only one at a time is there in floats.

    Args:
      quantization: "int8" quantises what the checkpoint has not quantised; None does where the checkpoint has some.
      allow_nonfinite: accept NaN, infinities and matrices of zeros.
      verify: compare the bytes of an orbax directory with their digests.
      place: puts one parameter on its devices; by default on jax's default device.

    Raises:
      CheckpointError: a file is damaged or changes, or its tensors are not those of the model.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, supported are {', '.join(FLOAT_DTYPES)}")
    place = place or (lambda _, array: jax.device_put(array))
    tensors = open_tensors(checkpoint, verify=verify)
    quantization = quantization or checkpoint.config.quantization
    total = num_bytes(checkpoint.config, dtype, quantization)
    progress = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not use_tqdm)

    def leaf(parameter: Parameter) -> jax.Array | QuantizedMatrix:
        is_quantised = quantization is not None and parameter.is_matrix
        progress.update(parameter.num_bytes(dtype, quantization))
        if is_quantised and isinstance(tensors, HfTensors) and tensors.is_int8(parameter):
            values, scales = tensors.read_int8(parameter)
            if not allow_nonfinite:
                check_values(scales, parameter, tensors.source(parameter))
            return QuantizedMatrix(place(parameter, values), place(parameter, scales))
        array = tensors.read(parameter, tensors.dtype(parameter) if is_quantised else DTYPES[dtype])
        if not allow_nonfinite:
            check_values(array, parameter, tensors.source(parameter))
        placed = place(parameter, array)
        # Waited for, or the floats of many would be there at once.
        return jax.block_until_ready(quantized(placed)) if is_quantised else placed

    try:
        weights = build(checkpoint.config, leaf)
        tensors.check_unchanged()
        return jax.block_until_ready(weights)
    finally:
        progress.close()
        tensors.close()


_EXPONENT = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}
_BLOCK = 2**20  # elements looked at once: 2-4 MB stay in the cache


def check_values(array: np.ndarray, parameter: Parameter, source: str) -> None:
    """Refuse NaN, infinities, and weights that are all zero: the marks of a file that was not written to its end.

    Raises:
      CheckpointError: names the file, what was found and how to go on.
    """
    bits, magnitude, infinity = _EXPONENT[array.dtype.name]
    flat, largest = array.reshape(-1).view(bits), 0
    for start in range(0, flat.size, _BLOCK):
        # Without the sign, the order of the bit patterns is the order of the numbers, and NaN is above infinity.
        largest = max(largest, int((flat[start : start + _BLOCK] & magnitude).max()))
        if largest >= infinity:
            problem = "NaN" if largest > infinity else f"an infinity at {array.dtype.name}"
            raise CheckpointError(f"{source}: holds {problem}; --allow-nonfinite loads it all the same")
    if largest == 0 and parameter.init != "zeros":
        raise CheckpointError(f"{source}: all zero; --allow-nonfinite loads it all the same")
