"""lm-eval with the model's own tokenizer beside it: prompts are token ids, scores come by `echo` and `logprobs`."""

from __future__ import annotations

from checks import Checks, same
from lm_eval_runs import NUM_QUESTIONS, evaluated

run = Checks()
for name, batch_size, options in (
    ("token ids", 1, {"tokenized_requests": "True"}),
    ("texts", 1, {"tokenized_requests": "False"}),
    ("four prompts a request", 4, {"tokenized_requests": "True", "num_concurrent": "1"}),
):
    with run.check(f"scores and answers, {name}"):
        tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": run.target.model_dir}
        found = evaluated(run.target, name.replace(" ", "-"), batch_size, **tokenizer, **options)
        same(found["jaxpaged_choices"]["sample_len"], NUM_QUESTIONS)
        same(found["jaxpaged_choices"]["acc,none"], 1.0)
        same(found["jaxpaged_answers"]["exact_match,none"], 1.0)
run.finish()
