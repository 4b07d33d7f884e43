#!/usr/bin/env bash
# A server and the terminal client together; the server ends with the client:
#
#   launch/chat.sh --ckpt_dir checkpoints/demo -- --max_tokens 60
#
# Words before -- are flags of llama_tp.serve, words after it are flags of llama_tp.chat.
set -euo pipefail

server_flags=() client_flags=()
while (( $# )) && [[ $1 != -- ]]; do
    server_flags+=("$1")
    shift
done
(( $# )) && client_flags=("${@:2}")

log=$(mktemp)
set -m  # gives the server a process group of its own: a Ctrl-C is for the client, which stops the answer
python3 -m llama_tp.serve --port 0 ${server_flags[@]+"${server_flags[@]}"} > "$log" 2>&1 < /dev/null &
server=$!
set +m
trap 'kill "$server" 2> /dev/null; wait "$server" 2> /dev/null; rm -f "$log"' EXIT

echo "chat: the server is loading its model ..." >&2
until grep -q '^server: ready' "$log"; do
    if ! kill -0 "$server" 2> /dev/null; then
        grep '^error: ' "$log" >&2 || cat "$log" >&2
        exit 1
    fi
    sleep 0.1
done
url=$(sed -n 's/^server: listening on \(http[^ ]*\).*/\1/p' "$log")
python3 -m llama_tp.chat --url "$url" ${client_flags[@]+"${client_flags[@]}"}
