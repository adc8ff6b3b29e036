import pytest
from jax._src.clusters import cloud_tpu_cluster

from aquila_jax.errors import UserError
from aquila_jax.hosts import Cluster, find

VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[07-10],other",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environ(monkeypatch):
    """JAX's detection reads the process's own environment."""

    def give(values):
        for name in (*VARIABLES, *SLURM, "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return values

    return give


def test_a_process_alone_has_no_cluster(environ):
    assert find(environ({})) is None


def test_plain_variables_say_all(environ):
    found = find(environ(VARIABLES))
    assert found == Cluster("environment variables", "10.0.0.1:1234", 4, 3)
    assert str(found) == (
        "process 3 of 4, found by environment variables, coordinator 10.0.0.1:1234"
    )


def test_one_process_by_variables_is_alone(environ):
    assert find(environ({**VARIABLES, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID not: set all three"),
        ({"JAX_PROCESS_ID": "4"}, "counts from 0 and is less"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES is 'many'"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "write HOST:PORT"),
    ],
)
def test_variables_that_do_not_fit_are_refused(environ, changes, message):
    with pytest.raises(UserError, match=message):
        find(environ({**VARIABLES, **changes}))


def test_slurm_says_who_is_first_and_which_gpu_is_whose(environ):
    found = find(environ(SLURM))
    # JAX's rule: a port from the job's number, the first node of the list.
    port = 5000 % 4096 + 65535 - 4096 + 1
    assert found == Cluster("SLURM", f"gpu07:{port}", 32, 9, [1])


def test_slurm_with_one_task_is_alone(environ):
    assert find(environ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})) is None


def test_gke_lists_workers_and_slices(environ, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    values = {
        "TPU_WORKER_HOSTNAMES": "localhost,worker-1,worker-2",
        "TPU_WORKER_ID": "2",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    found = find(environ(values))
    assert found == Cluster("GKE", "localhost:8482", 6, 5)


def test_cloud_tpu_asks_the_metadata_server(environ, monkeypatch):
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:b:127.0.0.1,a:b:10.0.0.3",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\n",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    found = find(environ({}))
    assert found == Cluster("Cloud TPU", "127.0.0.1:8482", 2, 1)


def test_a_run_on_cpu_does_not_ask_for_tpus(environ, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)

    def never(key):
        raise AssertionError(key)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", never)
    assert find(environ({"JAX_PLATFORMS": "cpu"})) is None
