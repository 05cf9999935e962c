"""The net itself: what it must catch, it catches."""

from __future__ import annotations

import io

from privacy import personal

from indexer import log
from indexer.config import LogSettings
from indexer.sidecar import middleware
from indexer.sidecar.fakes import FakeSpotifyPeople
from indexer.sidecar.routes import Failure


def test_tokens_mails_and_names_are_found_wherever_they_are_said(said: list[str]) -> None:
    fake = FakeSpotifyPeople()
    person = fake.person("somebody", name="Name-of-somebody")
    pair = person.token_pair()
    log.configure(LogSettings(format="json"), io.StringIO())
    for secret in (pair.access_token, pair.refresh_token, person.email, person.name):
        said.clear()
        log.get().warning("something", error=f"what was sent: {secret}")
        assert personal("".join(said)) == [secret]
    said.clear()
    middleware.failed(400, Failure(error=f"no {person.email}"), {})
    assert personal("".join(said)) == [person.email]
    said.clear()
