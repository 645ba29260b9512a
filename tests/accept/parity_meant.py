"""Differences from vLLM that are meant, each with its reason. An entry that nothing matches any more fails `make parity`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meant:
    """Differences of the requests and at the places that these patterns match (`*` is anything)."""

    case: str
    place: str
    reason: str


MEANT: tuple[Meant, ...] = (
    # --- what an object has
    Meant(
        "*",
        "null field *",
        "a field that says nothing is left out, or says so in OpenAI's objects: a client reads None both ways",
    ),
    Meant(
        "*",
        "field usage.prompt_tokens_details.created_cache_tokens",
        "vLLM's own count; all that is new is kept, so it is what is left",
    ),
    Meant("*", "names of events", "pieces of a stream name the server's build too, as OpenAI's do"),
    Meant(
        "echo with logprobs*", "field choices.prompt_logprobs", "they are in logprobs already; there is a field to ask for both"
    ),
    Meant("models", "data.owned_by", "the server's name"),
    Meant("models", "data.root", "the name and not the directory: nobody outside needs to know where files lie"),
    Meant("models", "field data.permission", "OpenAI has taken it away"),
    Meant("tokenizer_info", "tokenizer_class", "a class that any transformers can make of the file, and not the server's own"),
    Meant(
        "tokenizer_info", "field *", "what a client needs of the tokenizer: the rest is about the library that vLLM reads it with"
    ),
    # --- answers
    *(
        Meant(
            name,
            "choices.stop_reason",
            "both of the model's ends of sequence are ends; vLLM takes the second for a stop that was asked for",
        )
        for name in ("story 2", "several prompts")
    ),
    Meant(
        "story 4", "choices.text", "max_tokens has cut a character in two: that something is there is told, as by transformers"
    ),
    Meant(
        "chat *",
        "choices.logprobs.content.*token, part of a character",
        "the name of half a character; vLLM gives the first half none and the second all",
    ),
    Meant(
        "chat *",
        "choices.logprobs.content.*bytes, part of a character",
        "each token has its own bytes, as in OpenAI's answers, where vLLM gives none and then all",
    ),
    Meant("tokens as ids", "choices.logprobs.text_offset", "where a token begins in the text, not in the list of names"),
    Meant(
        "*",
        "usage.prompt_tokens_details.cached_tokens",
        "a prefix is cached from one page of 16 tokens on, vLLM's pages on a CPU have 128",
    ),
    *(
        Meant(
            name,
            f"usage.{count}_tokens",
            "where a grammar leaves the end alone, the answer ends: no step is spent on the token that says so",
        )
        for name in ("regex", "choice", "chat, JSON schema")
        for count in ("completion", "total")
    ),
    Meant("a tool, n*", "usage.*_tokens", "as the next two: other prompts and other texts have other lengths"),
    Meant(
        "a tool, named",
        "choices.message.tool_calls.function.arguments",
        "the arguments alone are generated; vLLM has the model write its marks around them",
    ),
    Meant(
        "a tool, none",
        "choices.message.content",
        "a model that may not call is not shown what it could call, and does not write calls as text",
    ),
    Meant("a tool, named", "choices.message.content", "null beside calls, as in OpenAI's answers"),
    # --- errors
    Meant("*", "error.type", "OpenAI's types, the same for every error of a kind, where vLLM has two sorts"),
    Meant("*", "error.code", "OpenAI's codes are texts that tell errors of one status apart; the status is in the status"),
    Meant("*", "error.param", "the field of the request that has to change, where vLLM names none or a place in its own types"),
    Meant("no * route", "field *", "one shape for every error"),
    Meant("a method that is not taken", "field *", "one shape for every error"),
    Meant("no key", "error", "one shape for every error"),
    Meant("a wrong key", "error", "one shape for every error"),
    # --- metrics
    Meant(
        "metrics",
        "further metric *",
        "what this engine can tell besides: pages, tiers, compilations, padding, names that tutorials use",
    ),
    Meant("metrics", "label * of cache_config_info", "the options of each engine are its own; those that both have are there"),
    Meant("metrics", "metric *_created", "when a series began: twice as many series, for no board"),
    Meant("metrics", "metric estimated_*_per_gpu_total", "a guess from shapes of GPUs"),
    Meant("metrics", "metric mm_cache_*", "there is no input but text"),
    Meant("metrics", "metric engine_sleep_state", "the engine cannot be put to sleep"),
    Meant("metrics", "metric num_requests_waiting_by_reason", "there is one reason to wait: that there is no room"),
    Meant("metrics", "metric tool_call_parser_invocations_total", "one parser, which reads every answer to a request with tools"),
    # --- what is taken and what is refused
    Meant("n", "status", "n equal answers are what greedy sampling with n asks for: taken, as OpenAI does"),
    Meant("chat, n", "status", "n equal answers are what greedy sampling with n asks for: taken, as OpenAI does"),
    Meant(
        "max_tokens beyond the model's",
        "status",
        "a limit and no reservation: pages are given on demand, and max_model_len ends it with length",
    ),
    Meant(
        "an unknown field",
        "status",
        "refused, with the nearest name: a field that is misspelt would change nothing and say nothing; OpenAI refuses it",
    ),
    Meant("unknown role", "status", "refused: a template would write whatever it is into the prompt"),
    Meant("a body of another type", "status", "415 says more than 400"),
    Meant("detokenize no token", "status", "refused: there is no such token; vLLM leaves it out of the text"),
)
