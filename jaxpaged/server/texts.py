"""/tokenize and /detokenize: what a prompt or a conversation is as token ids, and back."""

from __future__ import annotations

from typing import Any

from jaxpaged.host.checks import check_int
from jaxpaged.host.request import RequestError
from jaxpaged.prompts import chat_prompt
from jaxpaged.server.service import Asked, Service

MAX_TOKENS = 1 << 20


async def tokenize(service: Service, asked: Asked) -> dict[str, Any]:
    """vLLM's answer: count, max_model_len, tokens, and token_strs where they are asked for."""
    body, tokenizer = asked.body, service.tokenizer
    service.model_meant(body)
    if ("prompt" in body) == ("messages" in body):
        raise RequestError("prompt: give it or messages")

    def found() -> tuple[list[int], list[str] | None]:
        if "prompt" in body:
            token_ids = tokenizer.encode(body["prompt"], body.get("add_special_tokens", True))
        else:
            options = {name: body[name] for name in ("continue_final_message", "chat_template_kwargs", "tools") if name in body}
            is_open = body.get("add_generation_prompt", not body.get("continue_final_message"))
            token_ids = chat_prompt(tokenizer, body["messages"], add_generation_prompt=is_open, **options)["prompt_token_ids"]
        is_wanted = body.get("return_token_strs", False)
        return token_ids, [tokenizer.backend.id_to_token(one) or "" for one in token_ids] if is_wanted else None

    ticket = service.llm.admit(1, max(1, asked.num_bytes // 4))
    try:
        token_ids, names = await service.llm.in_thread(found)
    finally:
        ticket.release()
    limit = service.llm.config.max_model_len
    return {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": names}


async def detokenize(service: Service, asked: Asked) -> dict[str, Any]:
    """vLLM's answer: prompt, special tokens among it."""
    token_ids, tokenizer = asked.body["tokens"], service.tokenizer
    service.model_meant(asked.body)
    if len(token_ids) > MAX_TOKENS:
        raise RequestError(f"tokens: got {len(token_ids):,}, the limit is {MAX_TOKENS:,}")
    for token_id in token_ids:
        check_int("tokens", token_id, 0, service.llm.model_config.vocab_size - 1)
    ticket = service.llm.admit(1, max(1, len(token_ids)))
    try:
        return {"prompt": await service.llm.in_thread(tokenizer.decode, token_ids, False)}
    finally:
        ticket.release()
