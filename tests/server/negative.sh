#!/bin/sh
# schemathesis against a server of our own with the bundled model, by the server's own OpenAPI document: data that the document
# allows and data that it does not. No answer may be a 5xx, and what the document forbids has to be refused.
#   PYTHON         that has jaxpaged with its extra `serve`
#   SCHEMATHESIS   the `st` of a venv of its own: python -m venv .venv-schemathesis; pip install schemathesis==4.32.5
#   EXAMPLES       of each operation
set -eu
PYTHON=${PYTHON:-.venv/bin/python} SCHEMATHESIS=${SCHEMATHESIS:-.venv-schemathesis/bin/st} EXAMPLES=${EXAMPLES:-300}
said=$(mktemp)
"$PYTHON" -m jaxpaged serve --port 0 --max-num-seqs 8 --max-num-batched-tokens 128 --decode-row-buckets 8 \
  --prefill-tile-buckets 8 --num-gpu-blocks-override 400 --body-timeout-s 5 2>"$said" &
server=$!
trap 'kill $server 2>/dev/null; rm -f "$said"' EXIT
for _ in $(seq 300); do
  url=$(sed -n 's/.*serving on \(http[^ ]*\).*/\1/p' "$said")
  [ -n "$url" ] && break
  sleep 0.2
done
"$SCHEMATHESIS" run "$url/openapi.json" --mode all --max-examples "$EXAMPLES" --seed 1 --workers 2 --request-timeout 30 \
  --checks not_a_server_error,negative_data_rejection,unsupported_method,content_type_conformance,allow_header_conformance \
  --phases examples,coverage,fuzzing --continue-on-failure --warnings off
