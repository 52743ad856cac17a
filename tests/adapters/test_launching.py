"""How processes are started: each launcher's environment, what is refused, one run a folder, one set of options."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import see_one_folder, server
from selective_pref_adapters.launching import together
from selective_pref_adapters.launching.launcher import PLACE, check_address, first_host, join_launcher
from selective_pref_adapters.launching.together import LOCK, own_folder

Environment = dict[str, str]
SRUN: Environment = {  # as Slurm 22.05 sets it for the fourth task of `srun --nodes 2 --ntasks 4`
    "SLURM_JOB_ID": "1203",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "localhost,gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPIRUN: Environment = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def place(rank: int, size: int, local_rank: int = 0, **further: str) -> Environment:
    """What torchrun sets."""
    values = (rank, size, local_rank, "127.0.0.1", 0)
    return {**dict(zip(PLACE, map(str, values), strict=True)), **further}


TORCHRUN = place(0, 16, TORCHELASTIC_RUN_ID="run1", TORCHELASTIC_USE_AGENT_STORE="True", GROUP_WORLD_SIZE="2")
DEEPSPEED = place(1, 2, CROSS_SIZE="1", LOCAL_SIZE="2")


@pytest.mark.parametrize("environ", [{}, TORCHRUN, DEEPSPEED, {"MASTER_ADDR": "host0"}, place(0, 1)])
def test_what_other_launchers_set_stays_as_it_is(environ: Environment) -> None:
    joined = dict(environ)
    join_launcher(joined)
    assert joined == environ


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SRUN, ("3", "4", "1", "localhost", "22293", "2")),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
            ("3", "4", "0", "localhost", "22293", "1"),
        ),
        ({**SRUN, "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "9"}, ("3", "4", "1", "127.0.0.2", "9", "2")),
        (MPIRUN, ("1", "2", "1", "127.0.0.1", "29500", "2")),
        ({**SRUN, **MPIRUN}, ("1", "2", "1", "127.0.0.1", "29500", "2")),  # its daemons are the tasks of the step
    ],
)
def test_tasks_of_srun_and_mpirun_get_their_place(environ: Environment, expected: tuple[str, ...]) -> None:
    joined = dict(environ)
    join_launcher(joined)
    assert tuple(joined[name] for name in (*PLACE, "LOCAL_WORLD_SIZE")) == expected
    again = dict(joined)
    join_launcher(again)
    assert again == joined


def test_the_first_host_of_slurms_short_form() -> None:
    short = {"gpu[07-09,12],cpu1": "gpu07", "a": "a", "a,b": "a", "rack[1-2]-ib,x": "rack1-ib", "n[3,5]": "n3", "": ""}
    assert {hosts: first_host(hosts) for hosts in short} == short


ONE_TORCHRUN_A_HOST = {**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    "environ",
    [
        ONE_TORCHRUN_A_HOST,
        {**SRUN, **DEEPSPEED, "SLURM_STEP_NUM_TASKS": "2", "CROSS_SIZE": "2"},
        {**SRUN, **place(3, 4, 1)},
        {**TORCHRUN, "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # in the script of a job
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
    ],
)
def test_launchers_that_fit_one_into_the_other(environ: Environment) -> None:
    join_launcher(dict(environ))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "has RANK=0, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: expected all of RANK"),
        ({**place(0, 2), "LOCAL_RANK": ""}, "but not LOCAL_RANK: expected all"),
        (place(2, 2), "RANK is 2: expected 0 or more and less than WORLD_SIZE, 2"),
        (place(-1, 2), "RANK is -1: expected"),
        (place(1, 4, 2, LOCAL_WORLD_SIZE="2"), "LOCAL_RANK is 2: expected 0 or more and less than LOCAL_WORLD_SIZE, 2"),
        ({**place(0, 2), "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number; got 'two'"),
        ({**place(0, 2), "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({**TORCHRUN, **DEEPSPEED}, "of torchrun .* and that of deepspeed"),
        ({**SRUN, **TORCHRUN}, "srun started 4 tasks, and the torchrun of this one knows of 2"),
        ({**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"}, "srun started 2 tasks.* of 1"),
        ({**SRUN, **DEEPSPEED}, "srun started 4 tasks, and the deepspeed of this one knows of 1"),
        ({**SRUN, **place(0, 2)}, "srun started this process as 3 of 4, and RANK and WORLD_SIZE say 0 of 2"),
        ({**MPIRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "mpirun started 2 tasks"),
        ({**SRUN, "SLURM_PROCID": "4"}, "srun says that this is task 4 of 4"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun started 2 processes on several hosts.*set MASTER_ADDR"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "a Slurm job of 8 tasks, and runs once.*put srun in front"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "accelerate launch was asked for several processes, and has started one",
        ),
    ],
)
def test_what_does_not_fit_is_refused(environ: Environment, message: str) -> None:
    before = dict(environ)
    with pytest.raises(ValueError, match=message):
        join_launcher(environ)
    assert environ == before


def test_a_port_in_use_and_a_host_that_is_unknown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        first = {**place(0, 2), "MASTER_PORT": port}
        with pytest.raises(OSError, match=f"port {port} of this host cannot be opened .*: another run may use it"):
            check_address(first)
        for listens_elsewhere in (place(1, 2), place(0, 1), place(0, 2, TORCHELASTIC_USE_AGENT_STORE="True")):
            check_address({**listens_elsewhere, "MASTER_PORT": port})
    check_address(first)
    check_address({})
    with pytest.raises(OSError, match=r"MASTER_ADDR 'no\.such\.host\.invalid' is the address of no host"):
        check_address({**place(1, 2), "MASTER_ADDR": "no.such.host.invalid"})


# --- one run a folder ------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with own_folder(folder, {}):
        assert [path.name for path in folder.iterdir()] == [LOCK]
        with (
            pytest.raises(OSError, match=rf"another run is writing to .*one \(process {os.getpid()} of "),
            own_folder(folder, {}),
        ):
            raise AssertionError("two runs in one folder")
        with own_folder(tmp_path / "runs" / "two", {}):
            pass
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(ZeroDivisionError), own_folder(tmp_path / "three", {}):
        raise ZeroDivisionError
    assert not (tmp_path / "three").exists()
    with own_folder(folder, {}):
        pass


def test_a_lock_that_a_killed_run_has_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("0123 process 1 of a host that is gone, with a longer name than this one")
    with own_folder(tmp_path, {}):
        assert (tmp_path / LOCK).read_text().endswith(socket.gethostname())


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(together.fcntl, "flock", flock)
    with own_folder(tmp_path, {}):
        assert "has no locks (" in caplog.text


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("both")
    context = server()  # no fork of this process, where other tests may have left a process group
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    with own_folder(folder / "used", {}):
        processes = [context.Process(target=see_one_folder, args=(rank, port, folder, results)) for rank in (0, 1)]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=250) for _ in processes)
        for process in processes:
            process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    yield [found[0], found[1]]
    assert {path.name for path in folder.iterdir()} <= {"used"}


def test_processes_share_a_folder(seen: list[dict[str, str]]) -> None:
    assert seen[0]["one folder"] == seen[1]["one folder"]
    assert "process " in seen[0]["one folder"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two folders", "does not see the output folder"),
        ("other options", "were started with different options: seed is 0 and 1. Start the same command on every host"),
        ("used", "another run is writing to"),
    ],
)
def test_all_processes_refuse_what_one_of_them_cannot_do(case: str, message: str, seen: list[dict[str, str]]) -> None:
    assert message in seen[0][case]
    assert message in seen[1][case]
    kind = "OSError" if case == "used" else "ValueError"
    assert [one[case].partition(":")[0] for one in seen] == [kind, kind]


# --- meeting and parting ---------------------------------------------------------------------------------------------


def run_program(text: str, tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "", **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_service_that_never_answers_does_not_hold_a_process_for_ever(tmp_path: Path) -> None:
    """torch connects to whatever listens at the address of the first process, and waits without a limit."""
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        ended = run_program(
            """
            from datetime import timedelta
            import torch.distributed as dist
            from selective_pref_adapters.launching import processes
            processes.SLACK = 1.0
            with processes.meeting(0.02, RuntimeError):
                dist.init_process_group("gloo", timeout=timedelta(seconds=1.2))
            """,
            tmp_path,
            **place(1, 2, 1, MASTER_PORT=str(port)),
        )
    assert ended.returncode == 1
    expected = f"process 1 of 2, on {socket.gethostname()}, found not all of the others at 127.0.0.1:{port} within 0.02"
    assert expected in ended.stderr
    assert "whether something else listens there" in ended.stderr


def test_the_limit_is_one_of_meeting_and_not_of_what_follows(tmp_path: Path) -> None:
    ended = run_program(
        """
        import time
        from selective_pref_adapters.launching import processes
        processes.SLACK = 0.0
        with processes.meeting(0.02):
            time.sleep(0.1)
        time.sleep(2)
        print("went on")
        """,
        tmp_path,
        **place(0, 2),
    )
    assert (ended.returncode, ended.stdout) == (0, "went on\n"), ended.stderr


def test_a_group_is_left_before_the_interpreter_goes(tmp_path: Path) -> None:
    """Also after an error: what was registered first runs last, and finds no group."""
    for end, status in (("", 0), ("raise ValueError('no')", 1)):
        ended = run_program(
            f"""
            import atexit
            import torch.distributed as dist
            from selective_pref_adapters.launching.processes import meeting, place_alone
            atexit.register(lambda: print("group:", dist.is_initialized()))
            place_alone()
            for _ in range(2):  # once is enough
                with meeting(1.0):
                    if not dist.is_initialized():
                        dist.init_process_group("gloo")
            print("group:", dist.is_initialized())
            {end}
            """,
            tmp_path,
        )
        assert (ended.returncode, ended.stdout) == (status, "group: True\ngroup: False\n"), ended.stderr


@pytest.mark.parametrize(("size", "cleaned"), [("1", True), ("2", False)])
def test_one_of_several_processes_ends_without_the_interpreters_clean_up(
    size: str, cleaned: bool, tmp_path: Path
) -> None:
    """What was registered is done, what was printed is written, and the status is right."""
    ended = run_program(
        """
        import atexit
        from selective_pref_adapters.launching.processes import end_program

        class Kept:
            def __del__(self):
                print("cleaned up")

        kept = Kept()
        atexit.register(print, "at exit")
        print("printed")
        end_program(3)
        """,
        tmp_path,
        WORLD_SIZE=size,
    )
    expected = "printed\nat exit\n" + "cleaned up\n" * cleaned
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, expected, "")
