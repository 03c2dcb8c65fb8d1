#!/usr/bin/env bash
# Serves a folder of exported models to this machine: gRPC at port 8500, REST at 8501.
#
#   export/serving/serve.sh MODELS [flags of tensorflow_model_server]
#
# MODELS holds encoder/<version>/, as moco_tf.serving.export writes it. The first start copies models.config and
# batching.config into it; edit them there.
#
# tensorflow_model_server always listens on all addresses of a machine. So Docker runs it, and publishes its ports at
# HOST alone, unless HOST is 0.0.0.0 or both ports are 0; then the server on the PATH is run, if there is one.
# Variables:
#   HOST (127.0.0.1)  the address; 0.0.0.0: all. docs/serving.md says what to put before a server in a network.
#   GRPC_PORT (8500), REST_PORT (8501); both 0: none, with --grpc_socket_path=FILE gRPC by that file
#   MESSAGE_MB (256)  the largest request by gRPC, as far as the server heeds it (docs/serving.md)
#   IMAGE             the image that Docker runs
#   BATCHING=1        runs requests together (see docs/serving.md before you do)
set -euo pipefail
shopt -u patsub_replacement 2>/dev/null || true # bash 5.2 would take & in a path for what is being replaced

here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 1 || ! -d $1 ]]; then
    echo "serve.sh: give the folder that holds encoder/<version>/; got '${1:-}'" >&2
    exit 2
fi
models=$1
[[ $models == /* ]] || models=$PWD/$models # else cd takes some names for options
models=$(CDPATH='' cd "$models" && pwd && echo .)
models=${models%$'\n.'} # a name may end in a newline, which $() takes away
shift
host=${HOST:-127.0.0.1} grpc=${GRPC_PORT:-8500} rest=${REST_PORT:-8501} megabytes=${MESSAGE_MB:-256}
if [[ ! $megabytes =~ ^[1-9][0-9]{0,3}$ || $megabytes -gt 2047 ]]; then
    echo "serve.sh: MESSAGE_MB is a whole number from 1 to 2047; got '$megabytes'" >&2
    exit 2
fi

quoted=${models//\\/\\\\} # as a string of a configuration file
quoted=${quoted//\"/\\\"}
quoted=${quoted//$'\n'/\\n}
for name in models.config batching.config; do
    if [[ ! -e $models/$name ]]; then
        text=$(<"$here/$name")
        writing=$models/.$name.$$.$RANDOM$RANDOM
        (set -o noclobber && printf '%s\n' "${text//\"MODELS/\"$quoted}" >"$writing") # follows no link
        mv -n "$writing" "$models/$name"
    fi
done

flags=(
    --model_config_file="$models/models.config"
    --model_config_file_poll_wait_seconds=60
    --allow_version_labels_for_unavailable_models=true # at the start no version is loaded yet
    --grpc_channel_arguments=grpc.max_receive_message_length=$((megabytes << 20))
)
if [[ ${BATCHING:-0} == 1 ]]; then
    flags+=(--enable_batching=true --batching_parameters_file="$models/batching.config")
fi

if [[ $host == 0.0.0.0 || $grpc$rest == 00 ]] && command -v tensorflow_model_server >/dev/null; then
    exec tensorflow_model_server --port="$grpc" --rest_api_port="$rest" "${flags[@]}" "$@"
elif command -v docker >/dev/null; then
    [[ $host == *:* && $host != \[* ]] && host=[$host] # IPv6
    # At the same path inside as outside, so that the same models.config serves both. The value is a line of CSV.
    mount="\"source=${models//\"/\"\"}\",\"target=${models//\"/\"\"}\""
    published=()
    [[ $grpc == 0 ]] || published+=(--publish "$host:$grpc:8500")
    [[ $rest == 0 ]] || published+=(--publish "$host:$rest:8501")
    exec docker run --rm ${published[@]+"${published[@]}"} --mount "type=bind,readonly,$mount" \
        --entrypoint tensorflow_model_server "${IMAGE:-tensorflow/serving:2.21.0}" \
        --port=8500 --rest_api_port=8501 "${flags[@]}" "$@"
elif command -v tensorflow_model_server >/dev/null; then
    echo "serve.sh: tensorflow_model_server listens on all addresses and cannot be kept to HOST=$host without docker on" \
        "the PATH: say HOST=0.0.0.0 behind a firewall, or GRPC_PORT=0 REST_PORT=0 and --grpc_socket_path=FILE" >&2
    exit 2
fi
echo "serve.sh: neither tensorflow_model_server nor docker is on the PATH" >&2
exit 1
