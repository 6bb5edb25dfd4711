"""A Ray cluster of two nodes on this machine, in processes of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": sys.argv[1]})
cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextlib.contextmanager
def ray_cluster(environment: dict[str, str]) -> Iterator[str]:
    """Start a cluster of two nodes with two CPUs each, and end it when the block ends.

    Args:
        environment: variables of its processes, which are those of a study's workers too.

    Yields:
        Its address.
    """
    # Not in a test's folder: the path of a socket may have 107 characters.
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (place / "ray").mkdir()
    variables = {
        **os.environ,
        **environment,
        "RAY_TMPDIR": str(place),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(place / "ray")],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
        shutil.rmtree(place)
