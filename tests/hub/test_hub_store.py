"""Checkpoints to and from a Hub where nothing goes wrong."""

from __future__ import annotations

import shutil

import pytest
from conftest import NAME

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


def test_published_and_fetched_it_is_the_same(hub, store, checkpoint, contents, facts):
    publication = store.publish(checkpoint, message="first", tag="v1")
    print(publication, hub.requests)
    assert hub.contents(f"zoo/{NAME}") == contents
    hub.requests.clear()
    folder = store.fetch(NAME, facts)
    print(hub.requests, folder)
    hub.requests.clear()
    folder = store.fetch(NAME, facts)
    print(hub.requests, folder)
    publication = store.publish(checkpoint, message="first", tag="v1")
    print(publication, hub.requests)
    assert 0
