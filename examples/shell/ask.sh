#!/usr/bin/env bash
# Asks a lookalike server from a shell: `ask.sh grpcurl GALLERY IMAGE OTHER`, or `buf` in place of grpcurl, makes the
# gallery, and deletes it in the end. LOOKALIKE_TARGET names the server, LOOKALIKE_TLS_CA the roots to trust,
# LOOKALIKE_API_KEY the key. Prints what the server answers, as JSON, after a line that says what was asked.
set -euo pipefail
tool=$1 gallery=$2 image=$(base64 -w0 "$3") other=$(base64 -w0 "$4")
root=$(cd "$(dirname "$0")/../.." && pwd)
target=${LOOKALIKE_TARGET:-127.0.0.1:50051}
no_image=$(printf 'no image' | base64)
# For buf, which reads headers from a file: the key must not show in the list of processes.
header=$(mktemp)
trap 'rm -f "$header"' EXIT
printf 'authorization: Bearer %s\n' "${LOOKALIKE_API_KEY:-}" >"$header"

# call_TOOL SERVICE/METHOD [no-key]: sends the JSON on the standard input; of a stream, one message after the other.
call_grpcurl() {
    local options=(-import-path "$root/proto" -import-path "$root/third_party/googleapis" -max-time 30 -d @)
    local file
    for file in match search gallery; do options+=(-proto "lookalike/v1/$file.proto"); done
    options+=(-proto google/rpc/error_details.proto)
    options+=(-import-path "$root/examples/protos" -proto grpc/health/v1/health.proto)
    if [[ -n ${LOOKALIKE_TLS_CA:-} ]]; then options+=(-cacert "$LOOKALIKE_TLS_CA"); else options+=(-plaintext); fi
    # grpcurl expands the variable itself: the key does not show in the list of processes.
    if [[ -n ${LOOKALIKE_API_KEY:-} && ${2:-} != no-key ]]; then
        options+=(-expand-headers -rpc-header 'authorization: Bearer ${LOOKALIKE_API_KEY}')
    fi
    grpcurl "${options[@]}" "$target" "$1" 2>&1
}

call_buf() {
    local options=(--protocol grpc --timeout 30s -d @-) scheme=http
    case $1 in
    lookalike.*) options+=(--schema "$root") ;;
    *) options+=(--schema "$root/examples/protos") ;;
    esac
    if [[ -n ${LOOKALIKE_TLS_CA:-} ]]; then
        scheme=https
        options+=(--cacert "$LOOKALIKE_TLS_CA")
    else
        options+=(--http2-prior-knowledge)
    fi
    if [[ -n ${LOOKALIKE_API_KEY:-} && ${2:-} != no-key ]]; then
        options+=(--header "@$header")
    fi
    buf curl "${options[@]}" "$scheme://$target/$1" 2>&1
}

ask() {
    echo "# $1"
    "call_$tool" "${@:2}"
}

fails() {
    if ask "$@"; then
        echo "the call should have failed" >&2
        exit 1
    fi
}

uuid() { cat /proc/sys/kernel/random/uuid; }

item() {
    printf '{"item": {"name": "galleries/%s/items/%s", "identity": "%s", "metadata": {"n": %s}},' "$gallery" "$1" "$1" "$3"
    printf '"image": {"encoded": "%s"}, "allowMissing": true, "requestId": "%s"}' "$2" "$(uuid)"
}

ask health grpc.health.v1.Health/Check <<<'{}'
ask verify lookalike.v1.MatchService/Verify <<<"{\"a\": {\"encoded\": \"$image\"}, \"b\": {\"encoded\": \"$other\"}}"

ask create lookalike.v1.GalleryService/CreateGallery <<<"{\"galleryId\": \"$gallery\", \"requestId\": \"$(uuid)\"}"
item one "$image" 1 | ask upsert lookalike.v1.GalleryService/UpdateItem
item two "$other" 2 | ask upsert lookalike.v1.GalleryService/UpdateItem
ask written lookalike.v1.GalleryService/GetItem <<<"{\"name\": \"galleries/$gallery/items/two\"}"

ask 'search by image' lookalike.v1.SearchService/Search <<<"{\"gallery\": \"galleries/$gallery\", \"query\": {\"encoded\": \"$image\"}, \"k\": 2}"
embedding=$(ask embed lookalike.v1.MatchService/Embed <<<"{\"image\": {\"encoded\": \"$other\"}}" | grep -o '"embedding": *"[^"]*"')
ask 'search by vector' lookalike.v1.SearchService/Search <<<"{\"gallery\": \"galleries/$gallery\", \"query\": {$embedding}, \"k\": 1}"
ask filter lookalike.v1.SearchService/Search \
    <<<"{\"gallery\": \"galleries/$gallery\", \"query\": {\"encoded\": \"$image\"}, \"filter\": \"metadata.n > 1\"}"

ask stream lookalike.v1.MatchService/StreamVerify <<END
{"config": {}}
{"id": "same", "pair": {"a": {"encoded": "$image"}, "b": {"encoded": "$image"}}}
{"id": "bad", "pair": {"a": {"encoded": "$image"}, "b": {"encoded": "$no_image"}}}
{"id": "other", "pair": {"a": {"encoded": "$image"}, "b": {"encoded": "$other"}}}
END

fails error lookalike.v1.MatchService/Verify <<<"{\"a\": {\"encoded\": \"$image\"}, \"b\": {\"encoded\": \"$no_image\"}}"
if [[ -n ${LOOKALIKE_API_KEY:-} ]]; then
    fails 'without a key' lookalike.v1.MatchService/Verify no-key <<<"{\"a\": {\"encoded\": \"$image\"}, \"b\": {\"encoded\": \"$other\"}}"
fi

ask delete lookalike.v1.GalleryService/DeleteGallery <<<"{\"name\": \"galleries/$gallery\", \"force\": true, \"requestId\": \"$(uuid)\"}"
