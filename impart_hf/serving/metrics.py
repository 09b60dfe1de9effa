"""Metrics of swaps and of requests by delta, beside vLLM's own at /metrics."""

from prometheus_client import Counter, Gauge, Histogram

swaps = Counter("impart_hf:swaps", "Swaps that succeeded, by the delta that was loaded.", ["delta"])
failed_swaps = Counter("impart_hf:failed_swaps", "Swaps that did not happen, by the delta that was wanted.", ["delta"])
swap_seconds = Histogram(
    "impart_hf:swap_seconds", "Seconds of a swap, checks and waiting for running requests included."
)
requests = Counter("impart_hf:requests", "Requests that were admitted, by delta.", ["delta"])
waiting = Gauge("impart_hf:requests_waiting", "Requests that wait for their delta's turn, by delta.", ["delta"])
residence_seconds = Counter("impart_hf:residence_seconds", "Seconds that a delta was loaded, by delta.", ["delta"])
