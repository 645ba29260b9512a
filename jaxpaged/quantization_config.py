"""Which quantisations there are, and which one a checkpoint says that it has. Knows compressed-tensors' JSON. Refuses arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxpaged.errors import ConfigError, nearest

QUANTIZATIONS = ("int8",)
COMPRESSED_TENSORS = "compressed-tensors"  # what vLLM calls whatever llm-compressor has written; here only its int8 form

# Both schemes of llm-compressor's W8A8: one scale for each output of a weight, one for each token, found as it comes.
_SCHEMES = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}  # what compressed-tensors leaves out
_SUPPORTED = (
    f"supported is {COMPRESSED_TENSORS} with format int-quantized: int8 weights, symmetric, one scale per channel, int8"
    " activations, symmetric, dynamic per token; or load the original weights with quantization int8"
)


def check_quantization(value: object) -> None:
    """Whether it can be an engine's `quantization`.

    Raises:
      ConfigError: names the value, what is allowed and the nearest.
    """
    allowed = (*QUANTIZATIONS, COMPRESSED_TENSORS)
    if value is None or (isinstance(value, str) and value in allowed):
        return
    hint = nearest(value.lower(), allowed) if isinstance(value, str) else ""
    raise ConfigError(f"quantization: got {value!r}, expected one of {', '.join(allowed)}{hint}")


def quantization_of(given: Any, where: str) -> str | None:
    """The quantisation that `quantization_config` of a config.json tells of; None without one.

    Args:
      where: the file, for messages.

    Raises:
      ConfigError: names what was found that is not supported.

    Source: the fields of compressed-tensors' QuantizationConfig and QuantizationArgs, as vLLM reads them.
    """
    if not given:
        return None
    for problem in _problems(given):
        raise ConfigError(f"{where}: quantization_config: {problem}; {_SUPPORTED}")
    return "int8"


def _problems(given: Any) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"got {str(given)[:80]!r}"
        return
    method, form = given.get("quant_method"), given.get("format")
    if method != COMPRESSED_TENSORS:
        yield f"quant_method: got {method!r}"
    if form != "int-quantized":
        yield f"format: got {form!r}"
    if given.get("quantization_status", "compressed") != "compressed":
        yield f"quantization_status: got {given['quantization_status']!r}"
    if given.get("kv_cache_scheme"):
        yield f"kv_cache_scheme: got {str(given['kv_cache_scheme'])[:80]}"
    if (given.get("sparsity_config") or {}).get("format", "dense") != "dense":
        yield f"sparsity_config: got format {given['sparsity_config']['format']!r}"
    ignored = [name for name in given.get("ignore") or () if name != "lm_head"]
    if ignored:
        yield f"ignore: got {str(ignored[0])[:80]!r}, expected lm_head alone"
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        yield f"config_groups: got {len(groups) if isinstance(groups, dict) else type(groups).__name__}, expected one"
        return
    [group] = groups.values()
    yield from _problems_of_group(group)


def _problems_of_group(group: Any) -> Iterator[str]:
    if not isinstance(group, dict):
        yield f"config_groups: got {str(group)[:80]!r}"
        return
    if group.get("targets") != ["Linear"]:
        yield f"targets: got {str(group.get('targets'))[:80]}, expected ['Linear']"
    if group.get("format") not in (None, "int-quantized"):
        yield f"format: got {group['format']!r}"
    if group.get("output_activations"):
        yield f"output_activations: got {str(group['output_activations'])[:80]}"
    for name, wanted in _SCHEMES.items():
        scheme = group.get(name)
        if not isinstance(scheme, dict):
            yield f"{name}: got {str(scheme)[:80]}"
            continue
        for field, value in wanted.items():
            found = scheme.get(field, _DEFAULTS.get(field))
            if found != value or type(found) is not type(value):
                yield f"{name}: {field}: got {found!r}"
