"""lm-eval without a tokenizer of its own: it asks the server's /tokenizer_info, /tokenize and /detokenize."""

from __future__ import annotations

from checks import Checks, same
from lm_eval_runs import NUM_QUESTIONS, evaluated

run = Checks()
with run.check("scores and answers"):
    found = evaluated(run.target, "remote", tokenizer_backend="remote", auth_token=run.target.key)
    same(found["jaxpaged_choices"]["sample_len"], NUM_QUESTIONS)
    same(found["jaxpaged_choices"]["acc,none"], 1.0)
    same(found["jaxpaged_answers"]["exact_match,none"], 1.0)
run.finish()
