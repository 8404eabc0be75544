#!/usr/bin/env bash
# The swap and the way back on this machine, under the container's conditions and without one: no network but loopback, a
# root file system that cannot be written, a user other than root, HOME, /tmp and /dev/shm empty.
#   deploy/rehearse.sh [PYTHON]        Linux; needs unshare, ip, curl and jq
# 1. The embedded checkpoint decodes by stride and answers; its answers are written down; SIGTERM in the middle of one lets it finish.
# 2. The same command with --ar: the written answers are asked again and must be equal.
set -euo pipefail

python=$(command -v "${1:-python3}")
here=$(cd "$(dirname "$0")/.." && pwd)

if [ "${IDLM_REHEARSAL:-}" = "" ]; then
  for needed in unshare ip curl jq; do
    command -v "$needed" >/dev/null || { echo "rehearse.sh: $needed is not on PATH" >&2; exit 2; }
  done
  export IDLM_REHEARSAL=outside
  exec unshare --map-root-user --mount --net bash "$0" "$python"
fi

if [ "$IDLM_REHEARSAL" = outside ]; then
  ip link set lo up
  for place in /tmp /dev/shm "$HOME/.cache" "$HOME/.local/state"; do
    if [ -d "$place" ]; then mount -t tmpfs -o mode=1777 tmpfs "$place"; fi
  done
  mkdir /tmp/home
  # Each mount is made read-only in its turn; those that are tmpfs or the kernel's stay as they are.
  findmnt -rno TARGET,FSTYPE | while read -r target type; do
    case $type in
      tmpfs | proc | sysfs | devpts | mqueue | cgroup* | devtmpfs) ;;
      *) mount -o remount,bind,ro "$target" 2>/dev/null || true ;;
    esac
  done
  export IDLM_REHEARSAL=inside HOME=/tmp/home PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
  export PYTHONPATH="$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}"
  exec unshare --user --map-user=10001 --map-group=10001 bash "$0" "$python"
fi

port=30000
url=http://127.0.0.1:$port
work=/tmp/home
server=

say() { echo "rehearsal: $*"; }
fail() { say "FAILED: $*"; tail -n 20 "$work"/serve.log 2>/dev/null; exit 1; }
finish() { if [ -n "$server" ]; then kill -KILL "$server" 2>/dev/null || true; fi; }
trap finish EXIT

serve() {
  "$python" -P -m idlm_sglang.serving.cli serve --port $port --sleep-on-idle --log-file "$work/serve.log" "$@" >"$work/out.log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    if [ "$(curl -s -o /dev/null -w '%{http_code}' $url/ready || true)" = 200 ]; then return; fi
    kill -0 "$server" 2>/dev/null || fail "the server ended: $(tail -n 3 "$work/out.log")"
    sleep 0.5
  done
  fail "the server did not become ready"
}

stop() {
  local code=0
  kill -TERM "$server"
  wait "$server" || code=$?
  server=
  [ "$code" = 0 ] || fail "exit code $code after SIGTERM"
}

[ "$(id -u)" = 10001 ] || fail "user $(id -u)"
if touch "$here/written" 2>/dev/null; then fail "the root file system can be written"; fi
if curl -s --max-time 3 http://192.0.2.1/ >/dev/null; then fail "there is a network"; fi

{
  for question in "What is I-DLM?" "What is 17 + 25?" "Count from 3 to 20." "Is the output the same as with AR?"; do
    for temperature in 0 1; do
      jq -nc --arg q "$question" --argjson t $temperature '{model: "idlm-demo", messages: [{role: "user", content: $q}], temperature: $t, max_tokens: 80}'
    done
  done
} >"$work/requests.jsonl"

serve
say "serving by stride as user $(id -u), without network, root file system read-only"
bash "$here/deploy/record.sh" $url "$work/requests.jsonl" >"$work/answers.jsonl"
rounds=$(curl -s $url/metrics | grep -c '^idlm:rounds_total{.*kind="verify"' || true)
[ "$rounds" -ge 1 ] || fail "no strided rounds are counted"
say "$(wc -l <"$work/answers.jsonl") answers written down"

long='{"model": "idlm-demo", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 1500, "ignore_eos": true, "temperature": 0}'
curl -s -H 'Content-Type: application/json' -d "$long" $url/v1/chat/completions >"$work/long.json" &
asked=$!
sleep 0.5
stop
wait "$asked" || fail "the answer in flight was cut off"
[ "$(jq .usage.completion_tokens "$work/long.json")" = 1500 ] || fail "the answer in flight is incomplete"
say "SIGTERM: the answer in flight came to its end, exit code 0"

serve --ar
say "rolled back: the same command with --ar"
"$python" -P -m idlm_sglang.serving.cli replay "$work/answers.jsonl" --url $url || fail "the two ways of decoding differ"
stop
say "done"
