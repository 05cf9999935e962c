#!/bin/sh
# Makes secrets/ for compose.yaml with random ones; what is there already stays. Usage: ./make-secrets.sh NODE_URL
set -eu
[ $# = 1 ] || { echo "usage: $0 NODE_URL" >&2; exit 2; }
folder=$(dirname "$0")/secrets
# Compose hands the files on as they are, and each container has its own user: so all may read them, and only root
# (or you) may enter the folder.
umask 077
mkdir -p "$folder"
chmod 700 "$folder"
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
put() { [ -e "$folder/$1" ] || { printf '%s' "$2" >"$folder/$1" && chmod 444 "$folder/$1"; }; }
for name in postgres_password grafana_admin_password auth__jwt_secret auth__cron_secret listening__token_key; do
  put "$name" "$(random)"
done
put database__url "postgresql://indexer:$(cat "$folder/postgres_password")@postgres:5432/indexer"
put chain__endpoints "[{\"url\": \"$1\"}]"
