from hypothesis import given
from hypothesis import strategies as st

from aquila_jax.training.keeping import Keep, Saved

SAVED = st.lists(
    st.builds(
        Saved, st.integers(0, 100), st.none() | st.floats(0, 9, allow_nan=False), st.booleans()
    ),
    unique_by=lambda saved: saved.step,
)
KEEP = st.builds(Keep, st.integers(1, 4), st.integers(0, 7), st.integers(0, 3))


@given(SAVED, KEEP)
def test_a_checkpoint_is_dropped_exactly_if_nothing_keeps_it(saved, keep):
    dropped = keep.dropped(saved)
    for one in saved:
        newer = sum(other.step > one.step for other in saved)
        better = [
            other
            for other in saved
            if None not in (other.validation_loss, one.validation_loss)
            and (other.validation_loss, other.step) < (one.validation_loss, one.step)
        ]
        is_kept = (
            newer < keep.newest
            or one.is_stage_end
            or (keep.every > 0 and one.step % keep.every == 0)
            or (one.validation_loss is not None and len(better) < keep.best)
        )
        assert is_kept == (one.step not in dropped)


def test_the_newest_always_stays():
    assert Keep(1).dropped([Saved(step) for step in range(5)]) == [0, 1, 2, 3]
