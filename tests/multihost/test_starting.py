"""What keeps several processes from starting together is said by all of them."""

from tests.reliability.worker import write_data

from .processes import together


def _ends(directory, count, *arguments, **options):
    with together(directory, count, *arguments, **options) as processes:
        return [(process.end(), process.said.splitlines()[-1]) for process in processes]


def test_a_process_that_never_joins_is_named_by_the_others(tmp_path):
    ends = _ends(tmp_path, 3, "dense", absent=[2], AQUILA_JOIN_SECONDS="8")
    for code, said in ends:
        assert code == 75
        assert "process 2 of 3 did not join within 8 s" in said


def test_a_first_process_that_never_starts_is_named(tmp_path):
    ((code, said),) = _ends(tmp_path, 2, "dense", absent=[0], AQUILA_JOIN_SECONDS="3")
    assert code == 75
    assert "process 0 of 2 does not answer at 127.0.0.1:" in said


def test_hosts_with_other_settings_are_refused_by_all(tmp_path):
    write_data(tmp_path)
    for code, said in _ends(tmp_path, 2, "dense", own={1: ("--seed", "3")}):
        assert code == 2
        assert "not every host runs what process 0 does: on process 1 seed is 3, not 0" in said
    assert not (tmp_path / "dense").exists()


def test_what_the_first_process_alone_finds_ends_all_with_its_words(tmp_path):
    # No token cache: each says so. A MODEL_DIR that is a file: the first says so for all.
    write_data(tmp_path)
    (tmp_path / "dense").write_text("")
    for code, said in _ends(tmp_path, 2, "dense"):
        assert code == 2
        assert "cannot write to MODEL_DIR" in said
        assert "File exists" in said or "Not a directory" in said
