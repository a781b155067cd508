#!/usr/bin/env bash
# An MLflow server for a team on one Debian or Ubuntu machine: PostgreSQL for the numbers, a folder or a bucket for files.
#
#   cluster/mlflow/server.sh                      # http://127.0.0.1:5000, files in ./mlflow-artifacts
#   ARTIFACTS=s3://bucket/mlflow HOST=0.0.0.0 ALLOWED_HOSTS='mlflow.example.org:5000,10.0.0.7:*' AUTH=basic cluster/mlflow/server.sh
#
# Run it again after a reboot or a kill: it continues with the same database. Ctrl-C ends it; PostgreSQL stays up.
#
#   HOST, PORT       where it listens                                                     127.0.0.1, 5000
#   ALLOWED_HOSTS    names that clients may use, with a port or :* (MLflow refuses all others)   localhost and 127.0.0.1
#   ARTIFACTS        a folder, or s3://bucket/path (credentials: AWS_*, MLFLOW_S3_ENDPOINT_URL)   ./mlflow-artifacts
#   WORKERS          server processes                                                     2
#   AUTH             none or basic                                                        none
#   PG_HOST, PG_PORT, PG_USER, PG_DATABASE   an existing PostgreSQL; without PG_HOST, this machine's own is set up
#   VENV             where mlflow and the PostgreSQL driver are installed              .venv-mlflow
#
# Secrets come from the environment only, and are never written to a file or shown:
#   MLFLOW_DB_PASSWORD           needed with PG_HOST; otherwise one is generated at every start
#   MLFLOW_AUTH_ADMIN_PASSWORD   needed with AUTH=basic, at least 12 characters; the user is admin
#   MLFLOW_FLASK_SERVER_SECRET_KEY   optional with AUTH=basic; generated at every start if unset
set -euo pipefail
umask 077

HOST=${HOST:-127.0.0.1} PORT=${PORT:-5000} WORKERS=${WORKERS:-2} AUTH=${AUTH:-none}
ALLOWED_HOSTS=${ALLOWED_HOSTS:-"localhost:$PORT,127.0.0.1:$PORT"}
ARTIFACTS=${ARTIFACTS:-"$PWD/mlflow-artifacts"}
PG_USER=${PG_USER:-mlflow} PG_DATABASE=${PG_DATABASE:-mlflow} PG_PORT=${PG_PORT:-5432}
VENV=${VENV:-.venv-mlflow}
LOCK=$(dirname "${BASH_SOURCE[0]}")/requirements.lock

fail() { echo "server.sh: $*" >&2; exit 2; }
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

[[ $AUTH == none || $AUTH == basic ]] || fail "AUTH is '$AUTH'; set none or basic"
IFS=, read -ra names <<<"$ALLOWED_HOSTS"
for name in "${names[@]}"; do
  # MLflow takes * for any characters, so 10.* would admit 10.evil.example, a name that anybody can own.
  [[ $name =~ ^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:([0-9]+|\*))?$ ]] ||
    fail "ALLOWED_HOSTS: '$name' is not a complete host name; give HOST, HOST:PORT or HOST:*, separated by commas"
done
[[ $PG_USER =~ ^[a-z_][a-z0-9_]*$ && $PG_DATABASE =~ ^[a-z_][a-z0-9_]*$ ]] ||
  fail "PG_USER and PG_DATABASE may contain a-z, 0-9 and _ only"
