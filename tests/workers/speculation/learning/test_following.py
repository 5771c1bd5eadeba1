"""What a trainer makes of what it is told of the live version."""

from stepladder.workers.speculation.learning.following import Following


def test_what_it_has_published_is_no_news() -> None:
    """Between publishing and the controller's answer it is still told of the version before."""
    following = Following()
    assert not following.news(None) and not following.news(0)
    following.heed(0)
    following.published(1)
    for told in (0, 0, 1):
        assert not following.news(told)
        following.heed(told)
    following.published(2)
    assert not following.news(1) and following.version == 2


def test_what_others_made_live_is() -> None:
    following = Following()
    assert following.news(3), "it has been lost, and begins again from the live version"
    following.heed(3)
    assert following.version == 3 and not following.news(3)
    following.published(4)
    following.heed(3)
    following.heed(4)
    assert following.news(3), "4 was taken back"
    following.heed(3)
    assert following.version == 3
    assert following.news(0), "and that one too"


def test_what_cannot_be_read_is_not_followed() -> None:
    """Nor read again and again: what is taught next says what it was really taught from."""
    following = Following()
    following.heed(3)
    following.heed(4)
    following.keep(3)
    assert following.version == 3 and not following.news(4)
    following.heed(4)
    assert following.version == 3
    assert following.news(5)
