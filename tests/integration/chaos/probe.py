"""On the lab's head: lists the nodes that Ray considers alive, and drains one. A separate process, driven line by line.

Usage: probe.py ADDRESS; lines on stdin: `nodes`, `drain NODE_ID DEADLINE_MS`. Answers each with one line of JSON.
"""

from __future__ import annotations

import json
import sys

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")


def main(address: str) -> None:
    client = GcsClient(address=address)
    for line in sys.stdin:
        words = line.split()
        try:
            if words[0] == "drain":
                answer: object = client.drain_node(words[1], PREEMPTION, "spot", int(words[2]))
            else:
                nodes = client.get_all_node_info(timeout=10).values()
                answer = {n.node_manager_address: n.node_id.hex() for n in nodes if n.state == 0}
        except Exception as error:  # noqa: BLE001 - the caller says what it expected
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