if [[ $AUTH == basic ]]; then
  admin_password=${MLFLOW_AUTH_ADMIN_PASSWORD:-}
  ((${#admin_password} >= 12)) || fail "AUTH=basic needs MLFLOW_AUTH_ADMIN_PASSWORD, 12 characters or more"
elif [[ $HOST != 127.0.0.1 && $HOST != localhost ]]; then
  echo "server.sh: warning: without AUTH=basic, anyone who can reach $HOST:$PORT can read, change and delete runs" >&2
fi

if ! "$VENV/bin/python" -c 'import psycopg2' 2>/dev/null; then
  echo "server.sh: installing MLflow into $VENV"
  [[ -x $VENV/bin/python ]] || python3 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r "$LOCK"
fi

if [[ -n ${PG_HOST:-} ]]; then
  [[ -n ${MLFLOW_DB_PASSWORD:-} ]] || fail "PG_HOST needs MLFLOW_DB_PASSWORD"
else
  PG_HOST=127.0.0.1
  if [[ $(id -u) == 0 ]]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo -n); else
    fail "setting up PostgreSQL needs root; run as root, or set PG_HOST to an existing server"
  fi
  if ! command -v pg_lsclusters >/dev/null; then
    echo "server.sh: installing postgresql"
    "${as_root[@]}" apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends postgresql >/dev/null
  fi
  read -r version cluster PG_PORT status _ < <(pg_lsclusters -h | head -n 1) || fail "no PostgreSQL cluster; create one with pg_createcluster"
  [[ $status == online* ]] || "${as_root[@]}" pg_ctlcluster "$version" "$cluster" start
  MLFLOW_DB_PASSWORD=${MLFLOW_DB_PASSWORD:-$(random)}
  as_postgres=(runuser -u postgres --); [[ $(id -u) == 0 ]] || as_postgres=(sudo -n -u postgres)
  psql=("${as_postgres[@]}" psql -p "$PG_PORT" -v ON_ERROR_STOP=1 -qtAX)
  [[ $("${psql[@]}" -c "SELECT 1 FROM pg_roles WHERE rolname = '$PG_USER'") ]] || "${psql[@]}" -c "CREATE ROLE $PG_USER LOGIN"
  # Through stdin: every user of the machine can see arguments.
  printf "ALTER ROLE %s PASSWORD :'password';\n" "$PG_USER" |
    cat <(printf '\\set password %s\n' "'${MLFLOW_DB_PASSWORD//\'/\'\'}'") - | "${psql[@]}" -f -
  [[ $("${psql[@]}" -c "SELECT 1 FROM pg_database WHERE datname = '$PG_DATABASE'") ]] ||
    "${psql[@]}" -c "CREATE DATABASE $PG_DATABASE OWNER $PG_USER"
fi

# libpq reads the password from the environment: it is neither in the arguments nor in a URI that MLflow could show.
export PGPASSWORD=$MLFLOW_DB_PASSWORD
export MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://$PG_USER@$PG_HOST:$PG_PORT/$PG_DATABASE"
unset MLFLOW_DB_PASSWORD
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false   # saves a dozen processes and 2 GB
export MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=${MLFLOW_SQLALCHEMYSTORE_POOL_SIZE:-10}
export MLFLOW_DISABLE_TELEMETRY=true
app=()
if [[ $AUTH == basic ]]; then
  app=(--app-name basic-auth)
  export MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(random)}
  # Users and permissions go into the same database, in tables of their own.
  export MLFLOW_AUTH_CONFIG_PATH=${MLFLOW_AUTH_CONFIG_PATH:-"$PWD/mlflow-auth.ini"}
  printf '[mlflow]\ndefault_permission = READ\ndatabase_uri = %s\nadmin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n' \
    "$MLFLOW_BACKEND_STORE_URI" >"$MLFLOW_AUTH_CONFIG_PATH"
fi
[[ $ARTIFACTS == *://* ]] || mkdir -p "$ARTIFACTS"

echo "server.sh: http://$HOST:$PORT, database $PG_DATABASE at $PG_HOST:$PG_PORT, files in $ARTIFACTS"
exec "$VENV/bin/mlflow" server --host "$HOST" --port "$PORT" --workers "$WORKERS" \
  --artifacts-destination "$ARTIFACTS" --allowed-hosts "$ALLOWED_HOSTS" "${app[@]}"
