"""Tell Ray that this machine is about to be taken back; Ray itself does not listen for any cloud's notice.

    python cluster/spot_notice.py             # next to the worker on an AWS spot machine: waits for the notice
    python cluster/spot_notice.py --now 100   # the preStop hook of a Kubernetes pod with 100 s left

A drained node gets no new work. Training writes a checkpoint at the current step and continues elsewhere. Rebalance
recommendations are ignored, because most machines that get one live on for hours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

from ray._private import services
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]

IMDS = "http://169.254.169.254"  # the instance metadata service, version 2
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_metadata(imds: str, path: str) -> str | None:
    """Read an item of the machine's metadata; None if it does not exist. Raises OSError without an answer."""
    request = urllib.request.Request(
        f"{imds}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with DIRECTLY.open(request, timeout=2) as answer:
        token = answer.read().decode()
    item = urllib.request.Request(f"{imds}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token})
    try:
        with DIRECTLY.open(item, timeout=2) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_left(notice: str, margin: float) -> int:
    """Return the whole seconds until `margin` before the time in a spot/instance-action notice, at least 1."""
    end = datetime.datetime.fromisoformat(json.loads(notice)["time"])
    return max(1, int((end - datetime.datetime.now(datetime.UTC)).total_seconds() - margin))


def own_nodes(address: str, ip: str) -> list[str]:
    """Return the hex ids of live Ray nodes with this machine's address: one, or none once it has left."""
    nodes = GcsClient(address=address).get_all_node_info(timeout=10, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
    return [node.node_id.hex() for node in nodes.values() if node.node_manager_address == ip]


def drain(address: str, ip: str, seconds: int) -> None:
    """Drain this machine's node. Raises RuntimeError if that is refused or the node is not found."""
    nodes = own_nodes(address, ip)
    if len(nodes) != 1:
        raise RuntimeError(f"{len(nodes)} Ray nodes have the address {ip}; expected one")
    say(f"draining node {nodes[0]}: {seconds} s left")
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", nodes[0]]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stdout)


def watch(imds: str, address: str, ip: str, interval: float, margin: float) -> None:
    """Wait for the notice and drain. Failures are printed and retried, so that they never affect the worker."""
    last_error = None
    while True:
        try:
            if read_metadata(imds, "instance-life-cycle") == "on-demand":
                say("an on-demand machine gets no notice")
                return
            notice = read_metadata(imds, "spot/instance-action")
            if notice is not None:
                say(f"notice: {notice}")
                drain(address, ip, seconds_left(notice, margin))
                return
            last_error = None
        except Exception as error:
            if str(error) != last_error:  # the same message every few seconds would fill the disk
                last_error = str(error)
                say(f"{type(error).__name__}: {error}; trying again")
        time.sleep(interval)


def leave(address: str, ip: str, seconds: int) -> None:
    """Drain now, and return when the node has left or its time is over. An idle node may have left already."""
    end = time.monotonic() + seconds
    if own_nodes(address, ip):
        drain(address, ip, seconds)
    while own_nodes(address, ip) and time.monotonic() < end:
        time.sleep(1)


def say(message: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.datetime.now().isoformat(' ', 'seconds')} {message}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options from the command line, or from `arguments`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--now", type=int, metavar="SECONDS", help="drain at once, and wait until the node has left")
    parser.add_argument("--address", help="HOST:PORT of the head; default: RAY_ADDRESS, or that of this machine's node")
    parser.add_argument("--node-ip", help="this node's address, if it was set manually")
    parser.add_argument("--interval", type=float, default=5, help="seconds between checks; AWS recommends 5")
    parser.add_argument("--margin", type=float, default=15, help="seconds before the true end at which Ray expects the end")
    parser.add_argument("--imds", default=IMDS, help="base URL of the metadata service")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command."""
    options = parse()
    address = services.canonicalize_bootstrap_address_or_die(options.address)
    ip = options.node_ip or services.get_node_ip_address(address)
    if options.now is not None:
        leave(address, ip, options.now)
        return
    say(f"watching {options.imds} for Ray's node at {ip}")
    watch(options.imds, address, ip, options.interval, options.margin)


if __name__ == "__main__":
    main()
