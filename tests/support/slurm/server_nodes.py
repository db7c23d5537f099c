"""One task of a job whose last node is for servers: the first node requests rewards from it.

The other node does what `minitron stage` does there. The first node prints a JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nemo_minitron.backends.alignment.nemo_aligner.remote_servers import serving
from nemo_minitron.processes.nodes import Nodes, release_nodes, serve_requests
from tests.aligner.test_reward_server import ROWS, RULES, ask, server
from tests.aligner.test_server_nodes import context
from tests.support.processes import MARK, marked


def main(work: Path) -> int:
    nodes = Nodes.here()
    if nodes.rank:
        return serve_requests(nodes, work, lambda: False, sys.stderr.buffer)
    try:
        with serving([server(work / "rules", RULES)], context(work), on_cpu=True) as running:
            rewards = ask([[(row["text"], "a" * 8)] for row in ROWS], dict(running.variables))
            running.watch()
            servers = {os.readlink(f"/proc/{one.pid}/ns/uts") for one in marked(os.environ[MARK]) if is_server(one)}
    finally:
        release_nodes(nodes, work)
    own = os.readlink("/proc/self/ns/uts")
    print(json.dumps({"rewards": rewards, "own_node": own, "server_nodes": sorted(servers)}))
    return 0


def is_server(process: object) -> bool:
    return process.name() == "tritonserver"  # type: ignore[attr-defined, no-any-return]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
