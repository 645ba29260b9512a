"""What a request has been through when it is over: for metrics, logs and traces alike. Knows streams, and vLLM's names."""

from __future__ import annotations

from jaxpaged.host.request import FinishReason
from jaxpaged.streams import ClosedError, Stream

REASONS = tuple(reason.value for reason in FinishReason if reason is not FinishReason.PRUNED)


def spans(stream: Stream) -> dict[str, float]:
    """Seconds of what a request that is over has been through, as far as it has come; the names are vLLM's."""
    times, arrival_s = stream.times, stream.request.arrival_s
    found = {"e2e_request_latency": times.ended_s - arrival_s}
    if times.scheduled_s:
        found["request_queue_time"] = max(0.0, times.scheduled_s - arrival_s)
        found["request_inference_time"] = times.ended_s - times.scheduled_s
        if times.first_token_s:
            found["request_prefill_time"] = times.first_token_s - times.scheduled_s
            found["request_decode_time"] = times.last_token_s - times.first_token_s
    return found


def finish_reasons(stream: Stream) -> list[str]:
    """Why each output of a request that is over has ended; what a closed engine leaves is aborted."""
    rest = FinishReason.ABORT if stream.error is None or isinstance(stream.error, ClosedError) else FinishReason.ERROR
    found = [output.finish_reason or rest for output in stream.live.outputs]
    return [reason.value if reason.value in REASONS else FinishReason.ABORT.value for reason in found]
