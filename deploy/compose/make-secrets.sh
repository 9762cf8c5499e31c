#!/bin/sh
# Create the secrets of docker-compose.yml as files, once:
#   deploy/compose/make-secrets.sh [FOLDER]
# The folder is for its owner only. The files in it are readable, because the service in the container, user 10001,
# reads them. Existing files stay as they are.
set -eu
folder=${1:-secrets}
umask 077
mkdir -p "$folder"
cd "$folder"

write() {
    [ -e "$1" ] || printf '%s\n' "$2" > "$1"
    chmod 444 "$1"
}

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

write counterpart_token "$(random)"
write postgres_password "$(random)"
write counterpart_database "postgresql://counterpart:$(cat postgres_password)@database/counterpart"
# Standard Webhooks: the same value at the receivers.
write counterpart_webhook_secret "whsec_$(head -c 32 /dev/urandom | base64 | tr -d '\n')"
# Empty files, which count as absent, until a value is written into them.
write counterpart_oidc_client_secret "${OIDC_CLIENT_SECRET:-}"
write pacs_token "${PACS_TOKEN:-}"
write node_tls_key ""
write counterpart_bucket_key_id "${AWS_ACCESS_KEY_ID:-}"
write counterpart_bucket_key "${AWS_SECRET_ACCESS_KEY:-}"
