"""`aquila report` where there is nothing to report."""


def test_a_report_of_nothing_says_what_to_do(refused):
    assert "nowhere" in refused("report", "nowhere", "--out", "here")
