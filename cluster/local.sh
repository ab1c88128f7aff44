#!/bin/sh
# A Ray head on this machine, with a dashboard and a job server, until Ctrl-C:
#
#     cluster/local.sh                            # ports by PORT, DASHBOARD_PORT and METRICS_PORT
#     cluster/local.sh --num-gpus=1 --num-cpus=8  # what follows goes to `ray start`
#
# Jobs have this shell's BEELINE_RECIPE and BEELINE_WORKSPACE: with both set `ray job submit -- python pipeline/gen_pairs.py` is a
# complete command.
set -eu
umask 077 # the token and the logs are for this user

# Whoever reaches a head without a token can run code on it. The token is that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
# ~/.ray/auth_token, made here once; other shells need RAY_AUTH_MODE=token to use it.
export RAY_AUTH_MODE=token
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # so that Ray's own ports are open to this machine alone
export RAY_ROTATION_MAX_BYTES="${RAY_ROTATION_MAX_BYTES:-52428800}" RAY_ROTATION_BACKUP_COUNT="${RAY_ROTATION_BACKUP_COUNT:-2}"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
dashboard="127.0.0.1:${DASHBOARD_PORT:-8265}"
folder=$(mktemp -d /tmp/beeline.XXXXXX) # short: paths of sockets end at 107 characters
head=

end() {
    trap - EXIT INT TERM
    if [ -n "$head" ]; then
        kill "$head" 2>/dev/null || true
        wait "$head" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ray get-auth-token --generate >/dev/null
cd "$root"
# The agent, which starts the jobs, takes any port: with its usual one in use, by another Ray, say, no job would ever start.
ray start --head --block --node-ip-address=127.0.0.1 --port="${PORT:-6379}" --dashboard-host="${dashboard%:*}" --dashboard-port="${dashboard#*:}" \
    --dashboard-agent-listen-port=0 --metrics-export-port="${METRICS_PORT:-8080}" --temp-dir="$folder" \
    --disable-usage-stats "$@" >"$folder/head.log" 2>&1 &
head=$!

# The dashboard answers before the agent is up, whose port then stands in a file.
for _ in $(seq 120); do
    if ! kill -0 "$head" 2>/dev/null; then
        cat "$folder/head.log" >&2
        exit 1
    fi
    if [ -n "$(find "$folder" -name 'dashboard_agent_listen_port_*')" ]; then
        break
    fi
    sleep 1
done

cat <<TEXT
dashboard  http://$dashboard (it asks once for what \`ray get-auth-token\` prints)
metrics    http://127.0.0.1:${METRICS_PORT:-8080}/metrics
logs       $folder/session_latest/logs
submit     RAY_AUTH_MODE=token ray job submit --address http://$dashboard --working-dir . \\
               -- python pipeline/gen_pairs.py digits --workspace $root/runs/digits
end        Ctrl-C
TEXT
wait "$head"
