#!/usr/bin/env bash
# A Ray cluster on this machine that listens on the loopback only: a head, and NODES nodes of CPUS CPUs.
#
#     cluster/local.sh [NODES [CPUS]]
#
# Ctrl-C or SIGTERM ends it, and nothing else of Ray's. PORT and DASHBOARD_PORT may be set in the environment;
# RAY_TMPDIR is where Ray keeps its files. `python` is the one of an environment with this package.
set -euo pipefail

nodes=${1:-2}
cpus=${2:-$(($(nproc) > nodes ? $(nproc) / nodes : 1))}

# Before Ray is imported: it reads them once. The second has Ray take 127.0.0.1 for its address, and so listen nowhere
# else; its own command starts no second node like that.
export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_USAGE_STATS_ENABLED=0
if [[ -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
    (umask 077 && python -m ray.scripts.scripts get-auth-token --generate >/dev/null)
    chmod 600 ~/.ray/auth_token
fi

exec python - "$nodes" "$cpus" "${PORT:-6379}" "${DASHBOARD_PORT:-8265}" <<'PYTHON'
import signal
import sys

import psutil
from ray.cluster_utils import Cluster

nodes, cpus, port, dashboard_port = map(int, sys.argv[1:])
signals = {signal.SIGINT, signal.SIGTERM}
# What Ray takes for its objects on a machine, in equal parts.
memory_bytes = int(0.3 * psutil.virtual_memory().available / (nodes + 1))
here = {"node_ip_address": "127.0.0.1", "object_store_memory": memory_bytes}
cluster = Cluster()
try:
    # Jobs' drivers run on the head, which holds no workers. Of the nodes, the first one offers the machine's GPUs.
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    cluster.add_node(num_cpus=0, num_gpus=0, gcs_server_port=port, **dashboard, **here)
    for i in range(nodes):
        cluster.add_node(num_cpus=cpus, num_gpus=0 if i else None, **here)
    print(f"Ray: 127.0.0.1:{port}, jobs: http://127.0.0.1:{dashboard_port}; Ctrl-C ends it.", flush=True)
    # From here on, for Ray's processes inherit what is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)
finally:
    cluster.shutdown()
PYTHON
