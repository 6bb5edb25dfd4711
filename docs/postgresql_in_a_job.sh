#!/usr/bin/env bash
# Runs a PostgreSQL server as your own process, as long as a command or a job lasts:
#
#   export PGPASSWORD=…                               # of the studies' user: choose one
#   bash postgresql_in_a_job.sh DATA COMMAND…         # COMMAND finds the address in STUDY_DATABASE
#   LISTEN=this_host bash postgresql_in_a_job.sh DATA      # until Ctrl-C, or until the job ends
#
# DATA is the database's folder: made at first, used again later. On a local disk it is faster.
# The address is also written to DATA.address, for jobs elsewhere that share DATA's file system.
#   LISTEN   this_host, or its name, where workers on other hosts connect; default 127.0.0.1
#   PGPORT   the port; default a free one
#   MAX_CONNECTIONS   default 300; a worker uses up to three
# The server asks every user for the password and has no Unix socket.
set -euo pipefail

data=$(realpath -m "${1:?DATA, the database\'s folder, is missing}")
shift
: "${PGPASSWORD:?must be set: the password of the studies\' user}"
listen=${LISTEN:-127.0.0.1}
[ "$listen" != this_host ] || listen=$(hostname)
user=studies

# Debian and the packages of postgresql.org leave the server's programs out of PATH.
program() {
    command -v "$1" || ls -d /usr/lib/postgresql/*/bin/"$1" /usr/pgsql-*/bin/"$1" 2>/dev/null | sort -V | tail -n 1 | grep . ||
        { echo "error: no $1: install PostgreSQL's server, or load its module" >&2; exit 1; }
}
initdb=$(program initdb)
postgres=$(program postgres)
psql=$(program psql)
[ "$(id -u)" != 0 ] || { echo "error: PostgreSQL refuses to run as root" >&2; exit 1; }

mkdir -p "$(dirname "$data")"
exec 9> "$data.lock"
flock -n 9 || { echo "error: $data is in use by another server" >&2; exit 1; }

if [ ! -e "$data/PG_VERSION" ]; then
    umask 077
    "$initdb" -D "$data" -U "$user" -A scram-sha-256 -E UTF8 \
        --pwfile=<(printf '%s\n' "$PGPASSWORD") > /dev/null
fi
# Only this host, or also the networks that it belongs to.
rules="host all $user 127.0.0.1/32 scram-sha-256"
[ "$listen" = 127.0.0.1 ] || rules="host all $user samehost scram-sha-256
host all $user samenet scram-sha-256"
printf '%s\n' "$rules" > "$data/pg_hba.conf"

port=${PGPORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
# Linux stops the server even where this script is killed.
tied=
setpriv --pdeathsig INT true 2>/dev/null && tied="setpriv --pdeathsig INT"
$tied "$postgres" -D "$data" -p "$port" -c listen_addresses="$listen" \
    -c unix_socket_directories= -c max_connections="${MAX_CONNECTIONS:-300}" \
    9>&- > "$data.log" 2>&1 &
server=$!
command=
stop() {
    trap - EXIT
    if [ -n "$command" ]; then
        kill -TERM "$command" 2>/dev/null && wait "$command" || true
    fi
    rm -f "$data.address"
    # Ends connections, writes everything to the disk, and stops.
    kill -INT "$server" 2>/dev/null && wait "$server" || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

ask() { "$psql" -h "$listen" -p "$port" -U "$user" -d postgres -w -tAc "$1" 2>&1; }
for _ in $(seq 300); do
    answer=$(ask "select 1") && break
    kill -0 "$server" 2>/dev/null || { tail -n 5 "$data.log" >&2; echo "error: PostgreSQL has not started: $data.log" >&2; exit 1; }
    case $answer in *"password authentication failed"*) echo "error: PGPASSWORD is not the one that $data was made with" >&2; exit 1 ;; esac
    sleep 0.2
done
[ "$(ask "select 1 from pg_database where datname = 'studies'")" = 1 ] || ask "create database studies" > /dev/null

export STUDY_DATABASE="postgresql://$user@$listen:$port/studies"
printf '%s\n' "$STUDY_DATABASE" > "$data.address.new"
mv "$data.address.new" "$data.address"
if [ $# = 0 ]; then
    echo "$STUDY_DATABASE"
    wait "$server"
else
    "$@" 9>&- &
    command=$!
    code=0
    wait "$command" || code=$?
    command=
    exit "$code"
fi
