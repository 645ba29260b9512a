"""/v1/embeddings: texts or token ids in, a vector of each out."""

from __future__ import annotations

import base64
import struct

from starlette.responses import Response

from jaxpaged.embedder import POOLING_TYPES, PoolingParams
from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.server.bodies import dump_json
from jaxpaged.server.prompt_lists import listed
from jaxpaged.server.service import Asked, Service
from jaxpaged.server.streaming import unless_left

ENCODING_FORMATS = ("float", "base64")


async def answer(service: Service, asked: Asked) -> Response:
    """OpenAI's answer. `pooling_type` (last or mean) and `normalize` are vLLM's. Raises what `as_api_error` knows."""
    body, llm = asked.body, service.llm
    model = service.model_meant(body)
    prompts = listed("input", body["input"], service.options.max_prompts)
    kind = body.get("encoding_format", "float")
    if kind not in ENCODING_FORMATS:
        raise RequestError(f"encoding_format: got {shown(kind)}, expected one of {', '.join(ENCODING_FORMATS)}")
    size = llm.model_config.hidden_size
    if body.get("dimensions", size) != size:
        raise RequestError(f"dimensions: got {shown(body['dimensions'])}, this model's vectors have {size} and cannot be cut")
    pooling = body.get("pooling_type", POOLING_TYPES[0])
    params = PoolingParams(pooling_type=pooling.upper(), normalize=body.get("normalize", True))
    lengths = [max(1, len(prompt) // 4) if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    timeout_s = service.timeout_s(body)
    ticket = llm.admit(len(prompts), sum(lengths))
    try:
        outputs = await unless_left(asked.receive, llm.embed(prompts, params, ticket=ticket, timeout_s=timeout_s))
    finally:
        ticket.release()  # here too: where the client has left already, the work does not even begin

    def told() -> bytes:
        vectors = [output.outputs.embedding for output in outputs]
        written = [_base64(vector) for vector in vectors] if kind == "base64" else vectors
        data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(written)]
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return dump_json({"object": "list", "data": data, "model": model, "usage": usage})

    return Response(await llm.in_thread(told), media_type="application/json")


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
