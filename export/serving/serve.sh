#!/usr/bin/env bash
# Serves a folder of exported models: gRPC at port 8500, REST at 8501.
#
#   export/serving/serve.sh MODELS [flags of tensorflow_model_server]
#
# MODELS holds encoder/<version>/, as moco_tf.serving.export writes it. The first start copies models.config and
# batching.config into it; edit them there. Without tensorflow_model_server on the PATH, the public image
# tensorflow/serving is run by Docker.
# Variables: GRPC_PORT, REST_PORT; BATCHING=1 runs requests together (see docs/serving.md before you do).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 1 || ! -d $1 ]]; then
    echo "serve.sh: give the folder that holds encoder/<version>/; got '${1:-}'" >&2
    exit 2
fi
models=$(cd "$1" && pwd)
shift
grpc=${GRPC_PORT:-8500} rest=${REST_PORT:-8501}

for name in models.config batching.config; do
    if [[ ! -e $models/$name ]]; then
        text=$(<"$here/$name")
        printf '%s\n' "${text//\"MODELS/\"$models}" >"$models/$name"
    fi
done

flags=(
    --model_config_file="$models/models.config"
    --model_config_file_poll_wait_seconds=60
    --allow_version_labels_for_unavailable_models=true # at the start no version is loaded yet
)
if [[ ${BATCHING:-0} == 1 ]]; then
    flags+=(--enable_batching=true --batching_parameters_file="$models/batching.config")
fi

if command -v tensorflow_model_server >/dev/null; then
    exec tensorflow_model_server --port="$grpc" --rest_api_port="$rest" "${flags[@]}" "$@"
elif command -v docker >/dev/null; then
    # At the same path inside as outside, so that the same models.config serves both.
    exec docker run --rm -p "$grpc:8500" -p "$rest:8501" -v "$models:$models:ro" \
        --entrypoint tensorflow_model_server tensorflow/serving \
        --port=8500 --rest_api_port=8501 "${flags[@]}" "$@"
fi
echo "serve.sh: neither tensorflow_model_server nor docker is on the PATH" >&2
exit 1
