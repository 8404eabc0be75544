#!/usr/bin/env bash
# Ask a server and write the answers down as `idlm replay` reads them.
#   deploy/record.sh URL REQUESTS.jsonl > answers.jsonl
# REQUESTS.jsonl: one chat request a line, as sent to /v1/chat/completions. The key is taken from API_KEY. Needs curl and jq.
# Greedy requests and those with a seed can be replayed; others get the seed 1, so that they can.
set -euo pipefail

if [ "$#" -ne 2 ]; then
  echo "record.sh: needs URL and REQUESTS.jsonl, got $# arguments" >&2
  exit 2
fi
url=${1%/}
headers=(-H 'Content-Type: application/json')
if [ -n "${API_KEY:-}" ]; then headers+=(-H "Authorization: Bearer $API_KEY"); fi

while IFS= read -r line || [ -n "$line" ]; do
  [ -n "$line" ] || continue
  request=$(jq -c '. + {return_output_ids_in_sglext: true, stream: false} | if .temperature == 0 or .seed then . else .seed = 1 end' <<<"$line")
  curl -sS --fail-with-body --noproxy 127.0.0.1,localhost "${headers[@]}" -d "$request" "$url/v1/chat/completions" |
    jq -c --argjson request "$request" '{path: "/v1/chat/completions", request: $request, response: .}'
done <"$2"
